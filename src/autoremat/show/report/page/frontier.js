// --- Extra time against peak -----------------------------------------------------------------------------------------

const FRONTIER = { left: 48, right: 16, top: 24, bottom: 38 };
const RADIUS = 9;
const rows = [...document.querySelectorAll("#points tbody tr")];
let dots = [];

function drawFrontier() {
  const { width, height } = $("frontier-chart").getBoundingClientRect();
  const { points, line, bounds } = data.frontier;
  const least = Math.min(data.floor, data.leastPeak || data.floor), most = HIGHEST;
  const span = most - least || 0.1 * most || 1; // where nothing can be had for time, floor and plain peak are one
  const from = least - 0.06 * span, to = most + 0.05 * span;
  const inside = points.map((point) => point[1] <= to);
  const top = 1.3 * Math.max(0.01, ...line.map((p) => p[1]), ...points.filter((_, k) => inside[k]).map((p) => p[2]), ...bounds.map((b) => b[1]));
  const x = (bytes) => FRONTIER.left + ((Math.max(bytes, from) - from) / (to - from)) * (width - FRONTIER.left - FRONTIER.right);
  const y = (share) => height - FRONTIER.bottom - (Math.log1p(100 * share) / Math.log1p(100 * top)) * (height - FRONTIER.top - FRONTIER.bottom);
  const bottom = y(0), right = x(to);
  const shares = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].filter((n) => n <= 100 * top);
  const upright = (bytes, kind, name, at = 12) => [
    element("line", { class: kind, x1: x(bytes), x2: x(bytes), y1: 2, y2: bottom }),
    element("text", { class: kind === "budget" ? "halo budget-text" : "halo", x: x(bytes) + (x(bytes) < 0.8 * width ? 5 : -5), y: at,
      "text-anchor": x(bytes) < 0.8 * width ? "start" : "end" }, name),
  ];
  const hatch = element("pattern", { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    element("rect", { width: 1.6, height: 7, style: "fill:var(--budget);opacity:.45" }));
  let never = `M${x(from)},${FRONTIER.top}H${x(data.leastPeak || from)}`; // left of it nothing fits at all
  for (const [budget, bound] of bounds.filter((b) => b[0] > data.leastPeak)) never += `V${y(bound)}H${x(Math.min(budget, to))}`;
  const best = line.map(([bytes, share], k) => (k ? `H${x(bytes)}V${y(share)}` : `M${x(bytes)},${y(share)}`)).join("") + `H${right}`;
  const svg = element("svg", { role: "img", "aria-label": "Extra time against peak; the table beside it has the figures" },
    element("defs", {}, hatch),
    ...shares.flatMap((n) => [
      element("line", { class: "grid", x1: FRONTIER.left, x2: right, y1: y(n / 100), y2: y(n / 100) }),
      element("text", { x: FRONTIER.left - 7, y: y(n / 100) + 4, "text-anchor": "end" }, `${n}%`)]),
    ...ticks(to, (width / 90) * (to / (to - from))).filter((bytes) => bytes >= from).map((bytes) =>
      element("text", { x: x(bytes), y: bottom + 16, "text-anchor": "middle" }, formatBytes(bytes))),
    element("text", { x: right, y: height - 3, "text-anchor": "end" }, "peak"),
    element("path", { class: "never", d: `${never}V${bottom}H${x(from)}Z` }), element("path", { class: "never-edge", d: never }),
    ...upright(data.floor, "floor", "floor", data.budget <= to && Math.abs(x(data.budget) - x(data.floor)) < 60 ? 24 : 12), ...(data.budget <= to ? upright(data.budget, "budget", "budget") : []),
    element("path", { class: "best", d: best }),
    ...line.map(([bytes, share]) => element("circle", { class: "corner", cx: x(bytes), cy: y(share), r: 2.5 })));
  const edge = (left) => y((bounds.find(([budget]) => left <= x(Math.min(budget, to))) || [0, 0])[1]);
  const possible = (left, up) => left >= x(data.leastPeak || from) && left <= right && up + RADIUS <= edge(left);
  dots = placed(points.map(([, bytes, share]) => [x(bytes), y(share)]), possible).map(([left, up, atX, atY], k) => {
    const dot = element("g", { class: `dot ${points[k][3]}`, "data-point": k, visibility: inside[k] ? "visible" : "hidden" },
      ...(left === atX && up === atY ? [] : [element("line", { class: "lead", x1: left, y1: up, x2: atX, y2: atY })]),
      element("circle", { cx: left, cy: up, r: k ? RADIUS : RADIUS + 2 }), element("text", { x: left, y: up }, k ? String(k) : "★"),
      element("title", {}, `${points[k][0]}: ${formatBytes(points[k][1])}, ${percent(points[k][2])}`));
    for (const [event, on] of [["pointerenter", true], ["pointerleave", false]]) dot.addEventListener(event, () => mark(k, on));
    return dot;
  });
  svg.append(...dots.toReversed()); // the chosen one on top
  $("frontier-chart").replaceChildren(svg);
}

/** Where to draw the marks so that none hides another or looks impossible: [x, y] of the mark, then of the point. */
function placed(spots, possible) {
  const taken = [];
  return spots.map(([x, y]) => {
    const free = ([a, b]) => taken.every(([c, d]) => Math.hypot(a - c, b - d) > 2 * RADIUS + 1);
    const around = Array.from({ length: 200 }, (_, turn) => {
      const angle = (turn % 2 ? 1 : -1) * ((turn * 0.35) % 1.7), away = 2 * RADIUS + 2 + 0.8 * turn; // upwards: there is room
      return [x + away * Math.sin(angle), Math.max(RADIUS, y - away * Math.cos(angle))];
    }).filter(free);
    const spot = free([x, y]) ? [x, y] : around.find((at) => possible(...at)) || around[0] || [x, y];
    taken.push(spot);
    return [...spot, x, y];
  });
}

function mark(k, on) {
  rows[k].classList.toggle("on", on);
  dots[k]?.classList.toggle("on", on);
}

rows.forEach((row, k) => {
  for (const event of ["pointerenter", "focus"]) row.addEventListener(event, () => mark(k, true));
  for (const event of ["pointerleave", "blur"]) row.addEventListener(event, () => mark(k, false));
});
new ResizeObserver(drawFrontier).observe($("frontier-chart"));
