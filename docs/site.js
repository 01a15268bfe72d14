const figures = new Map();
for (const place of document.querySelectorAll(".plotly-graph-div")) {
  const source = place.nextElementSibling;
  figures.set(place, () => JSON.parse(source.textContent));
}
keepDrawn(figures);

// The contents beside a page go along with the reader.
const contents = document.querySelector(".toc-scroll");
if (contents) {
  const follow = () => {
    const here = [...contents.querySelectorAll(".scroll-current")].at(-1)?.getBoundingClientRect();
    const seen = contents.getBoundingClientRect();
    if (here && (here.top < seen.top || here.top > seen.bottom - 40)) {
      contents.scrollTop += here.top - seen.top - seen.height / 3;
    }
  };
  new MutationObserver(follow).observe(contents, { subtree: true, attributeFilter: ["class"] });
}

// On a phone each row of a table that is wider than the screen becomes a card: its cells below each
// other, each named by the head of its column.
function asCards() {
  for (const table of document.querySelectorAll("table:has(thead)")) {
    table.classList.remove("cards");
    const box = table.closest(".table-wrapper") ?? table;
    if (!NARROW.matches || box.scrollWidth <= box.clientWidth) continue;
    if (!table.role) nameCells(table);
    table.classList.add("cards");
  }
}

function nameCells(table) {
  const heads = [];
  for (const row of table.tHead.rows) { // pandas has a second one, for the name of the index
    const texts = [...row.cells].flatMap((cell) => Array(cell.colSpan).fill(cell.textContent.trim()));
    texts.forEach((text, i) => (heads[i] = `${heads[i] ?? ""} ${text}`.trim()));
  }
  table.role = "table"; // cells that stand below each other are no table to a browser
  const spans = heads.map(() => ({ rows: 0 })); // for each column the cell that goes on
  for (const row of table.querySelectorAll("tbody tr")) {
    row.role = "row";
    const own = [...row.cells];
    for (const [i, head] of heads.entries()) {
      if (spans[i].rows > 0) { // a card of its own says it again
        spans[i].rows--;
        const again = spans[i].cell.cloneNode(true);
        again.removeAttribute("id");
        again.classList.add("again");
        row.insertBefore(again, own[0] ?? null);
      } else if (own.length) {
        const cell = own.shift();
        nameCell(cell, head);
        spans[i] = { cell, rows: cell.rowSpan - 1 };
      }
    }
  }
}

function nameCell(cell, head) {
  const inside = document.createElement("div");
  inside.append(...cell.childNodes);
  cell.append(inside);
  cell.role = cell.tagName === "TH" ? "rowheader" : "cell";
  cell.dataset.label = head;
  cell.classList.toggle("empty", !inside.textContent.trim());
}

keepFiguresWhole();
asCards();
NARROW.addEventListener("change", asCards);
document.addEventListener("toggle", asCards, true); // what was folded had no width

// What scrolls sideways can be scrolled by key.
for (const box of document.querySelectorAll("pre, math, .table-wrapper, .cell_output table")) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}
