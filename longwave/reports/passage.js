// A text token by token, shaded: [text, the levels that kept it, its score at each level or null, what stands for it without text].
// Of many tokens, blocks of whole lines leave the layout while out of sight, so that tens of thousands scroll smoothly.

const symbols = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡" };
const symbolOf = sign => symbols[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0));
const visible = text => text.replace(/[\x00-\x20\x7f]/g, symbolOf);
const readable = text => text.replace(/[\x00-\x08\x0b-\x1f\x7f]/g, symbolOf);
const turning = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/; // signs that turn the direction of what follows

class Passage {
  // levels: how many there are. more(index): rows that the tip of a token has besides its scores.
  constructor(host, tokens, levels, more = () => []) {
    Object.assign(this, { host, tokens, more, levels: Math.max(levels, 1) });
    this.spans = tokens.map((token, index) => this.span(token, index));
    host.classList.toggle("many", tokens.length > 2000);
    host.append(...this.lines());
    this.shade(index => this.byLevel(index));
    host.addEventListener("pointerover", event => this.hover(event));
    host.addEventListener("pointerleave", () => tip.hide());
    host.addEventListener("focusout", () => this.leave());
    host.addEventListener("keydown", event => this.walk(event));
  }

  span([text, , , label], index) {
    const kind = !text && label ? "silent" : /^[\r\n]+$/.test(text) ? "newline" : turning.test(text) ? "isolated" : "";
    return element("span", { "data-index": index, class: kind }, readable(text));
  }

  // Blocks that end where a line does; one endless line is broken, and says so.
  lines() {
    const blocks = [];
    let block = null, signs = 0;
    this.spans.forEach((span, index) => {
      block ??= element("div", { class: "lines" });
      block.append(span);
      signs += this.tokens[index][0] === "\n" ? 80 : this.tokens[index][0].length;
      const ends = this.tokens[index][0].endsWith("\n"), size = block.childElementCount;
      const last = index + 1 === this.spans.length;
      if (!(ends && size >= 64) && size < 2048 && !last) return;
      if (!ends && !last) block.classList.add("goes-on");
      block.style.containIntrinsicBlockSize = `auto ${Math.ceil(signs / 50) * 1.7}em`; // until it has been seen
      blocks.push(block);
      [block, signs] = [null, 0];
    });
    return blocks;
  }

  byLevel(index) {
    const kept = this.tokens[index][1].length;
    return { kind: kept ? "kept" : "dropped", deep: 0.2 + 0.8 * kept / this.levels };
  }

  // look(index): {kind: kept, against, dropped or nothing; deep: 0 to 1}.
  shade(look) {
    this.look = look;
    this.spans.forEach((span, index) => {
      const { kind, deep } = look(index);
      for (const one of ["kept", "against", "dropped"]) span.classList.toggle(one, one === kind);
      span.style.setProperty("--deep", deep.toFixed(3));
    });
  }

  hover(event) {
    const index = event.target.dataset.index;
    if (index === undefined) return tip.hide();
    this.tell(+index, event.clientX, event.clientY);
  }

  tell(index, x, y) {
    const [text, kept, scores, label] = this.tokens[index];
    const rows = (scores ?? []).map((score, level) => [`level ${level + 1}`, score === null ? "did not get there" : score.toFixed(3),
      score === null ? "" : kept.includes(level) ? " kept" : " dropped"]);
    const name = element("code", {}, visible(text) || `(${label || "no text"})`);
    const words = element("small", {}, `token ${count(index + 1)}, ${groupName(kept, this.levels)}${scores ? "" : "; scores not recorded"}`);
    tip.show(x, y, name, element("div", {}, words), element("table", {}, ...[...rows, ...this.more(index)].map(([head, value, note]) =>
      element("tr", {}, element("th", {}, head), element("td", {}, value, element("small", {}, note ?? ""))))));
  }

  walk(event) {
    const last = this.spans.length - 1, at = this.at ?? -1;
    const next = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.goTo(next, "nearest");
  }

  goTo(index, block = "center") {
    this.spans[this.at]?.classList.remove("here");
    this.at = index;
    const span = this.spans[index];
    span.classList.add("here");
    span.scrollIntoView({ block, behavior: "instant" });
    requestAnimationFrame(() => { // after the event of scrolling there, which hides tips
      const box = span.getBoundingClientRect();
      this.tell(index, box.left, box.bottom);
    });
  }

  leave() {
    this.spans[this.at]?.classList.remove("here");
    tip.hide();
  }

  // Buttons that show the tokens alone that the same levels kept.
  groups(legend) {
    const sizes = new Map();
    for (const [, kept] of this.tokens) sizes.set(String(kept), [kept, (sizes.get(String(kept))?.[1] ?? 0) + 1]);
    const groups = [...sizes.values()].sort(([a], [b]) => a.length - b.length || String(a).localeCompare(String(b)));
    const buttons = groups.map(([kept, size]) => this.group(kept, groupName(kept, this.levels), percent(size / this.tokens.length)));
    legend.append(this.group(null, "all tokens", count(this.tokens.length)), ...buttons);
  }

  group(kept, name, amount) {
    const patch = kept === null ? null : element("i", { class: `patch ${kept.length ? "kept" : "dropped"}` }, "ab");
    patch?.style.setProperty("--deep", 0.2 + 0.8 * (kept?.length ?? 0) / this.levels);
    const button = element("button", { type: "button", "aria-pressed": kept === null }, patch, name, element("small", {}, amount));
    button.addEventListener("click", () => {
      for (const one of button.parentElement.children) one.setAttribute("aria-pressed", one === button);
      this.spans.forEach((span, index) => span.classList.toggle("muted", kept !== null && String(this.tokens[index][1]) !== String(kept)));
    });
    return button;
  }
}

function groupName(kept, levels) {
  if (!kept.length) return "kept by no level";
  const names = kept.map(level => level + 1);
  if (levels === 1) return "kept";
  if (names.length === 1) return `level ${names[0]} only`;
  return `levels ${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}
