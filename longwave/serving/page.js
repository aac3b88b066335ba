// The page asks the server as any client does. What models write reaches it as text nodes only, never as markup.

const find = id => document.getElementById(id);
const KEPT_MOST = 2048, KEPT_EVERY = 1500;
const state = { models: [], history: [], asking: null, rates: [], key: sessionStorage.getItem("key") ?? "", kept: 0, keeping: false };

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const chosen = () => state.models.find(one => one.id === find("model").value);
const talking = () => find("chat").checked && chosen()?.chat;

async function ask(path, body, signal) {
  const headers = { ...(body && { "content-type": "application/json" }), ...(state.key && { authorization: `Bearer ${state.key}` }) };
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (reply.status === 401) find("door").hidden = false;
  if (!reply.ok) throw new Error((await reply.json().catch(() => null))?.error?.message ?? `the server answered ${reply.status}`);
  return reply;
}

function alarm(message) {
  find("alarm").textContent = message;
  find("alarm").hidden = !message;
}

// --- the models -------------------------------------------------------------------------------------------------------

async function drawModels() {
  state.models = (await (await ask("/v1/models")).json()).data;
  find("model").replaceChildren(...state.models.map(one => element("option", { value: one.id }, one.id)));
  find("door").hidden = true;
  alarm("");
  drawModel();
}

function drawModel() {
  const { layout, max_model_len, chat, levels } = chosen();
  const deep = levels ? `, ${levels} ${levels === 1 ? "level" : "levels"}` : "";
  find("subtitle").textContent = `${layout}${deep}, a window of ${max_model_len.toLocaleString("en")} tokens`;
  find("mode").hidden = !chat;
  find("chat").checked = chat;
  find("max_tokens").max = max_model_len;
  forget();
}

function forget() {
  state.history = [];
  find("log").replaceChildren(find("hint"));
  find("hint").hidden = false;
  find("hint").textContent = talking() ? "Say something; Enter sends, Shift+Enter begins a line, Esc stops." : "Begin a text, and the model continues it; Enter sends, Shift+Enter begins a line, Esc stops.";
  find("text-label").textContent = talking() ? "Message" : "Text to continue";
  find("text").placeholder = find("text-label").textContent;
  find("kept").hidden = true;
}

// --- an answer --------------------------------------------------------------------------------------------------------

function wish(text) {
  const number = id => find(id).value === "" ? undefined : Number(find(id).value);
  const common = {
    model: chosen().id, stream: true, stream_options: { include_usage: true }, return_token_ids: true, max_tokens: number("max_tokens"),
    temperature: number("temperature"), top_p: number("top_p"), seed: number("seed"),
  };
  if (!talking()) return ["/v1/completions", { ...common, prompt: text }];
  const system = find("system").value ? [{ role: "system", content: find("system").value }] : [];
  return ["/v1/chat/completions", { ...common, messages: [...system, ...state.history, { role: "user", content: text }] }];
}

function entry(who, text) {
  const body = document.createTextNode(text), made = element("article", {}, element("h3", {}, who), body);
  find("hint").hidden = true;
  find("log").append(made);
  find("log").scrollTop = find("log").scrollHeight;
  return { made, body };
}

async function answer(text) {
  const chat = talking(), log = find("log");
  entry(chat ? "you" : "text", text);
  const { made, body } = entry(chosen().id, "");
  const began = performance.now(), ids = [];
  let first, usage, prompt = [];
  const controller = state.asking = new AbortController();
  busy(made, true);
  try {
    for await (const piece of events(await ask(...wish(text), controller.signal))) {
      const choice = piece.choices[0];
      prompt = piece.prompt_token_ids ?? prompt;
      usage = piece.usage ?? usage;
      ids.push(...(choice?.token_ids ?? []));
      const words = choice?.delta?.content ?? choice?.text ?? "";
      if (choice?.token_ids?.length) first ??= performance.now();
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      body.appendData(words);
      if (atEnd) log.scrollTop = log.scrollHeight;
      drawKept([...prompt, ...ids]);
    }
  } catch (error) {
    if (error.name !== "AbortError") { made.classList.add("failed"); body.appendData(error.message); }
  }
  busy(made, false);
  if (chat && body.data) state.history.push({ role: "user", content: text }, { role: "assistant", content: body.data });
  made.append(element("small", {}, told(usage, ids.length, began, first)));
  log.scrollTop = log.scrollHeight;
  drawKept([...prompt, ...ids], true);
}

function told(usage, count, began, first) {
  if (first === undefined) return "no token came";
  const wait = (first - began) / 1000, after = (performance.now() - first) / 1000;
  const rate = count > 1 && after > 0 ? `, ${((count - 1) / after).toFixed(1)} a second` : "";
  return `${usage?.prompt_tokens ?? "?"} tokens read, ${count} written${rate}; the first after ${wait.toFixed(2)} s`;
}

function busy(made, is) {
  made.classList.toggle("busy", is);
  find("log").setAttribute("aria-busy", is);
  find("stop").hidden = !is;
  find("send").hidden = is;
  if (!is) { state.asking = null; find("text").focus(); }
}

