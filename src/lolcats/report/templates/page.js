"use strict";
// Draws the charts, one after the other; those of several views put as many in a row as there is room for.
(async () => {
  const charts = [...document.querySelectorAll(".chart[data-spec]")];
  const drawn = new Map();

  const columnsOf = (place) => Math.max(1, Math.floor(place.clientWidth / Number(place.dataset.cells)));

  // The data of charts is kept by column; see pack.py.
  const columnOf = (kept) => {
    if (Array.isArray(kept)) return kept;
    return kept.times ? kept.of.flatMap((one, n) => Array(kept.times[n]).fill(one)) : kept.at.map((n) => kept.of[n]);
  };
  const unpack = (key, part) => {
    if (key !== "data" || !part.packed) return part;
    const { packed, ...rest } = part;
    const columns = Object.entries(packed).map(([name, kept]) => [name, columnOf(kept)]);
    const values = columns[0][1].map((_, n) => Object.fromEntries(columns.map(([name, column]) => [name, column[n]])));
    return { ...rest, values };
  };

  const draw = async (place) => {
    const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent, unpack);
    const before = drawn.get(place);
    if (place.dataset.cells) spec.columns = columnsOf(place);
    for (const param of before ? spec.params : []) {
      if (param.bind) param.value = before.view.signal(param.name);
    }
    if (before) before.finalize();
    // The interpreter (ast) needs no code from strings, which the policy of the page forbids.
    const bind = place.previousElementSibling;
    bind.replaceChildren();
    const options = { actions: false, renderer: "svg", ast: true, bind, tooltip: { theme: "page" } };
    drawn.set(place, Object.assign(await vegaEmbed(place, spec, options), { columns: spec.columns }));
  };

  for (const place of charts) {
    await draw(place);
    await new Promise((done) => setTimeout(done));
  }
  document.documentElement.dataset.drawn = String(charts.length);

  let waiting;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const place of charts) {
        if (place.dataset.cells && drawn.get(place).columns !== columnsOf(place)) draw(place);
      }
    }, 150);
  });
})();
