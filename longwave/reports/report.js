// The sections of the comparison of trained models.

const { models, axes, columns, cells } = data;
const isBaseline = model => model.key === report.baseline, baseline = models.find(isBaseline);
const measure = report.loss_comparable ? { name: "loss", field: "loss" } : { name: "bits per byte", field: "bits" };
const known = value => value !== null && value !== undefined;
const nameOf = (model, index, ...more) => element("div", {}, element("span", {}, swatch({ color: modelColor(index) }), model.name), ...more);

// What the intervals allow to be said ------------------------------------------------------------------------------------------

function drawStatements() {
  find("statements").append(...report.statements.map(({ text, verdict }) => element("p", { class: verdict }, text)));
  return report.statements.length;
}

// Quality ----------------------------------------------------------------------------------------------------------------------

const column = { tokens: 0, flops: 1, seconds: 2 };
const units = [[7200, 3600, "hours"], [300, 60, "minutes"], [0, 1, "seconds"]];

// An axis of what was spent: {key, label, unit, size: what one of it is in the data, at, xTick}.
function spending({ key }) {
  const last = models.reduce((most, model) => Math.max(most, model[key] ?? 0), 0);
  if (key === "tokens") return { key, label: "tokens", unit: "tokens of training", size: 1, at: x => `${compact(x)} tokens`, xTick: compact };
  if (key === "flops") return { key, label: "FLOPs", unit: "FLOPs of training", size: 1, at: x => `${compact(x)} FLOPs`, xTick: compact };
  const [, size, unit] = units.find(([from]) => last >= from);
  return { key, label: "time", unit: `${unit} of training`, size, fractions: true, at: x => duration(x * size), xTick: x => String(+x.toPrecision(3)) };
}

const along = ({ key, size }) => point => [point[column[key]] / size, ...point.slice(3)];

function lossSeries(axis) {
  return models.flatMap((model, index) => {
    const color = modelColor(index);
    return [{ name: `${model.name} training`, color, faint: true, points: model.train.map(along(axis)) },
      { name: `${model.name} held-out`, color, marked: true, points: model.held_out.map(along(axis)) }];
  });
}

function gapSeries({ key, size }) {
  return models.flatMap((model, index) => isBaseline(model) ? [] :
    [{ name: model.name, color: modelColor(index), marked: true, points: model.gaps[key].map(([x, ...rest]) => [x / size, ...rest]) }]);
}

const seedsMost = models.reduce((most, { seeds }) => Math.max(most, seeds.length), 0);

function drawQuality() {
  const views = axes.map(spending), charts = [];
  const band = seedsMost > 1 ? "mean over seeds; the band holds the true mean with 95%" : "";
  charts.push(new Chart(find("loss-chart"), {
    title: report.loss_comparable ? "Loss" : "Bits per byte", note: band, log: "x", views: seriesOf(views, lossSeries), tick: (value, digits) => value.toFixed(digits),
    format: value => value.toFixed(4), switches: [["late", "second half"], ["logX", "log x"], ["logY", "log y"]],
  }));
  charts.push(...drawGap(views));
  drawAxes(views, charts);
  const bits = "The models read text through different tokenizers, so their losses per token do not compare: all figures are in bits per byte, and curves are converted at the tokens per byte of all held-out text.";
  find("curve-words").append(...[report.loss_comparable ? "" : bits, report.curve_note].filter(Boolean).map(words => element("p", { class: "quiet" }, words)));
  drawModels();
  return models.length;
}

const seriesOf = (views, series) => views.map(axis => ({ ...axis, series: series(axis) }));

// The buttons that choose what has been spent as the x axis of both charts.
function drawAxes(views, charts) {
  const words = find("axis-words"), buttons = views.map(({ label }) => element("button", { type: "button" }, label));
  const choose = chosen => {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", index === chosen));
    charts.forEach(chart => chart.show(chosen));
    const { together } = axes[chosen], { label } = views[chosen];
    words.textContent = together || models.length < 2 ? "" : `Not all runs end at equal ${label}. A run nearer to the end of its schedule has a lower loss for that alone, so compare where runs end together.`;
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => choose(index)));
  find("axes").append(...buttons);
  find("axis-choice").hidden = views.length < 2;
  if (views.length) choose(0);
}

function drawGap(views) {
  const host = find("gap-chart"), all = seriesOf(views, gapSeries);
  host.hidden = !all.some(({ series }) => series.some(({ points }) => points.length));
  if (host.hidden) return [];
  return [new Chart(host, {
    title: `Gap to ${baseline.name}`, note: `how much higher the held-out ${measure.name} is where both have spent as much`, flat: true, views: all,
    tick: share => `${share < 0 ? "−" : ""}${+Math.abs(share * 100).toPrecision(3)}%`, format: signed(2), shows: [0], lines: [{ value: 0, name: baseline.name }], switches: [["late", "second half"], ["logX", "log x"]],
  })];
}

