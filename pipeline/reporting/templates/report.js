// Sorting and filtering the tables, tooltips of the charts' points, and the way from a point to its cells.
(function () {
  const tables = [...document.querySelectorAll("table.sortable")];

  function sort(table, heads, index) {
    const body = table.tBodies[0];
    const head = heads[index];
    const cells = [...body.rows].map((row) => row.cells[index].dataset.value);
    const numeric = cells.every((v) => v === "" || !isNaN(v));
    const first = numeric ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((a, b) => {
      const x = a.cells[index].dataset.value;
      const y = b.cells[index].dataset.value;
      if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stays last
      return sign * (numeric ? x - y : x.localeCompare(y));
    });
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...rows);
  }
  tables.forEach((table) => {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    heads.forEach((head, index) => {
      const button = head.querySelector("button");
      if (button) button.addEventListener("click", () => sort(table, heads, index));
    });
  });

  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = document.getElementById("comparison").tBodies[0].rows;
    let shown = 0;
    for (const row of tables.flatMap((table) => [...table.tBodies[0].rows])) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    for (const row of rows) shown += row.hidden ? 0 : 1;
    document.getElementById("shown").textContent = words.length ? shown + " of " + rows.length : "";
  });

  function unfold() { // a point or a name leads to its cells, folded out
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target && (target.matches("details") ? target : target.nextElementSibling);
    if (fold && fold.matches("details")) { fold.open = true; fold.scrollIntoView(); }
  }
  addEventListener("hashchange", unfold);
  unfold();

  const tip = document.getElementById("tip");
  const points = "svg.vega [role=graphics-symbol][aria-label]:not([aria-roledescription=axis])";
  document.querySelectorAll(points).forEach((point) => {
    point.dataset.tip = point.getAttribute("aria-label").replaceAll(" | ", "\n");
    point.setAttribute("aria-label", point.getAttribute("aria-label").replaceAll(" | ", ", "));
    point.setAttribute("tabindex", "0");
  });
  function show(event) {
    const point = event.target.closest && event.target.closest(points);
    tip.hidden = !point;
    if (!point) return;
    tip.textContent = point.dataset.tip;
    const box = point.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = scrollX + Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = scrollY + (above > 4 ? above : box.bottom + 8) + "px";
  }
  let touched = null;
  document.addEventListener("click", (event) => { // a finger's first touch shows the numbers, its second one opens the cells
    const point = event.target.closest && event.target.closest(points);
    if (point && event.pointerType === "touch" && point !== touched) event.preventDefault();
    else if (point && point.closest("a") && point.closest("a").getAttribute("href") === location.hash) unfold();
    touched = point;
    show(event);
  });
  ["mouseover", "focusin"].forEach((name) => document.addEventListener(name, show));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
})();
