"use strict";
// What is shown stands in the address alone (#method=svd&ratio=0.8&sort=dobi-table2.3.ascending&record=…), so that a
// view can be shared: every control changes the address, and show() makes the page follow it.

const records = JSON.parse(document.getElementById("records").textContent);
const rows = [...document.querySelectorAll("tbody tr")];
const boxes = [...document.querySelectorAll(".filter input")];
const filters = [...new Set(boxes.map((box) => box.name))];
const figures = [...document.querySelectorAll("figure")];
const dialog = document.getElementById("record");
const large = document.getElementById("large");
for (const table of document.querySelectorAll("table")) table.inOrder = [...table.tBodies[0].rows];
for (const one of [...rows, ...figures]) {
  one.tags = Object.fromEntries(filters.map((name) => [name, JSON.parse(one.dataset[name] ?? "null")]));
}
for (const link of document.querySelectorAll("a.png")) link.href = link.closest("figure").querySelector("img").src;

// ---- the address

function address() {
  const text = location.hash.slice(1);
  if (text === "" || text.includes("=")) return new URLSearchParams(text);
  return new URLSearchParams({ at: decodeURIComponent(text) }); // a plain link to a table: #dobi-table2
}

function go(change) {
  const state = address();
  state.delete("at"); // the page stays where the reader is
  change(state);
  history.pushState(null, "", `#${state}`); // and would jump to its top if location.hash became empty
  show();
}

// ---- what follows it

