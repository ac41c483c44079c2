// The gateway as one key may use it. The key lives in a private field of this object and is written nowhere.
//
// Every failure is a GatewayError with a message that people can read. Listeners hear "standing" when an answer tells
// where the key stands with its limits, and "refused" when the key is not accepted.

import { events } from "./event_stream.js";

const LIMITS = ["Requests", "Tokens"];
const BROKEN_OFF = "The answer broke off: the connection was lost.";

export class GatewayError extends Error {
  // `status` is 0 where there was no answer; `retryAfterMs` is null where the gateway did not say.
  constructor(message, { status = 0, code = "unreachable", param = null, retryAfterMs = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterMs });
  }
}

export class Gateway extends EventTarget {
  #key;

  constructor(key) {
    super();
    this.#key = key;
  }

  // The public part of the key, or null for a key of another form.
  get keyId() {
    return /^sk-shannon-([\w-]{12})-[\w-]{43}$/.exec(this.#key)?.[1] ?? null;
  }

  // Returns the JSON that a route answers with.
  async json(method, path, body = undefined, signal = undefined) {
    const response = await this.#send(method, path, body, {}, signal);
    return response.json();
  }

  async text(path) {
    return (await this.#send("GET", path)).text();
  }

  // Posts `body` and returns {response, frames}: its headers are there, its events follow, up to one that `isLast`.
  async stream(path, body, isLast, { headers = {}, signal } = {}) {
    const response = await this.#send("POST", path, body, headers, signal);
    return { response, frames: untilLast(events(response.body), isLast) };
  }

  async #send(method, path, body, headers = {}, signal = undefined) {
    const request = { method, signal, credentials: "omit", cache: "no-store", headers: { ...headers } };
    request.headers.Authorization = `Bearer ${this.#key}`;
    if (body !== undefined) {
      request.body = JSON.stringify(body);
      request.headers["Content-Type"] = "application/json";
    }
    let response;
    try {
      response = await fetch(path, request);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new GatewayError("The gateway does not answer. Is it running, and is the network up?");
    }
    this.#tellStanding(response, body?.model);
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (failure.status === 401) this.dispatchEvent(new CustomEvent("refused", { detail: failure }));
    throw failure;
  }

  #tellStanding(response, model) {
    if (!model || !response.headers.has("X-RateLimit-Limit-Requests")) return;
    const standing = { model };
    for (const kind of LIMITS) {
      standing[kind.toLowerCase()] = {
        limit: Number(response.headers.get(`X-RateLimit-Limit-${kind}`)),
        remaining: Number(response.headers.get(`X-RateLimit-Remaining-${kind}`)),
        resetAt: Date.parse(response.headers.get(`X-RateLimit-Reset-${kind}`)),
      };
    }
    this.dispatchEvent(new CustomEvent("standing", { detail: standing }));
  }
}

// Yields events until one is the last. A connection that ends before it, with an error or without, has been lost.
async function* untilLast(frames, isLast) {
  try {
    for await (const frame of frames) {
      yield frame;
      if (isLast(frame)) return;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  throw new GatewayError(BROKEN_OFF);
}

async function failureOf(response) {
  const error = await response.json().then((body) => body.error, () => null);
  const retryAfter = Number(response.headers.get("retry-after-ms"));
  return new GatewayError(error?.message ?? `The gateway answered with status ${response.status}.`, {
    status: response.status,
    code: error?.code,
    param: error?.param,
    retryAfterMs: retryAfter || null,
  });
}
