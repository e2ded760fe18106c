// The page: conversations on the left, messages in the middle, vitals and settings on the right.

import * as api from "/page/api.js";
import { button, copy, download, markdown, tinted } from "/page/render.js";
import * as store from "/page/store.js";
import { Vitals } from "/page/vitals.js";

const at = (id) => document.getElementById(id);
const settings = store.data.settings;
const vitals = new Vitals(at("vitals"));
let about = null; // what the server says of its model
let running = null; // the AbortController of the answer that is being made
let drawing = 0;

function say(text = "") {
  at("notice").textContent = text;
}

function keep() {
  if (!store.save()) say("this browser's storage is full or closed: export what you want to keep");
}

// --- messages ---------------------------------------------------------------------------------------------------------------

function fill(body, message) {
  if (message.role === "user") body.textContent = message.content;
  else if (message.pieces?.length) body.replaceChildren(tinted(message.pieces));
  else body.replaceChildren(markdown(message.content));
}

function messageBox(message, place, last) {
  const box = document.createElement("article");
  box.className = `message ${message.role}`;
  const body = document.createElement("div");
  body.className = "body";
  fill(body, message);
  box.append(body);
  if (message.about) {
    const line = document.createElement("div");
    line.className = "about";
    line.textContent = message.about;
    box.append(line);
  }
  const actions = document.createElement("div");
  actions.className = "actions";
  actions.append(button("Copy", () => copy(message.content)));
  if (message.role === "user") actions.append(button("Edit", () => edit(box, place)));
  else if (last) actions.append(button("Regenerate", () => regenerate()));
  if (!(running && last)) box.append(actions);
  return box;
}

function showMessages() {
  const messages = store.current()?.messages ?? [];
  const list = at("messages");
  if (messages.length) list.replaceChildren(...messages.map((m, i) => messageBox(m, i, i === messages.length - 1)));
  else {
    const empty = document.createElement("p");
    empty.className = "empty";
    empty.textContent =
      about?.style === "text" ? "A base model continues text: write the beginning of something." : "Ask something to begin.";
    list.replaceChildren(empty);
  }
  list.scrollTop = list.scrollHeight;
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
}

function showNewest() {
  if (drawing) return;
  drawing = requestAnimationFrame(() => {
    drawing = 0;
    const message = store.current()?.messages.at(-1);
    const body = at("messages").lastElementChild?.querySelector(".body");
    if (!running || !message || !body) return;
    const list = at("messages");
    const below = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    fill(body, message);
    if (below) list.scrollTop = list.scrollHeight;
  });
}

function edit(box, place) {
  if (running) return;
  const conversation = store.current();
  const area = document.createElement("textarea");
  area.value = conversation.messages[place].content;
  area.setAttribute("aria-label", "Edit message");
  const done = () => {
    if (!area.value.trim()) return;
    conversation.messages.length = place;
    send(area.value);
  };
  const row = document.createElement("div");
  row.className = "actions";
  row.append(button("Send", done), button("Cancel", showMessages));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showMessages();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      done();
    }
  });
  box.replaceChildren(area, row);
  area.focus();
}

// --- answers -------------------------------------------------------------------------------------------------------------------

function request(conversation) {
  const messages = conversation.messages.map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const synapse = { overflow: "drop_oldest", vitals_every: 4 };
  if (settings.memory && about?.memory) Object.assign(synapse, { memory: store.data.memory, conversation: conversation.id });
  if (settings.samples > 1 && about?.stochastic) synapse.samples = settings.samples;
  const body = { messages, stream: true, x_synapse: synapse };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) body[name] = settings[name];
  if (settings.seed !== "") body.seed = settings.seed;
  return body;
}

function take(message, chunk) {
  const text = chunk.choices[0]?.delta?.content ?? "";
  const extra = chunk.x_synapse ?? {};
  message.content += text;
  if (extra.uncertainty !== undefined) {
    message.pieces ??= [];
    message.pieces.push([text, extra.uncertainty]);
  } else if (text && message.pieces) message.pieces.push([text, null]);
  if (extra.tool?.kind === "output") message.about = `calculator: ${(message.tool = (message.tool ?? "") + extra.tool.text)}`;
  if (extra.vitals) vitals.add(extra.vitals);
  const notes = [];
  if (extra.dropped_messages) notes.push(`the oldest ${extra.dropped_messages} messages did not fit into the context`);
  if (extra.finish?.[0] === "context") notes.push("the context is full");
  if (extra.finish?.[0] === "length") notes.push("the longest answer was reached");
  if (notes.length) message.about = notes.join(" · ");
  showNewest();
}

async function answer() {
  const conversation = store.current();
  const body = request(conversation);
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  running = new AbortController();
  vitals.clear();
  say();
  showMessages();
  try {
    for await (const chunk of api.complete(body, running.signal)) take(message, chunk);
  } catch (error) {
    if (error.name === "AbortError") message.about = "stopped";
    else {
      say(error.message);
      if (error.status === 401) askForKey();
      if (!message.content) conversation.messages.pop();
    }
  }
  running = null;
  keep();
  showMessages();
  showMemory();
}

async function send(text) {
  if (running || !text.trim()) return;
  const conversation = store.current() ?? store.begin();
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.trim().split("\n")[0].slice(0, 60);
  keep();
  showList();
  await answer();
}

function regenerate() {
  const messages = store.current()?.messages ?? [];
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  answer();
}

// --- conversations -----------------------------------------------------------------------------------------------------------------

