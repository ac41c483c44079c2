// Attention of one layer and head over a whole conversation: as a picture, as tinted tokens, and as a table.

import { button, h, tell } from "./dom.js";
import { percent } from "./figures.js";
import { Heatmap } from "./heatmap.js";
import { spoken, tint, visible } from "./token_strip.js";

const LINKS = 20;

export class Attention {
  #request = null; // {model, messages}
  #abort = null;

  constructor(gateway) {
    this.gateway = gateway;
    this.layer = h("select", { id: "attention-layer", onchange: () => this.#load() });
    this.head = h("select", { id: "attention-head", onchange: () => this.#load() });
    this.note = h("p", { class: "note bad", role: "alert", hidden: true });
    this.heatmap = new Heatmap("Attention", (row, column, weight) => this.#point(row, column, weight));
    this.heatmap.node.classList.add("square");
    this.readout = h("output", {});
    this.row = h("div", { class: "row-tokens", tabindex: "0", role: "region", "aria-label": "Tokens, tinted by the attention of the current row" });
    this.links = h("tbody");
    this.load = button("Show attention", { onclick: () => this.#load() });
    const pick = (label, select) => h("div", { class: "field" }, h("label", { for: select.id }, label), select);
    this.result = h("div", { class: "heat", hidden: true },
      h("figure", {}, this.heatmap.node),
      h("div", {}, this.readout, this.row),
      h("details", { class: "links" }, h("summary", {}, `The ${LINKS} strongest links as a table`),
        h("table", {}, h("thead", {}, h("tr", {}, ...["From", "To", "Weight"].map((name, index) => h("th", { scope: "col", class: index === 2 && "number" }, name)))), this.links)));
    this.node = h("section", { "aria-labelledby": "attention-title", hidden: true },
      h("header", {}, h("h2", { id: "attention-title" }, "Attention"),
        h("div", { class: "picks end" }, pick("Layer", this.layer), pick("Head", this.head), this.load)),
      this.note, this.result);
  }

  // Offers the attention over a conversation. Nothing is asked of the gateway yet.
  offer(model, messages, layer) {
    this.#request = { model: model.id, messages };
    const numbers = (count, chosen) => Array.from({ length: count }, (_, number) => h("option", { value: number, selected: number === chosen }, String(number)));
    this.layer.replaceChildren(...numbers(model.layers, layer));
    this.head.replaceChildren(...numbers(model.heads, 0));
    this.result.hidden = true;
    this.load.hidden = false;
    tell(this.note, null);
    this.node.hidden = false;
  }

  hide() {
    this.#abort?.abort();
    this.node.hidden = true;
  }

  async #load() {
    this.#abort?.abort();
    const abort = (this.#abort = new AbortController());
    const body = { ...this.#request, trace_layer: Number(this.layer.value), head: Number(this.head.value) };
    this.load.disabled = true;
    tell(this.note, null);
    try {
      this.#show(await this.gateway.json("POST", "/v1/inspect/attention", body, abort.signal));
    } catch (error) {
      if (error.name !== "AbortError") tell(this.note, error.message);
    } finally {
      this.load.disabled = false;
    }
  }

  #show({ tokens, attn }) {
    this.tokens = tokens;
    this.matrix = attn;
    this.load.hidden = true;
    this.result.hidden = false;
    this.row.replaceChildren(...tokens.map((token) => h("span", {}, ...visible(token))));
    this.links.replaceChildren(...strongest(attn).map(([from, to, weight]) => h("tr", {},
      h("td", { class: "mono" }, `${from}: ${spoken(tokens[from])}`), h("td", { class: "mono" }, `${to}: ${spoken(tokens[to])}`),
      h("td", { class: "number" }, percent(weight)))));
    this.heatmap.show(attn);
    const last = attn.at(-1);
    this.heatmap.select(attn.length - 1, last.indexOf(Math.max(...last)));
  }

  #point(row, column, weight) {
    const name = (index) => `${index} “${spoken(this.tokens[index])}”`;
    this.readout.textContent = column > row ? `${name(row)} can't see ${name(column)}: it comes later.` : `${name(row)} attends to ${name(column)}: ${percent(weight)}`;
    [...this.row.children].forEach((node, index) => {
      node.style.backgroundColor = index <= row ? tint(Math.sqrt(this.matrix[row][index])) : "transparent";
      node.classList.toggle("query", index === row);
    });
  }
}

// Returns [from, to, weight] of the strongest links. The first token is left out: heads without anything to say look there.
function strongest(attn) {
  const links = attn.flatMap((row, from) => row.slice(1, from).map((weight, index) => [from, index + 1, weight]));
  return links.sort((one, other) => other[2] - one[2]).slice(0, LINKS);
}