// The table of models: {name, cell(model, index), has(model)}; a column that no model has a value for is left out.
const modelColumns = [
  ["Held-out loss", model => interval(model, "loss", known(model.perplexity) ? `perplexity ${model.perplexity.toFixed(2)}` : ""), () => report.loss_comparable],
  ["Bits per byte", model => interval(model, "bits", "")],
  [`Gap in ${measure.name}`, model => gapCell(model), () => models.length > 1],
  ["Kept", model => model.levels.map(level => percent(level.final)).join(" · ") || "all", () => models.some(({ levels }) => levels.length)],
  ["Parameters", model => count(model.parameters)],
  ["Tokens", model => spent(model.tokens, compact)],
  ["FLOPs", model => spent(model.flops, compact)],
  ["Training", model => spent(model.seconds, duration)],
];

const spent = (value, words) => value > 0 ? words(value) : null;

function drawModels() {
  const shown = modelColumns.filter(([, cell, has]) => has ? has() : models.some(model => cell(model) !== null));
  fillTable(find("models"), ["Model", ...shown.map(([name]) => name)], models.map((model, index) => [
    nameOf(model, index, ...modelFacts(model)), ...shown.map(([, cell]) => cell(model) ?? "—")]));
}

function modelFacts({ setting, seeds, layout }) {
  const lines = [setting, seedsMost > 1 ? `${seeds.length === 1 ? "seed" : "seeds"} ${seeds.map(({ seed }) => seed).join(", ")}` : ""].filter(Boolean);
  return [...lines.map(line => element("small", {}, line)), element("code", {}, layout)];
}

// A mean with half its interval; its tip tells the value of each seed.
function interval(model, field, more) {
  const found = model[field];
  if (!found) return "diverged";
  const seeds = model.seeds.map(one => `seed ${one.seed}: ${fixed(one[field], 4)}`).join(", ");
  const words = element("span", seedsMost > 1 ? { class: "median", tabindex: 0, "data-tip": seeds } : { class: "median" }, found.mean.toFixed(4));
  if (known(found.low)) words.append(element("small", {}, ` ± ${((found.high - found.low) / 2).toFixed(4)}`));
  return element("div", {}, words, more ? element("small", { class: "line" }, more) : null);
}

function gapCell(model) {
  if (isBaseline(model)) return "yardstick";
  if (!model.gap) return "—";
  const { mean, low, high } = model.gap;
  return element("div", {}, signed(2)(mean), known(low) ? element("small", { class: "line" }, `${signed(2)(low)} to ${signed(2)(high)}`) : null);
}

// Grids ------------------------------------------------------------------------------------------------------------------------

const colorOf = key => modelColor(models.findIndex(model => model.key === key));
const nameBy = key => models.find(model => model.key === key).name;
const exactly = value => String(+value.toPrecision(4)).replace("e-", "e−");

function drawGrids() {
  const keys = [...new Set(report.grids.map(({ key }) => key))];
  keys.forEach(key => drawGrid(key, report.grids.filter(grid => grid.key === key)));
  return keys.length;
}

function drawGrid(key, grids) {
  const host = element("figure", { class: "chart" }), values = [...new Set(grids.flatMap(grid => grid.values))];
  find("grid-charts").append(element("div", {}, host, element("ul", {}, ...grids.map(grid => element("li", {}, gridSentence(grid))))));
  new Chart(host, {
    title: key, note: "held-out loss; the large point is the best", flat: true, unit: key, at: value => `${key} = ${exactly(value)}`, xTick: exactly, ticks: values, fractions: true,
    log: values.every(value => value > 0) && "x", series: grids.flatMap(gridSeries), tick: (value, digits) => value.toFixed(digits), format: value => value.toFixed(4),
  });
}

function gridSeries({ model, values, losses, best }) {
  const points = values.map((value, index) => [value, losses[index]]).sort((one, other) => one[0] - other[0]);
  return [{ name: nameBy(model), color: colorOf(model), marked: true, points },
    { name: "best", unnamed: true, color: colorOf(model), large: true, points: points.filter(([value]) => value === best) }];
}

function gridSentence({ model, values, losses, best, at_edge: atEdge }) {
  const diverged = values.filter((_, index) => losses[index] === null).map(exactly);
  const end = atEdge ? `, which is at the edge of what was tried: a better one may lie beyond` : "";
  return `${nameBy(model)}: best at ${exactly(best)}${end}.${diverged.length ? ` Training diverged at ${diverged.join(", ")}.` : ""}`;
}

