// The sections of an inspected text.

const { tokens, levels, blocks, costs } = data;
const short = value => value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });
const times = value => `×${value >= 10 ? value.toFixed(0) : value.toFixed(2)}`;
const placesOf = level => [...tokens.keys()].filter(index => level < 0 || tokens[index][1].includes(level));
for (const block of blocks) {
  block.places = placesOf(block.level);
  block.of = new Map(block.places.map((place, index) => [place, block.received[index]]));
}
const excerpt = (start, stop) => readable(tokens.slice(start, stop).map(([text]) => text).join("").trim());

// Text -------------------------------------------------------------------------------------------------------------------------

let passage;

function drawText() {
  passage = new Passage(find("passage-text"), tokens, levels.length, tokenFigures);
  find("text-words").textContent = levels.length
    ? "Shaded by the levels that kept each token, darker for more. Hover a token for its figures, or go through the text with the left and right arrows; choose a group to see it alone."
    : "Hover a token for its figures, or go through the text with the left and right arrows.";
  if (levels.length) passage.groups(find("passage-legend"));
  const menu = find("shade"), all = shades();
  menu.append(...all.map(({ name }, index) => element("option", { value: index }, name)));
  menu.addEventListener("change", () => shadeBy(all[menu.value]));
  listenToOverview();
  shadeBy(all[0]);
  return tokens.length;
}

function tokenFigures(index) {
  const attention = blocks.filter(({ of }) => of.has(index)).map(({ depth, of }) => [`attention, block ${depth}`, times(of.get(index)), " what its distances give"]);
  const share = costs.spent[index] / costs.dense[index];
  return [...attention, ["cost", short(costs.spent[index]), ` FLOPs${levels.length ? `, ${percent(share, 0)} of dense` : ""}`]];
}

// What the text can be shaded by: {name, words, look}.
function shades() {
  const byLevel = { name: "levels that kept it", words: "", look: index => passage.byLevel(index) };
  return [...(levels.length ? [byLevel] : []), costShade(), ...scoreShades(), ...blocks.map(attentionShade)];
}

function costShade() {
  const values = levels.length ? costs.spent.map((spent, index) => spent / costs.dense[index]) : costs.spent;
  const [low, high] = ends(values), range = high - low || 1;
  const words = levels.length ? `${percent(low, 0)} to ${percent(high, 0)} of the dense model's cost` : `${short(low)} to ${short(high)} FLOPs`;
  return { name: "cost", words, look: index => ({ kind: "kept", deep: (values[index] - low) / range }) };
}

// Of the levels that go by a threshold.
function scoreShades() {
  return levels.flatMap((level, index) => level.threshold === null ? [] : [scoreShade(level, index)]);
}

function scoreShade({ name, threshold }, level) {
  const sizes = tokens.map(token => Math.abs((token[2][level] ?? threshold) - threshold)).sort((a, b) => a - b);
  const range = sizes[Math.floor(sizes.length * 0.95)] || 1;
  const look = index => {
    const score = tokens[index][2][level];
    if (score === null) return { kind: "dropped", deep: 0 };
    return { kind: score > threshold ? "kept" : "against", deep: Math.min(1, Math.abs(score - threshold) / range) };
  };
  return { name: `score at ${name}`, words: `blue above the threshold of ${threshold.toFixed(3)} (kept), orange below; grey did not get there`, look };
}

function attentionShade({ depth, of }) {
  const ordered = [...of.values()].sort((a, b) => a - b);
  const look = index => of.has(index) ? { kind: "kept", deep: nearest(ordered, value => value, of.get(index)) / Math.max(1, ordered.length - 1) } : { kind: "dropped", deep: 0 };
  return { name: `attention in block ${depth}`, words: "by rank: the darkest is the most attended", look };
}

function shadeBy({ words, look }) {
  find("shade-words").textContent = words;
  passage.shade(look);
  drawOverview();
}

// The whole text from left to right, in the shades of its tokens.
function drawOverview() {
  const host = find("overview"), width = Math.max(host.clientWidth, 1);
  const canvas = element("canvas", { width, height: 1 }), context = canvas.getContext("2d"), image = context.createImageData(width, 1);
  for (let x = 0; x < width; x++) image.data.set(overviewColor(x, width), 4 * x);
  context.putImageData(image, 0, 0);
  host.querySelector("canvas")?.remove();
  host.prepend(canvas);
}

function overviewColor(x, width) {
  const first = Math.floor(x * tokens.length / width), last = Math.max(first + 1, Math.floor((x + 1) * tokens.length / width));
  let blue = 0, orange = 0;
  for (let index = first; index < last; index++) {
    const { kind, deep } = passage.look(index);
    if (kind === "kept") blue += deep; else if (kind === "against") orange += deep;
  }
  const sum = blue + orange || 1, mix = MAP_INK.map((part, channel) => (part * blue + [206, 124, 44][channel] * orange) / sum);
  return [...mix, 255 * (blue + orange) / (last - first)];
}

