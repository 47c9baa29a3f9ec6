// What both pages share: the theme, requests with the API key, figures, and elements.

const KEY = "minicodformer-key";
const THEMES = ["auto", "light", "dark"];

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; text is text, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Ask the server; the API key, where one was given, is kept for this tab only. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* the status says enough */ }
  throw Object.assign(new Error(message), { status: response.status });
}

export const keepKey = (key) => sessionStorage.setItem(KEY, key);

export function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value.toLocaleString("en", { maximumFractionDigits: value < 10 && unit ? 1 : 0 })} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} d`;
}

/** Run at once and then every `seconds` while the page is looked at. */
export function every(seconds, work) {
  const turn = async () => {
    if (!document.hidden) await work();
    setTimeout(turn, 1000 * seconds);
  };
  turn();
}

/** Speed and memory of the server, in the bar. */
export async function showPulse() {
  const pulse = byId("pulse");
  try {
    const status = await (await ask("/api/status")).json();
    const loads = Object.values(status.models);
    const running = loads.reduce((sum, load) => sum + load.running, 0);
    const speed = loads.reduce((sum, load) => sum + load.tokens_per_second, 0);
    const pace = running ? `${Math.round(speed)} tokens/s, ${running} of ${status.slots} slots` : "idle";
    pulse.replaceChildren(element("span", { className: running ? "dot live" : "dot" }), `${pace} · ${bytes(status.memory)}`);
    return status;
  } catch (error) {
    pulse.replaceChildren(element("span", { className: "dot bad" }), error.status === 401 ? "a key is needed" : "no answer");
    return null;
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  byId("theme").title = `Theme: ${theme}`;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
}

setTheme(localStorage.getItem("theme") ?? "auto");
byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  localStorage.setItem("theme", next);
  setTheme(next);
});
