// A matrix of weights as a picture: pointer and arrow keys move over its cells.

import { h } from "./dom.js";

const MIN_CELL_PX = 4;
const MAX_SIDE_PX = 2048;

export class Heatmap {
  #rows = [];
  #cell = null; // [row, column]

  // `pick(row, column, weight)` is called when another cell becomes the current one.
  constructor(label, pick) {
    this.pick = pick;
    this.node = h("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heatmap", "aria-label": `${label}. Arrow keys move over it.` });
    this.node.addEventListener("pointermove", (event) => this.#point(event));
    this.node.addEventListener("pointerdown", (event) => this.#point(event));
    this.node.addEventListener("keydown", (event) => this.#move(event));
  }

  // `rows` are arrays of weights (0 to 1), perhaps of different length. The cells keep a size that can be seen.
  show(rows) {
    this.#rows = rows;
    const columns = Math.max(1, ...rows.map((row) => row.length));
    const cell = Math.max(1, Math.min(Math.floor(MAX_SIDE_PX / Math.max(rows.length, columns)), 16, Math.max(MIN_CELL_PX, Math.floor(1024 / columns))));
    this.cell = cell;
    this.node.width = columns * cell;
    this.node.height = Math.max(1, rows.length) * cell;
    this.#cell = null;
    this.draw();
  }

  draw() {
    const context = this.node.getContext("2d");
    context.clearRect(0, 0, this.node.width, this.node.height);
    context.fillStyle = getComputedStyle(this.node).accentColor; // --heat, in the theme that holds
    this.#rows.forEach((row, y) => row.forEach((weight, x) => {
      // Weights of a row sum to one, so most are small; the root spreads them out.
      context.globalAlpha = Math.min(1, Math.sqrt(weight));
      context.fillRect(x * this.cell, y * this.cell, this.cell, this.cell);
    }));
    context.globalAlpha = 1;
    this.#outline(context);
  }

  select(row, column) {
    const y = Math.min(this.#rows.length - 1, Math.max(0, row));
    const x = Math.min((this.#rows[y]?.length ?? 1) - 1, Math.max(0, column));
    if (y < 0) return;
    this.#cell = [y, x];
    this.draw();
    this.pick(y, x, this.#rows[y][x]);
  }

  #outline(context) {
    if (!this.#cell) return;
    const [y, x] = this.#cell;
    context.strokeStyle = getComputedStyle(this.node).color;
    context.lineWidth = Math.max(1, this.cell / 8);
    context.strokeRect(x * this.cell + 0.5, y * this.cell + 0.5, this.cell - 1, this.cell - 1);
  }

  #point(event) {
    const box = this.node.getBoundingClientRect();
    this.select(
      Math.floor(((event.clientY - box.top) / box.height) * this.#rows.length),
      Math.floor(((event.clientX - box.left) / box.width) * (this.node.width / this.cell)),
    );
  }

  #move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = this.#cell ?? [this.#rows.length - 1, 0];
    this.select(row + step[0], column + step[1]);
  }
}
