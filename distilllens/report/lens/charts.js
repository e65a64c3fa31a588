"use strict";
// Charts of the lens page: lines over depth and heatmaps, drawn as SVG from the page's own numbers.

const DATA = JSON.parse(document.getElementById("data").textContent);
const LEVELS = 40;

// Makes an element; text only ever becomes a text node.
function make(tag, options = {}, ...children) {
  const svg = options.svg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(svg, tag);
  for (const [name, value] of Object.entries(options)) {
    if (name !== "svg") element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const draw = (tag, options, ...children) => make(tag, { svg: true, ...options }, ...children);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const level = (share) => Math.round(clamp(share, 0, 1) * (LEVELS - 1));

function shownValue(scale, value) {
  if (scale === "share") return `${(100 * value).toFixed(1)}%`;
  if (scale === "log") return value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en");
  return value.toFixed(3);
}

// Round steps of 1, 2 or 5 for a linear axis from 0; powers of ten for a logarithmic one.
function ticks(scale, largest) {
  if (scale === "log") {
    const powers = Math.max(1, Math.ceil(Math.log10(largest)));
    const step = Math.ceil(powers / 5);
    return Array.from({ length: Math.floor(powers / step) + 1 }, (_, i) => 10 ** (i * step));
  }
  const rough = largest / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(largest / step + 1e-9) + 1 }, (_, i) => i * step);
}

function tickText(scale, value, largest) {
  if (scale === "share") return `${Math.round(100 * value * 10) / 10}%`;
  if (scale === "log") return value >= 1000 ? `${value / 1000}k` : String(value);
  return largest < 1 ? value.toFixed(2) : String(Math.round(value * 100) / 100);
}

function lineChart(statistic) {
  const { key, title, unit, scale } = statistic;
  const series = DATA.models.map((model) => ({ model, values: model.statistics[key] }));
  const largest = Math.max(...series.flatMap((s) => s.values), scale === "log" ? 2 : 1e-6);
  const figure = make("figure", { class: "card chart", "data-key": key });
  const readout = make("p", { class: "readout" });
  const holder = make("div", {
    tabindex: "0", role: "img",
    "aria-label": `${title} by depth; the arrow keys move along the layers, the values stand below`,
  });
  figure.append(make("figcaption", {}, title, make("small", {}, unit)), holder, readout);
  let depth = 1;
  let place = null;

  function show() {
    readout.replaceChildren(...series.map(({ model, values }) => {
      const layer = clamp(Math.round(depth * values.length), 1, values.length);
      return make("span", { class: model.role }, `${model.label} ${layer}/${values.length}: `,
        make("b", {}, shownValue(scale, values[layer - 1])));
    }));
    if (place) place();
  }

  function render(width) {
    const height = 210, left = 44, right = 12, top = 10, bottom = 34;
    const plot = { width: width - left - right, height: height - top - bottom };
    const x = (d) => left + d * plot.width;
    const marks = ticks(scale, largest * (scale === "log" ? 1 : 1.04));
    const high = scale === "log" ? Math.max(marks.at(-1), largest * 1.1) : largest * 1.06;
    const y = (value) => {
      const share = scale === "log" ? Math.log10(Math.max(1, value)) / Math.log10(high) : value / high;
      return top + plot.height * (1 - share);
    };
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (const mark of marks) {
      svg.append(draw("line", { class: "rule", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
      svg.append(draw("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, tickText(scale, mark, largest)));
    }
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      svg.append(draw("text", { x: x(share), y: height - 16, "text-anchor": share === 1 ? "end" : "middle" }, `${share * 100}%`));
    }
    svg.append(draw("text", { x: x(0.5), y: height - 2, "text-anchor": "middle" }, "depth"));
    const guide = draw("line", { class: "guide", y1: top, y2: height - bottom });
    svg.append(guide);
    for (const { model, values } of [...series].reverse()) {
      const points = values.map((value, i) => [x((i + 1) / values.length), y(value)]);
      const path = points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
      svg.append(draw("path", { class: `line ${model.role}`, d: path }));
      for (const [px, py] of points) svg.append(draw("circle", { class: model.role, cx: px, cy: py, r: values.length > 24 ? 2.4 : 3.6 }));
    }
    place = () => { guide.setAttribute("x1", x(depth)); guide.setAttribute("x2", x(depth)); };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      move(((event.clientX - box.left) * width / box.width - left) / plot.width);
    });
    svg.addEventListener("pointerleave", () => move(1));
    holder.replaceChildren(svg);
    show();
  }

  const finest = Math.max(...series.map((s) => s.values.length));
  function move(to) {
    depth = clamp(Math.round(to * finest), 1, finest) / finest;
    show();
  }
  holder.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(depth + step / finest);
  });
  fit(holder, render);
  return figure;
}

// Draws again whenever the place's width changes, so that letters keep their size on a phone.
function fit(holder, render) {
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== drawn) render(drawn = width);
  }).observe(holder);
}

