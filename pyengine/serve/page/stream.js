// The server's API: errors as its one sentence, an answer as the events of its stream.

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// A response that is no error. The key, where there is one, goes nowhere but to this server.
export async function request(path, key, options = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const said = body?.error?.message;
  throw new Failure(said ?? `The server answered with status ${response.status}.`, response.status);
}

// The chunks of a chat completion as they come.
export async function* chat(body, key, signal) {
  const response = await request("/v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message);
    yield chunk;
  }
  throw new Failure("The server broke off its answer.");
}

// The data of server-sent events; comments are left out.
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection to the server broke.");
    }
    if (part.done) return;
    const parts = (held + decoder.decode(part.value, { stream: true })).split("\n\n");
    held = parts.pop();
    for (const event of parts) if (event.startsWith("data: ")) yield event.slice(6);
  }
}
