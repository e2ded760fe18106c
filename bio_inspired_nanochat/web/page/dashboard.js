// The dashboard: asks for the run every few seconds, draws with Charts, and runs the state inspector.
import { get, health, key, post } from "/page/api.js";

const at = (id) => document.getElementById(id);
const EVERY = 4000; // milliseconds between looks at the run
let [tab, run, seen, wanted, asking] = ["vitals", null, null, 0, false];

function say(text) {
  at("message").textContent = text ?? "";
}

async function follow() {
  try {
    const fresh = await get("/api/run");
    const changed = !run || run.step !== fresh.step || run.state !== fresh.state;
    run = fresh;
    Charts.head(at("head"), run);
    say(run.message);
    if (changed) draw();
  } catch (error) {
    say(error.message);
    at("key-row").hidden = error.status !== 401;
  }
  document.body.dataset.ready = "1";
}

function draw() {
  if (tab === "vitals") Charts.all(at("vitals"), run);
  if (tab === "experts") {
    Charts.map(at("map"), run.experts);
    Charts.leaderboard(at("leaders"), run.experts);
  }
  if (tab === "samples") Charts.samples(at("samples"), run.samples);
  if (tab === "family") tree();
}

function open(name) {
  tab = name;
  for (const button of document.querySelectorAll("[data-tab]")) {
    button.setAttribute("aria-selected", String(button.dataset.tab === name));
    at(button.dataset.tab).hidden = button.dataset.tab !== name;
  }
  if (name === "inspector") model();
  else if (run) draw();
}

// --- the family tree, layer by layer ------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const MOST_LIVES = 1500; // of one layer; the whole tree of a long history is scripts.neurophylo's page

async function tree() {
  const place = at("tree");
  try {
    const family = await get("/api/family");
    place.replaceChildren();
    for (const layer of family.layers) branch(place, layer, family.last);
  } catch (error) {
    place.textContent = error.message;
  }
}

function branch(place, layer, last) {
  const lives = layer.experts.slice(-MOST_LIVES);
  const left = layer.experts.length - lives.length;
  Charts.html("h3", place, `Layer ${layer.layer}: ${lives.length} experts${left ? ` (the newest; ${left} older ones are left out)` : ""}`);
  const lanes = Math.max(...lives.map((one) => one.lane)) + 1;
  const from = left ? Math.min(...lives.map((one) => one.born[0])) : 0;
  const [width, height] = [1000, 18 * lanes + 30];
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  place.append(svg);
  const x = (step) => 10 + ((step - from) / Math.max(1, last - from)) * (width - 20);
  const y = (lane) => 12 + 18 * lane;
  const add = (name, attributes, parent = svg) => {
    const made = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    parent.append(made);
    return made;
  };
  const byId = new Map(lives.map((one) => [one.id, one]));
  const drawn = new Map();
  for (const one of lives) {
    for (const parent of one.parents) {
      const other = byId.get(parent);
      if (other) add("line", { x1: x(one.born[0]), x2: x(one.born[0]), y1: y(other.lane), y2: y(one.lane), class: "link" });
    }
    const known = one.track.at(-1);
    const colour = known && known[1] !== null ? `hsl(${120 * known[1]} 65% 45%)` : "#999";
    const end = one.end ? one.end[0] : last;
    const path = add("path", { d: `M${x(one.born[0])} ${y(one.lane)}H${Math.max(x(end), x(one.born[0]) + 1)}`, class: "life", stroke: colour });
    const how = one.end ? `${one.end[1] === "merge" ? "merged" : "died"} at ${one.end[0]}` : "lives";
    const kin = one.parents.length ? ` of #${one.parents.join(" and #")}` : "";
    add("title", {}, path).textContent = `#${one.id}: ${one.born[1]}${kin} at ${one.born[0]}, ${how}${known ? `; health ${Charts.show(known[1])}, load ${Charts.show(known[2])}` : ""}`;
    path.dataset.id = one.id;
    drawn.set(one.id, path);
  }
  add("text", { x: 10, y: height - 4 }).textContent = `step ${from}`;
  add("text", { x: width - 10, y: height - 4, "text-anchor": "end" }).textContent = `step ${last}`;
  svg.addEventListener("click", (event) => {
    for (const path of drawn.values()) path.classList.remove("lit");
    const todo = event.target.dataset.id === undefined ? [] : [Number(event.target.dataset.id)];
    const found = new Set(todo);
    while (todo.length) {
      const parent = todo.pop();
      drawn.get(parent).classList.add("lit");
      for (const one of lives) {
        if (one.parents.includes(parent) && !found.has(one.id)) {
          found.add(one.id);
          todo.push(one.id);
        }
      }
    }
  });
}

// --- the state inspector ------------------------------------------------------------------------------------------------------------

