// One question and its answer, as nodes. An answer fills itself from the parts of a completion.

import { announce } from "./announcer.js";
import { button, h } from "./dom.js";
import { countdown, duration, whole } from "./figures.js";
import { Lanes, ORCHESTRATOR } from "./lanes.js";
import { link } from "./markdown.js";
import { MarkdownStream } from "./markdown_stream.js";

const SOURCES_HEADING = "\n\n## Sources\n\n"; // how a workflow ends an answer; the footnotes say the same

export function question({ text, pictures }) {
  const images = pictures.map((url, number) => h("li", {}, h("img", { src: url, alt: `Picture ${number + 1} of the message` })));
  return h("div", { class: "question" }, h("h2", { class: "unseen" }, "You said"),
    images.length > 0 && h("ul", { class: "pictures" }, images), text);
}

export class Answer {
  lanes = new Lanes();
  state = "waiting"; // writing, done, stopped, failed
  sources = [];
  usage = null;

  #started = performance.now();
  #firstAt = null;
  #pieces = 0;

  // `actions` are called by the buttons: retry(), inspect(), timeline().
  constructor(model, actions) {
    this.model = model;
    this.actions = actions;
    // Not read out by itself: agents write faster than a screen reader can speak. The announcer reads what matters.
    this.status = h("span", { role: "status", "aria-live": "off" }, "waiting for the gateway");
    this.body = h("div", { class: "prose" });
    this.after = h("div");
    this.footer = h("footer", { hidden: true });
    this.node = h("article", { class: "answer", tabindex: "-1", "aria-busy": "true" },
      h("header", {}, h("h2", { class: "name small" }, model), this.status), this.body, this.after, this.footer);
    this.stream = new MarkdownStream(this.body, announce);
  }

  get text() {
    return this.stream.text;
  }

  take(part) {
    const now = performance.now();
    switch (part.kind) {
      case "queued":
        this.status.textContent = `place ${part.position} in the queue, about ${countdown(part.waitS * 1000)}`;
        return;
      case "events":
        for (const event of part.events) this.#takeEvent(event, now - this.#started);
        return;
      case "usage":
        this.usage = part.usage;
        return;
      case "finish":
        this.cut = part.reason === "length";
        return;
      case "reasoning":
        this.#reason(part.text);
        return;
      case "text":
        this.#firstAt ??= now;
        this.#pieces += 1;
        this.stream.append(part.text);
        if (this.state === "waiting") this.#write();
    }
  }

  // Ends the answer. `state` is done, stopped or failed; `error` is what failed.
  end(state, error = null) {
    this.state = state;
    this.node.setAttribute("aria-busy", "false");
    this.endedAt = performance.now();
    this.lanes.end(state === "done" ? "done" : "failed");
    const listed = this.sources.length ? this.text.lastIndexOf(SOURCES_HEADING) : -1;
    const text = listed < 0 ? this.text : this.text.slice(0, listed);
    this.stream.finish(text, this.sources.length ? (number) => this.#marker(number) : undefined);
    this.body.classList.remove("writing");
    this.status.textContent = { stopped: "stopped", failed: "", done: this.cut ? "cut off at the most tokens" : "" }[state];
    if (this.sources.length) this.after.append(this.#footnotes());
    if (error) this.after.append(this.#failure(error));
    this.#showFooter();
    announce({ done: "The answer is complete.", stopped: "Stopped.", failed: "The answer failed." }[state]);
  }

  // Fills an answer that was given earlier, and is not read out again.
  restore(text) {
    this.stream = new MarkdownStream(this.body);
    this.stream.finish(text);
    this.state = "done";
    this.node.setAttribute("aria-busy", "false");
    this.status.textContent = "";
    this.#showFooter();
  }

  #write() {
    this.state = "writing";
    this.status.textContent = "writing";
    this.body.classList.add("writing");
  }

  #takeEvent(event, at) {
    this.lanes.add(event, at);
    const sources = event.payload.sources;
    if (Array.isArray(sources) && sources[0]?.number !== undefined) this.sources = sources;
    if (event.agent_id === ORCHESTRATOR && event.type === "PROGRESS") announce(event.message);
    // An observation is what a tool has read, and no news.
    if (this.state === "waiting" && event.type !== "TOOL_OBSERVATION") this.status.textContent = event.message.slice(0, 200);
  }

  #reason(text) {
    if (!this.reasoning) {
      this.reasoning = h("div");
      this.body.before(h("details", { class: "reasoning" }, h("summary", {}, "Reasoning"), this.reasoning));
      this.status.textContent = "thinking";
    }
    this.reasoning.append(text);
  }

  #marker(number) {
    const source = this.sources.find((one) => one.number === number);
    if (!source) return null;
    const go = (event) => {
      event.preventDefault();
      this.after.querySelector(`[data-number="${number}"]`).focus();
    };
    return h("sup", {}, h("a", { href: "#source", onclick: go, title: source.title, "aria-label": `Source ${number}: ${source.title}` }, String(number)));
  }

  #footnotes() {
    const items = this.sources.map((source) => h("li", { "data-number": source.number, tabindex: "-1" },
      h("span", { class: "mono" }, String(source.number)),
      h("span", {}, link(source.url, source.title || source.url), source.domain && h("span", { class: "muted" }, ` ${source.domain}`))));
    return h("section", { class: "footnotes" }, h("h3", {}, "Sources"), h("ol", {}, items));
  }

  #failure(error) {
    const text = h("p", {}, error.message);
    const again = button("Try again", { glyph: "retry", onclick: () => this.actions.retry() });
    const note = h("div", { class: "note bad failure", role: "alert" }, text, again);
    if (!error.retryAfterMs) return note;
    const until = Date.now() + error.retryAfterMs;
    const label = again.lastChild;
    const tick = () => {
      const left = until - Date.now();
      again.disabled = left > 0;
      label.textContent = left > 0 ? `Try again in ${countdown(left)}` : "Try again";
      if (left > 0 && note.isConnected) setTimeout(tick, Math.min(left, 500));
    };
    setTimeout(tick);
    return note;
  }

  #showFooter() {
    const { retry, inspect, timeline } = this.actions;
    const buttons = [];
    if (this.text) buttons.push(button("Copy", { glyph: "copy", kind: "quiet", onclick: () => navigator.clipboard?.writeText(this.text) }));
    if (this.state !== "failed") buttons.push(button("Retry", { glyph: "retry", kind: "quiet", onclick: retry }));
    if (this.text) buttons.push(button("Inspect", { kind: "quiet", onclick: inspect }));
    if (this.lanes.stops.length) buttons.push(button("Timeline", { kind: "quiet", onclick: timeline }));
    this.footer.replaceChildren(...buttons, h("span", { class: "spent" }, this.#spent()));
    this.footer.hidden = false;
  }

  #spent() {
    if (!this.usage) return "";
    const { prompt_tokens: prompt, completion_tokens: completion, prompt_tokens_details: details } = this.usage;
    const cached = details?.cached_tokens ? ` (${whole(details.cached_tokens)} cached)` : "";
    const parts = [`${whole(prompt)}${cached} in`, `${whole(completion)} out`];
    if (this.#firstAt !== null) parts.push(`first after ${duration(this.#firstAt - this.#started)}`);
    const writingS = (this.endedAt - this.#firstAt) / 1000;
    if (this.#pieces > 8 && writingS > 0.05 && this.lanes.agents.size <= 2) parts.push(`${whole(Math.round(completion / writingS))} tok/s`);
    return parts.join(" · ");
  }
}
