// The data, spans turned into bytes per run, and what all parts of the page use.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const text = (k) => data.texts[k];
const cumulated = (steps) => { let at = 0; return steps.map((step) => (at += step)); };
const made = cumulated(data.values.made);
const kept = new Set(cumulated(data.values.kept));
const nOps = data.ops.name.length;

function formatBytes(bytes) {
  let size = bytes;
  for (const unit of ["B", "KB", "MB", "GB"]) {
    if (Math.abs(size) < 999.95) return `${size.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(2)} TB`;
}

function formatSeconds(seconds) {
  if (seconds >= 0.9995) return `${seconds.toFixed(2)} s`;
  return seconds >= 0.9995e-3 ? `${(seconds * 1e3).toFixed(1)} ms` : `${(seconds * 1e6).toFixed(0)} us`;
}

const percent = (share) => `${share < 0 ? "" : "+"}${(100 * share).toFixed(1)}%`;
const color = (category) => `var(--${data.categories[category].replace(" ", "-")})`;
const opName = (i) => [text(data.ops.module[i]), text(data.ops.name[i])].filter(Boolean).join(" ");
const valueName = (v) => (data.values.name[v] < 0 ? opName(made[v]) : text(data.values.name[v]));
const valueSource = (v) => (made[v] < 0 ? "" : text(data.ops.source[made[v]]));

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "circle", "text", "defs", "pattern", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A schedule: what runs when, and how many bytes of which category are in memory meanwhile. */
class Course {
  constructor(coded, waits = {}) {
    this.waits = waits;
    this.order = coded.order ? cumulated(coded.order) : data.ops.name.map((_, i) => i);
    this.length = this.order.length;
    this.value = coded.spans.value;
    this.category = coded.spans.category;
    this.begin = cumulated(coded.spans.begin);
    this.end = this.begin.map((at, k) => at + coded.spans.length[k]);
    this.bytes = this.value.map((v, k) => coded.spans.bytes[k] ?? data.values.bytes[v]);
    this.firstRun = new Int32Array(nOps).fill(-1);
    this.order.forEach((i, p) => { if (this.firstRun[i] < 0) this.firstRun[i] = p; });
    this.series = this.#series();
    this.total = Float64Array.from({ length: this.length }, (_, p) => this.series.reduce((sum, s) => sum + s[p], 0));
    this.peak = this.total.reduce((best, bytes, p) => (bytes > this.total[best] ? p : best), 0);
    this.backward = this.order.findIndex((i) => data.ops.backward[i]);
  }

  #series() {
    const series = data.categories.map(() => new Float64Array(this.length + 1));
    this.value.forEach((_, k) => {
      series[this.category[k]][this.begin[k]] += this.bytes[k];
      series[this.category[k]][this.end[k] + 1] -= this.bytes[k];
    });
    for (const s of series) for (let p = 1; p < s.length; p++) s[p] += s[p - 1];
    const scratch = series[data.categories.indexOf("scratch")];
    this.order.forEach((i, p) => {
      const again = p > this.firstRun[i] ? data.ops.scratchAgain[i] : undefined;
      scratch[p] += again ?? data.ops.scratch[i] ?? 0;
    });
    return series;
  }

  /** When each run starts, after what is waited for, and when the last one ends, in seconds or in runs. */
  moments(inSeconds) {
    const at = new Float64Array(this.length + 1);
    this.order.forEach((i, p) => {
      const again = p > this.firstRun[i] ? data.ops.secondsAgain[i] : undefined;
      const waits = inSeconds ? this.waits[p + 1] ?? 0 : 0;
      at[p + 1] = at[p] + (inSeconds ? again ?? data.ops.seconds[i] : 1) + waits;
    });
    return at;
  }

  /** Indices of the spans at a run, largest first. */
  at(run) {
    const here = [];
    for (let k = 0; k < this.value.length && this.begin[k] <= run; k++) if (this.end[k] >= run) here.push(k);
    return here.sort((a, b) => this.bytes[b] - this.bytes[a] || a - b);
  }
}

/** The top of both pictures: a budget far above the plain peak would leave nothing to see below. */
const HIGHEST = Math.max(data.plainPeak, data.peak, data.floor, data.budget <= 1.3 * data.plainPeak ? data.budget : 0);
const plain = new Course(data.plain);
const planned = new Course(data.planned, data.tier?.waits);

for (const key of document.querySelectorAll(".key[data-category]"))
  key.style.setProperty("--fill", color(data.categories.indexOf(key.dataset.category)));

// --- Light and dark -------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  $("theme").dataset.now = theme;
  try { localStorage.setItem("autoremat-theme", theme); } catch { /* no storage for files here: it stays for this visit */ }
}

let remembered = "auto";
try { remembered = localStorage.getItem("autoremat-theme") ?? "auto"; } catch { /* the same */ }
setTheme(THEMES.includes(remembered) ? remembered : "auto");
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf($("theme").dataset.now) + 1) % 3]));
