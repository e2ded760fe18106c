// What the page asks of the server. Every function throws an Error whose message can be shown.

const KEY = "nanochat.key";
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

function headers(more = {}) {
  return key.get() ? { ...more, Authorization: `Bearer ${key.get()}` } : more;
}

async function checked(response) {
  if (response.ok) return response;
  let said = `the server answered ${response.status}`;
  try {
    said = (await response.json()).error.message ?? said;
  } catch {
    // not JSON: the status has to do
  }
  throw Object.assign(new Error(said), { status: response.status });
}

export async function get(path) {
  return (await checked(await fetch(path, { headers: headers() }))).json();
}

export async function post(path, body) {
  const sent = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) };
  return (await checked(await fetch(path, sent))).json();
}

export async function health() {
  const response = await fetch("/health");
  return response.json();
}

const memoryPath = (name) => `/v1/x_synapse/memories/${encodeURIComponent(name)}`;

export const memory = {
  describe: (name) => get(memoryPath(name)),
  reset: async (name) => checked(await fetch(memoryPath(name), { method: "DELETE", headers: headers() })),
  save: async (name) => (await checked(await fetch(`${memoryPath(name)}/file`, { headers: headers() }))).blob(),
  load: async (name, file) => checked(await fetch(`${memoryPath(name)}/file`, { method: "PUT", headers: headers(), body: file })),
};

// The chunks of a streamed answer, as objects.
export async function* complete(body, signal) {
  const request = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal };
  const response = await checked(await fetch("/v1/chat/completions", request));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer");
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