// A heatmap of student rows over teacher columns; rows go upward from the first block.
function heatmap({ name, title, note, matrix, largest, palette, share }) {
  const numRows = matrix.length, numColumns = matrix[0].length;
  const figure = make("figure", { class: "card chart", "data-key": name });
  const readout = make("p", { class: "readout" });
  const holder = make("div", {
    tabindex: "0", role: "img",
    "aria-label": `${title}: divergence of student and teacher blocks; the arrow keys move from cell to cell, the value stands below`,
  });
  const ends = palette === "d" ? [`−${largest.toFixed(3)}`, `+${largest.toFixed(3)}`] : ["0", largest.toFixed(3)];
  figure.append(make("figcaption", {}, title, make("small", {}, note)), holder, colourScale(palette, ...ends, "nats"), readout);
  let at = null;
  let place = null;

  function show(cell) {
    at = cell;
    if (cell === null) readout.replaceChildren(make("span", {}, "Point at a cell, or tap it, for its number."));
    else {
      const value = matrix[cell.row][cell.column];
      const sign = palette === "d" && value > 0 ? "+" : "";
      readout.replaceChildren(make("span", {}, `student ${cell.row + 1} × teacher ${cell.column + 1}: `,
        make("b", {}, `${sign}${value.toFixed(4)} nats`)));
    }
    if (place) place();
  }

  function render(width) {
    const left = 34, bottom = 34, top = 6, right = 6;
    const plot = width - left - right;
    const rowHeight = clamp(plot / numColumns, 7, Math.max(7, 330 / numRows));
    const columnWidth = plot / numColumns;
    const height = top + rowHeight * numRows + bottom;
    const corner = (row, column) => ({ x: left + column * columnWidth, y: top + (numRows - 1 - row) * rowHeight });
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    matrix.forEach((values, row) => values.forEach((value, column) => {
      const cell = draw("rect", { ...corner(row, column), width: columnWidth + 0.4, height: rowHeight + 0.4 });
      cell.style.fill = `var(--${palette}${level(share(value))})`;
      svg.append(cell);
    }));
    for (const [teacher, student] of DATA.pairs) {
      svg.append(draw("rect", { class: "frame", ...corner(student - 1, teacher - 1), width: columnWidth, height: rowHeight }));
    }
    const every = (count, size) => Math.max(1, [1, 2, 4, 5, 10, 20].find((n) => n * size >= 16) || 20);
    for (let row = 1; row <= numRows; row++) {
      if (row % every(numRows, rowHeight) && row !== 1) continue;
      svg.append(draw("text", { x: left - 6, y: corner(row - 1, 0).y + rowHeight / 2 + 4, "text-anchor": "end" }, String(row)));
    }
    for (let column = 1; column <= numColumns; column++) {
      if (column % every(numColumns, columnWidth) && column !== 1) continue;
      svg.append(draw("text", { x: corner(0, column - 1).x + columnWidth / 2, y: height - 20, "text-anchor": "middle" }, String(column)));
    }
    svg.append(draw("text", { x: left + plot / 2, y: height - 4, "text-anchor": "middle" }, "teacher block"));
    svg.append(draw("text", { x: 9, y: top + rowHeight * numRows / 2, "text-anchor": "middle", transform: `rotate(-90 9 ${top + rowHeight * numRows / 2})` }, "student block"));
    const cursor = draw("rect", { class: "cursor", width: columnWidth, height: rowHeight });
    svg.append(cursor);
    place = () => {
      cursor.style.display = at ? "" : "none";
      if (at) for (const [name, value] of Object.entries(corner(at.row, at.column))) cursor.setAttribute(name, value);
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) * width / box.width - left) / columnWidth);
      const row = numRows - 1 - Math.floor(((event.clientY - box.top) * height / box.height - top) / rowHeight);
      show(row >= 0 && row < numRows && column >= 0 && column < numColumns ? { row, column } : null);
    });
    svg.addEventListener("pointerleave", () => show(null));
    holder.replaceChildren(svg);
    place();
  }

  holder.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (event.key === "Escape") return show(null);
    if (!step) return;
    event.preventDefault();
    const from = at || { row: 0, column: -1 * step[1] };
    show({ row: clamp(from.row + step[0], 0, numRows - 1), column: clamp(from.column + step[1], 0, numColumns - 1) });
  });
  show(null);
  fit(holder, render);
  return figure;
}

function colourScale(palette, low, high, unit) {
  const bar = make("i");
  for (let step = 0; step < LEVELS; step++) {
    const part = make("b");
    part.style.background = `var(--${palette}${step})`;
    bar.append(part);
  }
  return make("div", { class: "legend" }, low, bar, `${high} ${unit}`);
}

function drawCharts() {
  const { before, after } = DATA.divergence;
  const every = [before, after].filter(Boolean).flat(2);
  const largest = Math.max(...every, 1e-6);
  const maps = document.getElementById("heatmaps");
  const plain = { largest, palette: "h", share: (value) => value / largest };
  if (before) maps.append(heatmap({ name: "before", title: "Before training", note: "student before × teacher", matrix: before, ...plain }));
  maps.append(heatmap({ name: "after", title: before ? "After training" : "Student × teacher", note: "student × teacher", matrix: after, ...plain }));
  if (before) {
    const matrix = after.map((values, s) => values.map((value, t) => value - before[s][t]));
    const most = Math.max(...matrix.flat().map(Math.abs), 1e-6);
    maps.append(heatmap({
      name: "change", title: "Change", note: "after − before; blue: closer, red: further away",
      matrix, largest: most, palette: "d", share: (value) => 0.5 + value / (2 * most),
    }));
  }
  const curves = document.getElementById("curves");
  for (const statistic of DATA.statistics) curves.append(lineChart(statistic));
}