// The data of server-sent events, as objects; an error among them is thrown.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const data of parts.map(part => part.replace(/^data: /, "")).filter(part => part !== "[DONE]")) {
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// --- what is kept -----------------------------------------------------------------------------------------------------

async function drawKept(ids, last = false) {
  if (!chosen().levels || !ids.length || (state.keeping && !last) || (!last && performance.now() - state.kept < KEPT_EVERY)) return;
  state.keeping = true;
  const { id, max_model_len } = chosen(), shown = ids.slice(0, Math.min(KEPT_MOST, max_model_len));
  try {
    const { tokens, levels } = await (await ask("/kept", { model: id, tokens: shown })).json();
    if (chosen().id === id) showKept(tokens, levels, ids.length);
  } catch (error) {
    alarm(error.message);
  } finally {
    state.keeping = false;
    state.kept = performance.now();
  }
}

function showKept(tokens, levels, all) {
  find("kept").hidden = false;
  const cut = all > tokens.length ? ` The first ${tokens.length.toLocaleString("en")} of ${all.toLocaleString("en")} tokens are shown.` : "";
  find("kept-lead").textContent = `Shaded tokens go through the layers inside the ${levels === 1 ? "level" : `${levels} levels`}; the others pass them by.${cut}`;
  find("passage-text").replaceChildren(...tokens.map(({ text, kept }) => {
    const made = element("span", { class: kept.length ? "kept" : "dropped", title: kept.length ? `kept by ${kept.length} of ${levels}` : "dropped" }, text);
    made.style.setProperty("--deep", kept.length / levels);
    return made;
  }));
  const shares = [...Array(levels).keys()].map(level => {
    const met = level ? tokens.filter(one => one.kept.includes(level - 1)).length : tokens.length;
    return [level, tokens.filter(one => one.kept.includes(level)).length, met];
  });
  find("shares").replaceChildren(...shares.map(([level, kept, met]) => element("div", {},
    element("dt", {}, `level ${level + 1}`), element("dd", {}, `${kept} of ${met}`))));
}

// --- the server now ---------------------------------------------------------------------------------------------------

async function drawNow() {
  if (document.hidden || !find("door").hidden) return;
  try {
    const now = (await (await ask("/status")).json()).models[find("model").value];
    if (!now) return;
    find("rate").textContent = now.tokens_per_second.toFixed(now.tokens_per_second < 10 ? 1 : 0);
    find("running").textContent = now.running ?? 0;
    find("waiting").textContent = now.waiting ?? 0;
    find("cached").textContent = (now.cached_tokens ?? 0).toLocaleString("en");
    state.rates = [...state.rates, now.tokens_per_second].slice(-60);
    drawSpark();
    if (find("alarm").dataset.lost) { delete find("alarm").dataset.lost; alarm(""); }
  } catch (error) {
    find("alarm").dataset.lost = "yes";
    alarm(`The server cannot be reached: ${error.message}`);
  }
}

function drawSpark() {
  const most = Math.max(...state.rates, 1), step = 240 / 59, from = 240 - step * (state.rates.length - 1);
  const places = state.rates.map((rate, place) => `${(from + place * step).toFixed(1)} ${(62 - 58 * rate / most).toFixed(1)}`);
  const path = d => { const made = document.createElementNS("http://www.w3.org/2000/svg", "path"); made.setAttribute("d", d); return made; };
  const under = path(`M${from.toFixed(1)} 64 L${places.join(" L")} L240 64 Z`);
  under.setAttribute("class", "under");
  find("spark").replaceChildren(under, path(`M${places.join(" L")}`));
  find("spark-text").textContent = `the last minute; at most ${most.toFixed(most < 10 ? 1 : 0)} a second`;
}

// --- the controls -----------------------------------------------------------------------------------------------------

function listen() {
  const stop = () => state.asking?.abort();
  find("ask").addEventListener("submit", event => {
    event.preventDefault();
    const text = find("text").value;
    if (state.asking || !text.trim() || !chosen()) return;
    find("text").value = "";
    answer(text);
  });
  find("text").addEventListener("keydown", event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); find("ask").requestSubmit(); }
  });
  document.addEventListener("keydown", event => event.key === "Escape" && stop());
  find("stop").addEventListener("click", stop);
  find("clear").addEventListener("click", () => { stop(); forget(); });
  find("model").addEventListener("change", () => { stop(); state.rates = []; drawModel(); });
  find("chat").addEventListener("change", forget);
  find("door").addEventListener("submit", event => {
    event.preventDefault();
    state.key = find("key").value;
    sessionStorage.setItem("key", state.key);
    begin();
  });
  listenForTheme();
}

function listenForTheme() {
  const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
  const other = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
  const name = () => { find("theme").textContent = other(); };
  find("theme").addEventListener("click", () => { root.dataset.theme = other(); name(); });
  system.addEventListener("change", name);
  name();
}

async function begin() {
  try {
    await drawModels();
    find("text").focus();
  } catch (error) {
    alarm(error.message);
  }
}

listen();
begin().then(() => { drawNow(); setInterval(drawNow, 1000); document.documentElement.dataset.ready = "true"; });
