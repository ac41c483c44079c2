// Markdown that grows: an answer is rendered as it comes, without starting over for each token.
//
// Blocks that can't change any more are rendered once and left alone; only the last one is parsed again. Inside an open
// code block, which is where answers get long, new text is appended as it is. What is left, one very long list or
// table, is rendered ever more seldom, so that rendering takes no more than a share of the time.

import { parse, render } from "./markdown.js";
import { h } from "./dom.js";

// Pauses are this many times as long as the rendering before them took, layout and paint included.
const REST = 4;

export class MarkdownStream {
  #text = "";
  #settled = 0; // characters whose nodes are final
  #env = {};
  #fence = null;
  #unseen = false; // whether there is text that no rendering has had
  #frame = null;
  #timer = null;
  #onBlock;

  // Renders into `root`. `onBlock` is called with the text of each block once it is final.
  constructor(root, onBlock = () => {}) {
    this.#onBlock = onBlock;
    this.head = h("div");
    this.tail = h("div");
    root.replaceChildren(this.head, this.tail);
  }

  get text() {
    return this.#text;
  }

  append(text) {
    this.#text += text;
    this.#unseen = true;
    if (this.#timer === null) this.#pause(0);
  }

  // Renders what is left. `text` and `marker` replace what was streamed where they are given.
  finish(text = this.#text, marker = undefined) {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#timer);
    this.#timer = null;
    const unspoken = text.slice(this.#settled);
    // Definitions that came late, sources that became known, or a text that was changed: all blocks once more.
    if (text !== this.#text || marker || Object.keys(this.#env.references ?? {}).length) {
      this.#text = text;
      this.head.replaceChildren(render(parse(text), marker));
      this.tail.replaceChildren();
    } else {
      this.#renderTail();
    }
    if (unspoken.trim()) this.#onBlock(spoken(render(parse(unspoken))));
    this.#settled = this.#text.length;
  }

  #pause(ms) {
    this.#timer = setTimeout(() => {
      if (this.#unseen) this.#frame = requestAnimationFrame(() => this.#draw());
      else this.#timer = null;
    }, ms);
  }

  #draw() {
    const started = performance.now();
    this.#unseen = false;
    if (!this.#growFence()) {
      this.#settle();
      this.#renderTail();
    }
    // The next task comes after this frame's layout and paint.
    this.#timer = setTimeout(() => this.#pause(REST * (performance.now() - started)));
  }

  #renderTail() {
    const source = this.#text.slice(this.#settled);
    const tokens = parse(source, this.#env);
    this.tail.replaceChildren(render(tokens));
    this.#fence = openFence(source, tokens, this.#settled);
    if (this.#fence) this.#fence.node = this.tail.lastElementChild.querySelector("code");
  }

  // Appends to an open code block and returns true, unless the block may have ended.
  #growFence() {
    const fence = this.#fence;
    if (!fence) return false;
    const lastLine = this.#text.lastIndexOf("\n") + 1;
    const fresh = this.#text.slice(fence.checked);
    if (fence.closing.test(fresh)) return false;
    fence.checked = Math.max(fence.checked, lastLine);
    fence.node.append(this.#text.slice(fence.shown));
    fence.shown = this.#text.length;
    return true;
  }

  // Makes all blocks final that are followed by another one. A line that is still being written does not count: `#`
  // may become a heading or a word.
  #settle() {
    const source = this.#text.slice(this.#settled);
    const complete = source.lastIndexOf("\n") + 1;
    if (!complete) return;
    const tokens = parse(source.slice(0, complete), this.#env);
    const starts = tokens.flatMap((token, index) => (token.level === 0 && token.nesting >= 0 ? [index] : []));
    if (starts.length < 2) return;
    const last = starts.at(-1);
    const nodes = render(tokens.slice(0, last));
    this.#onBlock(spoken(nodes));
    this.head.append(nodes);
    this.#settled += offsetOfLine(source, tokens[last].map[0]);
  }
}

function spoken(nodes) {
  return [...nodes.children].map((block) => block.textContent).join(" ");
}

function openFence(source, tokens, offset) {
  const token = tokens.at(-1);
  if (token?.type !== "fence" || token.level !== 0) return null;
  const lines = source.split("\n");
  const [first, end] = token.map;
  // Indented ones lose their indentation, so their text is not the source's.
  if (!lines[first].startsWith(token.markup)) return null;
  const closing = new RegExp(`^ {0,3}${token.markup[0]}{${token.markup.length},}[ \\t]*$`, "m");
  if (end - 1 > first && closing.test(lines[end - 1])) return null;
  if (first === lines.length - 1) return null; // the line that opens it is not complete
  return { closing, shown: offset + source.length, checked: offset + source.lastIndexOf("\n") + 1 };
}

function offsetOfLine(source, line) {
  let offset = 0;
  for (let number = 0; number < line; number++) offset = source.indexOf("\n", offset) + 1;
  return offset;
}
