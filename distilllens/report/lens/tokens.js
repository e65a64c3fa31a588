// Token × layer maps and the detail of one cell.

const PHONE = window.matchMedia("(max-width: 760px)");
const state = { sample: 0, hidden: new Set(), shade: "entropy", layout: "beside", focus: null };

const sampleOf = () => DATA.samples[state.sample];
const visibleModels = () => DATA.models.map((_, m) => m).filter((m) => !state.hidden.has(m));
const tokenText = (place) => DATA.tokens[place];
const isHit = (sample, m, layer, token) => sample.maps[m].top[layer - 1][token][0] === sample.answer[token];

// The pale end of the colours: the largest entropy, or rank, in any answer and model of the page.
const FARTHEST = { entropy: 1e-6, rank: 2 };
for (const sample of DATA.samples) {
  for (const map of sample.maps) {
    for (const row of map.entropy) for (const value of row) FARTHEST.entropy = Math.max(FARTHEST.entropy, value);
    for (const row of map.rank) for (const value of row) FARTHEST.rank = Math.max(FARTHEST.rank, value);
  }
}

function cellLevel(map, layer, token) {
  if (state.shade === "entropy") return level(1 - map.entropy[layer - 1][token] / FARTHEST.entropy);
  return level(1 - Math.log(map.rank[layer - 1][token]) / Math.log(FARTHEST.rank));
}

function share(units) {
  if (units === 0) return "<0.01%";
  const percent = 100 * units / DATA.probability_unit;
  return `${percent >= 99.995 ? "100" : percent.toFixed(percent < 10 ? 2 : 1)}%`;
}

function drawSample() {
  const sample = sampleOf();
  const holder = document.getElementById("maps");
  const shown = visibleModels();
  const deepest = Math.max(...shown.map((m) => DATA.models[m].layers));
  holder.className = `maps ${state.layout}`;
  holder.style.setProperty("--count", shown.length);
  holder.replaceChildren(...shown.map((m) => tokenMap(sample, m, deepest)));
  drawQuestion(sample);
  drawScale();
  joinScrolling(holder);
  if (state.focus && (state.hidden.has(state.focus.m) || state.focus.token > sample.answer.length)) state.focus = null;
  holder.querySelectorAll("table").forEach((table) => table.querySelector("td").tabIndex = 0);
  showCell(state.focus);
}

function tokenMap(sample, m, deepest) {
  const model = DATA.models[m], map = sample.maps[m];
  const side = m === 0 ? 0 : 1;
  const paired = new Set(DATA.pairs.map((pair) => pair[side]));
  const head = make("tr", {}, make("th", { scope: "col", title: "block" }, "block"));
  sample.answer.forEach((place, token) => {
    head.append(make("th", { scope: "col", title: tokenText(place), "data-token": token + 1 }, tokenText(place)));
  });
  const body = make("tbody");
  for (let layer = model.layers; layer >= 1; layer--) {
    const label = make("th", { scope: "row", "data-layer": layer }, String(layer));
    if (paired.has(layer)) {
      label.className = "paired";
      label.title = "paired in training";
    }
    const row = make("tr", {}, label);
    sample.answer.forEach((_, token) => {
      const hit = isHit(sample, m, layer, token) ? " hit" : "";
      row.append(make("td", {
        class: `s${cellLevel(map, layer, token)}${hit}`, tabindex: "-1", "data-layer": layer, "data-token": token + 1,
      }, tokenText(map.top[layer - 1][token][0])));
    });
    body.append(row);
  }
  const table = make("table", { role: "grid", "aria-label": `${model.label}: blocks by tokens, the last block first`, "data-model": m },
    make("thead", {}, head), body);
  table.style.setProperty("--tokens", sample.answer.length);
  // Equal depth stands at equal height: a shallower model has taller rows.
  if (state.layout === "beside") table.style.setProperty("--row", `calc(var(--cell) * ${Math.min(4, deepest / model.layers)})`);
  return make("figure", { class: "map" },
    make("figcaption", {}, make("span", {}, model.label), make("small", {}, make("bdi", { title: model.path }, `${model.layers} blocks`))),
    make("div", { class: "scroller" }, table));
}

function drawQuestion(sample) {
  const by = { reference: "Reference answer", given: "Given answer" }[sample.answered_by] || `Greedy answer of the ${sample.answered_by}`;
  document.getElementById("question").replaceChildren(
    make("div", {}, make("span", { class: "label" }, `Prompt, ${sample.title.toLowerCase()}`), make("div", { class: "text" }, sample.prompt)),
    make("div", {}, make("span", { class: "label" }, `${by}${sample.cut ? `, its first ${sample.answer.length} tokens` : ""}`), make("div", { class: "text" }, sample.text)));
}

function drawScale() {
  const ends = state.shade === "entropy"
    ? [`undecided, ${FARTHEST.entropy.toFixed(1)} nats`, "sure, 0 nats"]
    : [`rank ${FARTHEST.rank.toLocaleString("en")}`, "rank 1"];
  document.getElementById("scale").replaceChildren(...colourScale("s", ends[0], ends[1], "").childNodes);
}

// All maps show the same tokens: scrolling one scrolls the others.
function joinScrolling(holder) {
  const scrollers = [...holder.querySelectorAll(".scroller")];
  for (const one of scrollers) {
    one.addEventListener("scroll", () => {
      for (const other of scrollers) if (other.scrollLeft !== one.scrollLeft) other.scrollLeft = one.scrollLeft;
    }, { passive: true });
  }
}

function cellElement({ m, layer, token }) {
  return document.querySelector(`table[data-model="${m}"] td[data-layer="${layer}"][data-token="${token}"]`);
}

