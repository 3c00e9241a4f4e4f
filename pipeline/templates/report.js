// Sorting the table (a column's button, by click or key) and tooltips of the charts' points.
(function () {
  const table = document.getElementById("comparison");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[1].cells];

  function sort(index) {
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
  heads.forEach((head, index) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => sort(index));
  });

  const tip = document.getElementById("tip");
  document.querySelectorAll(".point").forEach((point) => {
    const title = point.querySelector("title");
    point.dataset.tip = title.textContent;
    point.setAttribute("aria-label", title.textContent.replaceAll("\n", ", "));
    title.remove(); // else the browser shows it as well
  });
  function show(event) {
    const point = event.target.closest && event.target.closest(".point");
    tip.hidden = !point;
    if (!point) return;
    tip.textContent = point.dataset.tip;
    const box = point.querySelector(".dot").getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = scrollX + Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = scrollY + (above > 4 ? above : box.bottom + 8) + "px";
  }
  ["mouseover", "focusin", "click"].forEach((name) => document.addEventListener(name, show));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
})();
