// The list of sessions. The gateway keeps the conversations; this browser keeps their ids, so that a reload finds them.
//
// An id opens nothing without a key of its tenant. No text and no key is stored here.

import { button, byId, h, tell } from "./dom.js";
import { ago } from "./figures.js";

const MOST = 20;

export function newSessionId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return `web-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

// Returns what a message of a stored session says, and its pictures.
export function contentOf(message) {
  if (typeof message.content === "string") return { text: message.content, pictures: [] };
  const parts = message.content ?? [];
  return {
    text: parts.filter((part) => part.type === "text").map((part) => part.text).join("\n"),
    pictures: parts.filter((part) => part.type === "image_url").map((part) => part.image_url.url).filter((url) => url.startsWith("data:image/")),
  };
}

export class Sessions {
  #known; // [{id, at, title}], newest first
  #current = null;

  // `open(session)` is called with a session as the gateway shows it, `forget(id)` when one is gone.
  constructor(gateway, { open, forget }) {
    this.gateway = gateway;
    this.open = open;
    this.forget = forget;
    this.#known = this.#recall();
    byId("session-open").onsubmit = (event) => {
      event.preventDefault();
      this.#openById(byId("session-id").value.trim());
    };
    this.#draw();
    this.#findTitles();
  }

  // Makes a session the current one; it is listed once it has a title.
  use(id, title = null) {
    this.#current = id;
    const known = this.#known.find((session) => session.id === id);
    if (known) known.title ??= title;
    else if (title !== null) this.#known = [{ id, at: Date.now(), title }, ...this.#known].slice(0, MOST);
    this.#remember();
    this.#draw();
  }

  #draw() {
    if (!this.#known.length) {
      byId("session-list").replaceChildren(h("li", { class: "none" }, "Conversations of this key appear here."));
      return;
    }
    byId("session-list").replaceChildren(...this.#known.map((session) => h("li", {},
      h("button", { type: "button", class: "open", "aria-current": session.id === this.#current && "true", onclick: () => this.#openById(session.id) },
        h("span", { class: "title" }, session.title ?? session.id), h("span", { class: "when" }, ago(session.at))),
      button(`Forget ${session.title ?? session.id}`, { glyph: "trash", onlyIcon: true, kind: "quiet", onclick: () => this.#delete(session.id) }))));
  }

  async #openById(id) {
    tell(byId("session-failure"), null);
    try {
      const session = await this.gateway.json("GET", `/v1/sessions/${encodeURIComponent(id)}`);
      this.use(id, titleOf(session));
      byId("session-id").value = "";
      this.open(session);
    } catch (error) {
      byId("session-open").closest("details").open = true;
      tell(byId("session-failure"), error.message);
    }
  }

  async #delete(id) {
    try {
      await this.gateway.json("DELETE", `/v1/sessions/${encodeURIComponent(id)}`);
    } catch (error) {
      if (error.status !== 404) {
        tell(byId("session-failure"), error.message);
        return;
      }
    }
    this.#drop(id);
    this.forget(id);
  }

  #drop(id) {
    this.#known = this.#known.filter((session) => session.id !== id);
    this.#remember();
    this.#draw();
  }

  // One after the other: titles are not worth a burst of requests.
  async #findTitles() {
    for (const session of this.#known.filter((one) => one.title === null)) {
      try {
        session.title = titleOf(await this.gateway.json("GET", `/v1/sessions/${encodeURIComponent(session.id)}`));
        this.#draw();
      } catch (error) {
        if (error.status === 404) this.#drop(session.id);
        else return;
      }
    }
  }

  get #place() {
    return this.gateway.keyId && `shannon.sessions.${this.gateway.keyId}`;
  }

  #recall() {
    try {
      const kept = JSON.parse(localStorage.getItem(this.#place) ?? "[]");
      return kept.map(({ id, at }) => ({ id: String(id), at: Number(at), title: null })).slice(0, MOST);
    } catch {
      return [];
    }
  }

  #remember() {
    if (!this.#place) return;
    try {
      localStorage.setItem(this.#place, JSON.stringify(this.#known.map(({ id, at }) => ({ id, at }))));
    } catch {
      // Without storage the list lives as long as the page.
    }
  }
}

function titleOf(session) {
  const first = session.messages.find((message) => message.role === "user");
  return (first && contentOf(first).text.slice(0, 80)) || session.id;
}
