// A square of cells below the diagonal, drawn once as an image: hover or the arrow keys read one cell out.

const MAP_INK = [66, 138, 216]; // shows on light and on dark paper

class HeatMap {
  // cells: rows below the diagonal one after the other; shade(row, column, value): 0 to 1; tell(row, column, value): what the tip says.
  constructor({ title, size, cells, shade, tell }) {
    Object.assign(this, { size, cells, shade, tell, row: size - 1, column: 0 });
    this.canvas = element("canvas", { width: size, height: size, "aria-hidden": "true" });
    this.frame = element("i", { hidden: "" });
    this.field = element("div", { class: "field", tabindex: 0, role: "img", "aria-label": `Attention, ${title}` }, this.canvas, this.frame);
    this.figure = element("figure", { class: "map" }, element("figcaption", {}, title), this.field);
    this.field.addEventListener("pointermove", event => this.hover(event));
    this.field.addEventListener("pointerleave", () => this.leave());
    this.field.addEventListener("focusout", () => this.leave());
    this.field.addEventListener("keydown", event => this.walk(event));
    this.draw();
  }

  at(row, column) {
    return column > row ? 0 : this.cells[row * (row + 1) / 2 + column];
  }

  draw() {
    const context = this.canvas.getContext("2d"), image = context.createImageData(this.size, this.size);
    for (let row = 0, cell = 0; row < this.size; row++)
      for (let column = 0; column <= row; column++, cell++)
        image.data.set([...MAP_INK, 255 * this.shade(row, column, this.cells[cell])], 4 * (row * this.size + column));
    context.putImageData(image, 0, 0);
  }

  hover(event) {
    const box = this.field.getBoundingClientRect(), side = box.width / this.size;
    this.read(Math.floor((event.clientY - box.top) / side), Math.floor((event.clientX - box.left) / side), event.clientX, event.clientY);
  }

  walk(event) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    const box = this.field.getBoundingClientRect(), side = box.width / this.size;
    const row = this.row + down, column = this.column + right;
    this.read(row, column, box.left + (column + 1) * side, box.top + (row + 1) * side);
  }

  read(row, column, x, y) {
    this.row = Math.min(Math.max(row, 0), this.size - 1);
    this.column = Math.min(Math.max(column, 0), this.size - 1);
    const side = 100 / this.size;
    Object.assign(this.frame.style, { left: `${this.column * side}%`, top: `${this.row * side}%`, width: `${side}%`, height: `${side}%` });
    this.frame.hidden = false;
    tip.show(x, y, ...this.tell(this.row, this.column, this.at(this.row, this.column)));
  }

  leave() {
    this.frame.hidden = true;
    tip.hide();
  }
}
