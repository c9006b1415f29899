// What is pointed at, and how the view answers: shades, a sentence for everyone, the same for keyboard and mouse.
const root = document.getElementById("VIEW");
const state = { map: root.querySelector(".map").dataset.map, sinks: false, at: null, pinned: null };
const percent = (value) => (value < 0.0995 ? (100 * value).toFixed(1) : (100 * value).toFixed(0)) + " %";
const figure = (value) => value.toFixed(2).replace("-", "−");
// A word in a sentence of ours; of a script that runs the other way, apart from what stands around it.
const bare = (word) => {
  const text = word.textContent.trim() || "blank";
  return /[\u0590-\u08ff\ufb1d-\ufefc]/.test(text) ? `\u2068${text}\u2069` : text;
};
const textOf = (word) => `“${bare(word)}”`;
const tops = new Map();

const panels = [...root.querySelectorAll(".panel")].map((box) => {
  const side = (name) => {
    const text = box.querySelector("." + name);
    const words = [...text.querySelectorAll(".word")];
    return { text, words, special: words.map((word) => word.classList.contains("special")), index: new Map(words.map((word, place) => [word, place])) };
  };
  const data = JSON.parse(box.dataset.panel);
  box.removeAttribute("data-panel");
  return { box, cells: new Cells(data), prompt: side("prompt"), response: side("response"), canvas: box.querySelector(".cells canvas"), status: box.querySelector(".said") };
});

const counted = (panel, place) => state.sinks || !panel.prompt.special[place];
const shown = (panel) => (panel.cells.has(state.map) ? state.map : Object.keys(panel.cells.data.maps)[0]);

// The ends of the colour scale, the same for all panels: of a response word's attention, and of the mean's.
function topsNow() {
  const key = `${state.map} ${state.sinks}`;
  if (!tops.has(key)) {
    const found = { word: 0, mean: 0 };
    for (const panel of panels) {
      const words = panel.cells.words(shown(panel)), wide = panel.prompt.words.length, mean = panel.cells.row(shown(panel), -1);
      for (let cell = 0; cell < words.length; cell++) if (words[cell] > found.word && counted(panel, cell % wide)) found.word = words[cell];
      mean.forEach((value, place) => { if (counted(panel, place)) found.mean = Math.max(found.mean, value); });
    }
    tops.set(key, found);
  }
  return tops.get(key);
}

function shade(words, values, top, counts) {
  words.forEach((word, place) => {
    const share = counts(place) && top > 0 ? Math.sqrt(Math.min(1, values[place] / top)) : 0;
    word.style.setProperty("--shade", share.toFixed(3));
  });
}

function best(words, values, counts) {
  const order = [...words.keys()].filter((place) => counts(place) && values[place] >= 0.0005);
  return order.sort((a, b) => values[b] - values[a]).slice(0, 5);
}

function list(words, values, order) {
  return order.map((place) => `${bare(words[place])} ${percent(values[place])}`).join(" · ") || "nothing in particular";
}

// What is pointed at, in this panel: a word of the same prompt is pointed at in every panel.
function atIn(panel) {
  const { at } = state;
  if (!at || at.panel === panel) return at;
  const [here, there] = [panel.prompt.words, at.panel.prompt.words];
  const same = at.side === "prompt" && here.length === there.length && here[at.place].textContent === there[at.place].textContent;
  return same ? at : null;
}

function paint(scroll = false) {
  const top = state.at ? topsNow().word : topsNow().mean;
  root.querySelector(".legend span").textContent = `0 to ${percent(top)}`;
  for (const panel of panels) {
    const at = atIn(panel);
    const { cells, prompt, response } = panel, map = shown(panel);
    const counts = (place) => counted(panel, place);
    const looked = at && at.side === "prompt" ? new Float32Array(prompt.words.length) : cells.row(map, at ? at.place : -1);
    const read = at && at.side === "prompt" ? cells.column(map, at.place) : new Float32Array(response.words.length);
    shade(prompt.words, looked, top, counts);
    shade(response.words, read, top, () => true);
    for (const side of ["prompt", "response"]) {
      panel[side].words.forEach((word, place) => word.classList.toggle("at", Boolean(at) && at.side === side && at.place === place));
    }
    const order = best(prompt.words, looked, counts);
    if (at && scroll && at.side === "response" && order.length) reveal(prompt.text, prompt.words[order[0]]);
    panel.status.textContent = toldOf(panel, at, looked, read, order);
    drawLanes(panel, at);
    drawCursor(panel, at);
  }
}

function toldOf(panel, at, looked, read, order) {
  if (!at) return `The whole response, on average, looked most at: ${list(panel.prompt.words, looked, order)}`;
  return at.side === "prompt" ? toldOfPrompt(panel, at.place, read) : toldOfResponse(panel, at.place, looked, order);
}

