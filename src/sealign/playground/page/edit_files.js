// What leaves the page: an edit is saved in the folder of edits, or downloaded in one of several forms.

import { element } from "./settings.js";

const FORMS = { edit: "Edit", lora: "LoRA", control_vector: "Control vector", gguf_lora: "GGUF LoRA" };
let count = 0;

// A line below the actions of an edit, which says what came of them.
function statusLine() {
  const said = element("p", { className: "note" });
  said.setAttribute("role", "status");
  return said;
}

// A field and a button that saves an edit at its present strength.
export function savingOf(edit, strength, ask) {
  const folder = element("input", { value: edit.name.split("#")[0].replace(/.*\//, ""), autocomplete: "off", spellcheck: false });
  folder.setAttribute("aria-label", `Folder to save ${edit.name} to`);
  const button = element("button", { type: "button", textContent: "Save" });
  const said = statusLine();
  button.addEventListener("click", async () => {
    said.textContent = "";
    try {
      const body = { name: edit.name, strength: strength(), folder: folder.value.trim() };
      await ask("api/save", body, {
        saved: (event) => {
          said.textContent = `Saved to ${event.path}`;
          document.getElementById("folders").append(element("option", { value: body.folder }));
        },
      });
    } catch (error) {
      said.textContent = `Error: ${error.message}`;
    }
  });
  return [element("div", { className: "joined saving" }, folder, button), said];
}

async function download(body) {
  let response;
  try {
    response = await fetch("api/download", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    throw new Error("the playground does not answer; check whether it still runs");
  }
  if (!response.ok) throw new Error((await response.json()).error);
  const [, name] = response.headers.get("content-disposition").match(/filename="([^"]+)"/);
  const url = URL.createObjectURL(await response.blob());
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  return name;
}

// The buttons that download an edit at its present strength; those that cannot are off, and say why.
export function downloadsOf(edit, strength, ask) {
  const said = statusLine();
  const reasons = element("div");
  const buttons = Object.entries(FORMS).map(([form, title]) => {
    const button = element("button", { type: "button", textContent: title, disabled: form !== "edit" });
    button.addEventListener("click", async () => {
      said.textContent = "Preparing";
      try {
        said.textContent = `Downloaded ${await download({ name: edit.name, strength: strength(), form })}`;
      } catch (error) {
        said.textContent = `Error: ${error.message}`;
      }
    });
    return [form, button];
  });
  const details = element("details", { className: "more" }, element("summary", { textContent: "Download" }),
    element("div", { className: "buttons" }, ...buttons.map(([, button]) => button)), reasons, said);
  details.querySelector("summary").setAttribute("aria-label", `Download ${edit.name}`);
  let known = false;
  details.addEventListener("toggle", async () => {
    if (!details.open || known) return;
    known = true;
    said.textContent = "Checking which forms can hold this edit";
    try {
      await ask("api/forms", { name: edit.name }, {
        forms: (found) => {
          for (const [form, button] of buttons.slice(1)) {
            button.disabled = found[form] !== null;
            if (found[form] === null) continue;
            const id = `reason-${count++}`;
            button.setAttribute("aria-describedby", id);
            reasons.append(element("p", { className: "note", id, textContent: `${FORMS[form]}: ${found[form]}.` }));
          }
        },
      });
      said.textContent = "";
    } catch (error) {
      known = false;
      said.textContent = `Error: ${error.message}`;
    }
  });
  return details;
}

// A form that pushes an edit at its present strength to the Hub, with the login of the playground's machine.
export function pushingOf(edit, strength, ask, obstacle) {
  const said = statusLine();
  const repository = element("input", { placeholder: "owner/name", autocomplete: "off", spellcheck: false, disabled: obstacle !== null });
  repository.setAttribute("aria-label", `Repository to push ${edit.name} to`);
  const remark = element("p", { className: "note" });
  const hidden = element("input", { type: "checkbox", checked: true, disabled: obstacle !== null });
  const button = element("button", { type: "button", textContent: "Push", disabled: obstacle !== null });
  button.addEventListener("click", async () => {
    said.textContent = "Pushing";
    button.disabled = true;
    try {
      const body = { name: edit.name, strength: strength(), repository: repository.value.trim(), private: hidden.checked };
      await ask("api/push", body, {
        remark: (event) => { remark.textContent = event.message; },
        pushed: (event) => said.replaceChildren("Pushed to ", element("a", { href: event.url, textContent: event.url, target: "_blank", rel: "noopener noreferrer" })),
      });
    } catch (error) {
      said.textContent = `Error: ${error.message}`;
    }
    button.disabled = false;
  });
  if (obstacle !== null) said.textContent = `${obstacle}.`;
  const details = element("details", { className: "more" }, element("summary", { textContent: "Push to the Hub" }),
    element("div", { className: "joined saving" }, repository, button),
    element("label", { className: "switch" }, hidden, "Make a new repository private"), remark, said);
  details.querySelector("summary").setAttribute("aria-label", `Push ${edit.name} to the Hub`);
  return details;
}
