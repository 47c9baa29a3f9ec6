// The side view: what the model could have said in place of each token.

import { element } from "/web/page.js";

/** A token as it can be read: spaces and line ends are visible, and what is only part of a character says so. */
function readable({ token, bytes }) {
  if (bytes === null) return "part of a character";
  if (token === "") return "the end";
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function row(candidate, chosen) {
  const share = Math.exp(candidate.logprob);
  const bar = element("span", { className: "share" });
  bar.style.width = `${(100 * share).toFixed(2)}%`;
  const percent = share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;
  return element(
    "li", { className: chosen ? "said" : "" },
    bar, element("span", { className: "token", textContent: readable(candidate) }), element("span", { className: "percent", textContent: percent }),
  );
}

function list(token) {
  const same = (candidate) => candidate.token === token.token && candidate.logprob === token.logprob;
  const rows = token.top_logprobs.map((candidate) => row(candidate, same(candidate)));
  if (!token.top_logprobs.some(same)) rows.push(row(token, true));
  const left = 1 - token.top_logprobs.reduce((sum, { logprob }) => sum + Math.exp(logprob), 0);
  const rest = element("p", { className: "faint", textContent: `all others ${(100 * Math.max(0, left)).toFixed(1)}%` });
  return [element("ol", { className: "candidates" }, ...rows), rest];
}

export function showAlternatives(place, word) {
  const tokens = word.tokens;
  const head = tokens.length === 1
    ? element("p", {}, "in place of ", element("b", { className: "token", textContent: readable(tokens[0]) }))
    : element("p", {}, element("b", { className: "token", textContent: word.textContent }), ` is ${tokens.length} tokens`);
  place.replaceChildren(head, ...tokens.flatMap(list));
}
