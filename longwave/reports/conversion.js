// The sections of a conversion: its stages, what layers learned, which of them stay, and how near the students come.

const { stages, layers, selection, learning, tensors } = data;
const rowsInto = (id, { head, rows }) => { if (rows.length) fillTable(find(id), head, rows); return rows.length; };
const lines = series => series.map(({ name, points }, index) => ({ name, color: modelColor(index), marked: true, points }));

function drawLayers() {
  if (!layers.points.length) return 0;
  new Chart(find("layer-chart"), {
    title: "R²", note: "by layer", unit: "layer", at: layer => `layer ${layer}`, ticks: layers.points.map(([layer]) => layer),
    series: [{ name: "R²", color: modelColor(0), marked: true, points: layers.points }],
    tick: (value, digits) => value.toFixed(digits), format: value => value.toFixed(4),
  });
  return layers.points.length;
}

function drawSelection() {
  find("selection-words").textContent = selection.words;
  rowsInto("agreement-table", selection.agreement);
  return rowsInto("selection-table", selection.layers);
}

function drawLearning() {
  for (const { title, note, series } of learning) {
    const host = element("figure", { class: "chart" });
    find("learning-charts").append(host);
    new Chart(host, {
      title, note, unit: "tokens", at: tokens => `${compact(tokens)} tokens`, xTick: compact, series: lines(series),
      tick: (value, digits) => value.toFixed(digits), format: value => value.toFixed(4), switches: [["logY", "log y"]],
    });
  }
  return learning.length;
}

drawPage({
  stages: () => rowsInto("stage-table", stages),
  layers: drawLayers,
  selection: drawSelection,
  learning: drawLearning,
  tensors: () => rowsInto("tensor-table", tensors),
  notes: drawNotes,
  facts: drawFacts,
  reproduce: drawCommand,
});
