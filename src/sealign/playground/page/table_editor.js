// The table of demonstrations: a row for each, to type in or to paste from a spreadsheet.

import { element } from "./settings.js";

const COLUMNS = ["prompt", "positive", "negative"];

// The cells of a text that a spreadsheet has copied: tabs between cells, quotation marks around cells with line breaks.
export function readCells(text) {
  const rows = [[]];
  let at = 0;
  while (at < text.length) {
    let cell = "";
    if (text[at] === '"') {
      const quoted = /"((?:[^"]|"")*)"(?=[\t\r\n]|$)/y;
      quoted.lastIndex = at;
      const found = quoted.exec(text);
      if (found) {
        cell = found[1].replaceAll('""', '"');
        at = quoted.lastIndex;
      }
    }
    while (at < text.length && !"\t\r\n".includes(text[at])) cell += text[at++];
    rows[rows.length - 1].push(cell);
    if (text[at] === "\t") {
      if (++at === text.length) rows[rows.length - 1].push("");
      continue;
    }
    if (text[at] === "\r") at += 1;
    if (text[at] === "\n") at += 1;
    if (at < text.length) rows.push([]);
  }
  return rows;
}

export class TableEditor {
  constructor(body, add) {
    this.body = body;
    add.addEventListener("click", () => this.focus(this.append()));
    for (let number = 0; number < 3; number += 1) this.append();
  }

  append() {
    const row = element("tr", {}, element("th", { scope: "row", className: "number" }));
    for (const column of COLUMNS) {
      const cell = element("textarea", { rows: 1, placeholder: column });
      cell.dataset.column = column;
      cell.addEventListener("keydown", (event) => this.enter(event, row, column));
      cell.addEventListener("paste", (event) => this.paste(event, row, column));
      cell.addEventListener("input", () => row.classList.remove("wrong"));
      row.append(element("td", {}, cell));
    }
    const button = element("button", { type: "button", textContent: "\u00d7", className: "delete" });
    button.addEventListener("click", () => this.remove(row));
    row.append(element("td", {}, button));
    this.body.append(row);
    this.number();
    return row;
  }

  remove(row) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    this.focus(next ?? this.append());
    this.number();
  }

  number() {
    [...this.body.rows].forEach((row, index) => {
      row.querySelector(".number").textContent = index + 1;
      for (const cell of row.querySelectorAll("textarea")) cell.setAttribute("aria-label", `${cell.dataset.column} of row ${index + 1}`);
      row.querySelector(".delete").setAttribute("aria-label", `Delete row ${index + 1}`);
    });
  }

  focus(row, column = "prompt") {
    row.querySelector(`[data-column=${column}]`).focus();
  }

  enter(event, row, column) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.focus(row.nextElementSibling ?? this.append(), column);
  }

  // Cells of a spreadsheet fill the table from the focused cell on; any other text goes into this cell.
  paste(event, row, column) {
    const text = event.clipboardData.getData("text/plain");
    if (!text.includes("\t") && !/<table/i.test(event.clipboardData.getData("text/html"))) return;
    event.preventDefault();
    const cells = readCells(text);
    const columns = COLUMNS.slice(COLUMNS.indexOf(column));
    const isHeader = cells[0].every((cell, index) => cell.trim().toLowerCase() === columns[index]);
    let place = row;
    for (const line of isHeader ? cells.slice(1) : cells) {
      place ??= this.append();
      line.slice(0, columns.length).forEach((cell, index) => {
        place.querySelector(`[data-column=${columns[index]}]`).value = cell;
      });
      place.classList.remove("wrong");
      place = place.nextElementSibling;
    }
  }

  // The rows that are not empty; empty ones are removed, so that errors name the rows as they are shown.
  rows() {
    const found = [];
    for (const row of [...this.body.rows]) {
      row.classList.remove("wrong");
      const values = [...row.querySelectorAll("textarea")].map(({ value }) => value);
      if (values.some((value) => value.trim())) found.push(Object.fromEntries(COLUMNS.map((column, index) => [column, values[index]])));
      else row.remove();
    }
    if (!this.body.rows.length) this.append();
    this.number();
    return found;
  }

  // Show that a row, counted from 1, is wrong.
  mark(number) {
    const row = this.body.rows[number - 1];
    if (!row) return;
    row.classList.add("wrong");
    const empty = [...row.querySelectorAll("textarea")].find(({ value }) => !value.trim());
    this.focus(row, empty?.dataset.column);
  }
}
