// The two pictures that the admin view draws: a trace of the last minutes, and stacked bars by day.

import { h, s } from "./dom.js";
import { short, shortDay, whole } from "./figures.js";

const HEIGHT = 240;
const LEFT = 44;
const LABEL_WIDTH = 62;
const BOTTOM = 26;
const TOP = 10;

// Returns a trace of `values`, oldest first, between 0 and `most` (or the largest). Decoration: the figure is beside it.
export function trace(values, most = null) {
  const top = Math.max(most ?? 0, ...values, most === null ? 1e-9 : 0);
  const points = values.map((value, index) => `${(100 * index) / Math.max(1, values.length - 1)} ${(32 - (30 * value) / top).toFixed(2)}`);
  const line = `M${points.join("L")}`;
  return s("svg", { viewBox: "0 0 100 32", preserveAspectRatio: "none", "aria-hidden": "true", class: "line-0" },
    points.length > 1 && s("path", { class: "area", d: `${line}L100 32L0 32Z` }), points.length > 1 && s("path", { class: "trace", d: line }));
}

// Returns a figure of stacked bars, `width` pixels wide, with its legend and its table. `rows` is
// [{label, parts: Map(series -> number)}], one for each day.
export function bars(title, rows, series, width) {
  const totals = rows.map((row) => [...row.parts.values()].reduce((sum, value) => sum + value, 0));
  const most = niceTop(Math.max(1, ...totals));
  const pitch = (width - LEFT) / Math.max(1, rows.length);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - BOTTOM - TOP) * value) / most;
  const grid = [0, 0.5, 1].map((share) => [
    s("line", { class: "grid", x1: LEFT, x2: width, y1: y(most * share), y2: y(most * share) }),
    s("text", { x: LEFT - 8, y: y(most * share) + 4, "text-anchor": "end" }, short(most * share)),
  ]);
  const every = Math.ceil(LABEL_WIDTH / pitch);
  const labels = rows.map((row, index) => (rows.length - 1 - index) % every === 0 &&
    s("text", { x: Math.min(LEFT + (index + 0.5) * pitch, width - LABEL_WIDTH / 3), y: HEIGHT - 8, "text-anchor": "middle" }, shortDay(row.label)));
  const columns = rows.map((row, index) => column(row, series, LEFT + index * pitch, pitch, y));
  const sum = totals.reduce((all, total) => all + total, 0);
  const label = `${title}: ${whole(sum)} in all, from ${rows[0]?.label} to ${rows.at(-1)?.label}. The table below has the figures.`;
  return h("figure", { class: "chart" },
    s("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label }, grid.flat(), columns.flat(), labels),
    h("ul", { class: "legend" }, series.map((name, index) => h("li", {}, h("span", { class: `swatch line-${index % 10}` }), name))),
    h("details", {}, h("summary", { class: "small muted" }, "As a table"), table(title, rows, series)));
}

function column(row, series, left, pitch, y) {
  let base = 0;
  const width = Math.min(56, pitch * 0.68);
  const x = left + (pitch - width) / 2;
  return series.flatMap((name, index) => {
    const value = row.parts.get(name) ?? 0;
    if (!value) return [];
    const top = y(base + value);
    const height = y(base) - top;
    base += value;
    return [s("rect", { class: `line-${index % 10}`, x, y: top, width, height: Math.max(height - 1, 0.5), rx: Math.min(3, height / 2) },
      s("title", {}, `${row.label}, ${name}: ${whole(value)}`))];
  });
}

function table(title, rows, series) {
  const filled = rows.filter((row) => row.parts.size > 0);
  return h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": title }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Day"), series.map((name) => h("th", { scope: "col", class: "number" }, name)))),
    h("tbody", {}, filled.map((row) => h("tr", {}, h("th", { scope: "row" }, row.label),
      series.map((name) => h("td", { class: "number" }, whole(row.parts.get(name) ?? 0))))))));
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}
