// The page: it keeps the conversation and all settings, and sends with each request what that request needs.

import { Exchange } from "./answers.js";
import { downloadsOf, pushingOf } from "./edit_files.js";
import { enableFitting } from "./fitting.js";
import { activeEdits, describeEdits, element, readContext, readSampling, showEdit, showTemplateArguments } from "./settings.js";

const byId = (id) => document.getElementById(id);
const [conversation, message, send, stop] = ["conversation", "message", "send", "stop"].map(byId);

let exchanges = [];
let about = null; // what the playground says of its model and edits
let running = null; // the controller of the answer that is being generated

const say = (text) => { byId("status").textContent = text; };
const complain = (error) => { byId("problem").textContent = error ? `Error: ${error.message}` : ""; };

// Send a request, and pass its events to functions by name until the last one.
async function ask(path, body, handlers, signal) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the playground does not answer; check whether it still runs");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw Object.assign(new Error(event.message), { row: event.row });
      if (event.event === "waiting") say(`Waiting for the model: ${event.ahead} ${event.ahead === 1 ? "request is" : "requests are"} before this one.`);
      ended = event.event === "finished";
      handlers[event.event]?.(event);
    }
  }
  if (!ended) throw new Error("the answer broke off; check whether the playground still runs");
}

// Show an edit with what can be done with it.
function offer(edit) {
  const shown = showEdit(edit);
  if (about.not_offered === null) shown.row.append(downloadsOf(edit, shown.strength, ask), pushingOf(edit, shown.strength, ask, about.push_obstacle));
}

async function answer(text) {
  let context;
  let sampling;
  try {
    context = { ...readContext(), message: text, earlier: exchanges.map(({ record }) => record) };
    sampling = readSampling();
  } catch (error) {
    complain(error);
    return;
  }
  complain(null);
  const mine = exchanges; // a new conversation has another list
  const exchange = new Exchange(text, context.edits);
  conversation.append(exchange.box);
  exchange.box.scrollIntoView({ block: "nearest" });
  running = new AbortController();
  send.disabled = true;
  stop.disabled = false;
  message.value = "";
  byId("preset").value = "";
  try {
    await ask("api/answer", { ...context, ...sampling }, {
      started: () => say("Answering"),
      remark: (event) => exchange.note(event.message),
      token: (event) => exchange.addToken(event),
      end: (event) => exchange.finish(event),
    }, running.signal);
    say("");
  } catch (error) {
    if (error.name === "AbortError") {
      exchange.stop();
      say("Stopped");
    } else {
      exchange.note("This answer failed and is not part of the conversation.");
      complain(error);
      say("");
      message.value ||= text;
    }
  }
  running = null;
  send.disabled = false;
  const focused = document.activeElement === stop || document.activeElement === document.body;
  stop.disabled = true;
  if (focused) message.focus();
  if (exchange.record === null) return;
  mine.push(exchange);
  const ids = exchange.editedIds;
  if (!ids.length) return;
  try {
    await ask("api/effects", { ...context, answer: ids }, {
      started: () => say("Comparing the tokens of the edited answer"),
      effects: (event) => exchange.showEffects(event),
    });
  } catch (error) {
    complain(error);
  }
  if (!running) say("");
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && message.value.trim()) answer(message.value);
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
const interrupt = () => running?.abort();
stop.addEventListener("click", interrupt);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") interrupt(); });
byId("reset").addEventListener("click", () => {
  interrupt();
  exchanges = [];
  conversation.replaceChildren();
  complain(null);
  message.focus();
});
// The arrow keys go through the prompts, so the focus stays.
byId("preset").addEventListener("change", (event) => { if (event.target.value) message.value = event.target.value; });

byId("measure").addEventListener("click", async () => {
  const place = byId("damage");
  byId("measure").disabled = true;
  complain(null);
  try {
    const edits = activeEdits();
    const of = (value, sign) => (value === null ? "not finite" : `${sign && value >= 0 ? "+" : ""}${value.toFixed(3)}`);
    const between = (ends, sign) => `[${of(ends[0], sign)}, ${of(ends[1], sign)}]`;
    await ask("api/damage", { edits }, {
      waiting: (event) => { place.textContent = `Waiting: ${event.ahead} before this one`; },
      progress: (event) => { place.textContent = `Measuring: ${event.done} of ${event.total} batches`; },
      damage: (event) => {
        place.textContent = `${describeEdits(edits)}: loss ${of(event.loss_increase, true)} ${between(event.loss_interval, true)}, KL `
          + `${event.at_least ? "at least " : ""}${of(event.divergence)} ${between(event.divergence_interval)} nats per token on ${event.texts} neutral texts, 95 % intervals`;
      },
    });
  } catch (error) {
    place.textContent = "";
    complain(error);
  }
  if (!running) say("");
  byId("measure").disabled = false;
});

byId("load").addEventListener("click", async () => {
  const path = byId("path").value.trim();
  if (!path) return;
  complain(null);
  byId("load").disabled = true;
  try {
    await ask("api/load", { path }, { edit: offer });
    byId("path").value = "";
  } catch (error) {
    complain(error);
  }
  if (!running) say("");
  byId("load").disabled = false;
});

async function start() {
  about = await (await fetch("api/playground")).json();
  byId("model").textContent = `Model: ${about.model}`;
  about.edits.forEach(offer);
  byId("loading").hidden = about.folders === null;
  byId("folders").append(...(about.folders ?? []).map((path) => element("option", { value: path })));
  if (!about.edits.length && about.folders === null) byId("edits").textContent = "This playground was started without an edit.";
  showTemplateArguments(about.template_arguments);
  enableFitting(about, ask);
  byId("max-new-tokens").max = about.max_new_tokens;
  for (const [behaviour, prompts] of Object.entries(about.presets)) {
    const group = element("optgroup", { label: behaviour });
    group.append(...prompts.map((prompt) => element("option", { value: prompt, textContent: prompt })));
    byId("preset").append(group);
  }
}

start().catch(() => complain(new Error("the playground does not answer; check whether it still runs, and load the page again")));
