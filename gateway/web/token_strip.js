// A reply as tokens, each tinted by how unsure the model was when it chose it. One token at a time is the current one.
//
// The tokens are one stop for the Tab key; the arrow keys move among them.

import { h } from "./dom.js";
import { bits } from "./figures.js";

export const FULL_BITS = 4; // of entropy: the deepest tint. Sixteen equally likely tokens.

export class TokenStrip {
  tokens = []; // {id, text, entropy, topk, attn, node}
  #current = null;
  #pinned = false;

  // `show(token, index)` is called when another token becomes the current one.
  constructor(show) {
    this.show = show;
    this.node = h("div", { class: "tokens", role: "toolbar", "aria-label": "Tokens of the reply", "aria-orientation": "horizontal" });
    this.node.addEventListener("keydown", (event) => this.#move(event));
  }

  clear() {
    this.tokens = [];
    this.#current = null;
    this.#pinned = false;
    this.node.replaceChildren();
  }

  add({ token_id: id, token_text: text }) {
    const index = this.tokens.length;
    const node = h("button", {
      type: "button",
      class: "token mono",
      tabindex: index ? "-1" : "0",
      "aria-pressed": "false",
      onclick: () => this.pick(index, !this.#pinned || this.#current !== index),
      onfocus: () => this.pick(index, this.#pinned),
      onmouseenter: () => this.#pinned || this.pick(index, false),
    }, ...visible(text));
    this.tokens.push({ id, text, node });
    this.node.append(node);
    // A line break stands after its sign, outside the button.
    for (let breaks = text.split("\n").length - 1; breaks > 0; breaks--) this.node.append(h("br"));
  }

  // Adds what the model thought at that step.
  trace(index, { entropy, topk, attn }) {
    const token = this.tokens[index];
    if (!token) return;
    Object.assign(token, { entropy, topk, attn });
    token.node.style.backgroundColor = tint(entropy / FULL_BITS);
    token.node.setAttribute("aria-label", `${spoken(token.text)}, ${bits(entropy)}`);
    if (this.#current === null || this.#current === index) this.pick(index, false);
  }

  // Makes a token the current one. A pinned one stays when the pointer moves on.
  pick(index, pinned) {
    const before = this.tokens[this.#current];
    if (before) {
      before.node.tabIndex = -1;
      before.node.setAttribute("aria-pressed", "false");
    }
    this.#current = index;
    this.#pinned = pinned;
    const token = this.tokens[index];
    token.node.tabIndex = 0;
    token.node.setAttribute("aria-pressed", String(pinned));
    this.show(token, index);
  }

  #move(event) {
    const last = this.tokens.length - 1;
    const index = this.#current ?? 0;
    const next = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.tokens[Math.min(last, Math.max(0, next))].node.focus();
  }
}

// Returns a background for a share (0 to 1) of the deepest tint.
export function tint(share) {
  const depth = Math.round(Math.min(1, Math.max(0, share)) * 62);
  return `color-mix(in oklab, var(--tint) ${depth}%, transparent)`;
}

// Returns a token's text with signs for what can't be seen.
export function visible(text) {
  if (text === "") return [h("span", { class: "sign" }, "∅")];
  return text.split(/(\n|\t)/).filter(Boolean).map((part) => (part === "\n" ? h("span", { class: "sign" }, "↵") : part === "\t" ? h("span", { class: "sign" }, "⇥") : part));
}

export function spoken(text) {
  const names = { "": "end of text", " ": "space", "\n": "line break", "\n\n": "two line breaks", "\t": "tab" };
  return names[text] ?? text.trim();
}
