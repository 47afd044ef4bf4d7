// --- The tree of modules ---------------------------------------------------------------------------------------------

const ROWS = 16; // unfolded at first as deep as these suffice

function node([name, times, peak, saved, kept, runs, seconds, below], level = 1) {
  return { name, times, peak, saved, kept, runs, seconds, level, open: false, below: below.map((m) => node(m, level + 1)) };
}

const root = node(data.modules);
root.name = "the whole step";
const visible = (n) => [n, ...(n.open ? n.below.flatMap(visible) : [])];
const all = (n) => [n, ...n.below.flatMap(all)];

/** The next row that takes the focus when rows are drawn again. */
let focused = root;

function drawTree(takeFocus = false) {
  const shown = visible(root);
  if (!shown.includes(focused)) focused = root;
  const body = document.querySelector("#tree tbody");
  body.replaceChildren(...shown.map(row));
  if (takeFocus) body.children[shown.indexOf(focused)].focus();
}

function row(n) {
  const toggle = n.below.length
    ? element("button", { class: "toggle", type: "button", tabindex: -1, "aria-label": n.open ? "fold" : "unfold" }, n.open ? "▾" : "▸")
    : element("span", { class: "leaf" });
  const share = n.saved ? Math.min(1, n.kept / n.saved) : 0;
  const bar = n.saved ? element("span", { class: "kept", style: `width:${(100 * n.saved) / root.saved}%`, title: `${(100 * share).toFixed(0)}% of what plain training saves` },
    element("i", { style: `width:${100 * share}%` })) : "";
  const made = element("tr", { role: "row", tabindex: n === focused ? 0 : -1, "aria-level": n.level, style: `--level:${n.level - 1}`, "data-name": n.name },
    element("th", { scope: "row", role: "gridcell" }, toggle, n.name, n.times > 1 ? ` (${n.times})` : ""),
    ...[["saved", n.saved], ["kept", n.kept]].map(([what, bytes]) =>
      element("td", { role: "gridcell", "data-what": what, "data-bytes": bytes }, bytes ? formatBytes(bytes) : "")),
    element("td", { class: "bar", role: "gridcell" }, bar),
    element("td", { role: "gridcell", "data-what": "runs" }, n.runs ? String(n.runs) : ""),
    element("td", { class: "wide", role: "gridcell" }, n.runs ? formatSeconds(n.seconds) : ""),
    element("td", { role: "gridcell", "data-what": "peak", "data-bytes": n.peak }, n.peak ? formatBytes(n.peak) : ""));
  if (n.below.length) made.setAttribute("aria-expanded", n.open);
  made.addEventListener("click", () => { focused = n; n.open = !n.open && n.below.length > 0; drawTree(true); });
  return made;
}

document.querySelector("#tree tbody").addEventListener("keydown", (event) => {
  const shown = visible(root), at = shown.indexOf(focused);
  const above = shown.slice(0, at).findLast((n) => n.level < focused.level);
  const moves = {
    ArrowDown: () => shown[at + 1], ArrowUp: () => shown[at - 1], Home: () => root, End: () => shown.at(-1),
    ArrowRight: () => (focused.open ? focused.below[0] : ((focused.open = focused.below.length > 0), focused)),
    ArrowLeft: () => (focused.open ? ((focused.open = false), focused) : above),
    Enter: () => ((focused.open = !focused.open && focused.below.length > 0), focused),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  focused = moves[event.key]() ?? focused;
  drawTree(true);
});

$("unfold").addEventListener("click", () => { all(root).forEach((n) => { n.open = n.below.length > 0; }); drawTree(); });
$("fold").addEventListener("click", () => { all(root).forEach((n) => { n.open = false; }); drawTree(); });

for (let level = [root]; level.length; level = level.flatMap((n) => n.below)) {
  level.forEach((n) => { n.open = n.below.length > 0; });
  if (visible(root).length > ROWS && level[0] !== root) { level.forEach((n) => { n.open = false; }); break; }
}
drawTree();
