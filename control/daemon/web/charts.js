// Line charts of the last ten minutes, in SVG, with a cursor that says what was then.
import { element, shape } from "./format.js";

const HEIGHT = 112, LEFT = 54, RIGHT = 6, TOP = 6, BOTTOM = 16;
const SPANS_S = [60, 120, 300, 600]; // the shortest that holds what there is
const GAP_S = 7; // between points: the line breaks where the daemon was away

export class Chart {
  /**
   * @param section its card
   * @param series [{name, column of a point, colour: 1 to 3}]
   * @param words a value as [number, unit]
   */
  constructor(section, series, words) {
    this.series = series;
    this.words = words;
    this.points = [];
    this.svg = shape("svg", { role: "img", "aria-label": section.querySelector("h2").textContent });
    this.legend = element("div", { class: "legend" });
    section.append(this.svg, this.legend);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => { this.at = null; this.draw(); });
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.at = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    this.draw();
  }

  show(points) {
    this.points = points;
    this.draw();
  }

  draw() {
    const width = this.svg.clientWidth || 400;
    const { points, series } = this;
    const now = points.length ? points[points.length - 1][0] : 0;
    const known = points.length ? now - points[0][0] : 0;
    const span = SPANS_S.find((seconds) => seconds >= known) ?? SPANS_S[SPANS_S.length - 1];
    const x = (at) => LEFT + (width - LEFT - RIGHT) * (1 - (now - at) / span);
    const most = nice(Math.max(0, ...series.flatMap(({ column }) => points.map((p) => p[column] ?? 0))));
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (most ? value / most : 0));
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const level = y(share * most);
      parts.push(shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: level, y2: level }));
      if (most || !share) parts.push(label(LEFT - 6, level + 3, this.words(share * most).join(" "), "end"));
    }
    for (const share of [1, 0.5]) {
      const words = span > 60 ? `−${(share * span) / 60} min` : `−${share * span} s`;
      parts.push(label(x(now - share * span), HEIGHT - 3, words, share === 1 ? "start" : "middle"));
    }
    parts.push(label(width - RIGHT, HEIGHT - 3, "now", "end"));
    series.forEach(({ column, colour }) => {
      for (const run of runs(points, column)) {
        const line = run.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[column]).toFixed(1)}`).join("");
        const ends = `L${x(run[run.length - 1][0]).toFixed(1)} ${y(0)}L${x(run[0][0]).toFixed(1)} ${y(0)}Z`;
        if (series.length === 1) parts.push(shape("path", { class: `area s${colour}`, d: line + ends }));
        // A run of one point has no length: a short stroke shows it.
        parts.push(shape("path", { class: `series s${colour}`, d: run.length > 1 ? line : `${line}h2` }));
      }
    });
    let told = points[points.length - 1];
    if (this.at !== null && this.at !== undefined && points.length) {
      const at = now - span * (1 - this.at);
      told = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      parts.push(shape("line", { class: "cursor", x1: x(told[0]), x2: x(told[0]), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.svg.replaceChildren(...parts);
    this.legend.replaceChildren(...series.map(({ name, column, colour }) => element("span", {},
      element("i", { class: `swatch s${colour}` }), `${name} `,
      element("b", {}, told ? this.words(told[column] ?? null).join(" ") : "–"))));
  }
}

function label(x, y, text, anchor) {
  return shape("text", { class: "axis", x, y, "text-anchor": anchor }, text);
}

/** The stretches of points that have a value and follow one another. */
function runs(points, column) {
  const found = [];
  let last = null;
  for (const point of points) {
    if (point[column] === null) { last = null; continue; }
    if (last === null || point[0] - last[0] > GAP_S) found.push([]);
    found[found.length - 1].push(point);
    last = point;
  }
  return found;
}

/** The next round number. */
function nice(value) {
  if (!value) return 0;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 8, 10].find((step) => step * unit >= value) * unit;
}
