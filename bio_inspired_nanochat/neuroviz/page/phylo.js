// The family tree: lanes of experts over steps. Lines are grouped by colour and width, so that ten thousand events are a few traces;
// which expert lies under the pointer is looked up in the data, and the future is covered by one element above the picture, so that time
// moves without a redraw.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const plot = at("plot");
  const HEALTH = ["#a50026", "#d73027", "#f46d43", "#fdae61", "#d9c94e", "#a6d96a", "#66bd63", "#1a9850"];
  const UNKNOWN = "#9a9a9a";
  const WIDTHS = [2, 4, 7, 10]; // pixels at a load below 0.5, 1, 2 and above
  const EVENTS = {
    founder: ["circle", "founder"],
    birth: ["circle", "birth"],
    split: ["triangle-up", "split"],
    merge: ["diamond", "merge"],
    death: ["x", "death"],
    separate: ["line-ns-open", "twins part"],
  };
  const canvas = document.createElement("canvas");
  const KIND = canvas.getContext("webgl2") || canvas.getContext("webgl") ? "scattergl" : "scatter";
  let layer, byId, lanes, starts, ends, now, lit, timer;

  const endOf = (one) => (one.end ? one.end[0] : data.last);
  const round = (value, digits = 3) => (value === null || value === undefined ? "?" : Number(value).toPrecision(digits));

  // [step from, step to, health, load] along a life; what is known at a look holds until the next one.
  function pieces(one) {
    const track = one.track.filter(([step]) => step >= one.born[0] && step <= endOf(one));
    if (!track.length) return [[one.born[0], endOf(one), null, null]];
    const cuts = [one.born[0], ...track.slice(1).map(([step]) => step), endOf(one)];
    return track.map(([, health, load], i) => [cuts[i], cuts[i + 1], health, load]).filter(([a, b]) => b > a);
  }

  function group(one) {
    return ([, , health, load]) => {
      const colour = health === null ? UNKNOWN : HEALTH[Math.min(HEALTH.length - 1, Math.floor(health * HEALTH.length))];
      const width = load === null ? 3 : WIDTHS[load < 0.5 ? 0 : load < 1 ? 1 : load < 2 ? 2 : 3];
      return `${colour}|${width}`;
    };
  }

  function traces() {
    const lines = new Map();
    const links = { x: [], y: [] };
    const marks = Object.fromEntries(Object.keys(EVENTS).map((kind) => [kind, { x: [], y: [] }]));
    for (const one of layer.experts) {
      for (const piece of pieces(one)) {
        const key = group(one)(piece);
        if (!lines.has(key)) lines.set(key, { x: [], y: [] });
        const line = lines.get(key);
        line.x.push(piece[0], piece[1], null);
        line.y.push(one.lane, one.lane, null);
      }
      for (const parent of one.parents) {
        links.x.push(one.born[0], one.born[0], null);
        links.y.push(byId.get(parent).lane, one.lane, null);
      }
      marks[one.born[1]].x.push(one.born[0]);
      marks[one.born[1]].y.push(one.born[1] === "split" ? byId.get(one.parents[0]).lane : one.lane); // where it happens
      for (const [step, kind] of one.events) {
        if (kind === "death" || kind === "separate") {
          marks[kind].x.push(step);
          marks[kind].y.push(one.lane);
        }
      }
    }
    const made = [...lines].map(([key, { x, y }]) => {
      const [color, width] = key.split("|");
      return { type: KIND, mode: "lines", x, y, line: { color, width: Number(width) }, showlegend: false };
    });
    made.push({ type: KIND, mode: "lines", ...links, line: { color: "#555", width: 1 }, name: "parent to child" });
    for (const [kind, [symbol, name]] of Object.entries(EVENTS)) {
      const color = kind === "death" ? "#a50026" : "#222";
      made.push({ type: KIND, mode: "markers", ...marks[kind], marker: { symbol, size: 7, color }, name });
    }
    made.push({ type: KIND, mode: "lines", x: [null], y: [null], line: { color: "#1f6feb", width: 5 }, name: "descendants" });
    return made;
  }

  function index() {
    byId = new Map(layer.experts.map((one) => [one.id, one]));
    lanes = [];
    for (const one of layer.experts) (lanes[one.lane] ??= []).push(one);
    for (const lane of lanes) lane.sort((a, b) => a.born[0] - b.born[0]);
    starts = layer.experts.map((one) => one.born[0]).sort((a, b) => a - b);
    ends = layer.experts.filter((one) => one.end).map((one) => one.end[0]).sort((a, b) => a - b);
    for (const one of layer.experts) one.children = [];
    for (const one of layer.experts) for (const parent of one.parents) byId.get(parent).children.push(one.id);
  }

  const upTo = (sorted, step) => {
    let [low, high] = [0, sorted.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return low;
  };

  function descendants(one) {
    const found = new Set();
    const todo = [...one.children];
    while (todo.length) {
      const id = todo.pop();
      if (found.has(id)) continue;
      found.add(id);
      todo.push(...byId.get(id).children);
    }
    return found;
  }

  function story(one) {
    const born = one.born[1] === "founder" ? "founder" : `${one.born[1]} at step ${one.born[0]}`;
    const from = one.parents.length ? ` of ${one.parents.map((id) => `#${id}`).join(" and ")}` : "";
    const end = one.end ? `${one.end[1] === "merge" ? "merged" : "died"} at step ${one.end[0]}` : "lives";
    const known = one.track.filter(([step]) => step <= now).at(-1);
    const looks = known ? `\nhealth ${round(known[1])}, load ${round(known[2])} fair shares at step ${known[0]}` : "";
    const life = one.events.filter(([step]) => step <= now && step > one.born[0]).slice(-8);
    const told = life.map(([step, kind]) => `${step} ${kind.replace(/parent (\d+)/, "→ #$1")}`);
    const kin = `children: ${one.children.length}, descendants: ${descendants(one).size}`;
    return `#${one.id}: ${born}${from}; ${end}\n${kin}${looks}${told.length ? `\n${told.join("; ")}` : ""}`;
  }

  // The expert under a pointer event, if its line is drawn there by now.
  function under(event) {
    const box = plot.querySelector(".nsewdrag")?.getBoundingClientRect();
    if (!box || event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom) return null;
    const step = plot._fullLayout.xaxis.p2d(event.clientX - box.left);
    const height = plot._fullLayout.yaxis.p2d(event.clientY - box.top);
    const lane = lanes[Math.round(height)];
    if (!lane || step > now || Math.abs(height - Math.round(height)) > 0.4) return null;
    const place = upTo(lane.map((one) => one.born[0]), step) - 1;
    return place >= 0 && step <= endOf(lane[place]) ? lane[place] : null;
  }

  function show(step) {
    now = Math.max(0, Math.min(data.last, Math.round(step)));
    at("time").value = now;
    const [born, gone] = [upTo(starts, now), upTo(ends, now)];
    at("now").textContent = `step ${now} of ${data.last} · ${born - gone} living, ${gone} ended`;
    cover();
  }

  // Hide what comes after `now`.
  function cover() {
    const { xaxis, yaxis } = plot._fullLayout;
    const left = Math.max(0, Math.min(xaxis._length, xaxis.d2p(now)));
    const style = at("future").style;
    style.left = `${xaxis._offset + left}px`;
    style.top = `${yaxis._offset}px`;
    style.width = `${xaxis._length - left}px`;
    style.height = `${yaxis._length}px`;
  }

  function light(one) {
    lit = one;
    const last = plot.data.length - 1;
    const line = { x: [null], y: [null] };
    if (one) {
      for (const id of [one.id, ...descendants(one)]) {
        const other = byId.get(id);
        line.x.push(other.born[0], endOf(other), null);
        line.y.push(other.lane, other.lane, null);
        if (id === one.id) continue;
        for (const parent of other.parents) {
          line.x.push(other.born[0], other.born[0], null);
          line.y.push(byId.get(parent).lane, other.lane, null);
        }
      }
      at("story").textContent = story(one);
    } else {
      at("story").textContent = "Point at a line for an expert's life; click it to light up its descendants.";
    }
    plot.dataset.lit = one ? JSON.stringify([...descendants(one)].sort((a, b) => a - b)) : "";
    Plotly.restyle(plot, { x: [line.x], y: [line.y] }, [last]);
  }

  function open(number) {
    layer = data.layers[number];
    index();
    const wide = Math.max(1, data.last);
    Plotly.react(
      plot,
      traces(),
      {
        margin: { l: 60, r: 10, t: 10, b: 45 },
        hovermode: false,
        dragmode: "pan",
        showlegend: true,
        legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
        xaxis: { title: { text: "training step" }, range: [-0.01 * wide, 1.01 * wide], zeroline: false },
        yaxis: { title: { text: "lane (one living expert each)" }, range: [lanes.length - 0.4, -0.6], zeroline: false },
      },
      { responsive: true, scrollZoom: true, displaylogo: false },
    );
    light(null);
    show(data.last);
  }

  function play() {
    if (timer) {
      cancelAnimationFrame(timer);
      timer = 0;
      at("play").textContent = "▶ Play";
      return;
    }
    at("play").textContent = "⏸ Pause";
    const from = now >= data.last ? 0 : now;
    const began = performance.now();
    const tick = () => {
      const step = from + ((performance.now() - began) / 8000) * data.last;
      show(step);
      timer = requestAnimationFrame(tick);
      if (step >= data.last) play();
    };
    timer = requestAnimationFrame(tick);
  }

  at("scale").append("0 ", ...HEALTH.map((color) => Object.assign(document.createElement("b"), { style: `background:${color}` })), " 1");
  at("title").textContent = data.title;
  at("time").max = data.last;
  for (const [number, one] of data.layers.entries()) at("layer").add(new Option(`${one.layer} (${one.experts.length} experts)`, number));
  at("layer").addEventListener("change", () => open(Number(at("layer").value)));
  at("time").addEventListener("input", () => show(Number(at("time").value)));
  at("play").addEventListener("click", play);
  plot.addEventListener("mousemove", (event) => {
    const one = under(event);
    const tip = at("tip");
    tip.style.display = one ? "block" : "none";
    plot.style.cursor = one ? "pointer" : "";
    if (!one) return;
    tip.textContent = story(one);
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 330)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - 110)}px`;
  });
  plot.addEventListener("mouseleave", () => (at("tip").style.display = "none"));
  let down = null;
  plot.addEventListener("mousedown", (event) => (down = [event.clientX, event.clientY]), true);
  window.addEventListener("mouseup", (event) => {
    if (!down || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 4) return;
    down = null;
    if (!plot.querySelector(".nsewdrag") || !plot.contains(event.target)) {
      if (!event.target.closest?.(".dragcover")) return;
    }
    const one = under(event);
    light(one === lit ? null : one);
  }, true);
  open(0);
  plot.on("plotly_relayout", cover);
  plot.on("plotly_relayouting", cover);
  plot.on("plotly_afterplot", cover);
  document.body.dataset.ready = KIND;
})();
