// Where the key stands with its limits for one model, from the X-RateLimit headers of the last answer.

import { byId, h, s } from "./dom.js";
import { countdown, short } from "./figures.js";

const CIRCUMFERENCE = 2 * Math.PI * 13;
const LOW = 0.2;
const KINDS = ["requests", "tokens"];

export class Gauges {
  #standings = new Map();
  #model = null;
  #gauges = new Map();

  constructor(gateway) {
    byId("gauges").replaceChildren(...KINDS.map((kind) => this.#make(kind)));
    gateway.addEventListener("standing", ({ detail }) => {
      this.#standings.set(detail.model, detail);
      this.#draw();
    });
    this.timer = setInterval(() => this.#draw(), 1000);
  }

  show(model) {
    this.#model = model;
    this.#draw();
  }

  close() {
    clearInterval(this.timer);
  }

  #make(kind) {
    const level = s("circle", { class: "level", cx: 16, cy: 16, r: 13, "stroke-dasharray": CIRCUMFERENCE });
    const number = h("b");
    const what = h("span", { class: "what" });
    const node = h("div", { class: "gauge", role: "meter", "aria-label": `${kind} left this minute`, "aria-valuemin": 0 },
      s("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" }, s("circle", { class: "track", cx: 16, cy: 16, r: 13 }), level),
      h("div", {}, number, what));
    this.#gauges.set(kind, { node, level, number, what });
    return node;
  }

  #draw() {
    for (const [kind, gauge] of this.#gauges) {
      const standing = this.#standings.get(this.#model)?.[kind];
      gauge.node.hidden = !standing;
      if (!standing) continue;
      // Once its reset has passed, all of the limit is there again.
      const untilMs = standing.resetAt - Date.now();
      const remaining = untilMs > 0 ? standing.remaining : standing.limit;
      const share = standing.limit ? remaining / standing.limit : 0;
      gauge.node.className = `gauge ${remaining === 0 ? "empty" : share < LOW ? "low" : ""}`.trim();
      gauge.level.setAttribute("stroke-dashoffset", CIRCUMFERENCE * (1 - share));
      gauge.level.toggleAttribute("hidden", remaining === 0);
      gauge.number.textContent = `${short(remaining)} / ${short(standing.limit)}`;
      gauge.what.textContent = untilMs > 0 && share < 1 ? `${kind}, full in ${countdown(untilMs)}` : `${kind} a minute`;
      gauge.node.setAttribute("aria-valuemax", standing.limit);
      gauge.node.setAttribute("aria-valuenow", remaining);
      gauge.node.setAttribute("aria-valuetext", `${remaining} of ${standing.limit} ${kind} left`);
    }
  }
}
