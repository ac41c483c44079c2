// What else a model could have said at one step: its ten likeliest tokens as bars.

import { h } from "./dom.js";
import { bits, percent } from "./figures.js";
import { visible } from "./token_strip.js";

// Tokens that differ only by a leading space are shown differently.
const told = (text) => (text.startsWith(" ") ? [h("span", { class: "sign" }, "␣"), ...visible(text.slice(1))] : visible(text));

// Returns the nodes that describe a token.
export function odds(token, index) {
  const title = h("h3", {}, h("span", {}, "“", ...told(token.text), "”"));
  const chosen = token.topk?.find((one) => one.token_id === token.id);
  const facts = [`token ${index + 1}`, `id ${token.id}`, token.entropy !== undefined && bits(token.entropy), chosen && percent(chosen.prob)];
  const likeliest = token.topk?.[0]?.prob ?? 1;
  const rows = (token.topk ?? []).map((one) => {
    const fill = h("i", { class: "bar-fill" });
    fill.style.width = `${(100 * one.prob) / likeliest}%`;
    return h("li", { class: one.token_id === token.id ? "chosen" : "" }, fill,
      h("span", {}, ...told(one.token_text), one.token_id === token.id && h("span", { class: "unseen" }, " (chosen)")),
      h("span", {}, percent(one.prob)));
  });
  return [title, h("p", { class: "facts" }, facts.filter(Boolean).join(" · ")), h("ol", { "aria-label": "Likeliest tokens at this step" }, rows)];
}
