"use strict";

// Values under the pointer. Without this script, the browser shows them as its own tooltips.
const tip = document.querySelector(".tip");
for (const mark of document.querySelectorAll(".hit, td[title]")) {
  const title = mark.querySelector("title");
  mark.dataset.tip = title ? title.textContent : mark.title;
  if (title) title.remove();
  mark.removeAttribute("title");
}
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY, box.top) - tip.offsetHeight - 8)}px`;
});

// Tables that are sorted by a click on the name of a column: numbers by value, empty cells last.
const UNITS = { kB: 1e3, MB: 1e6, GB: 1e9, min: 60, h: 3600 };
function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const found = text.replaceAll(",", "").match(/^([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)/);
  return found ? Number(found[1]) * (UNITS[found[2]] || 1) : text;
}
function compare(a, b) {
  if (a === "" || b === "") return 0;
  const numbers = typeof a === "number" && typeof b === "number";
  return numbers ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.ariaSort === "descending" || (column === 0 && !head.ariaSort);
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.ariaSort = up ? "ascending" : "descending";
      const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (up ? compare(a, b) : compare(b, a)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// Back to the page that linked here, which adds its address: #back=../index.html
const back = new URLSearchParams(location.hash.slice(1)).get("back");
if (back) {
  const address = new URL(back, location.href.split("#")[0]);
  // a page of the same place only, no other site and no script
  if (address.protocol === location.protocol && address.host === location.host) {
    const link = document.createElement("a");
    link.href = address.href;
    link.textContent = "back to the comparison";
    document.querySelector(".links").prepend(link);
  }
}
