// A conversation with the student: streamed, and open to inspection token by token.

import { ask, byId, element, every, keepKey, showPulse } from "/web/page.js";
import { showAlternatives } from "/web/alternatives.js";

const ALTERNATIVES = 8;
let turns = []; // of the conversation that is shown
let stopping = null; // ends the answer under way

const log = byId("log"), prompt = byId("prompt");

function bubble(role, ...children) {
  byId("welcome").hidden = true;
  const made = element("article", { className: `turn ${role}`, "aria-label": role === "user" ? "You" : "Student" }, ...children);
  log.append(made);
  log.scrollTop = log.scrollHeight; // where it begins; from there on it is followed while the reader stays at the end
  return made;
}

const nearEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

/** Events of a response, each the JSON after "data: ". */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request(conversation) {
  const system = byId("system").value.trim(), seed = byId("seed").value, stop = byId("stop-at").value;
  return {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    temperature: byId("temperature").valueAsNumber,
    top_p: byId("top-p").valueAsNumber,
    max_completion_tokens: byId("max-tokens").valueAsNumber || 160,
    ...(seed === "" ? {} : { seed: Number(seed) }),
    ...(stop === "" ? {} : { stop }),
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: ALTERNATIVES,
  };
}

/** One word of an answer with the tokens that made it; the rarer they were, the warmer it is. */
function word(text, tokens) {
  const made = element("span", { className: "word", textContent: text, tabIndex: -1 });
  made.tokens = tokens;
  const logprob = Math.min(0, ...tokens.map((token) => token.logprob));
  made.style.setProperty("--surprise", Math.min(1, -logprob / 5).toFixed(3));
  return made;
}

function choose(chosen) {
  log.querySelector(".word.chosen")?.classList.remove("chosen");
  chosen.classList.add("chosen");
  for (const other of chosen.parentElement.children) other.tabIndex = other === chosen ? 0 : -1;
  showAlternatives(byId("alternatives"), chosen);
}

/** Stream an answer to `conversation`, which stays its own: another may have begun before it ends. */
async function answer(conversation) {
  const text = element("p", { className: "text", role: "group", "aria-label": "Answer, by token" });
  const figures = element("p", { className: "figures", textContent: "reading the prompt …" });
  const turn = bubble("assistant", text, figures);
  turn.setAttribute("aria-busy", "true");
  stopping = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  const asked = performance.now();
  let first = null, count = 0, said = "", pending = [], end = "stopped";
  const tell = () => {
    const seconds = (performance.now() - (asked + first)) / 1000;
    const pace = count > 1 && seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(0)} tokens/s` : "";
    figures.textContent = `${count} token${count === 1 ? "" : "s"}${pace} · first after ${(first / 1000).toFixed(2)} s`;
  };
  try {
    await ready;
    const body = JSON.stringify(request(conversation));
    const response = await ask("/v1/chat/completions", {
      method: "POST", body, headers: { "content-type": "application/json" }, signal: stopping.signal,
    });
    for await (const event of events(response)) {
      const choice = event.choices[0];
      if (!choice) continue;
      const stay = nearEnd();
      const tokens = choice.logprobs?.content ?? [];
      pending.push(...tokens);
      count += tokens.length;
      if (tokens.length) first ??= performance.now() - asked;
      if (choice.delta.content) {
        text.append(word(choice.delta.content, pending));
        said += choice.delta.content;
        pending = [];
      }
      if (choice.finish_reason) end = choice.finish_reason;
      if (first !== null) tell();
      if (stay) log.scrollTop = log.scrollHeight;
    }
    if (first === null) figures.textContent = "an empty answer";
    else if (end === "length") figures.append(" · cut at the most tokens");
  } catch (error) {
    if (error.name !== "AbortError") turn.append(element("p", { className: "trouble", role: "alert", textContent: error.message }));
    if (error.status === 401) askForKey();
    if (first === null) figures.remove();
    else figures.append(" · stopped");
  } finally {
    turn.removeAttribute("aria-busy");
    if (text.firstChild) text.firstChild.tabIndex = 0;
    if (said) conversation.push({ role: "assistant", content: said });
    else conversation.pop();
    byId("send").hidden = false;
    byId("stop").hidden = true;
    stopping = null;
    prompt.focus();
  }
}

function askForKey() {
  byId("key-form").hidden = false;
  togglePanel(true);
  byId("key").focus();
}

function send() {
  const content = prompt.value.trim();
  if (!content || stopping) return;
  turns.push({ role: "user", content });
  bubble("user", element("p", { className: "text", textContent: content }));
  prompt.value = "";
  fit();
  answer(turns);
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function togglePanel(open) {
  byId("panel").classList.toggle("open", open);
  document.body.classList.toggle("panel-open", byId("panel").classList.contains("open"));
  byId("open-panel").setAttribute("aria-expanded", String(byId("panel").classList.contains("open")));
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
byId("stop").addEventListener("click", () => stopping?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (stopping) stopping.abort();
  else if (byId("panel").classList.contains("open")) { togglePanel(false); byId("open-panel").focus(); }
});
byId("open-panel").addEventListener("click", () => togglePanel());
byId("close-panel").addEventListener("click", () => { togglePanel(false); byId("open-panel").focus(); });
byId("reset").addEventListener("click", () => {
  stopping?.abort();
  turns = [];
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  byId("welcome").hidden = false;
  byId("alternatives").replaceChildren(element("p", { className: "faint", textContent: "Choose a word of an answer." }));
  togglePanel(false);
  prompt.focus();
});
log.addEventListener("click", (event) => {
  if (!event.target.classList.contains("word")) return;
  event.target.focus();
  if (!byId("open-panel").checkVisibility()) return;
  togglePanel(true);
  event.target.scrollIntoView({ block: "nearest" });
});
log.addEventListener("focusin", (event) => { if (event.target.classList.contains("word")) choose(event.target); });
log.addEventListener("keydown", (event) => {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (!step || !event.target.classList.contains("word")) return;
  event.preventDefault();
  event.target[step]?.focus();
});
for (const output of document.querySelectorAll("output")) {
  const input = byId(output.htmlFor.value);
  const show = () => { output.value = input.valueAsNumber === 0 && input.id === "temperature" ? "0 · greedy" : input.valueAsNumber.toFixed(2); };
  input.addEventListener("input", show);
  show();
}
byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); keepKey(byId("key").value); ready = start(); });

async function listModels() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    byId("model").replaceChildren(...data.map(({ id }) => element("option", { value: id, textContent: id })));
    byId("key-form").hidden = true;
  } catch (error) {
    if (error.status === 401) askForKey();
  }
}

const start = () => Promise.all([listModels(), look()]);

async function look() {
  const status = await showPulse();
  if (!status) return;
  const most = byId("max-tokens");
  most.max = status.max_new_tokens;
  if (most.valueAsNumber > status.max_new_tokens) most.value = status.max_new_tokens;
}

let ready = start(); // a prompt may be written before it is known who answers
every(2, look);
