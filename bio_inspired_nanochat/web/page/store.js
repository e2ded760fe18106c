// Conversations and settings in this browser's storage.

const PLACE = "nanochat.v1";
export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const FRESH = () => ({
  conversations: [],
  current: null,
  memory: newId(),
  settings: { temperature: 0.8, top_p: 1, top_k: 50, max_tokens: 256, seed: "", samples: 0, system: "", memory: true, theme: "" },
});

function load() {
  const fresh = FRESH();
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE));
    if (kept && checked(kept.conversations)) return { ...fresh, ...kept, settings: { ...fresh.settings, ...kept.settings } };
  } catch {
    // unreadable or forbidden storage: begin anew
  }
  return fresh;
}

export const data = load();

// False when the browser's storage is full or forbidden.
export function save() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(data));
    return true;
  } catch {
    return false;
  }
}

export function current() {
  return data.conversations.find((conversation) => conversation.id === data.current) ?? null;
}

export function begin() {
  const empty = data.conversations.find((conversation) => conversation.messages.length === 0);
  const conversation = empty ?? { id: newId(), title: "", messages: [] };
  if (!empty) data.conversations.unshift(conversation);
  data.current = conversation.id;
  return conversation;
}

export function remove(id) {
  data.conversations = data.conversations.filter((conversation) => conversation.id !== id);
  if (data.current === id) data.current = data.conversations[0]?.id ?? null;
}

function checked(conversations) {
  const text = (value) => typeof value === "string";
  return (
    Array.isArray(conversations) &&
    conversations.every(
      (c) => c && /^[0-9a-f]{32}$/.test(c.id) && text(c.title) && Array.isArray(c.messages) &&
        c.messages.every((m) => m && ["user", "assistant"].includes(m.role) && text(m.content)),
    )
  );
}

export const exported = () => JSON.stringify({ format: "nanochat.conversations", conversations: data.conversations }, null, 1);

// Adds the conversations of an exported file that are not here yet; how many. Throws for any other file.
export function imported(content) {
  let record = null;
  try {
    record = JSON.parse(content);
  } catch {
    // said below
  }
  if (record?.format !== "nanochat.conversations" || !checked(record.conversations)) throw new Error("this file holds no exported conversations");
  const known = new Set(data.conversations.map((conversation) => conversation.id));
  const added = record.conversations.filter((conversation) => !known.has(conversation.id));
  data.conversations.push(
    ...added.map(({ id, title, messages }) => ({ id, title, messages: messages.map(({ role, content }) => ({ role, content })) })),
  );
  return added.length;
}