function toldOfResponse(panel, place, values, order) {
  const { cells, prompt, response } = panel;
  const figures = Object.keys(cells.data.tracks).map((name) => {
    const value = cells.track(name, place);
    return name === "grounding" ? `${name} ${percent(value)}` : `${name} ${figure(value)}`;
  });
  const mass = cells.data.mass[shown(panel)];
  if (mass) {
    const rows = mass.slice(cells.response[place], cells.response[place + 1]);
    figures.push(`${percent(rows.reduce((sum, value) => sum + value, 0) / rows.length)} of its attention on the prompt`);
  }
  return `${textOf(response.words[place])}: ${figures.join(", ")}; looked most at: ${list(prompt.words, values, order)}`;
}

function toldOfPrompt(panel, place, values) {
  const order = best(panel.response.words, values, () => true);
  return `${textOf(panel.prompt.words[place])} of the prompt was read by: ${list(panel.response.words, values, order)}`;
}

function reveal(box, word) {
  const hidden = word.offsetTop < box.scrollTop || word.offsetTop + word.offsetHeight > box.scrollTop + box.clientHeight;
  if (hidden) box.scrollTop = word.offsetTop - box.clientHeight / 2;
}

function look(panel, side, place, scroll) {
  state.at = { panel, side, place };
  paint(scroll);
}

function leave() {
  state.at = state.pinned;
  paint();
}

function pin(at) {
  const same = state.pinned && at && state.pinned.panel === at.panel && state.pinned.side === at.side && state.pinned.place === at.place;
  state.pinned = same ? null : at;
  for (const panel of panels) {
    for (const side of ["prompt", "response"]) {
      panel[side].words.forEach((word, place) => {
        const on = Boolean(state.pinned) && state.pinned.panel === panel && state.pinned.side === side && state.pinned.place === place;
        word.setAttribute("aria-pressed", String(on));
      });
    }
  }
  state.at = state.pinned || at;
  paint(true);
}

// One stop of the tab key for each text; arrow keys go from word to word.
function wire(panel, name) {
  const { text, words, index } = panel[name];
  const placeOf = (event) => index.get(event.target.closest(".word")) ?? -1;
  words.forEach((word, place) => {
    word.setAttribute("role", "button");
    word.setAttribute("aria-pressed", "false");
    word.tabIndex = place ? -1 : 0;
  });
  const move = (from, to) => {
    if (!words[to]) return;
    words[from].tabIndex = -1;
    words[to].tabIndex = 0;
    words[to].focus();
  };
  text.addEventListener("pointerover", (event) => { if (placeOf(event) >= 0) look(panel, name, placeOf(event), false); });
  text.addEventListener("pointerleave", leave);
  text.addEventListener("focusin", (event) => { if (placeOf(event) >= 0) look(panel, name, placeOf(event), true); });
  text.addEventListener("focusout", leave);
  text.addEventListener("click", (event) => {
    const place = placeOf(event);
    if (place >= 0) pin({ panel, side: name, place });
  });
  text.addEventListener("keydown", (event) => {
    const place = placeOf(event);
    if (place < 0) return;
    const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: words.length - 1 }[event.key];
    if (event.key === "Escape") pin(state.pinned);
    if (event.key === "Enter" || event.key === " ") pin({ panel, side: name, place });
    if (to !== undefined) move(place, to);
    if (to !== undefined || event.key === "Enter" || event.key === " ") event.preventDefault();
  });
}

// The strips below a response, each with one scale for all panels.
function boundsOf(name) {
  const every = panels.flatMap((panel) => panel.cells.data.tracks[name] || []);
  return [every.reduce((least, value) => Math.min(least, value), 0), every.reduce((most, value) => Math.max(most, value), 0)];
}

function drawLanes(panel, at) {
  const said = at && at.side === "response" ? at.place : -1;
  const { response } = panel.cells;
  for (const canvas of panel.box.querySelectorAll(".lane canvas")) {
    const name = canvas.dataset.track, [low, high] = boundsOf(name);
    const inside = (place) => said >= 0 && place >= response[said] && place < response[said + 1];
    drawStrip(canvas, panel.cells.data.tracks[name], [low, high], inside);
    canvas.parentElement.querySelector("small").textContent = `${figure(low)} to ${figure(high)}`;
  }
}

function wireLanes(panel) {
  const { response, rows } = panel.cells;
  for (const canvas of panel.box.querySelectorAll(".lane canvas")) {
    canvas.addEventListener("pointermove", (event) => {
      const token = Math.floor((event.offsetX / canvas.clientWidth) * rows);
      const said = response.findLastIndex((start) => start <= token);
      if (said >= 0 && said < panel.response.words.length) look(panel, "response", said, false);
    });
    canvas.addEventListener("pointerleave", leave);
  }
}

// The map of tokens.
function wordAt(starts, token) {
  return Math.max(0, starts.findLastIndex((start) => start <= token));
}

function drawMap(panel) {
  if (!panel.canvas.closest("details").open) return;
  const { cells } = panel, tokens = cells.tokens(shown(panel));
  const own = Array.from({ length: cells.columns }, (_, column) => counted(panel, wordAt(cells.prompt, column)));
  const top = topsNow().word;
  // No more columns than the screen has pixels: each shows the largest of its cells, so that none is lost.
  const wide = Math.min(cells.columns, Math.max(1, panel.canvas.clientWidth)), step = cells.columns / wide;
  drawCells(panel.canvas, cells.rows, wide, (row, pixel) => {
    let most = 0;
    for (let column = Math.floor(pixel * step); column < Math.floor((pixel + 1) * step); column++) {
      if (own[column]) most = Math.max(most, tokens[row * cells.columns + column]);
    }
    return top > 0 ? Math.sqrt(Math.min(1, most / top)) : 0;
  });
  panel.canvas.style.height = `${Math.min(420, Math.max(48, cells.rows * 12))}px`;
}

