// Fits plotly figures to the page that shows them: titles as wide as it is, panels below each other
// on a phone, colours for a dark page, and a slider that fingers and keys can move.
const NARROW = matchMedia("(max-width: 599px)");
const LINE = { title: 22, subtitle: 18 }; // pixels of a line, as utils/look.py has them
const BESIDE = 0.47; // width of one of two panels side by side, as a share of the plot
const LETTER = { title: 8.8, subtitle: 6.3, axis: 8.5 }; // mean width in pixels
const pen = document.createElement("canvas").getContext("2d");

// Draws each figure when it comes near the screen (a page has dozens of them), and again when a phone
// is turned or the scheme of page or system changes. `figures` maps a place to what gives its figure.
function keepDrawn(figures) {
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
        observer.unobserve(target);
        drawFigure(target, figures.get(target)());
      }
    },
    { rootMargin: "600px" },
  );
  function drawAll() {
    observer.disconnect();
    for (const place of figures.keys()) observer.observe(place);
  }
  drawAll();
  for (const query of [NARROW, matchMedia("(prefers-color-scheme: dark)")]) {
    query.addEventListener("change", drawAll);
  }
  new MutationObserver(drawAll).observe(document.body, { attributeFilter: ["data-theme"] });
}

// A figure, its error and its count stay on one line of a cell or an item of a list.
function keepFiguresWhole() {
  for (const cell of document.querySelectorAll("td, th, li")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const { data } = walker.currentNode;
      const whole = data.replace(/ ± /g, "\u00a0±\u00a0").replace(/\bn = (?=\d)/g, "n\u00a0=\u00a0");
      if (whole !== data) walker.currentNode.data = whole;
    }
  }
}

function drawFigure(place, { data, layout, frames }) {
  let shown = structuredClone({ data, layout });
  const width = place.clientWidth;
  shown.layout = { height: 450, ...shown.layout, margin: { t: 82, ...shown.layout.margin } };
  if (NARROW.matches) stackPanels(shown, width);
  wrapTitles(shown.layout, width);
  wrapAxisTitles(shown.layout, width);
  if (NARROW.matches) thinTicks(shown.layout, width);
  const wanted = plotHeight(shown.layout);
  if (isDark()) shown = turned(shown);
  const [slider] = shown.layout.sliders ?? [];
  delete shown.layout.sliders;
  Object.assign(shown.layout, { paper_bgcolor: "transparent", plot_bgcolor: "transparent" });
  if (NARROW.matches) shown.layout.dragmode = false; // a finger scrolls the page
  place.style.height = `${shown.layout.height}px`;
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud"] };
  if (NARROW.matches) config.displayModeBar = false; // it would lie over the title
  Plotly.newPlot(place, { ...shown, frames, config }).then(() => {
    // ten stops of the tab key for each of dozens of figures, whose words are read to who uses it
    for (const button of place.querySelectorAll(".modebar-btn")) button.tabIndex = -1;
    if (NARROW.matches) giveRoom(place, wanted);
    if (slider) addSlider(place, slider);
  });
}

// Legends and turned labels take their room from the panels: only what is drawn tells how much. A
// map of tokens by tokens is a square, or its diagonal would be steep.
function giveRoom(place, wanted) {
  const { w, h } = place._fullLayout._size;
  const cells = place.calcdata.length === 1 ? place.calcdata[0][0].z : undefined;
  const isSquare = cells?.length > 20 && cells.length === cells[0].length;
  const height = place.layout.height + (isSquare ? w - h : Math.max(wanted - h, 0));
  place.style.height = `${height}px`;
  Plotly.relayout(place, { height, ...roomForNames(place) });
}

// Names of points near the ends of the x axis are not cut.
function roomForNames({ _fullData, _fullLayout: { xaxis } }) {
  const named = _fullData.find(({ mode }) => /text/.test(mode));
  if (!named) return {};
  const [low, high] = xaxis.range;
  const half = (22 / xaxis._length) * (high - low);
  const ends = [Math.min(low, Math.min(...named.x) - half), Math.max(high, Math.max(...named.x) + half)];
  return { "xaxis.range": ends };
}

function plotHeight({ height, margin }) {
  return height - margin.t - (margin.b ?? 60);
}

function isDark() {
  return getComputedStyle(document.body).backgroundColor.match(/\d+/)[0] < 100;
}

