// The sections of an evaluation: a map of lengths and depths for each family of recall tasks, and tables.

const { families, contexts, labels, ablation } = data;

// A map of right answers: rows are lengths, columns depths, and the last column all depths together.
function heatMap({ task, depths, rows }) {
  const head = [...depths.map(depth => percent(depth, 0)), depths.length ? "all" : "right"];
  const body = rows.map(({ length, cells }) => element("tr", {}, element("th", { scope: "row" }, count(length)),
    ...cells.map((cell, column) => heatCell(cell, column === cells.length - 1))));
  const table = element("table", { class: "heat" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "tokens"), ...head.map(name => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...body));
  return element("figure", {}, element("figcaption", {}, task, " ", element("small", {}, depths.length ? "by depth" : "at all depths together")), table);
}

function heatCell({ shown, accuracy, words }, isTotal) {
  return element("td", { class: isTotal ? "total" : null, "data-tip": words, tabindex: 0, "data-share": accuracy }, shown);
}

function drawRecall() {
  find("maps").append(...families.map(heatMap));
  for (const cell of document.querySelectorAll("[data-share]")) cell.style.setProperty("--share", cell.dataset.share);
  return families.length;
}

const table = (id, head, rows) => { fillTable(find(id), head, rows); return rows.length; };

drawPage({
  recall: drawRecall,
  position: () => table("contexts", ["tokens seen", "predictions", "loss", "perplexity"], contexts),
  tasks: () => table("labels", ["task", "examples", "rows", "right", "chance"], labels),
  ablation: () => {
    find("ablation-words").textContent = ablation.words;
    const rows = table("mixers", ["mixer", ...ablation.head], ablation.rows);
    for (const cell of document.querySelectorAll("#mixers td")) cell.classList.toggle("idle", cell.textContent === "changes nothing");
    return rows;
  },
  notes: drawNotes,
  facts: drawFacts,
  reproduce: drawCommand,
});
