// Charts of a run: curves, expert map, leaderboard, samples. A classic script, so that pages opened from a file can use it too.
"use strict";
const Charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [360, 190, 62, 30, 8, 8];
  const show = (value) => (value === null || value === undefined ? "–" : value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4))));
  const hue = (index, count) => `hsl(${(210 + (300 * index) / Math.max(1, count)) % 360} 65% 45%)`;

  function node(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent?.append(made);
    return made;
  }

  function html(name, parent, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    parent?.append(made);
    return made;
  }

  function axes(svg, [x0, x1], [y0, y1], xName, yName) {
    const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
    const py = (y) => HEIGHT - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - BOTTOM - TOP);
    for (const share of [0, 0.5, 1]) {
      const [x, y] = [x0 + share * (x1 - x0), y0 + share * (y1 - y0)];
      node("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y), class: "grid" }, svg);
      node("text", { x: LEFT - 4, y: py(y) + 4, "text-anchor": "end" }, svg, show(y));
      node("text", { x: px(x), y: HEIGHT - BOTTOM + 12, "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, svg, show(x));
    }
    node("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle", class: "name" }, svg, xName);
    node("text", { x: 9, y: (HEIGHT - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 9 ${(HEIGHT - BOTTOM) / 2})`, class: "name" }, svg, yName);
    return [px, py];
  }

  const spread = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) if (value !== null) [low, high] = [Math.min(low, value), Math.max(high, value)];
    return low < high ? [low, high] : low === 0 ? [0, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  };

  // One chart: the whole model thick, layers thin.
  function curves(place, chart, source) {
    const box = html("figure", place, undefined, "chart");
    box.dataset.tag = chart.tag;
    html("figcaption", box, chart.tag).title = chart.about;
    const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${chart.tag}: ${chart.about}` }, box);
    const names = [...chart.tags].sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
    const [px, py] = axes(svg, spread(source.x), spread(names.flatMap((name) => source.y[name])), "training step", chart.unit);
    const layers = names.filter((name) => name !== chart.tag);
    for (const name of [...layers, ...names.filter((one) => one === chart.tag)]) {
      let path = "";
      let pen = "M";
      source.y[name].forEach((value, i) => {
        if (value === null) pen = "M";
        else {
          path += `${pen}${px(source.x[i]).toFixed(1)} ${py(value).toFixed(1)}`;
          pen = "L";
        }
      });
      const whole = name === chart.tag;
      node("path", { d: path.length && !path.includes("L") ? `${path}h0.01` : path, class: whole ? "whole" : "layer", stroke: whole ? "currentColor" : hue(layers.indexOf(name), layers.length) }, svg);
    }
    const said = html("p", box, undefined, "said");
    // The values of one step, each in the colour of its curve.
    const tell = (at, before = "") => {
      said.replaceChildren(before);
      names.slice(0, 6).forEach((name, i) => {
        const whole = name === chart.tag;
        const part = html("span", said, `${i ? " · " : ""}${whole ? "all" : name.split("/").at(-1)} ${show(source.y[name][at])}`);
        if (!whole) part.style.color = hue(layers.indexOf(name), layers.length);
      });
      if (names.length > 6) said.append(" …");
    };
    const last = source.x.length - 1;
    tell(last);
    svg.addEventListener("mousemove", (event) => {
      const rect = svg.getBoundingClientRect();
      const x = ((event.clientX - rect.left) / rect.width) * WIDTH;
      let best = 0;
      source.x.forEach((step, i) => (best = Math.abs(px(step) - x) < Math.abs(px(source.x[best]) - x) ? i : best));
      tell(best, `step ${source.x[best]}: `);
    });
    svg.addEventListener("mouseleave", () => tell(last));
  }

  function all(place, run) {
    place.replaceChildren();
    const groups = new Map();
    for (const chart of run.charts) {
      if (!groups.has(chart.group)) {
        html("h3", place, chart.group[0].toUpperCase() + chart.group.slice(1));
        groups.set(chart.group, html("div", place, undefined, "charts"));
      }
      curves(groups.get(chart.group), chart, run.sources[chart.source]);
    }
  }

  // Experts on the plane: size load, colour health, number id; one hue of rim per layer.
  function map(place, experts) {
    place.replaceChildren();
    if (!experts.length) return void html("p", place, "This model has no experts.", "quiet");
    const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "map of the experts" }, place);
    const layers = [...new Set(experts.map((row) => row.layer))].sort((a, b) => a - b);
    const pad = ([low, high]) => [low - 0.08 * (high - low), high + 0.08 * (high - low)];
    const [px, py] = axes(svg, pad(spread(experts.map((row) => row.x))), pad(spread(experts.map((row) => row.y))), "PCA 1 of the router embedding", "PCA 2");
    for (const row of experts) {
      const mark = node("g", { class: "expert" }, svg);
      const size = 4 + 2.5 * Math.sqrt(Math.min(4, row.load));
      node("circle", { cx: px(row.x), cy: py(row.y), r: size, fill: `hsl(${120 * row.health} 60% 60%)`, stroke: hue(layers.indexOf(row.layer), layers.length), "stroke-width": 1.5 }, mark);
      node("text", { x: px(row.x), y: py(row.y) + 2.5, "text-anchor": "middle", class: "id" }, mark, row.id);
      node("title", {}, mark, `layer ${row.layer} expert ${row.id}: health ${show(row.health)}, load ${show(row.load)}, age ${row.age} steps`);
    }
    html("p", place, `Colour: health, red 0 to green 1. Size: load. Rim: layer. ${experts.length} living experts.`, "said");
  }

  const COLUMNS = ["layer", "id", "contribution", "efficiency", "specialization", "resilience", "load", "account", "health", "age"];

  function leaderboard(place, experts, most = 20) {
    place.replaceChildren();
    if (!experts.length) return void html("p", place, "This model has no experts.", "quiet");
    const table = html("table", place);
    const head = html("tr", html("thead", table));
    for (const name of COLUMNS) html("th", head, name);
    const body = html("tbody", table);
    for (const row of experts.slice(0, most)) {
      const line = html("tr", body);
      for (const name of COLUMNS) html("td", line, show(row[name]));
    }
    html("p", place, "Contribution: nats per token that the loss would rise without the expert; load in fair shares; age in steps.", "said");
  }

  function samples(place, held) {
    place.replaceChildren();
    if (!held.length) return void html("p", place, "No samples yet.", "quiet");
    for (const sample of [...held].reverse()) {
      html("h4", place, `After step ${sample.step}`);
      for (const text of sample.texts) html("pre", place, text);
    }
  }

  function head(place, run) {
    place.textContent = `${run.name} · ${run.state} · step ${run.step}` + (run.val_bpb ? ` · ${show(run.val_bpb)} bits per byte` : "");
  }

  return { all, map, leaderboard, samples, head, html, show };
})();
