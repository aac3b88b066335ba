// What every page shares: its data, its header, tables, facts, tips and the switch between dark and light. Text reaches the page as text
// nodes only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const { report, headline } = data;
const find = id => document.getElementById(id);
const percent = (share, digits = 1) => share === null || share === undefined ? "—" : `${(share * 100).toFixed(digits)}%`;
const fixed = (value, digits) => value === null ? "not finite" : value.toFixed(digits);
const signed = digits => share => `${share < 0 ? "−" : share > 0 ? "+" : ""}${percent(Math.abs(share), digits)}`;
const modelColor = index => `var(--model-${index % 8})`;
// 3 significant digits with a prefix of 1000: 2.46M, 30T.
const compact = value => {
  const power = value > 0 ? Math.min(Math.max(Math.floor(Math.log10(+value.toPrecision(3)) / 3), 0), 6) : 0;
  return `${+(value / 1000 ** power).toPrecision(3)}${["", "k", "M", "G", "T", "P", "E"][power]}`;
};
const duration = seconds => seconds < 60 ? `${+seconds.toPrecision(3)} s` : seconds < 7200 ? `${+(seconds / 60).toPrecision(3)} min` : `${+(seconds / 3600).toPrecision(3)} h`;

function drawHeader() {
  document.title = report.title;
  find("title").textContent = report.title;
  find("subtitle").textContent = report.subtitle;
  find("created").textContent = report.created;
}

function drawHeadline() {
  const cards = Map.groupBy(headline, ({ label, about }) => about ? label : Symbol());
  find("headline").append(...[...cards.values()].map(card => card[0].about ? sharedCard(card) : soleCard(card[0])));
}

function soleCard({ label, value, sentence, verdict }) {
  return element("article", { class: verdict }, element("h2", {}, label), element("p", { class: "value" }, value), element("p", {}, sentence));
}

// One figure for each model; the sentences are told on hover and in print.
function sharedCard(card) {
  return element("article", {}, element("h2", {}, card[0].label), element("dl", {}, ...card.map(({ about, value, sentence, verdict }) =>
    element("div", { class: verdict, tabindex: 0, "data-tip": sentence }, element("dt", {}, about), element("dd", { class: "value" }, value),
      element("small", { class: "print-only" }, sentence)))));
}

function drawNotes() {
  find("notes").querySelector("ul").append(...report.notes.map(note => element("li", {}, note)));
  return report.notes.length;
}

// Cells carry their column's name, which narrow screens show in place of the head.
function fillTable(table, head, rows) {
  const body = rows.map(([first, ...rest]) => element("tr", {}, element("th", { scope: "row" }, first),
    ...rest.map((content, column) => element("td", { "data-column": head[column + 1] }, content))));
  table.append(element("thead", {}, element("tr", {}, ...head.map(name => element("th", { scope: "col" }, name)))), element("tbody", {}, ...body));
}

function fillFacts(list, facts) {
  list.append(...facts.map(([label, value]) => element("div", {}, element("dt", {}, label), element("dd", {}, value))));
  return facts.length;
}

function drawFacts() {
  return fillFacts(find("run-facts"), report.run) + fillFacts(find("machine-facts"), report.machine);
}

function drawCommand() {
  find("command").textContent = report.command;
  return report.command.length;
}

// A section without data leaves the page, and the contents.
function drawSections(sections) {
  for (const [id, draw] of Object.entries(sections)) {
    const section = find(id);
    section.hidden = !draw();
    if (!section.hidden && section.dataset.name) find("contents").append(element("a", { href: `#${id}` }, section.dataset.name));
  }
}

// Anything with data-tip tells it on hover and on focus.
function listenForTips() {
  const tell = event => {
    const host = event.target.closest?.("[data-tip]");
    if (!host) return;
    const box = host.getBoundingClientRect();
    tip.show(box.left, box.bottom - 8, element("div", { class: "words" }, host.dataset.tip));
  };
  document.addEventListener("pointerover", tell);
  document.addEventListener("focusin", tell);
  document.addEventListener("pointerout", event => event.target.closest?.("[data-tip]") && tip.hide());
  document.addEventListener("focusout", event => event.target.closest?.("[data-tip]") && tip.hide());
  document.addEventListener("keydown", event => event.key === "Escape" && tip.hide());
  addEventListener("scroll", tip.hide, { passive: true });
}

function listenForTheme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const other = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  const name = () => { find("theme").textContent = other(); };
  find("theme").addEventListener("click", () => { root.dataset.theme = other(); name(); });
  system.addEventListener("change", name);
  name();
}

function drawPage(sections) {
  drawHeader();
  drawHeadline();
  drawSections(sections);
  listenForTips();
  listenForTheme();
  if (!document.documentElement.dataset.error) document.documentElement.dataset.ready = "true";
}
