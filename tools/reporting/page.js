"use strict";
// Nothing here is needed to read the page: runs are hidden and shown, values read off, folded parts opened for print.
for (const button of document.querySelectorAll("[data-toggle]"))
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const drawn of document.querySelectorAll("#curves [data-series], #costs [data-series]"))
      if (drawn.dataset.series === button.dataset.toggle) drawn.classList.toggle("off", !shown);
  });

const LEFT = 46, RIGHT = 332, TOP = 8, BOTTOM = 166;
const short = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });

for (const svg of document.querySelectorAll("svg[data-label]")) {
  const [x0, x1] = svg.dataset.x.split(" ").map(Number), [y0, y1] = svg.dataset.y.split(" ").map(Number);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const note = document.createElement("div");
  cursor.setAttribute("class", "cursor");
  note.className = "read";
  const hide = () => { cursor.remove(); note.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = 340 / box.width;
    const at = Math.min(Math.max((event.clientX - box.left) * scale, LEFT), RIGHT);
    const rows = [];
    for (const line of svg.querySelectorAll("[data-read]:not(.off)")) {
      let near = null;
      for (const point of line.points) if (!near || Math.abs(point.x - at) < Math.abs(near.x - at)) near = point;
      if (near) rows.push([near.x, line.dataset.series, y0 + ((BOTTOM - near.y) / (BOTTOM - TOP)) * (y1 - y0)]);
    }
    if (!rows.length) return hide();
    const place = rows.reduce((best, row) => (Math.abs(row[0] - at) < Math.abs(best[0] - at) ? row : best))[0];
    const step = x0 + ((place - LEFT) / (RIGHT - LEFT)) * (x1 - x0);
    note.replaceChildren(`${svg.dataset.label} ${short(step)}`);
    for (const [, name, value] of rows) note.append(document.createElement("br"), `${name} `, short(value));
    cursor.setAttribute("d", `M${place} ${TOP}V${BOTTOM}`);
    svg.append(cursor);
    svg.parentNode.append(note);
    const side = place / scale;
    note.style.top = `${svg.offsetTop || 40}px`;
    note.style.left = side > box.width / 2 ? "auto" : `${side + 14}px`;
    note.style.right = side > box.width / 2 ? `${box.width - side + 14}px` : "auto";
  });
}

addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
