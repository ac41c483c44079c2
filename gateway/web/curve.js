// The binary entropy function, H(p) = -p log2(p) - (1 - p) log2(1 - p): the page's emblem, drawn to scale.

import { s } from "./dom.js";

const STEPS = 64;
const LEFT = 3;
const RIGHT = 397;
const FLOOR = 124;
const CEILING = 26;

const entropy = (p) => (p <= 0 || p >= 1 ? 0 : -p * Math.log2(p) - (1 - p) * Math.log2(1 - p));

export function drawCurve(svg) {
  const points = Array.from({ length: STEPS + 1 }, (_, step) => {
    const p = (1 - Math.cos((Math.PI * step) / STEPS)) / 2; // dense at the ends, where it is steep
    return `${(LEFT + (RIGHT - LEFT) * p).toFixed(1)} ${(FLOOR - (FLOOR - CEILING) * entropy(p)).toFixed(1)}`;
  });
  const line = `M${points.join("L")}`;
  const middle = (LEFT + RIGHT) / 2;
  svg.append(
    s("path", { class: "under", d: `${line}Z` }),
    s("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: FLOOR, y2: FLOOR }),
    s("line", { class: "axis", x1: middle, x2: middle, y1: CEILING, y2: FLOOR, "stroke-dasharray": "2 5" }),
    s("path", { class: "bow", d: line }),
    s("circle", { class: "apex", cx: middle, cy: CEILING, r: 6 }),
    s("text", { x: LEFT, y: FLOOR + 18 }, "p = 0"),
    s("text", { x: middle, y: FLOOR + 18, "text-anchor": "middle" }, "0.5"),
    s("text", { x: RIGHT, y: FLOOR + 18, "text-anchor": "end" }, "1"),
    s("text", { x: middle, y: CEILING - 13, "text-anchor": "middle" }, "1 bit"),
  );
}
