// --- Memory over the step: two stacked charts, and what is in memory at the cursor -------------------------------------

const MARGIN = { left: 62, right: 12, top: 22, bottom: 22 };
const LARGEST = 8;
const SHOWN = data.categories.map((_, c) => c).filter((c) => [plain, planned].some((course) => course.series[c].some(Boolean)));
const hasSeconds = data.ops.seconds.some(Boolean);
let inSeconds = hasSeconds;
const tierBytes = cumulated(data.tier?.bytes ?? []);

/** Round steps for an axis from 0, at most so many. */
function ticks(most, count) {
  const rough = most / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, k) => k * step);
}

class MemoryChart {
  constructor(id, course, name) {
    Object.assign(this, { course, name, box: $(id), run: course.peak });
    this.svg = element("svg", { "aria-hidden": "true" });
    this.box.append(this.svg);
    this.box.setAttribute("aria-valuemin", 0);
    this.box.setAttribute("aria-valuemax", course.length - 1);
    this.box.addEventListener("pointermove", (event) => this.#point(event));
    this.box.addEventListener("pointerdown", (event) => this.#point(event));
    this.box.addEventListener("keydown", (event) => this.#key(event));
    this.box.addEventListener("focus", () => this.show(this.run));
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  draw() {
    const { width, height } = this.box.getBoundingClientRect();
    if (!width || !this.course.length) return;
    const most = 1.08 * HIGHEST;
    this.at = this.course.moments(inSeconds);
    const longest = Math.max(this.at.at(-1), this.other.course.moments(inSeconds).at(-1)) || 1;
    this.x = (moment) => MARGIN.left + (moment / longest) * (width - MARGIN.left - MARGIN.right);
    this.y = (bytes) => height - MARGIN.bottom - (bytes / most) * (height - MARGIN.top - MARGIN.bottom);
    this.cursor = element("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom });
    const runs = this.#visibleRuns(), isInside = data.budget <= HIGHEST;
    this.svg.replaceChildren(
      ...ticks(most, height / 45).map((bytes) => this.#rule(bytes, "grid", width)),
      ...ticks(most, height / 45).map((bytes) => element("text", { x: MARGIN.left - 7, y: this.y(bytes) + 4, "text-anchor": "end" }, formatBytes(bytes))),
      ...ticks(longest, width / 110).map((moment) => element("text", { x: this.x(moment), y: height - 4, "text-anchor": "middle" },
        inSeconds ? (moment ? formatSeconds(moment).replace(/\.0+ /, " ") : "0") : String(moment))),
      ...this.#areas(runs),
      ...this.#phases(),
      this.#rule(data.floor, "floor", width), ...(isInside ? [this.#rule(data.budget, "budget", width)] : []),
      ...this.#names(width), ...this.#peak(), this.cursor,
    );
    this.#moveCursor();
  }

  #rule(bytes, kind, width) {
    return element("line", { class: kind, x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(bytes), y2: this.y(bytes) });
  }

  #names(width) {
    const name = (bytes, text, kind, at, anchor) => element("text", { class: `halo ${kind}`, x: at, y: Math.max(this.y(bytes) - 5, 13), "text-anchor": anchor }, text);
    return [
      name(data.floor, `floor ${formatBytes(data.floor)}`, "", MARGIN.left + 4, "start"),
      name(data.budget, `budget ${formatBytes(data.budget)}${data.budget > HIGHEST ? ", above ↑" : ""}`, "budget-text", width - MARGIN.right - 4, "end"),
    ];
  }

  #peak() {
    const x = this.x(this.at[this.course.peak]), y = this.y(this.course.total[this.course.peak]);
    const right = x < 0.4 * this.svg.clientWidth, line = this.y(data.budget); // the budget's name is at the right
    const foot = Math.abs(y - line) < 14 ? Math.min(y, line) - 5 : y - 2; // its line shall not cross out the peak's name
    return [
      element("path", { class: "peak", d: `M${x},${y}l-6,-9h12z` }),
      element("text", { class: "halo", x: x + (right ? 10 : -10), y: foot, "text-anchor": right ? "start" : "end" }, `peak ${formatBytes(this.course.total[this.course.peak])}`),
    ];
  }

  #phases() {
    if (this.course.backward < 0) return [];
    const x = this.x(this.at[this.course.backward]);
    return [
      element("line", { class: "grid", x1: x, x2: x, y1: 2, y2: this.y(0) }),
      element("text", { class: "halo", x: x - 5, y: 13, "text-anchor": "end" }, "forward"),
      element("text", { class: "halo", x: x + 5, y: 13 }, "backward"),
    ];
  }

  /** [x, run] from left to right: of the runs in one column of pixels the one with the most bytes. */
  #visibleRuns() {
    const { course } = this, found = [];
    let column = -1, best = -1, last = -1;
    const flush = () => {
      if (best < 0) return;
      found.push([column, best]);
      if (last !== best) found.push([column + 1, last]); // goes on beyond this column
    };
    for (let p = 0; p < course.length; p++) {
      const here = Math.floor(this.x(this.at[p]));
      if (here !== column) { flush(); column = here; best = p; }
      else if (course.total[p] > course.total[best]) best = p;
      last = p;
    }
    flush();
    return found;
  }

  #areas(runs) {
    const end = this.x(this.at.at(-1)), below = new Float64Array(runs.length);
    return SHOWN.map((c) => {
      const above = below.map((bytes, k) => bytes + this.course.series[c][runs[k][1]]);
      const edge = (heights) => runs.flatMap(([x], k) => {
        const y = this.y(heights[k]).toFixed(1), next = Math.min(runs[k + 1]?.[0] ?? end, end).toFixed(1);
        return [[x.toFixed(1), y], [next, y]];
      });
      const path = `M${[...edge(above), ...edge(below).reverse()].map((point) => point.join()).join("L")}Z`;
      below.set(above);
      return element("path", { d: path, style: `fill:${color(c)}` });
    });
  }

