// Requests to the service that serves this page, and the key they carry.

const KEY = "saccade-key";
let key = sessionStorage.getItem(KEY) ?? "";
let askForKey = () => {};

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.message ?? `the service answered ${status}`);
    this.status = status;
    this.param = body?.param ?? null;
    this.position = body?.position ?? null;
  }
}

export function onKeyWanted(handler) {
  askForKey = handler;
}

export function useKey(text) {
  key = text;
  sessionStorage.setItem(KEY, text);
}

// Paths are relative, so that the page also works behind a prefix.
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  if (response.status === 401) askForKey(Boolean(key));
  throw new ApiError(response.status, told.error);
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

// The JSON of each server-sent event; an error among them is thrown.
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error);
      yield event;
    }
  }
}