// Retention --------------------------------------------------------------------------------------------------------------------

const shares = [
  ["kept", "above the threshold", "what inference would keep"],
  ["live", "live", "score between 0 and 1: the tokens whose score can still learn"],
  ["falsely_kept", "falsely kept", "kept in training although inference would drop them"],
  ["falsely_dropped", "falsely dropped", "dropped in training although inference would keep them"],
];
const shareColor = index => `var(--share-${index})`;

function drawRetention() {
  find("retention-words").append(...shares.map(([, name, words], index) =>
    element("div", {}, element("dt", {}, swatch({ color: shareColor(index) }), name), element("dd", {}, words))));
  const selecting = models.filter(model => model.levels.length);
  models.forEach((model, index) => model.levels.length && drawLevels(model, index, selecting.length > 1));
  const several = new Set(selecting.map(model => model.selection)).size > 1;
  for (const selection of new Set(selecting.map(model => model.selection))) {
    const names = selecting.filter(model => model.selection === selection).map(model => model.name).join(", ");
    find("selection-words").append(`${several ? `${names}: ` : ""}${selectionWords[selection][0]} `);
    find("training-curve-words").append(selectionWords[selection][1]);
  }
  return selecting.length;
}

function drawLevels(model, index, several) {
  const charts = element("div", { class: "pair" }), words = gapSentence(model);
  if (several) find("retention-charts").append(element("h3", {}, nameOf(model, index)));
  find("retention-charts").append(charts, words ? element("p", { class: "retention-gap" }, words) : "");
  for (const level of model.levels) drawLevel(level, charts);
}

const selectionWords = {
  "top-k": [
    "Training keeps a fixed share (top-k); inference keeps every token that scores above zero. The two should agree.",
    "The training curve of a SUBLLM is taken while top-k chooses its tokens, which looks at the whole window, so it is no measure of quality.",
  ],
  threshold: [
    "Training and inference keep the tokens that score above one threshold, which follows the scores so that the target share stays.",
    "",
  ],
};

function drawLevel(level, charts) {
  const host = element("figure", { class: "chart" });
  charts.append(host);
  const final = level.final === null ? "not measured" : percent(level.final);
  new Chart(host, {
    title: level.name, note: `target ${percent(level.target)}; the curve is of training windows; all held-out text at the end ${final}`, unit: "step", domain: [0, 1],
    tick: value => percent(value, 0), format: value => percent(value), lines: [{ value: level.target, name: "target" }], switches: [["logX", "log steps"]],
    series: shares.map(([key, name], index) => ({ name, color: shareColor(index), points: level.steps.map((step, at) => [step, level[key][at]]) })),
  });
}

function gapSentence({ selected_loss: trained, seeds: [{ loss: used }] }) {
  if (trained === null || used === null) return "";
  const gap = used - trained, size = Math.abs(gap);
  const verdict = size < 5e-5 ? "the same to four digits" : `${size.toFixed(4)} (${percent(size / trained, 2)}) ${gap > 0 ? "worse" : "better"} as used than as trained`;
  return `Held-out loss at the end: ${used.toFixed(4)} when the threshold chooses the tokens, as inference does, and ${trained.toFixed(4)} under training's own choice; ${verdict}.`;
}

// Growth with the context ------------------------------------------------------------------------------------------------------

