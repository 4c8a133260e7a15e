// The layer map of a search: the efficiency of each method at each layer, one row for a method and site.

import { element } from "./settings.js";

const SITES = { residual: "residual stream", mlp: "MLP output", attention: "attention output" };
const LINE = 18; // height of a row, and of a line of text
const LABELS = 150;
const NARROW = 480; // below this width, the labels stand above the rows
const signed = (value) => (value === null ? "not finite" : `${value >= 0 ? "+" : ""}${value.toFixed(3)}`);
const words = (name) => name.replaceAll("_", " ");
// Of the settings of a method at a layer, the most efficient one is shown.
const better = (one, other) => !other || (one.efficiency ?? -Infinity) > (other.efficiency ?? -Infinity);
let count = 0;

function drawn(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export class LayerMap {
  constructor(place) {
    this.id = `map-${count++}`;
    this.rows = new Map(); // by site and method: the candidate of each layer
    this.layers = 0;
    this.winner = null;
    this.chosen = null;
    this.svg = drawn("svg", { class: "map", tabindex: 0, role: "listbox" });
    this.detail = element("p", { className: "note" });
    this.detail.setAttribute("aria-live", "polite");
    this.svg.addEventListener("keydown", (event) => this.move(event));
    this.svg.addEventListener("focus", () => { if (!this.chosen) this.choose(0, this.scanned(0)[0]); });
    place.replaceChildren(this.svg, this.detail);
    this.width = 0;
    // What is drawn changes the height, so it is drawn after the observation, and only for another width.
    const watch = new ResizeObserver(() => requestAnimationFrame(() => {
      if (!this.svg.isConnected) watch.disconnect();
      else if (place.clientWidth !== this.width) this.draw();
    }));
    watch.observe(place);
  }

  add({ layers, candidates }) {
    this.layers = layers;
    for (const each of candidates) {
      const name = `${each.site} ${each.method}`;
      if (!this.rows.has(name)) this.rows.set(name, { site: each.site, method: each.method, cells: [] });
      const { cells } = this.rows.get(name);
      for (const layer of each.layers) if (better(each, cells[layer])) cells[layer] = each;
    }
    const order = Object.keys(SITES);
    this.rows = new Map([...this.rows].sort(([, a], [, b]) => order.indexOf(a.site) - order.indexOf(b.site)));
    this.draw();
  }

  mark(winner) {
    this.winner = winner;
    this.draw();
  }

  get list() {
    return [...this.rows.values()];
  }

  // The layers of a row that have been scanned.
  scanned(row) {
    return [...(this.list[row]?.cells.keys() ?? [])].filter((layer) => this.list[row].cells[layer]);
  }

  draw() {
    const width = this.svg.parentElement?.clientWidth;
    if (!this.rows.size || !width) return;
    this.width = width;
    const narrow = width < NARROW;
    const left = narrow ? 0 : LABELS;
    const cell = Math.min(24, (width - left - 2) / this.layers);
    const all = this.list.flatMap(({ cells }) => cells.map(({ efficiency }) => efficiency));
    const most = Math.max(...all, 1e-9);
    const parts = [];
    let site = null;
    let y = 0;
    this.list.forEach((row, index) => {
      if (row.site !== site) {
        site = row.site;
        parts.push(drawn("text", { x: 0, y: y + 14, class: "site" }, SITES[site] ?? site));
        y += LINE + 2;
      }
      parts.push(drawn("text", { x: narrow ? 0 : 8, y: y + 13 }, words(row.method)));
      if (narrow) y += LINE;
      for (let layer = 0; layer < this.layers; layer += 1) {
        const place = { x: left + layer * cell + 1, y: y + 1, width: cell - 1, height: LINE - 3 };
        const found = row.cells[layer];
        parts.push(drawn("rect", { ...place, class: "empty" }));
        if (!found) continue;
        const loss = !(found.efficiency > 0);
        const shade = drawn("rect", { ...place, class: loss ? "loss" : "gain", "fill-opacity": loss ? 0 : found.efficiency / most });
        // What is pointed at, also where the shade is faint.
        const target = drawn("rect", { ...place, "fill-opacity": 0, role: "option", id: `${this.id}-${index}-${layer}`, "aria-label": describe(found, layer) });
        target.setAttribute("aria-selected", String(this.chosen?.row === index && this.chosen?.layer === layer));
        target.addEventListener("pointerenter", () => this.choose(index, layer));
        target.addEventListener("click", () => this.choose(index, layer));
        parts.push(drawn("rect", { ...place, class: "ground" }), shade);
        if (this.isWinner(row, layer)) parts.push(drawn("rect", { ...place, class: "winner" }));
        parts.push(target);
      }
      y += LINE;
    });
    const step = [1, 2, 5, 10, 20].find((each) => each * cell >= 24) ?? 50;
    for (let layer = 0; layer < this.layers; layer += step) {
      parts.push(drawn("text", { x: left + (layer + 0.5) * cell, y: y + 13, "text-anchor": "middle" }, layer));
    }
    y += LINE;
    this.outline = drawn("rect", { class: "chosen", visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.outline);
    this.svg.setAttribute("width", Math.max(left + this.layers * cell + 2, Math.min(width, LABELS))); // with room for the labels
    this.svg.setAttribute("height", y);
    const scanned = new Set(this.list.flatMap((_, row) => this.scanned(row))).size;
    this.svg.setAttribute("aria-label", `Layer map: efficiency of ${this.rows.size} methods and sites at ${scanned} of ${this.layers} layers; arrow keys choose one`);
    if (this.chosen) this.choose(this.chosen.row, this.chosen.layer);
    else this.detail.textContent = `Shades: efficiency, the gain per root of twice the divergence, up to ${signed(most)}. Outlined: no gain. Grey: not scanned. Point at a cell for its figures.`;
  }

  isWinner({ site, method }, layer) {
    return this.winner !== null && this.winner.site === site && this.winner.method === method && this.winner.layers.includes(layer);
  }

  choose(row, layer) {
    const target = this.svg.querySelector(`#${this.id}-${row}-${layer}`);
    if (!target) return;
    this.svg.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    target.setAttribute("aria-selected", "true");
    this.svg.setAttribute("aria-activedescendant", target.id);
    for (const name of ["x", "y", "width", "height"]) this.outline.setAttribute(name, target.getAttribute(name));
    this.outline.setAttribute("visibility", "visible");
    this.chosen = { row, layer };
    this.detail.textContent = describe(this.list[row].cells[layer], layer);
  }

  move(event) {
    if (!this.chosen) return;
    const { row, layer } = this.chosen;
    const layers = this.scanned(row);
    const at = layers.indexOf(layer);
    const next = { ArrowRight: [row, layers[at + 1]], ArrowLeft: [row, layers[at - 1]], ArrowDown: [row + 1, layer],
      ArrowUp: [row - 1, layer], Home: [row, layers[0]], End: [row, layers[layers.length - 1]] }[event.key];
    if (!next) return;
    event.preventDefault();
    this.choose(...next);
  }
}

function describe(found, layer) {
  return `${words(found.method)}, ${SITES[found.site] ?? found.site}, layer ${layer}, ${found.token} token: efficiency ${signed(found.efficiency)}, at least ${signed(found.at_least)}`;
}
