// A number and how it went over the last two minutes: a line and the area under it, in SVG.
import { h, setAttribute, setText, svg } from "./dom";

const WIDTH = 240;
const HEIGHT = 56;

export interface Chart {
  element: HTMLElement;
  update(value: string, note: string, series: (number | null)[], summary: string): void;
}

// A round number at or above the largest value, for the scale.
function ceiling(largest: number): number {
  if (largest <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(largest));
  return ([1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= largest) ?? 10) * power;
}

function paths(series: (number | null)[], top: number): { line: string; area: string } {
  const x = (i: number): string => ((i / Math.max(1, series.length - 1)) * WIDTH).toFixed(1);
  const y = (value: number): string => (HEIGHT - (Math.min(value, top) / top) * (HEIGHT - 2) - 1).toFixed(1);
  let line = "";
  let area = "";
  let begin = -1;
  for (let i = 0; i <= series.length; ++i) {
    const value = series[i] ?? null;
    if (value !== null && begin < 0) begin = i;
    if (value !== null) line += `${begin === i ? "M" : "L"}${x(i)} ${y(value)}`;
    if (value === null && begin >= 0) {
      // A lone second is a short stroke, not an invisible point.
      if (i - begin === 1) line += "h3";
      else area += `M${x(begin)} ${HEIGHT}${series.slice(begin, i).map((v, n) => `L${x(begin + n)} ${y(v ?? 0)}`).join("")}L${x(i - 1)} ${HEIGHT}Z`;
      begin = -1;
    }
  }
  return { line, area };
}

export function makeChart(title: string, unit: (value: number) => string): Chart {
  const value = h("p", { class: "value" }, "–");
  const note = h("p", { class: "hint" });
  const line = svg("path", { class: "line" });
  const area = svg("path", { class: "area" });
  const scale = h("span", { class: "scale" });
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
    area,
    line,
  );
  const element = h("div", { class: "chart" }, h("h3", {}, title), value, h("div", { class: "plot" }, picture, scale), note);
  return {
    element,
    update(text, noteText, series, summary): void {
      setText(value, text);
      setText(note, noteText);
      const top = ceiling(Math.max(0, ...series.map((v) => v ?? 0)));
      const shapes = paths(series, top);
      setAttribute(line, "d", shapes.line);
      setAttribute(area, "d", shapes.area);
      setText(scale, unit(top));
      setAttribute(picture, "aria-label", summary);
    },
  };
}