function listenToOverview() {
  const host = find("overview"), view = element("i"), text = find("passage-text");
  host.append(view);
  const place = event => {
    const box = host.getBoundingClientRect();
    return Math.min(tokens.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * tokens.length)));
  };
  host.addEventListener("click", event => passage.goTo(place(event)));
  host.addEventListener("pointermove", event => {
    const index = place(event);
    tip.show(event.clientX, event.clientY, element("b", {}, `token ${count(index + 1)}`), element("code", {}, visible(excerpt(index, index + 12))));
  });
  host.addEventListener("pointerleave", tip.hide);
  const follow = () => {
    const [first, last] = shownTokens(text);
    Object.assign(view.style, { left: `${100 * first / tokens.length}%`, width: `${100 * (last - first) / tokens.length}%` });
  };
  text.addEventListener("scroll", later(follow), { passive: true });
  new ResizeObserver(later(() => { drawOverview(); follow(); })).observe(host);
}

// The first and the last token of the blocks of lines in sight, as far into each as it is scrolled.
function shownTokens(text) {
  const box = text.getBoundingClientRect();
  const at = edge => {
    const blocks = [...text.children], inside = blocks.findIndex(block => block.getBoundingClientRect().bottom > edge);
    const block = blocks.at(inside), { top, height } = block.getBoundingClientRect();
    const first = +block.firstChild.dataset.index, size = block.childElementCount;
    return inside < 0 ? tokens.length : first + size * Math.min(1, Math.max(0, (edge - top) / height));
  };
  return [at(box.top), at(box.bottom)];
}

// Cost -------------------------------------------------------------------------------------------------------------------------

// Means of at most 160 stretches, each at its first token.
function means(values) {
  const stretch = Math.ceil(values.length / 160), points = [];
  for (let start = 0; start < values.length; start += stretch) {
    const piece = values.slice(start, start + stretch);
    points.push([start + 1, piece.reduce((sum, value) => sum + value, 0) / piece.length]);
  }
  return points;
}

function drawCost() {
  const stretch = Math.ceil(tokens.length / 160);
  const dense = { name: levels.length ? "if every block ran on every token" : "this model", color: modelColor(0), points: means(costs.dense) };
  const own = { name: "this model", color: modelColor(1), points: means(costs.spent) };
  new Chart(find("cost-chart"), {
    title: "FLOPs per token", note: stretch > 1 ? `means of ${stretch} tokens` : "", unit: "token", series: levels.length ? [dense, own] : [dense],
    tick: short, format: value => `${short(value)} FLOPs`, shows: [0], pick: place => passage.goTo(place - 1),
  });
  const [cheap, dear] = costs.passages;
  find("passages").append(...[["Cheapest passages", cheap], ["Dearest passages", dear]].filter(([, found]) => found.length)
    .map(([title, found]) => element("div", {}, element("h3", {}, title), element("ol", {}, ...found.map(passageButton)))));
  return tokens.length;
}

function passageButton({ start, stop, spent, share }) {
  const button = element("button", { type: "button" }, element("b", {}, `${percent(share, 0)} of dense`),
    element("code", {}, excerpt(start, stop)), element("small", {}, `${count(start + 1)} to ${count(stop)}`));
  button.dataset.tip = `${short(spent)} FLOPs per token; click to go there`;
  button.addEventListener("click", () => { tip.hide(); passage.goTo(start); });
  return element("li", {}, button);
}

// Levels -----------------------------------------------------------------------------------------------------------------------

const figures = [
  ["overlap_nearby", "Kept and most attended, nearby", "of the kept tokens, those among as many of the most attended of their neighbourhood", percent],
  ["overlap", "Kept and most attended", "the same over the whole text, where trends along it count too", percent],
  ["correlation_nearby", "Score and attention, nearby", "rank correlation (Spearman) with the neighbours only", value => signedFixed(value)],
  ["correlation", "Score and attention", "rank correlation over the whole text", value => signedFixed(value)],
  ["distance", "Distance of the distributions", "total variation of the two curves above: 0 the same, 100% nowhere together", percent],
];
const signedFixed = value => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

function drawLevels() {
  find("levels-list").append(...levels.map(drawLevel));
  for (const chart of waiting.splice(0)) chart();
  return levels.length;
}

const waiting = []; // charts that need their place in the page before they are drawn

function drawLevel(level) {
  const host = element("div", { class: "level" }), found = level.comparisons.filter(one => one.distribution);
  const kept = level.retention === null ? "no token got this far" : `kept ${percent(level.retention)} of ${count(level.entered)} tokens, target ${percent(level.target, 0)}`;
  if (found.length) {
    const figure = element("figure", { class: "chart" });
    host.append(figure);
    waiting.push(() => new Chart(figure, {
      title: level.name, note: kept, unit: "token", flat: true, series: distributions(found), tick: value => `×${+value.toFixed(2)}`,
      format: value => `×${value.toFixed(2)} an even spread`, shows: [0], lines: [{ value: 1, name: "even" }], pick: place => passage.goTo(place - 1),
    }));
  } else host.append(element("h3", {}, `${level.name}: ${kept}`));
  const notes = level.comparisons.filter(one => !one.distribution).map(one => element("p", { class: "quiet" }, `${one.model}: ${one.reason}.`));
  host.append(...notes, ...(found.length ? [statistics(found)] : []));
  return host;
}