// plotly's own slider cannot be reached by key, and is too small for a finger.
function addSlider(place, { active, currentvalue, steps }) {
  const before = place.parentElement.querySelector(".steps");
  const box = document.createElement("div");
  const value = document.createElement("output");
  const range = document.createElement("input");
  Object.assign(range, { type: "range", min: 0, max: steps.length - 1 });
  range.setAttribute("aria-label", currentvalue.prefix.replace(/\W+$/, ""));
  range.value = before ? before.querySelector("input").value : active;
  function show() {
    const { method, args, label } = steps[range.value];
    value.textContent = `${currentvalue.prefix}${label}`;
    range.setAttribute("aria-valuetext", label);
    Plotly[method](place, ...args).catch(() => {}); // a later step has overtaken it
  }
  range.addEventListener("input", show);
  box.className = "steps";
  box.append(value, range);
  if (before) before.replaceWith(box);
  else place.after(box);
  show();
}

// Titles

function wrapTitles(layout, width) {
  const { title } = layout;
  if (!title?.text) return;
  for (const [kind, part] of [["title", title], ["subtitle", title.subtitle ?? {}]]) {
    const text = rewrapped(part.text ?? "", (width - 20) / LETTER[kind]);
    const more = LINE[kind] * (lines(text) - lines(part.text ?? ""));
    layout.margin.t += more;
    layout.height += more;
    part.text = text;
  }
}

function wrapAxisTitles(layout, width) {
  const room = { x: width - 100, y: plotHeight(layout) };
  for (const name of Object.keys(layout).filter((name) => /^[xy]axis\d*$/.test(name))) {
    const { title, domain = [0, 1] } = layout[name];
    const letters = (room[name[0]] * (domain[1] - domain[0])) / LETTER.axis;
    if (title?.text) title.text = rewrapped(title.text, Math.max(letters, 12));
  }
}

function rewrapped(text, letters) {
  if (/<(?!br>)/.test(text)) return text; // marked text is laid out by who marked it
  const rows = [""];
  for (const word of text.replaceAll("-<br>", "-").replaceAll("<br>", " ").split(" ")) {
    const row = `${rows.at(-1)} ${word}`.trim();
    if (row.length <= letters || !rows.at(-1)) rows[rows.length - 1] = row;
    else rows.push(word);
  }
  return rows.join("<br>");
}

function lines(text) {
  return text.split("<br>").length;
}

// Numbers below an axis do not meet.
function thinTicks(layout, width) {
  for (const name of Object.keys(layout).filter((name) => /^xaxis\d*$/.test(name))) {
    const { domain: [from, to] = [0, 1], nticks, tickvals, ticktext, type } = layout[name];
    const room = (width - 100) * (to - from);
    if (nticks) layout[name].nticks = Math.min(nticks, Math.max(3, Math.floor(room / 32)));
    if (!tickvals?.length || !(ticktext ?? tickvals).every((text) => /^\d+$/.test(text))) continue;
    const places = type === "log" ? tickvals.map(Math.log) : tickvals;
    const pixels = room / (places.at(-1) - places[0]);
    let last = -Infinity;
    const kept = places.map((place) => {
      const isFree = (place - last) * pixels >= 26;
      if (isFree) last = place;
      return isFree;
    });
    layout[name].tickvals = tickvals.filter((_, i) => kept[i]);
    if (ticktext) layout[name].ticktext = ticktext.filter((_, i) => kept[i]);
  }
}

// Panels

