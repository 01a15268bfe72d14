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

// What scrolls sideways can be scrolled by key.
for (const box of document.querySelectorAll("pre, math, .table-wrapper, .cell_output table")) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}
