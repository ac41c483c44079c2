// The token inspector: generate with a small model and look at every step: entropy, alternatives, attention.

import { announce } from "./announcer.js";
import { Attention } from "./attention.js";
import { button, field, h, tell } from "./dom.js";
import { percent } from "./figures.js";
import { Heatmap } from "./heatmap.js";
import { odds } from "./odds.js";
import { FULL_BITS, spoken, TokenStrip } from "./token_strip.js";

const ABSENT = "This gateway has no token inspector.";
const AWAY = "The token inspector is not available at the moment: ";

export class Inspector {
  #models = null;
  #earlier = []; // messages before the one in the form
  #abort = null;

  constructor(root, gateway) {
    this.gateway = gateway;
    this.strip = new TokenStrip((token, index) => this.#showToken(token, index));
    this.attention = new Attention(gateway);
    this.heads = new Heatmap("Attention of each head at this step", (head, position, weight) => {
      this.headsReadout.textContent = `head ${head} attends to ${this.#at(position)}: ${percent(weight)}`;
    });
    this.headsReadout = h("output", {});
    this.note = h("p", { class: "note", role: "status", hidden: true });
    this.odds = h("div", { class: "odds" });
    this.stripFigure = h("div", { class: "strip", hidden: true }, h("figure", {}, h("figcaption", {}, "Attention at this step: one row for each head, from the first token to this one"), this.heads.node), this.headsReadout);
    this.reply = h("section", { "aria-labelledby": "reply-title", hidden: true },
      h("header", {}, h("h2", { id: "reply-title" }, "Reply"), this.summary = h("span", { class: "muted small" }),
        h("span", { class: "scale end", "aria-label": `Tint: from 0 to ${FULL_BITS} bits of entropy`, role: "img" }, "0", h("i"), `${FULL_BITS} bits`)),
      h("div", { class: "reply" }, h("div", {}, this.strip.node, this.stripFigure), this.odds));
    const out = h("div", { class: "inspect-out" }, this.note, this.intro = intro(), this.reply, this.attention.node);
    root.replaceChildren(h("h1", { class: "unseen", tabindex: "-1" }, "Inspector"), h("div", { class: "inspect" }, this.#form(), out));
  }

  // Called when the view is shown. `messages` is a conversation whose last answer is to be made again.
  // Asks which models there are to look into, once.
  async open() {
    if (this.#models) return;
    try {
      const { models } = await this.gateway.json("GET", "/v1/inspect");
      if (!models.length) throw Object.assign(new Error(ABSENT), { status: 404 });
      this.#models = models;
      this.model.replaceChildren(...models.map((model) => h("option", { value: model.id }, model.id)));
      this.#offerLayers();
      this.form.hidden = this.intro.hidden = false;
      tell(this.note, null);
    } catch (error) {
      this.form.hidden = this.intro.hidden = true;
      tell(this.note, error.status === 404 ? ABSENT : AWAY + error.message);
    }
  }

  close() {
    this.#abort?.abort();
    this.attention.hide();
  }

  #form() {
    const number = (id, value, most, step = 1) => h("input", { id, type: "number", min: 0, max: most, step, value });
    this.model = h("select", { id: "inspect-model", onchange: () => this.#offerLayers() });
    this.message = h("textarea", { id: "inspect-message", required: true });
    this.message.value = "Write a haiku about a gateway.";
    this.before = h("div", { class: "turns-before", hidden: true });
    this.tokens = number("inspect-tokens", 48, 4096);
    this.temperature = number("inspect-temperature", 0.8, 2, "any");
    this.topK = number("inspect-top-k", 0, 1000);
    this.seed = number("inspect-seed", 1, 2 ** 31 - 1);
    this.layer = h("select", { id: "inspect-layer" });
    this.run = button("Generate", { kind: "primary", type: "submit" });
    this.halt = button("Stop", { glyph: "stop", kind: "danger", hidden: true, onclick: () => this.#abort?.abort() });
    this.form = h("form", { class: "inspect-form", "aria-label": "What to generate", hidden: true, onsubmit: (event) => {
      event.preventDefault();
      this.#generate();
    } },
    field("Model", this.model), this.before, field("Message", this.message),
    h("div", { class: "pair" }, field("Tokens", this.tokens), field("Temperature", this.temperature)),
    h("div", { class: "pair" }, field("Top k, 0 is all", this.topK), field("Seed", this.seed)),
    field("Layer to trace", this.layer), h("div", { class: "actions" }, this.run, this.halt));
    return this.form;
  }

  #offerLayers() {
    const model = this.#chosen;
    this.tokens.max = model.max_model_len;
    this.layer.replaceChildren(...Array.from({ length: model.layers }, (_, number) => h("option", { value: number, selected: number === model.layers - 1 }, String(number))));
  }

  get #chosen() {
    return this.#models.find((model) => model.id === this.model.value);
  }

  // Takes a conversation over: its last question is asked again.
  take(messages) {
    const turns = messages.map(({ role, content }) => ({ role, content: typeof content === "string" ? content : content.filter((part) => part.type === "text").map((part) => part.text).join("\n") }));
    if (turns.at(-1).role === "assistant") turns.pop();
    this.message.value = turns.pop()?.content ?? "";
    this.#earlier = turns;
    this.before.hidden = turns.length === 0;
    this.before.replaceChildren(h("div", { class: "muted" }, `After ${turns.length} earlier messages`),
      button("Leave them out", { kind: "quiet", onclick: () => this.take([{ role: "user", content: this.message.value }]) }));
  }

  async #generate() {
    const abort = (this.#abort = new AbortController());
    const messages = [...this.#earlier, { role: "user", content: this.message.value }];
    const model = this.#chosen;
    const layer = Number(this.layer.value);
    const body = {
      model: model.id,
      messages,
      max_new_tokens: Number(this.tokens.value) || 1,
      temperature: Number(this.temperature.value),
      top_k: Number(this.topK.value) || null,
      seed: Number(this.seed.value),
      trace_layer: layer,
    };
    this.#start();
    try {
      const isLast = (frame) => frame.event === "done";
      const { frames } = await this.gateway.stream("/v1/inspect", body, isLast, { signal: abort.signal });
      for await (const frame of frames) this.#takeFrame(frame);
    } catch (error) {
      if (error.name !== "AbortError") tell(this.note, error.status === 404 && error.code === "not_found" ? ABSENT : error.message);
    }
    this.#end();
    const reply = this.strip.tokens.map((token) => token.text).join("");
    if (reply) this.attention.offer(model, [...messages, { role: "assistant", content: this.replyText ?? reply }], layer);
  }

  #start() {
    tell(this.note, null);
    this.strip.clear();
    this.odds.replaceChildren();
    this.replyText = null;
    this.stripFigure.hidden = true;
    this.attention.hide();
    this.intro.hidden = true;
    this.reply.hidden = false;
    this.reply.scrollIntoView({ block: "nearest" }); // on a telephone it is below the form
    this.summary.textContent = "The model is loaded on first use, which takes some seconds.";
    this.run.disabled = true;
    this.halt.hidden = false;
  }

  #end() {
    const traced = this.strip.tokens.filter((token) => token.entropy !== undefined);
    const mean = traced.reduce((sum, token) => sum + token.entropy, 0) / (traced.length || 1);
    this.summary.textContent = `${this.strip.tokens.length} tokens, ${mean.toFixed(2)} bits of entropy on average`;
    announce(this.summary.textContent);
    this.run.disabled = false;
    this.halt.hidden = true;
    this.reply.hidden = this.strip.tokens.length === 0;
  }

  #takeFrame(frame) {
    if (frame.comment !== undefined) return;
    const data = JSON.parse(frame.data);
    if (data.error) throw new Error(data.error.message);
    if (frame.event === "token") {
      this.summary.textContent = "generating";
      this.strip.add(data);
    } else if (frame.event === "trace") this.strip.trace(data.step, { ...data, entropy: data.entropy / Math.LN2 }); // nats
    else if (frame.event === "done") this.replyText = data.reply;
  }

  #showToken(token, index) {
    this.odds.replaceChildren(...odds(token, index));
    this.stripFigure.hidden = !token.attn?.length;
    if (!token.attn?.length) return;
    this.context = token.attn[0].length;
    this.step = index;
    this.heads.show(token.attn);
    this.headsReadout.textContent = `${token.attn.length} heads over ${this.context} tokens`;
  }

  // Returns a name for a position of the context at the step that is shown.
  #at(position) {
    const token = this.strip.tokens[position - (this.context - this.step)];
    return token ? `${position} “${spoken(token.text)}”` : `${position}, in the prompt`;
  }
}

function intro() {
  return h("p", { class: "muted" }, "Generate a reply, and see for each token how unsure the model was, what else it could have said, and which earlier tokens it looked at.");
}
