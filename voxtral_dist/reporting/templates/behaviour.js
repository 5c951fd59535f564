"use strict";

// Show the values of a chart at the step nearest to the pointer, or at the next step by the arrow keys.
function readable(svg) {
  const lines = [...svg.querySelectorAll(".line")].map((line) => ({
    name: line.dataset.name,
    unit: line.dataset.unit,
    places: line.dataset.places.split(" ").map(Number),
    steps: line.dataset.steps.split(" ").map(Number),
    values: line.dataset.values.split(" "),
  }));
  const places = new Map(lines.flatMap((line) => line.steps.map((step, index) => [step, line.places[index]])));
  const steps = [...places.keys()].sort((one, other) => one - other);
  const guide = svg.querySelector(".guide");
  const readout = svg.parentElement.querySelector(".readout");
  let current = -1;

  function show(index) {
    current = Math.min(Math.max(index, 0), steps.length - 1);
    const step = steps[current];
    guide.removeAttribute("hidden");
    guide.setAttribute("transform", `translate(${places.get(step)} 0)`);
    const said = lines.filter((line) => line.steps.includes(step)).map((line) => {
      const name = lines.length > 1 ? `${line.name} ` : "";
      return `${name}${line.values[line.steps.indexOf(step)]}${line.unit && ` ${line.unit}`}`;
    });
    readout.textContent = `step ${step.toLocaleString("en")}: ${said.join(", ")}`;
  }

  function hide() {
    guide.setAttribute("hidden", "");
    readout.textContent = "";
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) * svg.viewBox.baseVal.width) / box.width;
    const distances = steps.map((step) => Math.abs(places.get(step) - x));
    show(distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) {
      event.preventDefault();
      show(current + move);
    }
  });
}

// Sort the rows by a column on a click on its head: numbers descending first, texts ascending first.
function sortable(table) {
  const body = table.tBodies[0];
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const value = (row) => row.cells[head.cellIndex].dataset.value;
      const rows = [...body.rows];
      const isNumeric = rows.every((row) => value(row) === "None" || Number.isFinite(Number(value(row))));
      const number = (row) => (value(row) === "None" ? -1 : Number(value(row)));
      const before = head.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !isNumeric;
      rows.sort((one, other) =>
        isNumeric ? number(one) - number(other) : value(one).localeCompare(value(other), undefined, { numeric: true }),
      );
      if (!ascending) rows.reverse();
      body.append(...rows);
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    });
  }
}

// Say above a table that is wider than the page that it scrolls, and let the keyboard reach it.
function scrollable(box) {
  const sign = document.createElement("p");
  sign.className = "caption scroll-sign";
  sign.textContent = "More columns: scroll sideways →";
  sign.hidden = true;
  box.before(sign);
  new ResizeObserver(() => {
    sign.hidden = box.scrollWidth <= box.clientWidth + 1;
    if (sign.hidden) box.removeAttribute("tabindex");
    else box.tabIndex = 0;
  }).observe(box);
}

document.querySelectorAll(".wide").forEach(scrollable);
document.querySelectorAll(".chart > svg").forEach(readable);
document.querySelectorAll("table.sortable").forEach(sortable);
