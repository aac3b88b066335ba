"use strict";
// Line charts in SVG: hover read-outs, legend toggles, linear and logarithmic axes. Nothing here knows what is drawn.

window.addEventListener("error", event => fail(event.message));
document.addEventListener("securitypolicyviolation", event => fail(`blocked: ${event.violatedDirective}`));

function fail(message) {
  document.documentElement.dataset.error = message;
  const alarm = document.getElementById("alarm");
  alarm.hidden = false;
  alarm.textContent = `Part of this page could not be drawn: ${message}`;
}

function element(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function dress(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

// In the next frame: what an observer of sizes changes at once can change sizes again, which browsers report as an error.
const later = act => () => requestAnimationFrame(act);

const count = value => value.toLocaleString("en");

// The one floating read-out of the page ----------------------------------------------------------------------------------------

const tip = {
  show(x, y, ...content) {
    const node = document.getElementById("tip");
    node.replaceChildren(...content);
    node.hidden = false;
    const { width, height } = node.getBoundingClientRect();
    const left = x + 16 + width < innerWidth ? x + 16 : x - 16 - width;
    const top = y + 16 + height < innerHeight ? y + 16 : y - 16 - height;
    node.style.left = `${Math.min(Math.max(8, left), Math.max(8, innerWidth - width - 8))}px`;
    node.style.top = `${Math.max(8, top)}px`;
  },
  hide() { document.getElementById("tip").hidden = true; },
};

function swatch(series) {
  const mark = element("i", { class: "swatch" });
  mark.style.borderTopColor = series.color;
  mark.style.borderTopStyle = series.dash ? "dotted" : "solid";
  mark.style.opacity = series.faint ? 0.55 : 1;
  return mark;
}

// Axes -------------------------------------------------------------------------------------------------------------------------

function niceTicks(low, high, wanted) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(multiple => multiple * power >= rough * 0.7);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
  return ticks;
}

function logTicks(low, high, wanted) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const multiple of [1, 2, 5]) ticks.push(+(multiple * 10 ** power).toPrecision(12));
  const inside = ticks.filter(tick => tick >= low && tick <= high);
  if (inside.length < 3) return niceTicks(low, high, wanted);
  return inside.length > wanted * 2 ? inside.filter(tick => /^1(e|0*$)|^0?\.0*1$/.test(String(tick))) : inside;
}

// Places values of [low, high] between two pixels, and says where the ticks go: those given, or round ones.
function axis([low, high], log, from, to, wanted, given) {
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const bend = log ? Math.log : value => value;
  const scale = (to - from) / (bend(high) - bend(low));
  const place = value => from + (bend(value) - bend(low)) * scale;
  return { place, low, high, ticks: given?.filter(tick => tick >= low && tick <= high) ?? (log ? logTicks : niceTicks)(low, high, wanted) };
}

function withRoom([low, high], log) {
  const room = log ? (high / low) ** 0.04 : (high - low) * 0.04;
  return log ? [low / room, high * room] : [low - room, high + room];
}

// A reduce, not a spread of arguments: thousands of those are too many for some engines.
const ends = values => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

// A chart: {title, note, views or one view, tick, format, lines, domain, switches, flat, log, pick} ------------------------------
// A view is {unit, series, at(x): x in words, xTick(x), ticks: of the x axis}; a chart shows one of its views at a time.
// A series is {name, color, points: [[x, value or null, low, high], ...] in the order of x, faint, dash, marked, large, unnamed}: low
// and high, if there, are drawn as a band. until: the last x that was measured; beyond it the line is dashed, and called computed. pick(x): what a click, or Enter, does there. log: true for both axes, "x" for one. yTicks: of the y
// axis. plain: without a legend.
// A switch is one of: logX, logY, late (the second half of the x axis alone).