function showList() {
  at("list").replaceChildren(
    ...store.data.conversations.map((conversation) => {
      const item = document.createElement("li");
      item.setAttribute("aria-current", String(conversation.id === store.data.current));
      const title = button(conversation.title || "New conversation", () => choose(conversation.id));
      title.className = "title";
      const remove = button("✕", () => {
        if (running) return;
        store.remove(conversation.id);
        keep();
        showList();
        showMessages();
      });
      remove.setAttribute("aria-label", `Delete ${conversation.title || "conversation"}`);
      item.append(title, remove);
      return item;
    }),
  );
}

function choose(id) {
  if (running) return;
  store.data.current = id;
  keep();
  showList();
  showMessages();
  at("history").classList.remove("open");
}

function fresh() {
  if (running) return;
  choose(store.begin().id);
  at("input").focus();
}

// --- memory and settings ---------------------------------------------------------------------------------------------------------

let memoryShown = 0; // an answer that is overtaken by a later question's tells of a memory that is gone

async function showMemory() {
  const asked = ++memoryShown;
  const ids = ["memory", "memory-reset", "memory-save", "memory-load"];
  for (const id of ids) at(id).disabled = !about?.memory;
  if (!about) return;
  if (!about.memory) {
    at("memory-about").textContent = "This model has no fast weights, so it keeps nothing between conversations.";
    return;
  }
  try {
    const { turns, norm } = await api.memory.describe(store.data.memory);
    if (asked !== memoryShown) return;
    const size = Math.hypot(...norm.flatMap((layer) => Object.values(layer)));
    at("memory-about").textContent = size ? `${turns} answers · fast-weight norm ${size.toPrecision(3)}` : "empty";
  } catch (error) {
    if (asked === memoryShown) at("memory-about").textContent = error.message;
  }
}

async function withMemory(action) {
  try {
    await action(store.data.memory);
    say();
  } catch (error) {
    say(error.message);
  }
  showMemory();
}

function bind(id, read = (field) => Number(field.value)) {
  const field = at(id);
  const show = () => {
    const label = at(`${id}-value`);
    if (label) label.textContent = field.value;
  };
  if (field.type === "checkbox") field.checked = settings[id];
  else field.value = settings[id];
  show();
  field.addEventListener("input", () => {
    const value = read(field);
    if (field.checkValidity() && !Number.isNaN(value)) settings[id] = value;
    show();
    keep();
  });
}

function theme(next) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = settings.theme || dark;
  if (next) settings.theme = now === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = settings.theme || dark;
  keep();
}

function askForKey() {
  at("key-section").hidden = false;
  at("panel").classList.add("open");
  at("key").focus();
}

function drawer(opener, place) {
  at(opener).addEventListener("click", () => {
    const open = at(place).classList.toggle("open");
    at(opener).setAttribute("aria-expanded", String(open));
  });
}

function fileButton(opener, field, action) {
  at(opener).addEventListener("click", () => at(field).click());
  at(field).addEventListener("change", async () => {
    const [file] = at(field).files;
    at(field).value = "";
    if (file) await action(file);
  });
}

async function connect() {
  for (;;) {
    try {
      const health = await api.health();
      at("key-section").hidden = !health.key_needed;
      if (health.status === "ok") break;
      at("model").textContent = health.error ?? "the model is loading…";
    } catch {
      at("model").textContent = "the server does not answer";
    }
    await new Promise((resume) => setTimeout(resume, 1000));
  }
  try {
    const [model] = (await api.get("/v1/models")).data;
    about = model.x_synapse;
    at("model").textContent = `${model.id} · ${about.layers} layers · context ${about.context}${about.mechanisms.length ? "" : " · vanilla"}`;
    at("max_tokens").max = about.max_tokens;
    at("samples").disabled = !about.stochastic;
    at("samples-about").textContent = about.stochastic
      ? "With 2 or more, the tint of a token shows how far its probability differs between releases."
      : "This model releases no vesicle at random.";
    say();
  } catch (error) {
    say(error.message);
    if (error.status === 401) askForKey();
  }
  showMemory();
  showMessages();
}

function start() {
  for (const id of ["temperature", "top_p", "top_k", "max_tokens", "samples"]) bind(id);
  bind("seed", (field) => (field.value === "" ? "" : Number(field.value)));
  bind("system", (field) => field.value);
  bind("memory", (field) => field.checked);
  theme(false);
  at("theme").addEventListener("click", () => theme(true));
  drawer("show-history", "history");
  drawer("show-panel", "panel");
  at("new").addEventListener("click", fresh);
  at("stop").addEventListener("click", () => running?.abort());
  at("key").value = api.key.get();
  at("key").addEventListener("change", () => {
    api.key.set(at("key").value);
    connect();
  });
  at("export").addEventListener("click", () => download(store.exported(), "conversations.json", "application/json"));
  fileButton("import", "import-file", async (file) => {
    try {
      say(`${store.imported(await file.text())} conversations added`);
      keep();
      showList();
    } catch (error) {
      say(error.message);
    }
  });
  at("memory-reset").addEventListener("click", () => withMemory(api.memory.reset));
  at("memory-save").addEventListener("click", () => withMemory(async (name) => download(await api.memory.save(name), "memory.safetensors")));
  fileButton("memory-load", "memory-file", (file) => withMemory((name) => api.memory.load(name, file)));

  const input = at("input");
  const grow = () => {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight + 2}px`;
  };
  input.addEventListener("input", grow);
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !input.value.trim()) return;
    const text = input.value;
    input.value = "";
    grow();
    send(text);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("composer").requestSubmit();
    } else if (event.key === "ArrowUp" && !input.value) {
      const buttons = at("messages").querySelectorAll(".message.user .actions button:last-child");
      if (buttons.length) {
        event.preventDefault();
        buttons[buttons.length - 1].click();
      }
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      running?.abort();
      for (const id of ["history", "panel"]) at(id).classList.remove("open");
    }
    if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      fresh();
    }
  });
  showList();
  showMessages();
  input.focus();
  connect();
}

start();