async function model() {
  if (at("constant").length) return;
  try {
    const about = await get("/api/model");
    for (const one of about.sliders) {
      const option = new Option(`${one.name} (mean ${one.mean}${one.unit ? ` ${one.unit}` : ""})`, one.name);
      option.title = one.about;
      at("constant").add(option);
    }
    for (let layer = 0; layer < about.layers; layer++) at("layer").add(new Option(layer, layer));
    if (about.sliders.length) await ask();
    else at("about").textContent = "This model has no presynaptic terminals to look into.";
  } catch (error) {
    at("about").textContent = error.message;
  }
}

const factor = () => 2 ** Number(at("factor").value);

// One question at a time; what was moved meanwhile is asked when the answer has come.
async function ask() {
  wanted++;
  if (asking) return;
  asking = true;
  while (wanted) {
    wanted = 0;
    const factors = factor() === 1 ? {} : { [at("constant").value]: factor() };
    try {
      seen = await post("/api/inspect", { text: at("text").value, layer: Number(at("layer").value), factors });
      showStates();
    } catch (error) {
      at("about").textContent = error.message;
    }
  }
  asking = false;
}

const colour = (share) => `hsl(${260 - 205 * share} 65% ${18 + 52 * share}%)`;

function showStates() {
  const ticks = seen.own.values.calcium[0].length;
  if (Number(at("tick").max) !== ticks - 1) {
    at("tick").max = ticks - 1;
    at("tick").value = ticks - 1;
  }
  const tick = Math.min(ticks - 1, Number(at("tick").value));
  at("tick-value").textContent = `${tick} of ${ticks - 1}, before token ${tick * seen.tick}`;
  at("about").textContent = `Step ${seen.step}, layer ${seen.layer}: a row per head, a column per token; a tick is ${seen.tick} tokens.`;
  const place = at("maps");
  place.replaceChildren();
  for (const [name, unit] of Object.entries(seen.units)) state(place, name, unit, tick);
  const likely = (side) => side.next.map(([token, share]) => `${token} ${(100 * share).toFixed(1)}%`).join("  ");
  at("following").textContent = `Next token: ${likely(seen.own)}${seen.changed ? `  —  changed: ${likely(seen.changed)}` : ""}`;
  document.body.dataset.inspected = String(Number(document.body.dataset.inspected ?? 0) + 1);
}

function state(place, name, unit, tick) {
  const sides = [["as learned", seen.own], ["changed", seen.changed]].filter(([, side]) => side);
  let [low, high] = [Infinity, -Infinity];
  for (const [, side] of sides) for (const head of side.values[name]) for (const row of head) for (const value of row) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const box = Charts.html("div", place, undefined, "state");
  const pair = document.createElement("div");
  const means = [];
  for (const [title, side] of sides) {
    const rows = side.values[name].map((head) => head[tick]);
    const panel = Charts.html("div", pair);
    const canvas = Charts.html("canvas", panel);
    canvas.width = rows[0].length;
    canvas.height = rows.length;
    canvas.style.height = `${Math.max(40, 14 * rows.length)}px`;
    canvas.dataset.quantity = name;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${name}, ${title}`);
    const pen = canvas.getContext("2d");
    rows.forEach((row, head) => row.forEach((value, token) => {
      pen.fillStyle = colour(high > low ? (value - low) / (high - low) : 0.5);
      pen.fillRect(token, head, 1, 1);
    }));
    canvas.addEventListener("mousemove", (event) => {
      const area = canvas.getBoundingClientRect();
      const token = Math.min(rows[0].length - 1, Math.floor(((event.clientX - area.left) / area.width) * rows[0].length));
      const head = Math.min(rows.length - 1, Math.floor(((event.clientY - area.top) / area.height) * rows.length));
      canvas.title = `head ${head}, token ${token} ${seen.tokens[token]}: ${Charts.show(rows[head][token])}`;
    });
    const tokens = Charts.html("div", panel, undefined, "tokens");
    for (const token of seen.tokens) Charts.html("span", tokens, token);
    const flat = rows.flat();
    means.push(`${title} mean ${Charts.show(flat.reduce((sum, value) => sum + value, 0) / flat.length)}`);
  }
  Charts.html("p", box, `${name} (${unit}), colours from ${Charts.show(low)} to ${Charts.show(high)}: ${means.join(", ")}`, "said").dataset.mean = name;
  pair.className = sides.length > 1 ? "pair two" : "pair";
  box.append(pair);
}

for (const button of document.querySelectorAll("[data-tab]")) button.addEventListener("click", () => open(button.dataset.tab));
at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("layer").addEventListener("change", ask);
at("constant").addEventListener("change", ask);
at("factor").addEventListener("input", () => {
  at("factor-value").textContent = factor() === 1 ? "as learned" : `× ${Charts.show(factor())}`;
  ask();
});
at("tick").addEventListener("input", () => seen && showStates());
at("key").value = key.get();
at("key").addEventListener("change", () => {
  key.set(at("key").value);
  follow();
});
await health();
await follow();
setInterval(() => !document.hidden && run?.state !== "finished" && follow(), EVERY);
