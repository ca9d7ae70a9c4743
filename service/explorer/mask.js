// The mask on its canvas: a part of it, panned and zoomed, and a cursor that tells of a cell.

import { $ } from "./dom.js";

const SIZE = 1024; // pixels of a side
const LEAST = 8; // tokens of a side

export const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

export class Mask {
  constructor(canvas, moved) {
    this.canvas = canvas;
    this.moved = moved; // called when another part is wanted
    this.part = { row: 0, column: 0, span: 128 };
    this.length = 128;
    this.cursor = null;
    this.view = null;
    canvas.width = canvas.height = SIZE;
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 0.5 : 2, this.#under(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.drag = { at: this.#under(event), part: { ...this.part } };
    });
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => (this.drag = null));
    canvas.addEventListener("pointerleave", () => { if (!this.drag) this.point(null); });
  }

  // Show `length` tokens: all of them, or the part given, as far as it lies within.
  limit(length, part) {
    this.length = length;
    this.#set(part ?? { row: 0, column: 0, span: length });
  }

  get whole() {
    return this.part.span >= this.length;
  }

  zoom(factor, at = { x: 0.5, y: 0.5 }) {
    const { row, column, span } = this.part;
    const next = Math.min(this.length, Math.max(LEAST, Math.round(span * factor)));
    this.#set({ row: row + at.y * (span - next), column: column + at.x * (span - next), span: next });
    this.moved();
  }

  pan(rows, columns) {
    const { row, column, span } = this.part;
    this.#set({ row: row + rows, column: column + columns, span });
    this.moved();
  }

  all() {
    this.#set({ row: 0, column: 0, span: this.length });
    this.moved();
  }

  #set({ row, column, span }) {
    const wide = Math.max(1, Math.min(this.length, Math.round(span)));
    const step = 2 ** Math.max(0, Math.ceil(Math.log2(wide / 256)));
    const within = (at) => Math.floor(Math.max(0, Math.min(this.length - wide, Math.round(at))) / step) * step;
    this.part = { row: within(row), column: within(column), span: wide };
  }

  #under(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  #move(event) {
    const at = this.#under(event);
    if (this.drag) {
      const { row, column, span } = this.drag.part;
      this.#set({ row: row - (at.y - this.drag.at.y) * span, column: column - (at.x - this.drag.at.x) * span, span });
      this.moved();
    } else {
      const { row, column, span } = this.part;
      this.point({ row: Math.floor(row + at.y * span), column: Math.floor(column + at.x * span) });
    }
  }

  #key(event) {
    const step = Math.max(1, Math.round(this.part.span / 8));
    const arrow = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (arrow && event.shiftKey) {
      const { row, column, span } = this.part;
      const from = this.cursor ?? { row: row + (span >> 1), column: column + (span >> 1) };
      const by = this.view?.step ?? 1;
      const within = (at, low) => Math.max(low, Math.min(low + span - 1, at));
      this.point({ row: within(from.row + arrow[0] * by, row), column: within(from.column + arrow[1] * by, column) });
    } else if (arrow) this.pan(arrow[0] * step, arrow[1] * step);
    else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0") this.all();
    else return;
    event.preventDefault();
  }

  point(cursor) {
    this.cursor = cursor;
    this.draw();
    $("cell").textContent = cursor ? this.told(cursor) : "";
  }

  // What a cell shows, in words.
  told({ row, column }) {
    const view = this.view;
    if (!view || row >= this.length || column >= this.length) return "";
    const [height, width] = view.shape;
    const y = Math.floor((row - view.rows[0]) / view.step), x = Math.floor((column - view.columns[0]) / view.step);
    if (y < 0 || x < 0 || y >= height || x >= width) return "";
    const at = y * width + x;
    const range = (first) => {
      const low = Math.floor(first / view.step) * view.step;
      return view.step > 1 ? `${low}\u2013${low + view.step - 1}` : `${low}`;
    };
    const seen = view.names.filter((_, bit) => (view.lit[at] >> bit) & 1).join(", ");
    const share = view.step > 1 && seen ? `, ${Math.round((view.share[at] / 255) * 100)}% of the pairs` : "";
    const what = seen ? `seen by ${seen}${share}` : view.causal && column > row ? "not yet written" : "left out";
    return `query ${range(row)}, key ${range(column)}: ${what}`;
  }

  take(answer) {
    const mask = answer.mask;
    this.view = {
      ...mask,
      causal: answer.causal,
      names: answer.primitives.map((one) => one.spec),
      kinds: answer.primitives.map((one) => one.name),
      primitive: bytes(mask.primitive),
      share: bytes(mask.share),
      lit: new Uint16Array(bytes(mask.lit).buffer),
    };
    this.draw();
  }

  draw() {
    const { canvas, view, part } = this;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    context.globalAlpha = 1;
    context.fillStyle = colour("mask");
    context.fillRect(0, 0, SIZE, SIZE);
    if (!view) return;
    const scale = SIZE / part.span;
    const x = (key) => (key - part.column) * scale, y = (query) => (query - part.row) * scale;
    if (view.causal) {
      context.fillStyle = colour("future");
      const edge = (up) => x(part.row + up / scale + 1);
      const far = Math.max(SIZE, edge(0), edge(SIZE));
      context.beginPath();
      for (const [across, down] of [[edge(0), 0], [far, 0], [far, SIZE], [edge(SIZE), SIZE]]) context.lineTo(across, down);
      context.fill();
    }
    const [height, width] = view.shape;
    const side = view.step * scale, gap = side >= 12 ? 1 : 0;
    const colours = view.kinds.map(colour);
    for (let row = 0; row < height; row++) {
      const top = Math.round(y(view.rows[0] + row * view.step)), bottom = Math.round(y(view.rows[0] + (row + 1) * view.step));
      if (bottom <= 0 || top >= SIZE) continue;
      for (let column = 0; column < width; column++) {
        const at = row * width + column;
        if (!view.primitive[at]) continue;
        const left = Math.round(x(view.columns[0] + column * view.step)), right = Math.round(x(view.columns[0] + (column + 1) * view.step));
        context.fillStyle = colours[view.primitive[at] - 1];
        context.globalAlpha = view.step === 1 ? 1 : 0.3 + (0.7 * view.share[at]) / 255;
        context.fillRect(left, top, Math.max(1, right - left - gap), Math.max(1, bottom - top - gap));
      }
    }
    context.globalAlpha = 1;
    if (this.cursor) {
      const low = (at) => Math.floor(at / view.step) * view.step;
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(x(low(this.cursor.column)), y(low(this.cursor.row)), Math.max(4, side), Math.max(4, side));
    }
  }
}
