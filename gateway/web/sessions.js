// The list of sessions. The gateway keeps the conversations; this browser keeps their ids, so that a reload finds them.
//
// An id opens nothing without a key of its tenant. No text and no key is stored here.

import { button, byId, h, tell } from "./dom.js";
import { ago } from "./figures.js";

const MOST = 500;

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
  #known; // [{id, at, title, node}], newest first
  #current = null;
  #inSight = new Set(); // entries without a title
  #finding = false;

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
    this.sight = new IntersectionObserver((entries) => this.#see(entries), { root: byId("session-list") });
    this.#draw();
  }

  close() {
    this.sight.disconnect();
  }

  // Makes a session the current one.
  use(id, title = null) {
    this.#current = id;
    const known = this.#known.find((session) => session.id === id);
    if (known && title) known.title ??= title;
    this.#draw();
  }

  // Puts the current session first, where something has been said. It is listed from then on.
  touch(title) {
    const known = this.#known.find((session) => session.id === this.#current);
    const others = this.#known.filter((session) => session !== known);
    this.#known = [{ id: this.#current, at: Date.now(), title: known?.title ?? title }, ...others].slice(0, MOST);
    this.#remember();
    this.#draw();
  }

  #draw() {
    this.sight.disconnect();
    this.#inSight.clear();
    for (const session of this.#known) {
      session.node = this.#entry(session);
      if (session.title === null) this.sight.observe(session.node);
    }
    const none = h("li", { class: "none" }, "Conversations of this key appear here.");
    byId("session-list").replaceChildren(...(this.#known.length ? this.#known.map((session) => session.node) : [none]));
  }

  #entry({ id, at, title }) {
    return h("li", {},
      h("button", { type: "button", class: "open", "aria-current": id === this.#current && "true", onclick: () => this.#openById(id) },
        h("span", { class: "title" }, title ?? id), h("span", { class: "when" }, ago(at))),
      button(forgetting(title ?? id), { glyph: "trash", onlyIcon: true, kind: "quiet", onclick: () => this.#delete(id) }));
  }

  // Writes a title into an entry that may have the focus.
  #entitle(session, title) {
    session.title = title;
    const [open, forget] = session.node.children;
    open.querySelector(".title").textContent = title;
    forget.title = forgetting(title);
    forget.setAttribute("aria-label", forgetting(title));
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
    const index = this.#known.findIndex((session) => session.id === id);
    this.#drop(id);
    this.forget(id);
    (this.#known[index]?.node.lastElementChild ?? byId("new-session")).focus();
  }

  #drop(id) {
    this.#known = this.#known.filter((session) => session.id !== id);
    this.#remember();
    this.#draw();
  }

  #see(entries) {
    for (const { target, isIntersecting } of entries) {
      const session = this.#known.find((one) => one.node === target);
      if (session && isIntersecting) this.#inSight.add(session);
      else this.#inSight.delete(session);
    }
    if (!this.#finding) this.#findTitles();
  }

  // One after the other, and only of what is in sight: titles are not worth a burst of requests.
  async #findTitles() {
    this.#finding = true;
    for (const session of this.#inSight) {
      this.#inSight.delete(session);
      try {
        this.#entitle(session, titleOf(await this.gateway.json("GET", `/v1/sessions/${encodeURIComponent(session.id)}`)));
      } catch (error) {
        if (error.status !== 404) break;
        this.#drop(session.id);
      }
    }
    this.#finding = false;
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

const forgetting = (title) => `Forget ${title}`;

function titleOf(session) {
  const first = session.messages.find((message) => message.role === "user");
  return (first && contentOf(first).text.slice(0, 80)) || session.id;
}
