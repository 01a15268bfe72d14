const figures = new Map();
for (const place of document.querySelectorAll(".plotly-graph-div")) {
  const source = place.nextElementSibling;
  figures.set(place, () => JSON.parse(source.textContent));
}
keepDrawn(figures);

// What scrolls sideways can be scrolled by key.
for (const box of document.querySelectorAll("pre, .cell_output table")) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}
