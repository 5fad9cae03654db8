/** Small charts as SVG: a line over time, bars over days. Sizes are in the units of the view box; CSS colours them. */

import { h, mark, s } from "./dom.js";

/**
 * A line with the area below it, from a quarter of an hour ago to now. Gaps (null) stay gaps.
 * @param {string} label what it shows, for those who cannot see it
 * @param {{height?: number, seconds?: number}} [options]
 */
export function sparkline(label, { height = 36, seconds = 900 } = {}) {
  const width = 300;
  const area = s("path", { class: "area" });
  const line = s("path", { class: "line" });
  const base = s("path", { class: "base", d: `M0 ${height - 0.5}H${width}` });
  const element = s("svg", { class: "chart spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, base, area, line);

  /**
   * @param {number[]} at seconds since the epoch @param {(number | null)[]} values @param {number} now
   * @param {number} [top] what the full height stands for; the largest value unless given
   */
  function update(at, values, now, top) {
    const high = top ?? Math.max(1e-9, ...values.map((value) => value ?? 0)) * 1.1;
    const x = (time) => Math.max(0, Math.min(width, width - ((now - time) / seconds) * width));
    const y = (value) => height - 1 - Math.min(1, value / high) * (height - 3);
    let lines = "";
    let areas = "";
    for (const run of runs(at, values)) {
      const points = run.map(([time, value]) => `${x(time).toFixed(1)} ${y(value).toFixed(1)}`);
      if (points.length === 1) points.push(points[0]);
      lines += `M${points.join("L")}`;
      areas += `M${points[0].split(" ")[0]} ${height}L${points.join("L")}L${points.at(-1).split(" ")[0]} ${height}Z`;
    }
    mark(line, "d", lines || null);
    mark(area, "d", areas || null);
  }
  return { element, update };
}

/** Stretches without a gap. @returns {[number, number][][]} */
function runs(at, values) {
  const found = [];
  let run = null;
  at.forEach((time, index) => {
    if (values[index] === null || values[index] === undefined) run = null;
    else if (run) run.push([time, values[index]]);
    else found.push((run = [[time, values[index]]]));
  });
  return found;
}

/** A bar that is so full. @param {string} label @returns {{element: Element, update: (share: number, text: string) => void}} */
export function meter(label) {
  const value = s("rect", { class: "value", height: 6, rx: 3, width: 0 });
  const element = s(
    "svg",
    { class: "meter", viewBox: "0 0 200 6", preserveAspectRatio: "none", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 },
    s("rect", { class: "track", width: 200, height: 6, rx: 3 }),
    value,
  );
  return {
    element,
    update(share, text) {
      const filled = Math.max(0, Math.min(1, share || 0));
      mark(value, "width", (filled * 200).toFixed(1));
      mark(element, "aria-valuenow", Math.round(filled * 100));
      mark(element, "aria-valuetext", text);
      mark(element, "class", `meter${filled >= 0.98 ? " full" : filled >= 0.85 ? " high" : ""}`);
    },
  };
}

/** How many series have a shade of their own (`.s0` to `.s5` in parts.css). */
export const SHADES = 6;

/**
 * Stacked bars, one for each day.
 * @param {string} label
 * @param {{name: string, parts: {name: string, value: number, shade: number}[]}[]} days
 * @param {(value: number) => string} format
 * @param {number} [width] about as many pixels as there are, so that the letters come out in their size
 */
export function stacked(label, days, format, width = 720) {
  const height = 200;
  const left = 44;
  const bottom = 22;
  const high = Math.max(1, ...days.map((day) => day.parts.reduce((sum, part) => sum + part.value, 0)));
  const top = roundUp(high);
  const y = (value) => (1 - value / top) * (height - bottom - 8) + 8;
  const slot = (width - left) / Math.max(1, days.length);
  const bar = Math.min(36, slot * 0.72);
  const ticks = [0, 0.5, 1].map((share) => [
    s("line", { class: "tick", x1: left, x2: width, y1: y(top * share), y2: y(top * share) }),
    s("text", { x: left - 8, y: y(top * share) + 4, "text-anchor": "end" }, format(top * share)),
  ]);
  const every = Math.ceil((days.length * 52) / (width - left));
  const bars = days.map((day, index) => {
    const x = left + slot * index + (slot - bar) / 2;
    let sum = 0;
    const parts = day.parts.map((part) => {
      const from = y(sum + part.value);
      const tall = y(sum) - from;
      sum += part.value;
      return tall > 0.2 ? s("rect", { class: `bar s${part.shade}`, x, y: from, width: bar, height: Math.max(0.6, tall - 0.6) }) : null;
    });
    const name = index % every === 0 ? s("text", { x: x + bar / 2, y: height - 5, "text-anchor": "middle" }, day.name) : null;
    const said = day.parts.filter((part) => part.value).map((part) => `${part.name}: ${format(part.value)}`);
    return s("g", null, s("title", null, `${day.name}: ${format(sum)}${said.length > 1 ? `\n${said.join("\n")}` : ""}`), parts, name);
  });
  return s("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ticks, bars);
}

/** What the shades of a chart stand for. @param {{name: string, shade: number}[]} series */
export function legend(series) {
  return h("ul", { class: "legend plain" }, series.map(({ name, shade }) => h("li", { class: `s${shade}` }, name)));
}

/** The next number that is 1, 2 or 5 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}