  #point(event) {
    const x = event.clientX - this.box.getBoundingClientRect().left;
    let low = 0, high = this.course.length - 1; // the last run that has begun at x
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.x(this.at[middle]) <= x) low = middle; else high = middle - 1;
    }
    this.show(low);
  }

  #key(event) {
    const page = Math.ceil(this.course.length / 20), step = event.shiftKey ? 10 : 1;
    const to = {
      ArrowLeft: this.run - step, ArrowRight: this.run + step, ArrowDown: this.run - step, ArrowUp: this.run + step,
      PageDown: this.run - page, PageUp: this.run + page, Home: 0, End: this.course.length - 1, p: this.course.peak, P: this.course.peak,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.show(Math.max(0, Math.min(this.course.length - 1, to)));
  }

  /** Put the cursor on a run, the other chart's on the first run of the same op, and say what is there. */
  show(run) {
    if (!this.course.length) return;
    this.run = run;
    this.other.run = this.other.course.firstRun[this.course.order[run]];
    this.current = true;
    this.other.current = false;
    this.#moveCursor();
    this.other.#moveCursor();
    showMoment(this.course, run, this.name);
    for (const chart of [this, this.other]) chart.describe();
  }

  describe() {
    this.box.setAttribute("aria-valuenow", this.run);
    this.box.setAttribute("aria-valuetext", `${opName(this.course.order[this.run])}, ${formatBytes(this.course.total[this.run])}`);
  }

  #moveCursor() {
    if (!this.cursor) return;
    const x = (this.x(this.at[this.run]) + this.x(this.at[this.run + 1])) / 2;
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("class", this.current ? "cursor" : "cursor other");
  }
}

function showMoment(course, run, name) {
  const i = course.order[run], here = course.at(run), total = course.total[run];
  const again = run > course.firstRun[i];
  $("moment-run").textContent = `${name}: run ${run + 1} of ${course.length}, op ${i} of ${nOps}`;
  $("moment-op").textContent = text(data.ops.name[i]);
  $("moment-phase").textContent = (data.ops.backward[i] ? "backward" : "forward") + (again ? ", computed again" : "");
  $("moment-module").textContent = text(data.ops.module[i]);
  $("moment-source").textContent = text(data.ops.source[i]);
  $("moment-bytes").textContent = formatBytes(total);
  $("moment-bytes").dataset.bytes = total;
  $("moment").dataset.run = run;
  if (data.tier) {
    const inTier = course === planned ? tierBytes[run] : 0;
    $("moment-tier").textContent = formatBytes(inTier);
    $("moment-tier").dataset.bytes = inTier;
  }
  $("moment-categories").replaceChildren(...SHOWN.map((c) => {
    const bytes = course.series[c][run];
    return element("li", { class: bytes ? "" : "none", "data-bytes": bytes },
      element("i", { class: "key", style: `--fill:${color(c)}` }), data.categories[c], element("b", {}, formatBytes(bytes)));
  }));
  const rest = here.slice(LARGEST).reduce((sum, k) => sum + course.bytes[k], 0);
  $("moment-values").replaceChildren(
    ...here.slice(0, LARGEST).map((k) => element("li", { "data-bytes": course.bytes[k] },
      element("i", { class: "key", style: `--fill:${color(course.category[k])}`, title: data.categories[course.category[k]] }),
      element("span", {}, valueName(course.value[k]), element("small", {}, text(data.values.type[course.value[k]]))),
      element("b", {}, formatBytes(course.bytes[k])))),
    ...(here.length > LARGEST ? [element("li", { "data-bytes": rest }, element("i"), `${here.length - LARGEST} more`, element("b", {}, formatBytes(rest)))] : []),
  );
}

const charts = [new MemoryChart("plain", plain, "Plain"), new MemoryChart("planned", planned, "Planned")];
[charts[0].other, charts[1].other] = [charts[1], charts[0]];
charts[1].show(planned.peak);

for (const button of document.querySelectorAll("[data-axis]")) {
  button.disabled = !hasSeconds;
  button.setAttribute("aria-pressed", (button.dataset.axis === "seconds") === inSeconds);
  button.addEventListener("click", () => {
    inSeconds = button.dataset.axis === "seconds";
    for (const b of document.querySelectorAll("[data-axis]")) b.setAttribute("aria-pressed", b === button);
    charts.forEach((chart) => chart.draw());
  });
}
