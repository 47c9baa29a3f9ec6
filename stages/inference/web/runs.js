// The runs of this machine: the same facts as `monitor` and `runs` on the command line.

import { ask, byId, bytes, duration, element, every, number, showPulse } from "/web/page.js";
import { chart } from "/web/chart.js";

const percent = (share) => `${Math.round(100 * share)}%`;
const chosen = () => decodeURIComponent(location.hash.slice(1));
// Always the same one: an alert that is put on the page anew is read out anew. Not atomic: only what came is read.
const alarms = element("ul", { className: "warnings", role: "alert", "aria-atomic": "false" });

/** Have `place` hold what is `made`; whatever it holds already that looks the same stays, selected and scrolled as it is. */
function update(place, made) {
  const standing = [...place.children];
  const wanted = made.map((part) => {
    const same = standing.findIndex((old) => old.isEqualNode(part));
    return same < 0 ? part : standing.splice(same, 1)[0];
  });
  for (const old of standing) old.remove();
  wanted.forEach((part, index) => { if (part !== place.children[index]) place.insertBefore(part, place.children[index] ?? null); });
}

function badge(state) {
  return element("span", { className: `badge ${state}`, textContent: state });
}

function entry(run) {
  const said = run.updated === null ? "" : `${duration(Date.now() / 1000 - run.updated)} ago`;
  const progress = run.total ? `${percent(run.done / run.total)} of ${run.stage}` : run.verb;
  const link = element(
    "a", { href: `#${encodeURIComponent(run.name)}` },
    element("span", { className: "name", textContent: run.name }), badge(run.state),
    element("span", { className: "faint", textContent: [progress, said].filter(Boolean).join(" · ") }),
  );
  if (run.name === chosen()) link.setAttribute("aria-current", "true");
  return link;
}

function card(title, ...children) {
  return element("section", { className: "card" }, title ? element("h2", { textContent: title }) : null, ...children);
}

function meter(label, share, told) {
  const bar = element("span", { className: "fill" });
  bar.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  const track = element("div", { className: "track", role: "meter", "aria-label": label, "aria-valuenow": Math.round(100 * share) }, bar);
  return element("div", { className: "meter" }, element("span", { textContent: label }), element("span", { className: "faint", textContent: told }), track);
}

function fact(name, value) {
  return element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }));
}

function head({ facts, coverage }) {
  const figures = [
    fact("training KL", facts.kl === null ? "–" : `${number(facts.kl)} nats`),
    fact("validation KL", facts.validation_kl === null ? "–" : `${number(facts.validation_kl)} nats`),
    fact("step", facts.step ?? "–"),
    fact("coverage", coverage === null ? "–" : `${(100 * coverage).toFixed(2)}%`),
  ];
  return element(
    "header", { className: "run-head" },
    element("h1", {}, facts.name, " ", badge(facts.state)),
    element("p", { className: "faint", textContent: [facts.verb, facts.teacher && `teacher ${facts.teacher}`, facts.message].filter(Boolean).join(" · ") }),
    element("dl", { className: "facts" }, ...figures),
  );
}

function stage({ stage: name, done, total, unit, rate, left }) {
  const [told, of] = unit === "bytes" ? [bytes, ""] : [(count) => count.toLocaleString("en"), ` ${unit}`];
  const pace = !rate ? "" : unit === "bytes" ? ` · ${bytes(rate)}/s` : ` · ${number(rate)} ${unit}/s`;
  const rest = left === null ? "" : ` · ${duration(left)} left`;
  return meter(name, done / total, `${done === total ? "" : `${told(done)} of `}${told(total)}${of}${pace}${rest}`);
}

function load({ cpu, cores, memory_used, memory_total, disk_free, processes, run_cores, run_memory, gpus }) {
  const rows = [
    meter("CPU", cpu, `${percent(cpu)} of ${cores} cores`),
    meter("memory", memory_used / memory_total, `${bytes(memory_used)} of ${bytes(memory_total)}`),
    ...gpus.map((gpu) => meter(`GPU ${gpu.index}`, gpu.busy ?? 0, `${gpu.busy === null ? "?" : percent(gpu.busy)} · ${gpu.memory_used === null ? "?" : bytes(gpu.memory_used)}`)),
  ];
  const own = processes ? `the run: ${processes} processes, ${run_cores.toFixed(1)} cores, ${bytes(run_memory)} · ` : "";
  return card("This machine", ...rows, element("p", { className: "faint", textContent: `${own}${bytes(disk_free)} of disk free` }));
}

function sample({ prompt, answer, label }) {
  const part = (name, text) => [element("dt", { textContent: name }), element("dd", { textContent: text })];
  return element("dl", { className: "sample" }, ...part("prompt", prompt), ...part("answer", answer), ...part("label", label));
}

function note({ time, stage: name, text, level }) {
  const when = new Date(1000 * time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return element("li", { className: level }, element("time", { textContent: when }), element("b", { textContent: name }), element("span", { textContent: `${level === "warning" ? "warning: " : ""}${text}` }));
}

function view(run) {
  const parts = [head(run), alarms];
  if (run.stages.length) parts.push(card("Progress", ...run.stages.map(stage)));
  const curves = run.curves.filter((curve) => curve.values.length > 1);
  if (curves.length) parts.push(element("section", { className: "charts", "aria-label": "Curves" }, ...curves.map(chart)));
  parts.push(load(run.load));
  if (run.samples.length) {
    const { step } = run.samples[0];
    const title = step === null ? "Answers of the newest evaluation" : `Answers after ${step.toLocaleString("en")} steps`;
    parts.push(card(title, ...run.samples.map(sample)));
  }
  if (run.notes.length) parts.push(card("Newest notes", element("ul", { className: "notes" }, ...run.notes.map(note))));
  return parts;
}

async function show() {
  try {
    const runs = await (await ask("/api/runs")).json();
    if (!runs.length) {
      update(byId("view"), [element("p", { className: "faint", textContent: "There is no run under runs/ where this server was started." })]);
      return;
    }
    if (!runs.some((run) => run.name === chosen())) history.replaceState(null, "", `#${encodeURIComponent(runs[0].name)}`);
    const focused = byId("list").contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    update(byId("list"), runs.map(entry));
    if (focused) [...byId("list").children].find((link) => link.getAttribute("href") === focused)?.focus();
    const name = chosen();
    const run = await (await ask(`/api/runs/${encodeURIComponent(name)}`)).json();
    if (name !== chosen()) return;
    update(byId("view"), view(run));
    update(alarms, run.warnings.map((text) => element("li", { textContent: text })));
  } catch (error) {
    update(byId("view"), [element("p", { className: "trouble", role: "alert", textContent: error.status === 401 ? "A key is needed: give it on the chat page." : error.message })]);
  }
}

addEventListener("hashchange", show);
every(2, async () => { await Promise.all([show(), showPulse()]); });
