"use strict";

// Light or dark: the system's choice until somebody presses the button.
const root = document.documentElement;
const theme = document.getElementById("theme");
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches);
const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
systemIsDark.addEventListener("change", showTheme);
showTheme();
theme.hidden = false;

// Tables that are sorted by the buttons in their headings.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
};
const compare = (a, b) =>
  typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });
for (const button of document.querySelectorAll(".sortable .sort")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [valueOf(row, heading.cellIndex), row]);
    rows.sort(([a], [b]) => sign * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}

// Videos of a label, or with a name.
const tools = document.getElementById("tools");
if (tools) {
  const label = document.getElementById("by-label");
  const name = document.getElementById("by-name");
  const rows = [...document.querySelectorAll("#videos tbody tr")].map((row) => [
    row,
    document.getElementById(row.dataset.video),
  ]);
  const filter = () => {
    const wanted = name.value.toLowerCase();
    let shown = 0;
    for (const [row, card] of rows) {
      const fits =
        (!label.value || card.dataset.labels.split(" ").includes(label.value)) &&
        card.dataset.name.toLowerCase().includes(wanted);
      row.hidden = card.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} videos are shown`;
  };
  tools.addEventListener("submit", (event) => event.preventDefault());
  label.addEventListener("change", filter);
  name.addEventListener("input", filter);
  filter();
  tools.hidden = false;
}