// Two or three panels in a row go below each other; of more, small maps, two stay side by side.
function stackPanels({ data, layout }, width) {
  const panels = Object.keys(layout)
    .filter((name) => /^xaxis\d*$/.test(name))
    .map((name) => {
      const x = layout[name];
      const y = layout[`yaxis${(x.anchor ?? "y").slice(1)}`] ?? {};
      return { x, y, across: x.domain ?? [0, 1], up: y.domain ?? [0, 1] };
    });
  const rows = Object.values(Object.groupBy(panels, ({ up }) => up[1].toFixed(3)));
  if (!rows.some((row) => row.length > 1)) return;
  rows.sort(([a], [b]) => b.up[1] - a.up[1]);
  const plot = plotHeight(layout);
  const slots = rows.flatMap((row) => {
    const beside = row.length > 3 ? 2 : 1;
    return row.flatMap((_, i) => (i % beside ? [] : [row.slice(i, i + beside)]));
  });
  let top = 0;
  for (const slot of slots) {
    const [{ x, up }] = slot;
    slot.height = slot.length > 1
      ? (width - 100) * BESIDE // square
      : Math.min(plot * (up[1] - up[0]), width);
    slot.top = top;
    top += slot.height + (x.showticklabels === false ? 34 : 100);
  }
  const total = slots.at(-1).top + slots.at(-1).height;
  layout.height += total - plot;
  for (const slot of slots) {
    for (const panel of slot) placePanel(panel, slot, total, layout);
  }
  for (const row of rows.filter((row) => row.length === 2 || row.length === 3)) {
    for (const { y } of row.slice(1)) {
      delete y.showticklabels; // those on the left had spoken for them
      y.title = { ...row[0].y.title, ...y.title };
    }
  }
  if (layout.coloraxis) {
    const bar = { lenmode: "pixels", len: 220, x: 1.02, y: 1, yanchor: "top" };
    layout.coloraxis.colorbar = { ...layout.coloraxis.colorbar, ...bar };
  }
}

function placePanel({ x, y, across, up }, slot, total, layout) {
  const middle = (across[0] + across[1]) / 2;
  x.domain = slot.length === 1 ? [0, 1] : slot[0].x === x ? [0, BESIDE] : [1 - BESIDE, 1];
  y.domain = [1 - (slot.top + slot.height) / total, 1 - slot.top / total];
  y.domain[0] = Math.max(y.domain[0], 0);
  for (const heading of layout.annotations ?? []) {
    const here = Math.abs(heading.x - middle) < 0.01 && Math.abs(heading.y - up[1]) < 0.01;
    if (heading.yref === "paper" && here && !heading.placed) {
      heading.placed = true;
      heading.x = (x.domain[0] + x.domain[1]) / 2;
      heading.y = y.domain[1];
    }
  }
}

// Colours

// A figure for a dark page: each colour keeps its hue and has the opposite lightness. Reds do not, or
// a scale would run from brown to pink: by their lightness they become what stands beside it here.
const REDS = [
  [51, [255, 124, 122]],
  [101, [236, 70, 74]],
  [145, [186, 48, 54]],
  [187, [128, 38, 42]],
  [226, [84, 36, 38]],
  [247, [44, 44, 44]],
];

function turned(value, key = "") {
  if (Array.isArray(value)) return value.map((item) => turned(item, key));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, turned(item, name)]));
  }
  if (typeof value !== "string") return value;
  if (/scale/i.test(key)) return turnedColour(value, 0.65); // small values are not lost in the dark
  if (/color/i.test(key)) return turnedColour(value);
  if (key !== "text") return value;
  return value
    .replace("darker is more", "brighter is more")
    .replace(/color: ?(#\w+)/g, (_, colour) => `color:${turnedColour(colour)}`);
}

function turnedColour(colour, power = 0.85) {
  if (!CSS.supports("color", colour)) return colour; // the name of an axis or of a scale
  pen.fillStyle = colour; // which then reads #rrggbb or rgba(r, g, b, a)
  const [red, green, blue, alpha = 1] = pen.fillStyle.startsWith("#")
    ? pen.fillStyle.match(/\w\w/g).map((part) => parseInt(part, 16))
    : pen.fillStyle.match(/[\d.]+/g).map(Number);
  const [low, high] = [Math.min(red, green, blue), Math.max(red, green, blue)];
  const lightness = (high + low) / 2;
  if (red === high && high - low > 20 && Math.abs(green - blue) < 0.42 * (high - low)) {
    return `rgba(${reddened(lightness).join(", ")}, ${alpha})`;
  }
  const shift = 255 * (1 - lightness / 255) ** power - lightness;
  // black becomes white, and white the colour of the page
  const parts = [red, green, blue].map((part) => Math.round(20 + 0.92 * (part + shift)));
  return `rgba(${parts.join(", ")}, ${alpha})`;
}

function reddened(lightness) {
  const above = Math.max(1, REDS.findIndex(([light]) => light >= lightness));
  const [[from, first], [to, last]] = REDS.slice(above - 1, above + 1);
  const share = Math.min(Math.max((lightness - from) / (to - from), 0), 1);
  return first.map((part, i) => Math.round(part + share * (last[i] - part)));
}
