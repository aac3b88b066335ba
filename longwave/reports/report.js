// The sections of the comparison of trained models.

const { gaps, columns, cells } = data;
const isBaseline = model => model.key === report.baseline, baseline = report.models.find(isBaseline);

// Quality ----------------------------------------------------------------------------------------------------------------------

function lossSeries() {
  return report.models.flatMap((model, index) => {
    const color = modelColor(index), pairs = points => points.map(([step, loss]) => [step, loss]);
    const modes = [...new Set(model.held_out.map(([, , mode]) => mode))];
    const heldOut = modes.map((mode, order) => ({
      name: `${model.name} held-out${mode ? ` (${mode})` : ""}`, color, marked: true, dash: order ? "2 4" : null,
      points: pairs(model.held_out.filter(point => point[2] === mode)),
    }));
    return [{ name: `${model.name} training`, color, faint: true, points: pairs(model.train) }, ...heldOut];
  });
}

// Each model against the baseline, at the steps where both were tried on held-out text.
function gapSeries() {
  const known = new Map(baseline.held_out.map(([step, loss]) => [step, loss]));
  return report.models.flatMap((model, index) => {
    if (isBaseline(model)) return [];
    const points = model.held_out.filter(([step, loss, mode]) => mode !== "top-k" && loss !== null && known.get(step));
    return [{ name: model.name, color: modelColor(index), marked: true, points: points.map(([step, loss]) => [step, loss / known.get(step) - 1]) }];
  });
}

function drawQuality() {
  new Chart(find("loss-chart"), {
    title: "Loss", unit: "step", series: lossSeries(), tick: (value, digits) => value.toFixed(digits), format: value => value.toFixed(4),
    switches: [["late", "second half"], ["logX", "log steps"], ["logY", "log loss"]],
  });
  drawGap();
  find("curve-words").textContent = report.curve_note;
  const head = ["Model", "Parameters", "Held-out loss", "Bits per byte", "Perplexity", "Gap in loss", "Layout"];
  fillTable(find("models"), head, report.models.map((model, index) => [
    element("span", {}, swatch({ color: modelColor(index) }), model.name), count(model.parameters), fixed(model.final_loss, 4),
    fixed(model.bits_per_byte, 4), fixed(model.perplexity, 2), gapWords(model, gaps[index]), element("code", {}, model.layout),
  ]));
  return report.models.length;
}

function drawGap() {
  const series = gapSeries(), host = find("gap-chart");
  host.hidden = !series.some(({ points }) => points.length);
  if (host.hidden) return;
  new Chart(host, {
    title: `Gap to ${baseline.name}`, note: "how much higher the held-out loss is, as a share of it", unit: "step", flat: true, series,
    tick: share => `${share < 0 ? "−" : ""}${+Math.abs(share * 100).toPrecision(3)}%`, format: signed(2), shows: [0], lines: [{ value: 0, name: baseline.name }], switches: [["late", "second half"], ["logX", "log steps"]],
  });
}

function gapWords(model, gap) {
  if (isBaseline(model)) return "yardstick";
  return gap === null ? "—" : signed(2)(gap);
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
  const { levels } = report.retention;
  find("retention-words").append(...shares.map(([, name, words], index) =>
    element("div", {}, element("dt", {}, swatch({ color: shareColor(index) }), name), element("dd", {}, words))));
  for (const level of levels) drawLevel(level);
  const [selection, curve] = selectionWords[report.retention.selection];
  find("selection-words").textContent = selection;
  find("training-curve-words").textContent = curve;
  find("retention-gap").textContent = gapSentence();
  return levels.length;
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

function drawLevel(level) {
  const host = element("figure", { class: "chart" });
  find("retention-charts").append(host);
  const final = level.final === null ? "not measured" : percent(level.final);
  new Chart(host, {
    title: level.name, note: `target ${percent(level.target)}; the curve is of training windows; all held-out text at the end ${final}`, unit: "step", domain: [0, 1],
    tick: value => percent(value, 0), format: value => percent(value), lines: [{ value: level.target, name: "target" }], switches: [["logX", "log steps"]],
    series: shares.map(([key, name], index) => ({ name, color: shareColor(index), points: level.steps.map((step, at) => [step, level[key][at]]) })),
  });
}

function gapSentence() {
  const { top_k_loss: trained, threshold_loss: used } = report.retention;
  if (trained === null || used === null) return "";
  const gap = used - trained, size = Math.abs(gap);
  const verdict = size < 5e-5 ? "the same to four digits" : `${size.toFixed(4)} (${percent(size / trained, 2)}) ${gap > 0 ? "worse" : "better"} as used than as trained`;
  return `Held-out loss at the end: ${used.toFixed(4)} when the threshold chooses the tokens, as inference does, and ${trained.toFixed(4)} under training's own choice; ${verdict}.`;
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
  const levels = tokens.reduce((most, [, kept, scores]) => Math.max(most, 1 + (kept.at(-1) ?? -1), scores?.length ?? 0), report.retention.levels.length);
  new Passage(find("passage-text"), tokens, levels).groups(find("passage-legend"));
  find("passage-source").textContent = source;
  return tokens.length;
}

// Samples ---------------------------------------------------------------------------------------------------------------

function drawSamples() {
  const prompts = [...new Set(report.models.flatMap(model => model.generations.map(([prompt]) => prompt)))];
  find("samples-list").append(...prompts.map(prompt => element("article", { class: "pair" },
    ...report.models.flatMap((model, index) => samplesOf(model, index, prompt)))));
  return prompts.length;
}

function samplesOf(model, index, prompt) {
  return model.generations.filter(sample => sample[0] === prompt).map(([, continuation]) =>
    element("div", {}, element("h3", {}, swatch({ color: modelColor(index) }), model.name), element("p", { class: "written" }, element("span", { class: "quiet" }, prompt), continuation)));
}

drawPage({ notes: drawNotes, quality: drawQuality, retention: drawRetention, speed: drawSpeed, passage: drawPassage, samples: drawSamples,
  facts: drawFacts, reproduce: drawCommand });