function cellOf(element) {
  const td = element.closest && element.closest("td[data-layer]");
  if (!td) return null;
  return { m: Number(td.closest("table").dataset.model), layer: Number(td.dataset.layer), token: Number(td.dataset.token) };
}

// Marks a cell, its counterparts in the other models, and shows what they say; null: nothing.
function showCell(cell) {
  const holder = document.getElementById("maps");
  holder.querySelectorAll(".here, .twin, .on").forEach((e) => e.classList.remove("here", "twin", "on"));
  const detail = document.getElementById("detail");
  detail.classList.toggle("open", cell !== null);
  if (cell === null) {
    detail.replaceChildren(make("p", { class: "hint" }, "Point at a cell, or reach the map with Tab and move with the arrow keys: what the models would say there appears here."));
    return;
  }
  const columns = visibleModels().map((m) => {
    const twin = { m, layer: DATA.counterparts[cell.m][m][cell.layer - 1], token: cell.token };
    const element = cellElement(twin);
    element.classList.add(m === cell.m ? "here" : "twin");
    const table = element.closest("table");
    table.querySelector(`thead th[data-token="${cell.token}"]`).classList.add("on");
    table.querySelector(`tbody th[data-layer="${twin.layer}"]`).classList.add("on");
    return detailColumn(twin);
  });
  const sample = sampleOf();
  const close = make("button", { type: "button", class: "button close", "aria-label": "Close the detail" }, "Close");
  close.addEventListener("click", () => closeDetail());
  detail.replaceChildren(
    make("div", { class: "head" }, make("p", {}, `Token ${cell.token} of ${sample.answer.length}: the answer says `,
      make("bdi", { class: "token gold-token" }, tokenText(sample.answer[cell.token - 1])), ". What stands at this depth:"), close),
    make("div", { class: "columns" }, ...columns));
}

function detailColumn({ m, layer, token }) {
  const sample = sampleOf(), map = sample.maps[m], model = DATA.models[m];
  const l = layer - 1, t = token - 1;
  const items = map.top[l][t].map((place, k) => {
    const fill = make("i");
    fill.style.width = `${100 * map.top_probability[l][t][k] / DATA.probability_unit}%`;
    return make("li", { class: place === sample.answer[t] ? "gold" : "" },
      make("bdi", { class: "token", title: tokenText(place) }, tokenText(place)),
      make("span", { class: "bar" }, fill), make("span", { class: "share" }, share(map.top_probability[l][t][k])));
  });
  return make("div", { "data-model": m },
    make("h3", {}, `${model.label}, block ${layer} of ${model.layers}`,
      make("small", {}, `entropy ${map.entropy[l][t].toFixed(2)} nats · answer's token: rank ${map.rank[l][t].toLocaleString("en")}, ${share(map.probability[l][t])}`)),
    make("ol", { class: "tops" }, ...items));
}

// What a screen reader says of a focused cell.
function speak({ m, layer, token }) {
  const map = sampleOf().maps[m], l = layer - 1, t = token - 1;
  const tops = map.top[l][t].map((place, k) => `${tokenText(place)} ${share(map.top_probability[l][t][k])}`);
  document.getElementById("spoken").textContent = `${DATA.models[m].label}, block ${layer}, token ${token}: ${tops.join(", ")}; the answer's token has rank ${map.rank[l][t]}`;
}

function closeDetail() {
  const element = state.focus && cellElement(state.focus);
  state.focus = null;
  showCell(null);
  document.getElementById("spoken").textContent = "";
  if (element) element.blur();
}

// One cell of each map is reached by Tab; the arrow keys go on from there.
function focusCell(cell, { move = true } = {}) {
  state.focus = cell;
  const element = cellElement(cell);
  element.closest("table").querySelectorAll('td[tabindex="0"]').forEach((td) => td.tabIndex = -1);
  element.tabIndex = 0;
  if (move) element.focus({ preventScroll: true });
  showCell(cell);
  keepVisible(element);
  speak(cell);
}

// Scrolls a map so far that a cell is not under its sticky row, column, or edge.
function keepVisible(element) {
  const scroller = element.closest(".scroller");
  const box = scroller.getBoundingClientRect(), cell = element.getBoundingClientRect();
  if (cell.left < box.left + 48) scroller.scrollLeft -= box.left + 48 - cell.left;
  if (cell.right > box.right - 4) scroller.scrollLeft += cell.right - box.right + 4;
  if (cell.top < box.top + 32) scroller.scrollTop -= box.top + 32 - cell.top;
  if (cell.bottom > box.bottom - 4) scroller.scrollTop += cell.bottom - box.bottom + 4;
  const detail = document.getElementById("detail"), now = element.getBoundingClientRect();
  // A sheet that is still rising stands lower than it will.
  const top = PHONE.matches ? window.innerHeight - detail.offsetHeight : detail.getBoundingClientRect().top;
  const covered = top < now.bottom && top + detail.offsetHeight > now.top;
  const floor = covered ? top : window.innerHeight;
  if (now.bottom > floor) window.scrollBy(0, now.bottom - floor + 12);
  else if (now.top < 8) window.scrollBy(0, now.top - 60);
}

function moveBy(cell, key, wide) {
  const layers = DATA.models[cell.m].layers, tokens = sampleOf().answer.length;
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0], PageUp: [5, 0], PageDown: [-5, 0] };
  if (key === "Home") return { ...cell, token: 1, layer: wide ? layers : cell.layer };
  if (key === "End") return { ...cell, token: tokens, layer: wide ? 1 : cell.layer };
  if (!steps[key]) return null;
  return { ...cell, layer: clamp(cell.layer + steps[key][0], 1, layers), token: clamp(cell.token + steps[key][1], 1, tokens) };
}
