// --- The table of values ---------------------------------------------------------------------------------------------

const PAGE = 100;
const life = data.values.bytes.map(() => []); // indices of the planned spans of every value
planned.value.forEach((v, k) => life[v].push(k));
const duration = life.map((spans) => spans.reduce((sum, k) => sum + planned.end[k] - planned.begin[k] + 1, 0));
const atPeak = new Set(planned.at(planned.peak).map((k) => planned.value[k]));
const names = data.values.bytes.map((_, v) => valueName(v));

function fateText(v) {
  const fate = data.values.fate[v], times = data.values.again[v];
  const stays = data.ops.stays[made[v]];
  if (data.fates[fate] === "computed again") return `${kept.has(v) ? "kept, then " : ""}computed again${times > 1 ? ` ${times} times` : ""}`;
  return data.fates[fate] + (data.fates[fate] === "kept" && stays !== undefined ? `: ${text(stays)}` : "");
}

const KEYS = {
  name: (v) => names[v], bytes: (v) => data.values.bytes[v], type: (v) => text(data.values.type[v]),
  source: valueSource, fate: fateText, span: (v) => duration[v],
};
const searched = names.map((name, v) => `${name} ${text(data.values.type[v])} ${valueSource(v)}`.toLowerCase());
const sorting = { key: "bytes", up: false };
let limit = PAGE;

data.fates.forEach((fate, k) => $("fate").append(element("option", { value: k }, fate)));
$("fate").append(element("option", { value: "peak" }, "in memory at the peak"));

function chosen() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), fate = $("fate").value;
  const fits = (v) => (fate === "" || (fate === "peak" ? atPeak.has(v) : data.values.fate[v] === Number(fate)))
    && words.every((word) => searched[v].includes(word));
  const key = KEYS[sorting.key], sign = sorting.up ? 1 : -1;
  const order = new Intl.Collator("en", { numeric: true }).compare;
  const compare = (a, b) => (typeof a[0] === "number" ? a[0] - b[0] : order(a[0], b[0]));
  return names.map((_, v) => v).filter(fits).map((v) => [key(v), v]).sort((a, b) => sign * compare(a, b) || a[1] - b[1]).map(([, v]) => v);
}

function drawValues() {
  const found = chosen();
  const bytes = found.reduce((sum, v) => sum + data.values.bytes[v], 0);
  $("count").textContent = `${found.length} of ${names.length} values, ${formatBytes(bytes)}`;
  $("count").dataset.count = found.length;
  $("count").dataset.bytes = bytes;
  $("more").hidden = found.length <= limit;
  document.querySelector("#table tbody").replaceChildren(...found.slice(0, limit).map(valueRow));
  for (const button of document.querySelectorAll("[data-sort]")) {
    const head = button.closest("th");
    if (button.dataset.sort === sorting.key) head.setAttribute("aria-sort", sorting.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
}

function valueRow(v) {
  const type = text(data.values.type[v]), source = valueSource(v);
  return element("tr", { "data-value": v },
    element("th", { scope: "row" }, names[v], element("small", {}, [type, source].filter(Boolean).join(" · "))),
    element("td", { "data-bytes": data.values.bytes[v] }, formatBytes(data.values.bytes[v])),
    element("td", { class: "wide" }, type), element("td", { class: "wide" }, element("code", {}, source)),
    element("td", {}, fateText(v)), element("td", {}, lifeBar(v)));
}

/** When the value is in memory, over the runs of the plan. */
function lifeBar(v) {
  const share = (runs) => ((100 * runs) / planned.length).toFixed(2);
  const svg = element("svg", { class: "life", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img",
    "aria-label": `${share(duration[v])}% of the runs` });
  for (const k of life[v]) svg.append(element("rect", { x: share(planned.begin[k]), width: Math.max(1, share(planned.end[k] - planned.begin[k] + 1)),
    y: 0, height: 10, style: `fill:${color(planned.category[k])}` }));
  return svg;
}

for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => {
  const { sort } = button.dataset;
  sorting.up = sorting.key === sort ? !sorting.up : !["bytes", "span"].includes(sort);
  sorting.key = sort;
  limit = PAGE;
  drawValues();
});
for (const [id, event] of [["filter", "input"], ["fate", "change"]]) $(id).addEventListener(event, () => { limit = PAGE; drawValues(); });
$("more").addEventListener("click", () => { limit += 5 * PAGE; drawValues(); });
drawValues();

// For whoever waits for the page: the milliseconds until all was drawn. Charts are drawn in the first frame.
requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.ready = Math.round(performance.now()); }));
