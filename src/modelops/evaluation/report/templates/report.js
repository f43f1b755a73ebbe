"use strict";
// Everything can be read without this: it only sorts tables and enlarges images.
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...table.tBodies[0].rows].map((row) => {
        const text = row.cells[column].innerText.trim();
        const amount = parseFloat(text.replaceAll(",", "").replace("−", "-"));
        return { row, text, amount };
      });
      const order = (a, b) => {
        const [x, y] = [Number.isNaN(a.amount), Number.isNaN(b.amount)];
        if (x !== y) return x - y;
        const way = x ? a.text.localeCompare(b.text) : a.amount - b.amount;
        return down ? -way : way;
      };
      table.tBodies[0].append(...keyed.sort(order).map((item) => item.row));
    });
  });
}
const dialog = document.querySelector("dialog");
for (const image of document.querySelectorAll("figure img")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "zoom";
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => {
    const large = dialog.querySelector("img");
    large.src = image.src;
    large.className = image.className;
    large.alt = image.alt;
    dialog.querySelector("p").textContent = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => {
  if (event.target === dialog || event.target.closest("button")) dialog.close();
});
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details.caution")) details.open = true;
});
addEventListener("hashchange", reveal);
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
reveal();
