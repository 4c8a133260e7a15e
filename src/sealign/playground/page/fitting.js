// Fit an edit on demonstrations or search for the best one, show the verdict, and save it.

import { downloadsOf, pushingOf, savingOf } from "./edit_files.js";
import { LayerMap } from "./layer_map.js";
import { element, showEdit } from "./settings.js";
import { TableEditor } from "./table_editor.js";

const BUNDLED = "bundled:";
const byId = (id) => document.getElementById(id);
const complain = (error) => { byId("fit-problem").textContent = error ? `Error: ${error.message}` : ""; };
const signed = (value) => (value === null ? "not finite" : `${value >= 0 ? "+" : ""}${value.toFixed(3)}`);
const plain = (value) => (value === null ? "not finite" : value.toFixed(3));
const interval = (found) => (found === null ? "not known" : `${signed(found[0])} [${signed(found[1])}, ${signed(found[2])}]`);

function showVerdict(event) {
  const result = byId("fit-result");
  result.append(element("p", {}, element("strong", { textContent: event.sentence })));
  if (event.winner === null) return;
  if (event.winner) result.append(element("p", { textContent: `Winner: ${event.winner}.` }));
  const table = element("table", { className: "figures" }, element("caption", {
    textContent: `Preference margin on ${event.held_out} held-out demonstrations, nats per token, 95 % intervals` }));
  for (const [name, found] of [["edited", event.margin], ["random directions", event.random], ["reversed", event.reversed]]) {
    const row = table.insertRow();
    row.append(element("th", { scope: "row", textContent: name }));
    row.insertCell().textContent = interval(found);
  }
  const own = event.domain_divergence === undefined || event.domain_divergence === null ? "" : `; KL ${plain(event.domain_divergence)} on the model's own answers`;
  result.append(table, element("p", { className: "note", textContent:
    `Damage on neutral text: loss ${interval(event.loss)}, KL ${plain(event.divergence)}${own}; nats per token.` }));
}

// What is sent to be fitted or searched, or an error.
function readRequest(table) {
  const source = byId("fit-source").value;
  const demonstrations = { table: () => ({ table: table.rows() }), text: () => ({ rows: byId("fit-rows").value }) }[source]
    ?? (() => ({ behaviour: source.slice(BUNDLED.length) }));
  const common = { name: byId("fit-name").value.trim(), ...demonstrations() };
  const method = byId("fit-method").value;
  if (method) return ["api/fit", { ...common, method }];
  const minutes = byId("search-minutes");
  if (!minutes.checkValidity()) {
    minutes.focus();
    throw new Error(`Time limit: ${minutes.validationMessage}`);
  }
  const methods = [...document.querySelectorAll("#search-methods input:checked")].map(({ value }) => value);
  return ["api/search", { ...common, methods, layers: byId("search-layers").value.trim() || "all",
    max_minutes: Number(minutes.value), deployable: byId("search-deployable").checked }];
}

function showSearch({ methods, searched, obstacle }) {
  byId("search-methods").append(...methods.map((name) => element("label", { className: "switch" },
    element("input", { type: "checkbox", value: name, checked: searched.includes(name) }), name)));
  byId("fit-method").addEventListener("change", () => {
    const searching = byId("fit-method").value === "";
    byId("search-settings").hidden = !searching;
    byId("fit").textContent = searching ? "Find and test" : "Fit and judge";
    byId("fit-stop").textContent = searching ? "Stop the search" : "Stop the fit";
    byId("fit").disabled = searching && obstacle !== null;
  });
  if (obstacle !== null) byId("search-about").textContent = `${obstacle}.`;
}

export function enableFitting(about, ask) {
  byId("fitting").hidden = false;
  if (about.not_offered !== null) {
    byId("fitting").replaceChildren(byId("fitting").querySelector("summary"), element("p", { className: "note", textContent: `${about.not_offered}.` }));
    return;
  }
  byId("fit-method").append(...about.methods.map((name) => element("option", { value: name, textContent: name })));
  byId("fit-method").value = "difference_operator";
  showSearch(about.search);
  byId("fit-source").append(...Object.keys(about.presets).map((name) => element("option", { value: BUNDLED + name, textContent: `bundled: ${name}` })));
  const table = new TableEditor(byId("table-rows"), byId("row-add"));
  const showSource = () => {
    for (const name of ["table", "text"]) byId(`fit-${name}`).hidden = byId("fit-source").value !== name;
  };
  byId("fit-source").addEventListener("change", showSource);
  byId("fit-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    // What is larger is refused by the playground; reading it would only stop the page.
    if (file.size > about.max_body) return complain(new Error(`${file.name} has ${file.size} bytes, more than ${about.max_body}; use sealign fit`));
    complain(null);
    byId("fit-rows").value = await file.text();
  });
  let running = null;
  byId("fit-stop").addEventListener("click", () => running?.abort());
  byId("fit").addEventListener("click", async () => {
    const [bar, result, stage] = ["fit-progress", "fit-result", "fit-stage"].map(byId);
    complain(null);
    result.replaceChildren();
    byId("fit-map").replaceChildren();
    let map = null;
    running = new AbortController();
    byId("fit").disabled = byId("fit-method").disabled = true;
    byId("fit-stop").disabled = false;
    bar.hidden = false;
    bar.value = 0;
    try {
      const [path, body] = readRequest(table);
      await ask(path, body, {
        waiting: (event) => { stage.textContent = `Waiting: ${event.ahead} before this one`; },
        remark: (event) => result.append(element("p", { className: "note", textContent: `Warning: ${event.message}` })),
        progress: (event) => {
          stage.textContent = `${event.stage}: ${event.done} of ${event.total}`;
          bar.value = event.done / event.total;
        },
        scanned: (event) => {
          map ??= new LayerMap(byId("fit-map"));
          map.add(event);
        },
        verdict: (event) => {
          showVerdict(event);
          if (event.place) map.mark(event.place);
        },
        edit: (event) => {
          const shown = showEdit(event);
          if (about.folders !== null) shown.row.append(...savingOf(event, shown.strength, ask));
          shown.row.append(downloadsOf(event, shown.strength, ask), pushingOf(event, shown.strength, ask, about.push_obstacle));
        },
      }, running.signal);
      stage.textContent = "";
    } catch (error) {
      stage.textContent = error.name === "AbortError" ? "Stopped" : "";
      if (error.name !== "AbortError") complain(error);
      if (error.row) table.mark(error.row);
    }
    running = null;
    bar.hidden = true;
    byId("fit").disabled = byId("fit-method").disabled = false;
    byId("fit-stop").disabled = true;
  });
}
