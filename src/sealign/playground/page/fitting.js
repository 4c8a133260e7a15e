// Fit an edit on demonstrations, show the verdict, and save it.

import { element, showEdit } from "./settings.js";

const byId = (id) => document.getElementById(id);
const signed = (value) => (value === null ? "not finite" : `${value >= 0 ? "+" : ""}${value.toFixed(3)}`);
const interval = ([value, low, high]) => `${signed(value)} [${signed(low)}, ${signed(high)}]`;

// A row of an edit that was fitted here gets a button that saves it at its present strength.
function addSaving({ row, strength }, edit, ask, complain) {
  const folder = element("input", { value: edit.name.split("#")[0], autocomplete: "off", spellcheck: false });
  folder.setAttribute("aria-label", `Folder to save ${edit.name} to`);
  const button = element("button", { type: "button", textContent: "Save" });
  const said = element("p", { className: "note" });
  said.setAttribute("role", "status");
  button.addEventListener("click", async () => {
    complain(null);
    try {
      const body = { name: edit.name, strength: strength(), folder: folder.value.trim() };
      await ask("api/save", body, {
        saved: (event) => {
          said.textContent = `Saved to ${event.path}`;
          byId("folders").append(element("option", { value: body.folder }));
        },
      });
    } catch (error) {
      complain(error);
    }
  });
  row.append(element("div", { className: "joined saving" }, folder, button), said);
}

function showVerdict(event) {
  byId("fit-result").append(
    element("p", {}, element("strong", { textContent: event.sentence })),
    element("p", { className: "note", textContent:
      `Preference margin on ${event.held_out} held-out demonstrations, nats per token: edited ${interval(event.margin)}, `
      + `random directions ${interval(event.random)}; KL on neutral text ${event.divergence === null ? "not finite" : event.divergence.toFixed(3)}.` }),
  );
}

export function enableFitting(about, ask, complain) {
  if (!about.methods.length) return;
  byId("fitting").hidden = false;
  byId("fit-method").append(...about.methods.map((name) => element("option", { value: name, textContent: name })));
  byId("fit-method").value = "difference_operator";
  byId("fit-source").append(...Object.keys(about.presets).map((name) => element("option", { value: name, textContent: `bundled: ${name}` })));
  byId("fit-source").addEventListener("change", (event) => { byId("fit-rows").disabled = event.target.value !== ""; });
  byId("fit-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    // What is larger is refused by the playground; reading it would only stop the page.
    if (file.size > about.max_body) return complain(new Error(`${file.name} has ${file.size} bytes, more than ${about.max_body}; use sealign fit`));
    complain(null);
    byId("fit-source").value = "";
    byId("fit-rows").disabled = false;
    byId("fit-rows").value = await file.text();
  });
  let running = null;
  byId("fit-stop").addEventListener("click", () => running?.abort());
  byId("fit").addEventListener("click", async () => {
    const [bar, result, behaviour] = [byId("fit-progress"), byId("fit-result"), byId("fit-source").value];
    const source = behaviour ? { behaviour } : { rows: byId("fit-rows").value };
    const stage = element("p", { className: "note" });
    complain(null);
    running = new AbortController();
    byId("fit").disabled = true;
    byId("fit-stop").disabled = false;
    bar.hidden = false;
    bar.value = 0;
    result.replaceChildren(stage);
    try {
      await ask("api/fit", { name: byId("fit-name").value.trim(), method: byId("fit-method").value, ...source }, {
        waiting: (event) => { stage.textContent = `Waiting: ${event.ahead} before this one`; },
        remark: (event) => result.append(element("p", { className: "note", textContent: `Warning: ${event.message}` })),
        progress: (event) => {
          stage.textContent = `${event.stage}: ${event.done} of ${event.total}`;
          bar.value = event.done / event.total;
        },
        verdict: showVerdict,
        edit: (event) => {
          const shown = showEdit(event);
          if (about.folders !== null) addSaving(shown, event, ask, complain);
        },
      }, running.signal);
      stage.remove();
    } catch (error) {
      if (error.name === "AbortError") stage.textContent = "Stopped";
      else {
        stage.remove();
        complain(error);
      }
    }
    running = null;
    bar.hidden = true;
    byId("fit").disabled = false;
    byId("fit-stop").disabled = true;
  });
}
