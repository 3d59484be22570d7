// Rows per second of every (layer, expert server): layers downwards, servers to the right, darker is more. One
// canvas, since V2 on 64 servers has 3,776 cells; the numbers are there as a table too.
import { h, setAttribute, setText } from "./dom";
import { count, shortId } from "./format";
import type { Heat, State } from "./schema";

const GAP = 1;
const LABELS = 28; // left margin for layer numbers
const TOP = 4; // above the first row, for half of its number

export interface HeatMap {
  element: HTMLElement;
  update(heat: Heat, states: Map<string, State>): void;
  redraw(): void; // after a change of theme
}

interface Cell {
  layer: number; // indices
  server: number;
}

export function makeHeatMap(): HeatMap {
  const canvas = h("canvas", { class: "heat", id: "heat", role: "img", tabindex: 0, "aria-label": "Expert load" });
  const readout = h("p", { class: "hint readout", id: "heat-readout" });
  const legend = h("div", { class: "legend", "aria-hidden": "true" }, h("span", {}, "0"), h("span", { class: "ramp" }), h("span", { class: "top" }));
  const tableBody = h("div", { class: "scroll", role: "region", "aria-label": "Rows per second as a table", tabindex: 0 });
  const numbers = h("details", { class: "numbers" }, h("summary", {}, "Numbers"), tableBody);
  const none = h("p", { class: "empty" }, "No expert servers yet.");
  const element = h("div", {}, none, h("div", { class: "heat-box" }, canvas), h("div", { class: "heat-foot" }, readout, legend), numbers);

  let heat: Heat = { servers_total: 0, layers: [], servers: [], rows_per_s: [] };
  let states = new Map<string, State>();
  let top = 0;
  let pointed: Cell | null = null;

  const rows = (cell: Cell): number => heat.rows_per_s[cell.layer]?.[cell.server] ?? 0;

  function geometry(): { width: number; height: number; cellWidth: number; cellHeight: number } {
    const width = canvas.parentElement?.clientWidth ?? 300;
    const layers = Math.max(1, heat.layers.length);
    const cellWidth = Math.max(2, (width - LABELS) / Math.max(1, heat.servers.length));
    const cellHeight = Math.max(5, Math.min(18, Math.floor(320 / layers)));
    return { width, height: TOP + layers * cellHeight, cellWidth, cellHeight };
  }

  function draw(): void {
    const style = getComputedStyle(document.documentElement);
    const color = (name: string): string => style.getPropertyValue(name).trim();
    const ratio = window.devicePixelRatio || 1;
    const { width, height, cellWidth, cellHeight } = geometry();
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    if (!context) return;
    context.scale(ratio, ratio);
    context.font = `10px ${color("--mono")}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(12 / cellHeight); // labels that do not touch
    heat.layers.forEach((layer, l) => {
      const y = TOP + l * cellHeight;
      context.globalAlpha = 1;
      if (l % every === 0) {
        context.fillStyle = color("--muted");
        context.fillText(String(layer), LABELS - 8, y + cellHeight / 2);
      }
      heat.servers.forEach((server, s) => {
        const x = LABELS + s * cellWidth;
        const lost = states.get(server) === "lost";
        const gap = cellWidth > 6 ? GAP : 0;
        context.globalAlpha = 1;
        context.fillStyle = color(lost ? "--lost-cell" : "--heat-0");
        context.fillRect(x, y, cellWidth - gap, cellHeight - GAP);
        const value = rows({ layer: l, server: s });
        if (lost || value <= 0 || top <= 0) return;
        context.globalAlpha = 0.12 + 0.88 * (value / top);
        context.fillStyle = color("--heat-1");
        context.fillRect(x, y, cellWidth - gap, cellHeight - GAP);
      });
    });
    if (pointed) {
      context.globalAlpha = 1;
      context.strokeStyle = color("--text");
      context.lineWidth = 1.5;
      context.strokeRect(LABELS + pointed.server * cellWidth, TOP + pointed.layer * cellHeight, cellWidth - GAP, cellHeight - GAP);
    }
  }

  function describe(): void {
    if (pointed && pointed.layer < heat.layers.length && pointed.server < heat.servers.length) {
      const server = heat.servers[pointed.server] ?? "";
      const lost = states.get(server) === "lost" ? " (lost)" : "";
      setText(readout, `Layer ${heat.layers[pointed.layer]}, server ${shortId(server)}${lost}: ${count(rows(pointed))} rows/s`);
      return;
    }
    const totals = heat.servers.map((_, s) => heat.layers.reduce((sum, __, l) => sum + rows({ layer: l, server: s }), 0));
    const sum = totals.reduce((a, b) => a + b, 0);
    const balance = sum > 0 ? `, busiest server ${((Math.max(...totals) * totals.length) / sum).toFixed(2)} × the mean` : "";
    const cut = heat.servers_total > heat.servers.length ? ` (of ${heat.servers_total})` : "";
    setText(readout, `${heat.layers.length} layers × ${heat.servers.length} servers${cut}${sum > 0 ? balance : ", idle"}`);
  }

  function writeTable(): void {
    if (!numbers.open) return;
    const head = h("tr", {}, h("th", { scope: "col" }, "Layer"), ...heat.servers.map((server) => h("th", { scope: "col" }, shortId(server))));
    const body = heat.layers.map((layer, l) =>
      h("tr", {}, h("th", { scope: "row" }, String(layer)), ...heat.servers.map((_, s) => h("td", {}, count(rows({ layer: l, server: s }))))),
    );
    tableBody.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, ...body)));
  }

  function point(cell: Cell | null): void {
    pointed = cell;
    describe();
    draw();
  }

  canvas.addEventListener("pointermove", (event) => {
    const { cellWidth, cellHeight } = geometry();
    const server = Math.floor((event.offsetX - LABELS) / cellWidth);
    const layer = Math.floor((event.offsetY - TOP) / cellHeight);
    point(server >= 0 && server < heat.servers.length && layer >= 0 && layer < heat.layers.length ? { layer, server } : null);
  });
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || heat.servers.length === 0) return;
    event.preventDefault();
    const from = pointed ?? { layer: 0, server: 0 };
    const clamp = (value: number, end: number): number => Math.max(0, Math.min(end - 1, value));
    point(
      pointed
        ? { layer: clamp(from.layer + (step[0] ?? 0), heat.layers.length), server: clamp(from.server + (step[1] ?? 0), heat.servers.length) }
        : from,
    );
  });
  numbers.addEventListener("toggle", writeTable);
  new ResizeObserver(draw).observe(element);

  return {
    element,
    update(newHeat, newStates): void {
      heat = newHeat;
      states = newStates;
      top = Math.max(0, ...heat.rows_per_s.flat());
      none.hidden = heat.servers.length > 0;
      canvas.hidden = numbers.hidden = legend.hidden = heat.servers.length === 0;
      setText(legend.querySelector(".top") as HTMLElement, `${count(top)} rows/s`);
      setAttribute(canvas, "aria-label", `Expert load: ${heat.layers.length} layers by ${heat.servers.length} servers, at most ${count(top)} rows per second. Arrow keys read single cells.`);
      setAttribute(canvas, "data-top", String(top));
      describe();
      draw();
      writeTable();
    },
    redraw: draw,
  };
}