const kilo = tokens => tokens % 2 ** 20 === 0 ? `${tokens / 2 ** 20}M` : tokens % 1024 === 0 ? `${tokens / 1024}k` : count(tokens);
const bytes = value => {
  const power = value > 0 ? Math.min(Math.max(Math.floor(Math.log(value) / Math.log(1024)), 0), 5) : 0;
  return `${+(value / 1024 ** power).toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
};
const moment = seconds => seconds >= 3600 && seconds < 86400 ? `${+(seconds / 3600).toPrecision(3)} h` : seconds >= 86400 ? `${+(seconds / 86400).toPrecision(3)} d` : seconds >= 1 ? duration(seconds) : seconds >= 1e-3 ? `${+(seconds * 1e3).toPrecision(3)} ms` : `${+(seconds * 1e6).toPrecision(3)} µs`;
const moments = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 60, 600, 3600, 36000, 360000, 3600000];
const powers = [...Array(13).keys()].map(power => 4 ** (power + 5));
const growthCharts = [[1, "Time to the first token", moment, moments], [2, "Time per token", moment, moments], [3, "State", bytes, powers]];

function drawGrowth() {
  const curves = report.growth?.curves.filter(({ measured }) => measured.length) ?? [];
  if (!curves.length) return 0;
  const key = curves.map(({ model }) => element("span", {}, swatch({ color: colorOf(model) }), nameBy(model)));
  find("growth-key").append(...key, element("span", { class: "quiet" }, "points: measured, dashed: computed"));
  for (const chart of growthCharts) drawGrowthChart(curves, chart);
  const [main, more] = data.growth_words;
  find("growth-main").append(...main.map(words => element("p", {}, words)));
  find("growth-more").append(...more.map(words => element("li", {}, words)));
  find("growth-busy").textContent = report.growth.disturbed ? `This machine was busy: ${report.growth.note}. Times, and what is computed from them, are not to be trusted.` : "";
  return curves.length;
}

function drawGrowthChart(curves, [field, title, format, yTicks]) {
  const host = element("figure", { class: "chart" });
  find("growth-charts").append(host);
  new Chart(host, {
    title, flat: true, plain: true, log: true, unit: "tokens of context", at: x => `${kilo(x)} tokens`, xTick: kilo, ticks: powers, yTicks, tick: format, format,
    series: curves.map(({ model, measured, computed }) => ({
      name: nameBy(model), color: colorOf(model), marked: true, until: measured.at(-1)[0],
      points: [...measured, ...computed].map(point => [point[0], point[field]]).filter(([, value]) => value !== null),
    })),
  });
}

// Speed ------------------------------------------------------------------------------------------------------------------------

function drawSpeed() {
  const rows = report.speed.rows.map((row, index) => [row.label, ...cells[index].map(speedCell)]), table = find("speed-table");
  find("speed-baseline").textContent = report.speed.columns[report.baseline] ?? baseline.name;
  find("speed-words").textContent = report.speed.note;
  find("speed-words").classList.toggle("alarm", report.speed.disturbed);
  table.style.setProperty("--columns", columns.length);
  fillTable(table, ["", ...columns], rows);
  return rows.length;
}

function speedCell(cell) {
  if (cell.missing !== undefined)
    return element("span", { class: "missing", tabindex: 0, "data-tip": cell.missing }, "—", element("small", { class: "print-only" }, cell.missing));
  const ratio = cell.ratio === null ? null : element("span", { class: "ratio", ...(cell.ratios ? { tabindex: 0, "data-tip": `${cell.ratios} over the rounds` } : {}) }, `×${cell.ratio.toFixed(2)}`);
  return element("div", { class: "figure" }, element("span", { class: "median" }, cell.value), ratio,
    cell.spread ? element("small", {}, cell.spread) : null, cell.bound ? boundBar(cell) : null);
}

function boundBar({ bound, kind, basis, share }) {
  const fill = element("i");
  fill.style.width = `${Math.min(share ?? 0, 1) * 100}%`;
  const over = share > 1 ? " Beyond its bound: the timing is noisy, or the baseline is further from its own bound." : "";
  const words = `${kind === "floor" ? "floor" : "bound"} ${bound}${share === null ? "" : `, ${percent(share, 0)} of it reached`}`;
  return element("span", { class: "bound", tabindex: 0, "data-tip": basis + over }, share === null ? null : element("span", { class: "bar" }, fill), element("small", {}, words));
}

// Passage ----------------------------------------------------------------------------------------------------------------------

function drawPassage() {
  const { tokens, code, source } = report.passage;
  find("passage-text").classList.toggle("code", code);
  const levels = tokens.reduce((most, [, kept, scores]) => Math.max(most, 1 + (kept.at(-1) ?? -1), scores?.length ?? 0), 0);
  new Passage(find("passage-text"), tokens, levels).groups(find("passage-legend"));
  find("passage-source").textContent = source;
  return tokens.length;
}

// Samples ---------------------------------------------------------------------------------------------------------------

function drawSamples() {
  const prompts = [...new Set(models.flatMap(model => model.generations.map(([prompt]) => prompt)))];
  find("samples-list").append(...prompts.map(prompt => element("article", { class: "pair" },
    ...models.flatMap((model, index) => samplesOf(model, index, prompt)))));
  return prompts.length;
}

function samplesOf(model, index, prompt) {
  return model.generations.filter(sample => sample[0] === prompt).map(([, continuation]) =>
    element("div", {}, element("h3", {}, swatch({ color: modelColor(index) }), model.name), element("p", { class: "written" }, element("span", { class: "quiet" }, prompt), continuation)));
}

drawPage({ statements: drawStatements, notes: drawNotes, quality: drawQuality, grids: drawGrids, retention: drawRetention, growth: drawGrowth, speed: drawSpeed, passage: drawPassage, samples: drawSamples,
  facts: drawFacts, reproduce: drawCommand });
