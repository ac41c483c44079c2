// Markdown to nodes: what a model writes becomes elements from the list below, and text, and nothing else.
//
// HTML in the source is text. Links lead to http, https and mailto only. Pictures are shown as links, because loading
// one would send its host the text of the chat.

import MarkdownIt from "./vendor/markdown-it/markdown-it.js";
import { button, h } from "./dom.js";

const LINK = /^(https?:\/\/|mailto:)/i;
// Headings of an answer stand below those of the page.
const TAGS = {
  p: "p", h1: "h3", h2: "h4", h3: "h5", h4: "h6", h5: "h6", h6: "h6", ul: "ul", ol: "ol", li: "li", blockquote: "blockquote",
  hr: "hr", thead: "thead", tbody: "tbody", tr: "tr", th: "th", td: "td", em: "em", strong: "strong", s: "s",
};

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
parser.validateLink = (url) => LINK.test(url);

// Returns the block tokens of a text. `env` keeps link definitions for texts that are parsed in pieces.
export function parse(text, env = {}) {
  return parser.parse(text, env);
}

// Returns the nodes of block or inline tokens. `marker` makes a node of the number in a [1], or returns null.
export function render(tokens, marker = () => null) {
  const root = document.createDocumentFragment();
  const open = [root];
  const add = (node) => open.at(-1).append(node);
  for (const token of tokens) {
    if (token.nesting === -1) {
      if (!token.hidden) open.pop();
    } else if (token.nesting === 1) {
      if (token.hidden) continue; // the paragraph of a tight list
      const { outer, inner } = container(token);
      add(outer);
      open.push(inner);
    } else if (token.type === "inline") {
      add(render(token.children, marker));
    } else {
      add(leaf(token, marker));
    }
  }
  return root;
}

function container(token) {
  if (token.type === "table_open") {
    const inner = h("table");
    return { outer: h("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Table" }, inner), inner };
  }
  if (token.type === "link_open") {
    const inner = link(token.attrGet("href"));
    return { outer: inner, inner };
  }
  const inner = h(TAGS[token.tag] ?? "span");
  const align = /^text-align:(center|right)$/.exec(token.attrGet("style"))?.[1]; // of a table's column
  if (align) inner.className = align;
  if (token.tag === "ol" && token.attrGet("start")) inner.setAttribute("start", token.attrGet("start"));
  return { outer: inner, inner };
}

function leaf(token, marker) {
  switch (token.type) {
    case "text":
      return marked(token.content, marker);
    case "code_inline":
      return h("code", {}, token.content);
    case "fence":
    case "code_block":
      return listing(token.content, token.info?.trim().split(/\s+/)[0]);
    case "softbreak":
    case "hardbreak":
      return h("br");
    case "image":
      return link(token.attrGet("src"), `image: ${token.content || token.attrGet("src")}`);
    case "hr":
      return h("hr");
    default:
      return document.createTextNode(token.content);
  }
}

export function link(url, text = null) {
  if (!LINK.test(url ?? "")) return h("span", {}, text);
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}

function listing(content, language) {
  const code = h("code", {}, content);
  const onclick = () => navigator.clipboard?.writeText(code.textContent);
  const copy = button("Copy the code", { glyph: "copy", onlyIcon: true, kind: "quiet", onclick });
  return h("div", { class: "listing" },
    h("header", {}, h("span", {}, language), copy),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Code${language ? ` in ${language}` : ""}` }, code));
}

// Returns text with its source markers, [1] or [1, 2], replaced by what `marker` makes of each number.
function marked(text, marker) {
  const root = document.createDocumentFragment();
  let from = 0;
  for (const match of text.matchAll(/\[(\d{1,3}(?:, ?\d{1,3})*)\]/g)) {
    const nodes = match[1].split(/, ?/).map((number) => marker(Number(number)));
    if (nodes.includes(null)) continue;
    root.append(text.slice(from, match.index).trimEnd(), ...nodes);
    from = match.index + match[0].length;
  }
  root.append(text.slice(from));
  return root;
}
