// A curve over training steps, drawn as SVG.

import { element, number } from "/web/page.js";

const WIDTH = 300, HEIGHT = 90, MARGIN = 4;

function drawn(tag, attributes) {
  const made = document.createElementNS(document.querySelector("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function chart({ stage, name, newest, steps, values }) {
  const points = steps.map((step, index) => [step, values[index]]).filter(([, value]) => value !== null);
  const heights = points.map(([, value]) => value);
  const least = Math.min(...heights), most = Math.max(...heights);
  const from = steps[0], to = steps.at(-1);
  const x = (step) => MARGIN + ((WIDTH - 2 * MARGIN) * (step - from)) / (to - from || 1);
  const y = (value) => HEIGHT - MARGIN - ((HEIGHT - 2 * MARGIN) * (value - least)) / (most - least || 1);
  const path = points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
  const said = `${name} of ${stage}: ${number(newest)} now, from ${number(least)} to ${number(most)}`;
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": said });
  if (path.length) {
    svg.append(
      drawn("polygon", { points: `${x(points[0][0])},${HEIGHT} ${path.join(" ")} ${x(points.at(-1)[0])},${HEIGHT}`, class: "area" }),
      drawn("polyline", { points: path.join(" "), class: "line" }),
    );
  }
  return element(
    "figure", { className: "chart" },
    element("figcaption", {}, element("span", { textContent: name }), element("b", { textContent: number(newest) })),
    svg,
    element("p", { className: "faint", textContent: `${number(least)} – ${number(most)} · steps ${from.toLocaleString("en")}–${to.toLocaleString("en")}` }),
  );
}
