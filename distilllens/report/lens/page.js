// Controls of the page, and its start.

function themeNow() {
  const chosen = document.documentElement.dataset.theme;
  return chosen || (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function startTheme() {
  const button = document.getElementById("theme");
  const tell = () => {
    const dark = themeNow() === "dark";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(dark));
    button.setAttribute("aria-label", `Switch to ${dark ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = themeNow() === "dark" ? "light" : "dark";
    tell();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
  tell();
}

function startControls() {
  const select = document.getElementById("sample");
  DATA.samples.forEach((sample, number) => {
    const start = sample.prompt.replace(/\s+/g, " ").slice(0, 60);
    select.append(make("option", { value: number }, `${number + 1}. ${start}`));
  });
  select.addEventListener("change", () => {
    state.sample = Number(select.value);
    state.focus = null;
    drawSample();
  });
  const models = document.getElementById("models");
  DATA.models.forEach((model, m) => {
    const box = make("input", { type: "checkbox", value: m, checked: "" });
    box.addEventListener("change", () => {
      if (!box.checked && visibleModels().length === 1) box.checked = true; // one map must stay
      else if (box.checked) state.hidden.delete(m);
      else state.hidden.add(m);
      drawSample();
    });
    models.append(make("label", {}, box, make("span", {}, model.label)));
  });
  for (const name of ["shade", "layout"]) {
    document.querySelectorAll(`input[name="${name}"]`).forEach((radio) => radio.addEventListener("change", () => {
      state[name] = radio.value;
      drawSample();
    }));
  }
}

function startMaps() {
  const maps = document.getElementById("maps");
  maps.addEventListener("pointerover", (event) => {
    const cell = event.pointerType === "mouse" ? cellOf(event.target) : null;
    if (cell) showCell(cell);
  });
  // The panel may open under the pointer: then it stays, until the pointer leaves that too.
  const detail = document.getElementById("detail");
  const goes = (event, to) => event.relatedTarget instanceof Node && to.contains(event.relatedTarget);
  for (const [one, other] of [[maps, detail], [detail, maps]]) {
    one.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !goes(event, other)) showCell(state.focus);
    });
  }
  maps.addEventListener("click", (event) => {
    const cell = cellOf(event.target);
    if (cell) focusCell(cell);
  });
  maps.addEventListener("focusin", (event) => {
    const cell = cellOf(event.target);
    const now = state.focus;
    if (cell && !(now && now.m === cell.m && now.layer === cell.layer && now.token === cell.token)) focusCell(cell, { move: false });
  });
  maps.addEventListener("keydown", (event) => {
    const cell = cellOf(event.target);
    const next = cell && moveBy(cell, event.key, event.ctrlKey);
    if (!next) return;
    event.preventDefault();
    focusCell(next);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") closeDetail();
  });
}

startTheme();
drawCharts();
if (DATA.samples.length) {
  startControls();
  startMaps();
  // A wide screen begins with an example: the middle of the teacher at the first token.
  if (!PHONE.matches) state.focus = { m: 0, layer: Math.max(1, Math.round(0.75 * DATA.models[0].layers)), token: 1 };
  drawSample();
}
