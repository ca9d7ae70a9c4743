// A line over evenly spaced points, as SVG.

import { short, svg } from "./dom.js";

export function plot(values, { label, from = "", to = "", height = 120, most, format = short } = {}) {
  const width = 300, left = 34, bottom = 16, top = 8;
  const highest = Math.max(most ?? 0, ...values, 0) || 1;
  const empty = !values.some((value) => value > 0) && !most;
  const x = (at) => left + ((width - left) * at) / Math.max(1, values.length - 1);
  const y = (value) => top + (height - top - bottom) * (1 - value / highest);
  const points = values.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
  const drawn = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const base = height - bottom;
  drawn.append(svg("line", { class: "axis", x1: left, y1: base, x2: width, y2: base }));
  drawn.append(svg("line", { class: "axis", x1: left, y1: top, x2: width, y2: top, "stroke-dasharray": "2 3" }));
  if (points.length > 1) {
    drawn.append(svg("polygon", { class: "area", points: `${x(0)},${base} ${points.join(" ")} ${x(values.length - 1)},${base}` }));
    drawn.append(svg("polyline", { class: "line", points: points.join(" ") }));
  }
  const text = (at, up, anchor, words) => svg("text", { x: at, y: up, "text-anchor": anchor }, words);
  drawn.append(text(left - 5, top + 4, "end", empty ? "" : format(highest)), text(left - 5, base + 3, "end", "0"));
  drawn.append(text(left, height - 3, "start", from), text(width, height - 3, "end", to));
  return drawn;
}