class Chart {
  constructor(host, spec) {
    this.host = host;
    this.spec = spec;
    this.views = (spec.views ?? [spec]).map(view => ({ at: x => `${view.unit} ${count(x)}`, xTick: count, ...view,
      series: view.series.map((series, id) => ({ ...series, id })).filter(({ points }) => points.length) }));
    this.view = this.views[0];
    this.hidden = new Set();
    this.on = { logX: Boolean(spec.log), logY: spec.log === true, late: false };
    this.canvas = element("div", { class: "canvas" });
    host.append(this.head(), this.canvas, this.legend());
    this.canvas.addEventListener("pointermove", event => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("keydown", event => this.walk(event));
    this.canvas.addEventListener("focusout", () => this.leave());
    if (spec.pick) this.canvas.addEventListener("click", () => this.pick());
    new ResizeObserver(later(() => this.canvas.clientWidth !== this.width && this.draw())).observe(this.canvas);
    this.draw();
  }

  show(view) {
    this.view = this.views[view];
    this.draw();
  }

  head() {
    const { title, note, switches = [] } = this.spec;
    const buttons = switches.map(([name, label]) => this.toggle(label, this.on[name], pressed => { this.on[name] = pressed; }));
    return element("figcaption", {},
      element("span", { class: "titles" }, element("strong", {}, title), note ? element("span", { class: "quiet" }, note) : null),
      element("span", { class: "switches" }, ...buttons));
  }

  legend() {
    const all = new Map(this.views.flatMap(view => view.series).filter(series => !series.unnamed).map(series => [series.id, series]));
    if (all.size < 2 || this.spec.plain) return "";
    return element("div", { class: "legend" }, ...[...all.values()].map(series =>
      this.toggle(element("span", {}, swatch(series), series.name), true, pressed => this.hidden[pressed ? "delete" : "add"](series.id))));
  }

  toggle(content, pressed, change) {
    const button = element("button", { type: "button", "aria-pressed": pressed }, content);
    button.addEventListener("click", () => {
      const now = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", now);
      change(now);
      this.draw();
    });
    return button;
  }

  usable([, y]) {
    return y !== null && (!this.on.logY || y > 0);
  }

  // The series to draw, without what the switches leave out.
  visible() {
    const places = series => series.flatMap(({ points }) => points.map(([x]) => x)), all = places(this.view.series);
    const [, last] = ends(all), front = places(this.view.series.filter(({ faint }) => !faint)).filter(x => x > 0);
    // A logarithmic axis would give most of its width to what came before the first point that counts.
    const first = this.on.late ? last / 2 : this.on.logX ? ends(front.length ? front : all.filter(x => x > 0))[0] : -Infinity;
    return this.view.series.filter(series => !this.hidden.has(series.id))
      .map(series => ({ ...series, points: series.points.filter(([x]) => x >= first) }));
  }

  draw() {
    this.width = Math.max(this.canvas.clientWidth, 240);
    this.height = this.spec.flat ? 210 : Math.round(Math.min(360, Math.max(230, this.width * 0.42)));
    this.shown = this.visible();
    const points = this.shown.flatMap(series => series.points.filter(point => this.usable(point)));
    this.stops = [...new Set(points.map(([x]) => x))].sort((a, b) => a - b);
    const svg = shape("svg", { viewBox: `0 0 ${this.width} ${this.height}`, role: "img", tabindex: 0, "aria-label": this.spec.title });
    this.canvas.replaceChildren(svg);
    if (!points.length) return void svg.append(shape("text", { x: this.width / 2, y: this.height / 2, class: "empty" }, "No data to draw"));
    this.scale(points);
    const back = this.shown.filter(series => series.faint), front = this.shown.filter(series => !series.faint);
    svg.append(...this.grid(), ...this.rules(), ...this.shown.map(series => this.band(series)), ...[...back, ...front].map(series => this.line(series)));
    this.cross = shape("g", { class: "cross", "pointer-events": "none" });
    svg.append(this.cross);
  }

  scale(points) {
    const bands = points.flatMap(([, , ...band]) => band).filter(y => y !== null && y !== undefined && (!this.on.logY || y > 0));
    const values = this.spec.domain ?? withRoom(ends([...points.map(([, y]) => y), ...bands, ...(this.spec.shows ?? [])]), this.on.logY);
    this.x = axis(ends(this.stops), this.on.logX, 52, this.width - 18, this.width < 480 ? 4 : 8, this.view.ticks);
    this.y = axis(values, this.on.logY, this.height - 40, 12, 5, this.spec.yTicks);
  }

  grid() {
    const { x, y, width, height } = this;
    const bottom = height - 40, digits = Math.max(...y.ticks.map(tick => (String(tick).split(".")[1] ?? "").length));
    const rows = y.ticks.flatMap(tick => [
      shape("line", { x1: 52, x2: width - 18, y1: y.place(tick), y2: y.place(tick), class: "grid" }),
      shape("text", { x: 44, y: y.place(tick) + 4, "text-anchor": "end" }, this.spec.tick(tick, digits)),
    ]);
    const columns = x.ticks.filter(tick => this.view.fractions || Number.isInteger(tick)).flatMap(tick => [
      shape("line", { x1: x.place(tick), x2: x.place(tick), y1: bottom, y2: bottom + 4, class: "axis" }),
      shape("text", { x: x.place(tick), y: bottom + 18, "text-anchor": "middle" }, this.view.xTick(tick)),
    ]);
    return [...rows, ...columns, shape("line", { x1: 52, x2: width - 18, y1: bottom, y2: bottom, class: "axis" }),
      shape("text", { x: (width + 34) / 2, y: height - 5, "text-anchor": "middle", class: "unit" }, this.view.unit)];
  }

  rules() {
    const inside = (this.spec.lines ?? []).filter(rule => rule.value >= this.y.low && rule.value <= this.y.high);
    return inside.flatMap(rule => {
      const y = this.y.place(rule.value);
      return [shape("line", { x1: 52, x2: this.width - 18, y1: y, y2: y, class: "rule" }),
        shape("text", { x: this.width - 20, y: y - 5, "text-anchor": "end", class: "rule-name" }, rule.name)];
    });
  }

  // The points in runs without a gap.
  runs(points, fits) {
    const runs = [[]];
    for (const point of points) if (fits(point)) runs.at(-1).push(point); else if (runs.at(-1).length) runs.push([]);
    return runs;
  }

  spot(x, y) {
    return [this.x.place(x).toFixed(1), this.y.place(y).toFixed(1)];
  }

  band(series) {
    const held = y => Math.min(Math.max(y, this.y.low), this.y.high), known = y => y !== null && y !== undefined && (!this.on.logY || y > 0);
    const runs = this.runs(series.points, point => known(point[2]) && known(point[3])).filter(run => run.length > 1);
    const sides = run => [...run.map(([x, , low]) => this.spot(x, held(low))), ...run.map(([x, , , high]) => this.spot(x, held(high))).reverse()];
    const group = shape("g", { class: "band" });
    group.style.color = series.color;
    group.append(...runs.map(run => shape("path", { d: `M${sides(run).map(place => place.join(" ")).join("L")}Z` })));
    return group;
  }

  line(series) {
    const { until = Infinity } = series, places = points => this.runs(points, point => this.usable(point)).map(run => run.map(([x, y]) => this.spot(x, y)));
    const crowded = series.points.length > this.width / 2;
    const group = shape("g", { class: `series${series.faint ? " faint" : ""}${crowded ? " crowded" : ""}` });
    group.style.color = series.color;
    const trace = (runs, dash) => {
      const path = runs.filter(run => run.length > 1).map(run => `M${run.map(place => place.join(" ")).join("L")}`).join("");
      if (path) group.append(shape("path", { d: path, "stroke-dasharray": dash }));
    };
    trace(places(series.points.filter(([x]) => x <= until)), series.dash);
    trace(places(series.points.filter(([x]) => x >= until)), "2 5");
    const dots = places(series.points.filter(([x]) => x <= until)).flatMap(run => run.length === 1 || (series.marked && series.points.length <= 60) ? run : []);
    group.append(...dots.map(([cx, cy]) => shape("circle", { cx, cy, r: series.large ? 5.5 : 2.6 })));
    return group;
  }

  hover(event) {
    if (!this.stops.length) return;
    const box = this.canvas.firstChild.getBoundingClientRect();
    const at = (event.clientX - box.left) * this.width / box.width;
    this.read(nearest(this.stops, step => this.x.place(step), at), event.clientX, event.clientY);
  }

  pick() {
    if (this.stop !== undefined) this.spec.pick(this.stops[this.stop]);
  }

  walk(event) {
    if (event.key === "Enter" && this.spec.pick) return this.pick();
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.stops.length) return;
    event.preventDefault();
    const next = Math.min(Math.max((this.stop ?? -1) + move, 0), this.stops.length - 1);
    const box = this.canvas.firstChild.getBoundingClientRect();
    this.read(next, box.left + this.x.place(this.stops[next]) * box.width / this.width, box.top + 24);
  }

