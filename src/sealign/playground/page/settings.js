// What the user sets: the edits and their strengths, sampling, system prompt, arguments of the chat template.

const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A strength that was chosen by a search has many digits.
const brief = (strength) => String(Number(strength.toPrecision(4)));

// A layer list such as 3, 9-29.
function ranges(layers) {
  const runs = [];
  for (const layer of layers) {
    const last = runs[runs.length - 1];
    if (last && layer === last[1] + 1) last[1] = layer;
    else runs.push([layer, layer]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

const shown = [];

// Show an edit, and return its row and a function that gives its present strength.
export function showEdit(edit) {
  const at = shown.findIndex((other) => other.edit.name === edit.name);
  const id = `edit-${at < 0 ? shown.length : at}`;
  const onOff = element("input", { type: "checkbox", id, checked: true });
  const own = edit.strength === null ? "" : `own strength ${brief(edit.strength)}`;
  const place = edit.layers.length ? `${edit.site}, layer${edit.layers.length > 1 ? "s" : ""} ${ranges(edit.layers)}` : "";
  const about = [edit.method, place, own].filter(Boolean).join("; ");
  const row = element("div", { className: "edit" });
  row.append(element("label", { className: "switch", htmlFor: id }, onOff, edit.name));
  row.append(element("p", { className: "note", textContent: about }));
  let number = null;
  if (edit.strength !== null) {
    const step = edit.slider / 100;
    const slider = element("input", { type: "range", min: -edit.slider, max: edit.slider, step, value: edit.strength });
    slider.setAttribute("aria-label", `Strength of ${edit.name}, slider`);
    number = element("input", { type: "number", min: -edit.max_strength, max: edit.max_strength, step: "any",
      value: edit.strength, required: true, id: `${id}-strength` });
    number.setAttribute("aria-label", `Strength of ${edit.name}`);
    slider.addEventListener("input", () => { number.value = slider.value; });
    number.addEventListener("input", () => { if (number.value !== "") slider.value = number.value; });
    row.append(element("div", { className: "strength" }, slider, number));
  }
  for (const remark of edit.remarks) row.append(element("p", { className: "note", textContent: `Warning: ${remark}` }));
  if (at < 0) byId("edits").append(row);
  else shown[at].row.replaceWith(row);
  shown[at < 0 ? shown.length : at] = { edit, onOff, number, row };
  return { row, strength: () => (number === null ? null : Number(checked(number, `Strength of ${edit.name}`))) };
}

function checked(field, name) {
  if (field.checkValidity()) return field.value;
  field.focus();
  throw new Error(`${name}: ${field.validationMessage}`);
}

export function activeEdits() {
  return shown.filter(({ onOff }) => onOff.checked).map(({ edit, number }) => ({
    name: edit.name,
    strength: number === null ? null : Number(checked(number, `Strength of ${edit.name}`)),
  }));
}

export function describeEdits(edits) {
  if (!edits.length) return "no edit";
  return edits.map(({ name, strength }) => (strength === null ? name : `${name} ${brief(strength)}`)).join(", ");
}

// The rules of --chat-template-arg: a value is JSON where it is JSON, else text.
function templateArguments() {
  const found = {};
  for (const line of byId("template-arguments").value.split("\n")) {
    if (!line.trim()) continue;
    const at = line.indexOf("=");
    const name = line.slice(0, at).trim();
    const text = line.slice(at + 1).trim();
    if (at < 0 || !name || !text) throw new Error(`Chat template arguments: "${line}" must be NAME=VALUE.`);
    try { found[name] = JSON.parse(text); } catch { found[name] = text; }
  }
  return found;
}

export function showTemplateArguments(given) {
  byId("template").hidden = given === null;
  const lines = Object.entries(given ?? {}).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  byId("template-arguments").value = lines.join("\n");
}

// What an answer depends on beside the conversation.
export function readContext() {
  return {
    edits: activeEdits(),
    system: byId("system").value.trim() ? byId("system").value : null,
    template_arguments: templateArguments(),
  };
}

export function readSampling() {
  const temperature = checked(byId("temperature"), "Temperature");
  return {
    temperature: Number(temperature) > 0 ? Number(temperature) : null,
    top_p: Number(checked(byId("top-p"), "Top-p")),
    seed: Number(checked(byId("seed"), "Seed")),
    max_new_tokens: Number(checked(byId("max-new-tokens"), "Max new tokens")),
  };
}
