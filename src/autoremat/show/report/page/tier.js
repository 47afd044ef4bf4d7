// --- The slower tier: bytes in it over the step, and the link's copies -------------------------------------------------

const LANE = 12;

class TierChart {
  constructor() {
    this.box = $("tier");
    this.svg = element("svg", { role: "img", "aria-label": "Bytes in the tier over the step, and copies out and in" });
    this.box.append(this.svg);
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  draw() {
    const { width, height } = this.box.getBoundingClientRect(), { x, at } = charts[1]; // the step above it
    if (!width || !x) return;
    const most = Math.max(...tierBytes), bottom = height - 2 * LANE - 8;
    const y = (bytes) => bottom - (bytes / most) * (bottom - 16);
    const edge = tierBytes.map((bytes, p) => `H${x(at[p]).toFixed(1)}V${y(bytes).toFixed(1)}`).join("");
    const lane = (way) => bottom + 5 + way * (LANE + 2);
    this.svg.replaceChildren(
      element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }),
      element("path", { class: "tier-area", d: `M${x(0)},${bottom}${edge}H${x(at.at(-1)).toFixed(1)}V${bottom}Z` }),
      element("text", { x: MARGIN.left - 7, y: y(most) + 4, "text-anchor": "end" }, formatBytes(most)),
      ...["out", "in"].map((name, way) => element("text", { x: MARGIN.left - 7, y: lane(way) + LANE - 2, "text-anchor": "end" }, name)),
      ...data.tier.copies.map(([v, way, begin, end]) => {
        const left = x(this.#moment(begin)), right = x(this.#moment(end));
        return element("rect", { class: "copy", x: left, y: lane(way), width: Math.max(1, right - left), height: LANE },
          element("title", {}, `${valueName(v)}: ${formatBytes(data.values.bytes[v])} ${way ? "in" : "out"}, ${formatSeconds(end - begin)}`));
      }),
    );
  }

  /** A moment of the clock on the axis that is shown. */
  #moment(seconds) {
    if (inSeconds) return seconds;
    const at = planned.moments(true);
    let p = 0;
    while (p + 1 < planned.length && at[p + 1] <= seconds) p++;
    return p + Math.min(1, (seconds - at[p]) / (at[p + 1] - at[p] || 1));
  }
}

if (data.tier) charts.push(new TierChart());
