(() => {
  const root = document.getElementById("VIEW");
  const prompt = [...root.querySelectorAll(".prompt .token")];
  const response = [...root.querySelectorAll(".response .token")];
  const maps = [...root.querySelectorAll(".map")];
  const box = root.querySelector(".prompt");
  const said = root.querySelector(".said");
  const own = prompt.map((token) => !token.classList.contains("special"));
  const values = maps.map((map) => Float32Array.from(atob(map.dataset.cells), (c) => (c.charCodeAt(0) / 255) ** 4));
  const masses = maps.map((map) => map.dataset.mass.split(" ").map(Number));
  const percent = (value) => (value < 0.0995 ? (100 * value).toFixed(1) : (100 * value).toFixed(0)) + " %";
  const word = (token) => token.textContent.trim() || "blank";
  let map = 0;
  let pinned = -1; // the response token that was clicked; -1: none, and the mean over all of them is shown
  let row = [];

  function rowOf(token) {
    const width = prompt.length;
    if (token >= 0) return values[map].subarray(token * width, (token + 1) * width);
    const mean = new Float32Array(width);
    values[map].forEach((value, cell) => { mean[cell % width] += value / response.length; });
    return mean;
  }

  function show(token, scroll) {
    row = rowOf(token);
    const places = [...prompt.keys()].filter((place) => own[place]).sort((a, b) => row[b] - row[a]);
    const top = places.length ? row[places[0]] : 0;
    prompt.forEach((each, place) => each.style.setProperty("--shade", top > 0 ? Math.min(1, row[place] / top) : 0));
    response.forEach((each, place) => each.classList.toggle("shown", place === token));
    const looked = places.slice(0, 5).filter((place) => row[place] >= 0.0005);
    const list = looked.map((place) => `${word(prompt[place])} ${percent(row[place])}`).join(", ") || "nothing in particular";
    let what = "All response tokens, the mean";
    if (token >= 0) {
      const logprob = response[token].dataset.logprob.replace("-", "−");
      what = `“${word(response[token])}”: log-prob ${logprob}, ${percent(masses[map][token])} of its attention on the prompt`;
    }
    said.textContent = `${what}; looked most at: ${list}`;
    if (scroll && places.length) {
      const { offsetTop, offsetHeight } = prompt[places[0]];
      const hidden = offsetTop < box.scrollTop || offsetTop + offsetHeight > box.scrollTop + box.clientHeight;
      if (hidden) box.scrollTop = offsetTop - box.clientHeight / 2;
    }
  }

  function pin(token) {
    pinned = pinned === token ? -1 : token;
    response.forEach((each, place) => each.setAttribute("aria-pressed", String(place === pinned)));
    show(pinned, true);
  }

  function move(from, to) {
    if (!response[to]) return;
    response[from].tabIndex = -1;
    response[to].tabIndex = 0;
    response[to].focus();
  }

  response.forEach((each, token) => {
    each.addEventListener("mouseenter", () => show(token, false));
    each.addEventListener("mouseleave", () => show(pinned, false));
    each.addEventListener("focus", () => show(token, true));
    each.addEventListener("blur", () => show(pinned, false));
    each.addEventListener("click", () => pin(token));
    each.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: token - 1, ArrowRight: token + 1, Home: 0, End: response.length - 1 }[event.key];
      if (event.key === "Escape") pin(pinned);
      if (to === undefined) return;
      event.preventDefault();
      move(token, to);
    });
  });
  prompt.forEach((each, place) => each.addEventListener("mouseenter", () => { each.title = percent(row[place]); }));
  maps.forEach((each, number) => each.addEventListener("click", () => {
    map = number;
    maps.forEach((other) => other.setAttribute("aria-pressed", String(other === each)));
    show(pinned, false);
  }));
  show(-1, false);
})();
