// An exchange of the conversation: the message, the two answers, and what the edits do to each token.

import { describeEdits, element } from "./settings.js";

let count = 0;
// Where the mouse was moved to last: when the page scrolls below a resting mouse, nothing is pointed at.
let resting = "";
const position = (event) => `${event.screenX},${event.screenY}`;
document.addEventListener("pointermove", (event) => { resting = position(event); });

const nats = (value) => (value === null ? "not finite" : value.toFixed(3));
const percent = (log) => (log === null ? "none" : `${(100 * Math.exp(log)).toPrecision(3)} %`);
// A space at the beginning, a line break and other white space are made visible.
const visible = (name) => name.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
// Share of the full colour: seen from 0.01 nats on, nearly full at 2 nats.
const share = (divergence) => (divergence === null ? 1 : Math.sqrt(1 - Math.exp(-divergence)));

function shade(divergence) {
  const patch = element("span", { className: "shade", textContent: divergence });
  patch.style.setProperty("--share", share(divergence));
  return patch;
}

export class Exchange {
  constructor(message, edits) {
    this.id = `exchange-${count++}`;
    this.message = message;
    this.arms = {};
    this.box = element("article", { className: "exchange" });
    this.box.setAttribute("aria-label", `Answers to: ${message}`);
    const sides = element("div", { className: "sides" });
    for (const [arm, title] of [["base", "Base"], ["edited", `Edited: ${describeEdits(edits)}`]]) {
      const text = element("p", { className: "text" });
      const side = element("section", { className: `answer ${arm}` }, element("h3", { textContent: title }), text);
      side.setAttribute("aria-label", title);
      sides.append(side);
      this.arms[arm] = { text, side, tokens: [], answer: null };
    }
    this.notes = element("div");
    this.box.append(element("p", { className: "question", textContent: message }), sides, this.notes);
  }

  note(text) {
    this.notes.append(element("p", { className: "note", textContent: text }));
  }

  addToken({ arm, id, text, end }) {
    const { tokens, text: place } = this.arms[arm];
    const span = element("span", { className: "token", textContent: tokens.length ? text : text.trimStart() });
    if (end) Object.assign(span, { className: "token mark", textContent: "end", hidden: true });
    place.append(span);
    tokens.push({ id, text, span });
  }

  finish({ arm, text, complete }) {
    this.arms[arm].answer = text;
    if (!complete) this.arms[arm].side.append(element("p", { className: "note", textContent: "Cut off at the maximum number of tokens." }));
  }

  // What was said so far stays in the conversation.
  stop() {
    const arms = Object.values(this.arms);
    if (arms.every(({ tokens }) => !tokens.length)) return this.note("Stopped before the first token; not part of the conversation.");
    for (const arm of arms) arm.answer ??= arm.tokens.map(({ text }) => text).join("").trim();
    return this.note("Stopped.");
  }

  // The exchange as part of a later request, or null if an answer is missing.
  get record() {
    const [base, edited] = [this.arms.base.answer, this.arms.edited.answer];
    return base === null || edited === null ? null : { user: this.message, base, edited };
  }

  get editedIds() {
    return this.arms.edited.tokens.map(({ id }) => id);
  }

  // Shade the tokens of the edited answer, and let mouse and arrow keys choose one of them.
  showEffects({ tokens, mean_divergence, at_least }) {
    const { text, side, tokens: parts } = this.arms.edited;
    const mean = mean_divergence === null ? "" : ` on average ${at_least ? "at least " : ""}${nats(mean_divergence)} nats per token.`;
    const legend = element("span", { className: "legend" }, "Shades:", ...[0.01, 0.1, 0.5, 2].map(shade));
    side.append(element("p", { className: "note mean" }, `KL from base:${mean} `, legend));
    const detail = element("div", { className: "detail", hidden: true });
    detail.setAttribute("aria-live", "polite");
    this.notes.before(detail);
    text.classList.add("scored");
    text.tabIndex = 0;
    text.setAttribute("role", "listbox");
    text.setAttribute("aria-label", "Tokens of the edited answer; arrow keys choose one");
    let chosen = -1;
    const choose = (index) => {
      if (chosen >= 0) parts[chosen].span.setAttribute("aria-selected", "false");
      chosen = index;
      parts[index].span.setAttribute("aria-selected", "true");
      text.setAttribute("aria-activedescendant", parts[index].span.id);
      detail.replaceChildren(...describeToken(tokens[index], at_least));
      detail.hidden = false;
    };
    parts.forEach(({ span }, index) => {
      span.id = `${this.id}-${index}`;
      span.hidden = false;
      // A token that ends within a character has no text of its own.
      if (span.textContent === "") Object.assign(span, { className: "token mark", textContent: "\u2026" });
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.style.setProperty("--share", share(tokens[index].divergence));
      span.addEventListener("pointerenter", (event) => { if (position(event) !== resting) choose(index); });
      span.addEventListener("click", () => choose(index));
    });
    text.addEventListener("focus", () => { if (chosen < 0) choose(0); });
    text.addEventListener("keydown", (event) => {
      const last = parts.length - 1;
      const next = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last };
      if (!(event.key in next)) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(last, next[event.key])));
    });
  }
}

function describeToken(effect, atLeast) {
  const name = element("span", { className: "name", textContent: visible(effect.name) });
  const change = `: ${percent(effect.base)} in the base model, ${percent(effect.edited)} edited; KL ${atLeast ? "at least " : ""}${nats(effect.divergence)} nats`;
  const tables = element("div", { className: "tables" });
  for (const [title, found] of [["Base", effect.base_alternatives], ["Edited", effect.edited_alternatives]]) {
    const table = element("table", {}, element("caption", { textContent: `Likeliest, ${title.toLowerCase()}` }));
    for (const one of found) {
      const row = table.insertRow();
      row.className = one.name === effect.name ? "chosen" : "";
      row.insertCell().append(element("span", { className: "name", textContent: visible(one.name) }));
      row.insertCell().textContent = percent(one.log_probability);
    }
    tables.append(table);
  }
  return [element("p", {}, name, change), tables];
}
