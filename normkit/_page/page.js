// A heading of a sortable table is a button: rows go up, then down, in each group by itself; what has no figure stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.querySelectorAll("[data-sort]")];
  for (const heading of headings) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      for (const body of table.tBodies) sort(body, Number(heading.dataset.sort), up);
    });
  }
}

function sort(body, column, up) {
  const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
  const key = (row) => {
    const cell = row.cells[column];
    const number = cell.classList.contains("n") || cell.dataset.v !== undefined;
    if (!number) return cell.textContent.trim().toLowerCase() || null;
    const text = cell.dataset.v ?? cell.textContent;
    return text === "inf" ? Infinity : text.trim() === "" || isNaN(text) ? null : Number(text);
  };
  const keys = new Map(rows.map((row) => [row, key(row)]));
  rows.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "string" ? x.localeCompare(y) : x === y ? 0 : x < y ? -1 : 1;
    return up ? order : -order;
  });
  body.append(...rows);
}
