// Announcements for screen readers, at a pace that can be followed: whole sentences, never tokens.

import { byId } from "./dom.js";

const PAUSE_MS = 600;
let waiting = [];
let timer = null;

// Forgets what was said and what was still to be said.
export function hush() {
  clearTimeout(timer);
  waiting = [];
  timer = null;
  byId("announcer").textContent = "";
}

// Says `text` politely, together with whatever else comes within the next moment.
export function announce(text) {
  waiting.push(text);
  timer ??= setTimeout(() => {
    byId("announcer").textContent = waiting.join(" ");
    waiting = [];
    timer = null;
  }, PAUSE_MS);
}