function show() {
  const state = address();
  filter(state);
  sort(state);
  openRecords(state.getAll("record").filter((key) => key in records));
  openLarge(figures.find((figure) => figure.id === state.get("large")));
  const place = state.get("at") && document.getElementById(state.get("at"));
  if (!place) return;
  for (let one = place.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
  (place.closest(".part, figure") ?? place).scrollIntoView();
}

function filter(state) {
  const wanted = Object.fromEntries(filters.map((name) => [name, state.getAll(name)]));
  // What has no values of a filter, such as a figure over all ratios, does not depend on it.
  const fits = (tags, name) => !wanted[name].length || !tags || tags.some((tag) => wanted[name].includes(tag));
  for (const one of [...rows, ...figures]) one.hidden = !filters.every((name) => fits(one.tags[name], name));
  for (const head of document.querySelectorAll("th[data-set]")) {
    showColumn(head, filters.includes("dataset") && !fits([head.dataset.set], "dataset"));
  }
  for (const part of document.querySelectorAll(".part:has(tr, figure)")) {
    part.hidden = !part.querySelector("tbody tr:not([hidden]), figure:not([hidden])");
  }
  for (const item of document.querySelectorAll("nav li")) {
    item.hidden = document.getElementById(item.firstChild.hash.slice(1)).closest("[hidden]") !== null;
  }
  for (const box of boxes) box.checked = wanted[box.name].includes(box.value);
  for (const chosen of document.querySelectorAll(".chosen")) {
    const count = wanted[chosen.dataset.of].length;
    chosen.textContent = count ? ` (${count})` : "";
  }
  const left = rows.filter((row) => !row.hidden).length;
  const all = left === rows.length;
  document.getElementById("shown").textContent = all ? `${left} rows` : `${left} of ${rows.length} rows`;
  document.getElementById("nothing").hidden = left > 0;
  document.getElementById("reset").hidden = filters.every((name) => !wanted[name].length);
}

function showColumn(head, hidden) {
  if (head.hidden === hidden) return;
  head.hidden = hidden;
  const column = head.querySelector("button")?.dataset.column;
  if (column) for (const row of head.closest("table").inOrder) row.cells[column].hidden = hidden;
}

function sort(state) {
  const asked = new Map(state.getAll("sort").map((text) => text.split(".")).map(([id, ...how]) => [id, how]));
  for (const table of document.querySelectorAll("table")) {
    const [column, direction] = asked.get(table.id) ?? [];
    for (const button of table.querySelectorAll("thead button")) {
      button.parentElement.ariaSort = button.dataset.column === column ? direction : "none";
    }
    const sign = direction === "descending" ? -1 : 1;
    const sorted = column ? [...table.inOrder].sort((a, b) => order(a.cells[column], b.cells[column], sign)) : table.inOrder;
    // Rows that are moved lose the focus, so that they are moved only if they must.
    if (sorted.some((row, place) => row !== table.tBodies[0].rows[place])) table.tBodies[0].append(...sorted);
  }
}

// Numbers as numbers, then text, then what is empty: last in both directions.
function order(a, b, sign) {
  const rank = (cell) => ("sort" in cell.dataset ? 0 : ["", "—"].includes(cell.textContent) ? 2 : 1);
  if (rank(a) !== rank(b)) return rank(a) - rank(b);
  if (rank(a) === 0) return sign * (Number(a.dataset.sort) - Number(b.dataset.sort));
  return sign * a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

// ---- records

function element(name, content, ...children) {
  const made = document.createElement(name);
  made.textContent = content; // never as HTML: records may hold any text
  made.append(...children);
  return made;
}

function openRecords(keys) {
  if (!keys.length) return dialog.close();
  document.getElementById("record-content").replaceChildren(...keys.flatMap((key) => describe(records[key])));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function openLarge(figure) {
  if (!figure) return large.close();
  const image = figure.querySelector("img").cloneNode();
  document.getElementById("large-title").textContent = figure.querySelector("figcaption").firstChild.textContent;
  document.getElementById("large-content").replaceChildren(image);
  if (!large.open) large.showModal();
}

function describe(record) {
  const state = element("p", `${record.state}${record.reason ? `: ${record.reason}` : ""}`);
  state.className = `state ${record.state}`;
  const parts = [element("h3", record.label), state, element("pre", record.command), listed(record.about)];
  for (const [name, found] of Object.entries(record.metrics)) parts.push(element("h4", name), listed(found));
  if (record.traceback) parts.push(folded("traceback", record.traceback));
  if (record.stages.length) parts.push(element("h4", "stages"), stages(record.stages));
  for (const name of ["sizes", "left out", "content", "versions", "configuration"]) {
    if (Object.keys(record[name]).length) parts.push(folded(name, lines(record[name])));
  }
  return parts;
}

function listed(values) {
  return element("pre", lines(values));
}

function folded(name, text) {
  return element("details", "", element("summary", name), element("pre", text));
}

function stages(found) {
  const told = (stage) => `${stage.stage}: ${stage.seconds} s` + (stage.reused ? ` (reused; making it took ${stage.made_in} s)` : "");
  return element("pre", found.map(told).join("\n"));
}

// As YAML, which is how configurations are written.
function lines(value, indent = "") {
  return Object.entries(value)
    .filter(([, inner]) => inner !== undefined)
    .map(([name, inner]) => {
      const nested = inner !== null && typeof inner === "object" && !Array.isArray(inner) && Object.keys(inner).length;
      if (nested) return `${indent}${name}:\n${lines(inner, `${indent}  `)}`;
      const plain = typeof inner === "string" && /^[ -~\u00a1-\uffff]+$/.test(inner);
      return `${indent}${name}: ${plain ? inner : JSON.stringify(inner)}`;
    })
    .join("\n");
}

// ---- controls

for (const box of boxes) {
  box.addEventListener("change", () =>
    go((state) => (box.checked ? state.append(box.name, box.value) : state.delete(box.name, box.value))));
}

document.getElementById("reset").addEventListener("click", () => go((state) => filters.forEach((name) => state.delete(name))));

document.addEventListener("click", (event) => {
  const button = event.target.closest("thead button");
  const link = event.target.closest('a[href^="#"]');
  if (button) go((state) => turn(state, button));
  if (link && !event.ctrlKey && !event.metaKey) {
    event.preventDefault(); // the link's address is added to the present one, so that filters stay
    follow(link.getAttribute("href").slice(1));
  }
  for (const open of document.querySelectorAll(".filter[open]")) if (!open.contains(event.target)) open.open = false;
});

function follow(target) {
  go((state) => {
    if (target.includes("=")) new URLSearchParams(target).forEach((value, name) => state.append(name, value));
    else state.set("at", target);
  });
}

// Ascending, descending, as it was.
function turn(state, button) {
  const { id } = button.closest("table");
  const next = { none: "ascending", ascending: "descending", descending: null }[button.parentElement.ariaSort];
  const others = state.getAll("sort").filter((text) => text.split(".")[0] !== id);
  state.delete("sort");
  for (const text of next ? [...others, `${id}.${button.dataset.column}.${next}`] : others) state.append("sort", text);
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll(".filter[open]")) {
    open.open = false;
    open.querySelector("summary").focus();
  }
});

dialog.addEventListener("close", () => go((state) => state.delete("record")));
large.addEventListener("close", () => go((state) => state.delete("large")));
window.addEventListener("hashchange", show);
show();