function distributions(found) {
  const points = ({ edges }, shares) => shares.map((share, bin) =>
    [Math.round((edges[bin] + edges[bin + 1] + 1) / 2), share * (edges.at(-1) - edges[0]) / (edges[bin + 1] - edges[bin])]);
  const kept = found[0].distribution;
  return [{ name: "kept", color: modelColor(1), points: points(kept, kept.kept) }, ...found.map((one, index) => (
    { name: `attention, block ${one.depth} of ${one.model}`, color: shareColor(index), dash: index ? "6 4" : null, points: points(one.distribution, one.distribution.attention) }))];
}

const shareColor = index => `var(--share-${index ? 1 : 2})`;

function statistics(found) {
  const table = element("table", { class: "statistics" });
  const head = ["", ...found.map(({ model, depth }) => `block ${depth} of ${model}`)];
  const rows = figures.map(([key, name, words, show]) => [element("span", {}, name, element("br"), element("small", {}, words)),
    ...found.map(one => statistic(one[key], show, key === "distance"))]);
  const left = [element("span", {}, "Tokens compared"), ...found.map(one =>
    element("span", {}, count(one.compared), " ", element("small", {}, `first token: ${percent(one.first_share)} of all attention`)))];
  fillTable(table, head, [...rows, left]);
  return element("div", { class: "scroll" }, table);
}

function statistic({ value, chance, low, high }, show, lessIsMore) {
  const above = lessIsMore ? value < low : value > high, below = lessIsMore ? value > high : value < low;
  const verdict = above ? "more alike than by chance" : below ? "less alike than by chance" : "as by chance";
  return element("div", { class: "figure" }, element("span", { class: "median" }, show(value)),
    element("span", { class: above ? "more" : below ? "less" : "quiet" }, verdict),
    element("small", {}, `chance ${show(chance)}, 95% of choices ${show(low)} to ${show(high)}`));
}

// Attention --------------------------------------------------------------------------------------------------------------------

function drawMaps() {
  const drawn = blocks.filter(({ maps }) => maps.length);
  find("maps-list").append(...drawn.flatMap(block => [element("h3", {}, mapWords(block)),
    element("div", { class: "maps" }, ...block.maps.map(map => drawMap(block, map).figure))]));
  return drawn.length;
}

function mapWords({ depth, level, places, edges, first_share }) {
  const pooled = edges.length - 1 < places.length ? `, ${Math.round(places.length / (edges.length - 1))} tokens a cell` : "";
  const where = level < 0 ? "" : ` in level ${level + 1}`;
  return `Block ${depth}${where}: ${count(places.length)} tokens${pooled}; ${percent(first_share)} of the attention goes to the first`;
}

function drawMap(block, { head, cells }) {
  const bytes = Uint8Array.from(atob(cells), sign => sign.charCodeAt(0));
  const title = head === null ? "mean of all heads" : `head ${head}`;
  const shade = (row, column, value) => Math.min(1, Math.max(0, (Math.log2(value / even(block, row, column)) + 3) / 9));
  return new HeatMap({ title, size: block.edges.length - 1, cells: new Float32Array(bytes.buffer), shade, tell: (row, column, value) => cellWords(block, row, column, value) });
}

function cellWords(block, row, column, value) {
  const from = cellTokens(block, row), to = cellTokens(block, column);
  const spread = even(block, row, column);
  if (!spread) return [element("b", {}, column > row ? "later" : "out of the window"), element("div", {}, `${from.name} cannot see ${to.name}`)];
  return [element("b", {}, percent(value, value < 0.01 ? 3 : 1)),
    element("div", {}, `of the attention of ${from.name} `, element("code", {}, from.text), ` goes to ${to.name} `, element("code", {}, to.text)),
    element("small", {}, `${times(value / spread)} an even spread, which would be ${percent(spread, 2)}`)];
}

function cellTokens({ edges, places }, cell) {
  const first = places[edges[cell]], last = places[edges[cell + 1] - 1];
  const text = tokens.slice(first, Math.min(last + 1, first + 8)).map(([one]) => one).join("");
  return { name: first === last ? `token ${count(first + 1)}` : `tokens ${count(first + 1)} to ${count(last + 1)}`, text: visible(text.replace(/\s+/g, " ")) };
}

// What a cell would get if each of its queries looked at everything it can see alike.
function even({ edges, window }, row, column) {
  let sum = 0;
  for (let query = edges[row]; query < edges[row + 1]; query++) {
    const oldest = window === null ? 0 : Math.max(0, query - window + 1);
    const inside = Math.max(0, Math.min(edges[column + 1], query + 1) - Math.max(edges[column], oldest));
    sum += inside / (query + 1 - oldest);
  }
  return sum / (edges[row + 1] - edges[row]);
}

drawPage({ text: drawText, cost: drawCost, levels: drawLevels, maps: drawMaps, notes: drawNotes, facts: drawFacts, reproduce: drawCommand });