  read(stop, clientX, clientY) {
    this.stop = stop;
    const step = this.stops[stop], x = this.x.place(step);
    const found = this.shown.map(series => ({ series, point: latest(series.points, step) }));
    const dots = found.filter(({ point }) => point && this.usable(point)).map(({ series, point }) => {
      const dot = shape("circle", { cx: this.x.place(point[0]), cy: this.y.place(point[1]), r: 4 });
      dot.style.color = series.color;
      return dot;
    });
    this.cross.replaceChildren(shape("line", { x1: x, x2: x, y1: 12, y2: this.height - 40 }), ...dots);
    const rows = found.filter(({ series }) => !series.unnamed).map(entry => this.reading(entry, step));
    tip.show(clientX, clientY, element("b", {}, this.view.at(step)), element("table", {}, ...rows));
  }

  reading({ series, point }, step) {
    const value = !point ? "—" : point[1] === null ? "not finite" : this.spec.format(point[1]);
    const band = point && typeof point[2] === "number" ? ` ${this.spec.format(point[2])} to ${this.spec.format(point[3])}` : "";
    const late = point && point[0] !== step ? ` at ${this.view.xTick(point[0])}` : "";
    const computed = point?.[0] > series.until ? " computed" : "";
    return element("tr", {}, element("th", {}, swatch(series), series.name), element("td", {}, value, element("small", {}, band, computed, late)));
  }

  leave() {
    this.stop = undefined;
    this.cross?.replaceChildren();
    tip.hide();
  }
}

// The last point at or before a step; points are in step order.
function latest(points, step) {
  let low = 0, high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle + 1; else high = middle;
  }
  return points[low - 1];
}

function nearest(stops, place, at) {
  let low = 0, high = stops.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((place(stops[middle]) + place(stops[middle + 1])) / 2 < at) low = middle + 1; else high = middle;
  }
  return low;
}
