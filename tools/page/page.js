// Its figures have been drawn where they stand: they are fitted to the page once all is there.
addEventListener("load", () => {
  keepFiguresWhole();
  const figures = new Map();
  for (const place of document.querySelectorAll(".js-plotly-plot")) {
    const { data, layout } = structuredClone({ data: place.data, layout: place.layout });
    const frames = place._transitionData._frames.slice();
    place.parentElement.style.height = "auto"; // room for a slider, and for panels on a phone
    figures.set(place, () => ({ data, layout, frames }));
  }
  keepDrawn(figures);
});

// The contents of a narrow page lie over what they lead to.
addEventListener("click", ({ target }) => {
  const folded = target.closest("nav.contents a")?.closest("details");
  if (folded) folded.open = false;
});