function drawCursor(panel, at) {
  const { cells, canvas } = panel, [row, column] = ["row", "column"].map((name) => canvas.parentElement.querySelector("." + name));
  const place = (line, starts, size) => {
    line.hidden = !at || (line === row) !== (at.side === "response");
    if (line.hidden) return;
    line.style.setProperty("--from", `${(100 * starts[at.place]) / size}%`);
    line.style.setProperty("--size", `${(100 * (starts[at.place + 1] - starts[at.place])) / size}%`);
  };
  place(row, cells.response, cells.rows);
  place(column, cells.prompt, cells.columns);
}

function wireMap(panel) {
  const { cells, canvas } = panel;
  const cursor = { row: 0, column: 0 };
  const tell = () => {
    const said = wordAt(cells.response, cursor.row), word = wordAt(cells.prompt, cursor.column);
    state.at = { panel, side: "response", place: said };
    paint();
    const value = cells.tokens(shown(panel))[cursor.row * cells.columns + cursor.column];
    const names = `${textOf(panel.response.words[said])} to ${textOf(panel.prompt.words[word])}`;
    panel.status.textContent = `Response token ${cursor.row + 1}, prompt token ${cursor.column + 1}: ${names}: ${percent(value)}`;
    canvas.setAttribute("aria-label", `Attention, response tokens by prompt tokens. ${panel.status.textContent}`);
  };
  const go = (row, column) => {
    cursor.row = Math.min(cells.rows - 1, Math.max(0, row));
    cursor.column = Math.min(cells.columns - 1, Math.max(0, column));
    tell();
  };
  canvas.addEventListener("pointermove", (event) => {
    const { clientWidth, clientHeight } = canvas;
    go(Math.floor((event.offsetY / clientHeight) * cells.rows), Math.floor((event.offsetX / clientWidth) * cells.columns));
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("focus", tell);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    go(cursor.row + step[0], cursor.column + step[1]);
  });
  canvas.closest("details").addEventListener("toggle", () => drawMap(panel));
}

// The heads.
function wireHeads(panel) {
  const details = panel.box.querySelector(".heads");
  if (details) details.addEventListener("toggle", () => { if (details.open) makeThumbs(panel, details.querySelector(".thumbs")); });
}

function makeThumbs(panel, box) {
  if (box.childElementCount) return;
  const { shape: [layers, heads], scores, kept } = panel.cells.data.heads, known = new Set(kept);
  box.style.setProperty("--heads", heads);
  const buttons = Array.from({ length: layers * heads }, (_, head) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    const name = `layer ${Math.floor(head / heads)}, head ${head % heads}, copy score ${scores[head].toFixed(2)}`;
    button.type = "button";
    button.title = name;
    button.setAttribute("aria-label", name);
    button.setAttribute("aria-pressed", String(state.map === head));
    button.tabIndex = head ? -1 : 0;
    button.disabled = !known.has(head);
    button.style.setProperty("--score", scores[head]);
    button.append(canvas);
    if (known.has(head)) drawThumb(canvas, panel.cells, head);
    return button;
  });
  box.addEventListener("click", (event) => {
    const head = buttons.indexOf(event.target.closest("button"));
    if (head >= 0) choose(head);
  });
  box.addEventListener("keydown", (event) => {
    const from = buttons.indexOf(event.target.closest("button"));
    const to = from + ({ ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads }[event.key] || 0);
    if (to === from || !buttons[to]) return;
    event.preventDefault();
    buttons[from].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
  });
  box.append(...buttons);
  buttons[0].tabIndex = -1;
  (buttons.find((button) => !button.disabled) || buttons[0]).tabIndex = 0;
}

function choose(map) {
  state.map = map;
  for (const button of root.querySelectorAll(".map")) button.setAttribute("aria-pressed", String(button.dataset.map === map));
  for (const box of root.querySelectorAll(".thumbs")) {
    [...box.children].forEach((button, head) => button.setAttribute("aria-pressed", String(head === map)));
  }
  paint();
  panels.forEach(drawMap);
}

root.classList.add("live");
for (const panel of panels) {
  wire(panel, "prompt");
  wire(panel, "response");
  wireLanes(panel);
  wireMap(panel);
  wireHeads(panel);
}
for (const button of root.querySelectorAll(".map")) button.addEventListener("click", () => choose(button.dataset.map));
const sinks = root.querySelector(".sinks");
sinks.addEventListener("click", () => {
  state.sinks = !state.sinks;
  sinks.setAttribute("aria-pressed", String(state.sinks));
  paint();
  panels.forEach(drawMap);
});
new ResizeObserver(() => panels.forEach((panel) => drawLanes(panel, atIn(panel)))).observe(root);
paint();
