// The chat: a conversation with one model at a time, its sessions, and the timeline beside it.
//
// The page holds the conversation and sends all of it each time, so what is on the screen is what the model gets.

import { announce } from "./announcer.js";
import { complete } from "./completion.js";
import { Composer } from "./composer.js";
import { button, byId, h } from "./dom.js";
import { Gauges } from "./gauges.js";
import { contentOf, newSessionId, Sessions } from "./sessions.js";
import { Answer, question } from "./turn.js";

const IDEAS = ["What are you?", "Write a haiku about a gateway.", "Tell me a joke."];
const MOST_BODY_CHARS = 6_000_000; // of pictures; the gateway takes bodies of 8 MiB by default
const NEAR_PX = 80;
const A_MOMENT_MS = 1000;

export class Chat {
  #turns = []; // {text, pictures, answer}
  #sessionId = newSessionId();
  #stored = false; // whether the gateway has turns of this session
  #abort = null;
  #following = true; // whether the end of the conversation stays in sight
  #top = 0; // where it was scrolled to
  #touchedAt = -Infinity; // when the reader last did something there

  // `inspect(messages)` takes a conversation to the inspector.
  constructor(gateway, models, timeline, { inspect }) {
    this.gateway = gateway;
    this.models = models;
    this.timeline = timeline;
    this.inspect = inspect;
    this.composer = new Composer(byId("composer"), { send: (text, pictures) => this.#ask(text, pictures), stop: () => this.#abort?.abort() });
    this.gauges = new Gauges(gateway);
    this.sessions = new Sessions(gateway, {
      open: (session) => this.#restore(session),
      forget: (id) => id === this.#sessionId && this.#begin(),
    });
    this.#offerModels();
    byId("new-session").onclick = () => {
      this.#begin();
      this.composer.focus();
    };
    byId("ideas").replaceChildren(...IDEAS.map((idea) => button(idea, { onclick: () => this.#ask(idea, []) })));
    byId("scroll").onscroll = ({ target }) => this.#scrolled(target);
    for (const gesture of ["wheel", "touchmove", "pointerdown", "keydown"]) {
      byId("scroll").addEventListener(gesture, () => (this.#touchedAt = performance.now()), { passive: true });
    }
    this.growth = new ResizeObserver(() => this.#following && this.#scrollToEnd());
    this.growth.observe(byId("turns"));
    this.#begin();
  }

  focus() {
    this.composer.focus();
  }

  close() {
    this.#abort?.abort();
    this.gauges.close();
    this.sessions.close();
    this.growth.disconnect();
    this.#turns = [];
    byId("turns").replaceChildren();
  }

  #offerModels() {
    const select = byId("model");
    select.replaceChildren(...this.models.map((model) => h("option", { value: model.id }, model.id)));
    select.onchange = () => {
      const model = this.models.find((one) => one.id === select.value);
      byId("model-about").textContent = byId("model-about").title = model?.description ?? "";
      this.composer.offerImages(model?.takes_images ?? null);
      this.gauges.show(select.value);
    };
    select.onchange();
  }

  // Starts an empty conversation.
  #begin(sessionId = newSessionId()) {
    this.#abort?.abort();
    this.#turns = [];
    this.#sessionId = sessionId;
    this.#stored = false;
    this.sessions.use(sessionId);
    byId("turns").replaceChildren();
    byId("welcome").hidden = false;
    this.timeline.show(null);
  }

  #restore(session) {
    this.#begin(session.id);
    this.#stored = true;
    for (const message of session.messages) {
      if (message.role === "user") this.#addTurn(contentOf(message));
      else if (message.role === "assistant" && this.#turns.length) this.#addAnswer(this.#turns.at(-1), "Earlier answer").restore(contentOf(message).text);
    }
    this.#scrollToEnd();
    announce(`Session opened, ${this.#turns.length} turns.`);
    this.composer.focus();
  }

  #ask(text, pictures) {
    const turn = this.#addTurn({ text, pictures });
    this.sessions.touch(text.slice(0, 80) || "Picture");
    return this.#answer(turn);
  }

  #addTurn({ text, pictures }) {
    byId("welcome").hidden = true;
    const turn = { text, pictures, answer: null };
    this.#turns.push(turn);
    byId("turns").append(question(turn));
    return turn;
  }

  #addAnswer(turn, model) {
    turn.answer?.node.remove();
    turn.answer = new Answer(model, {
      retry: () => this.#retry(turn),
      inspect: () => this.inspect(this.#messages(turn, true)),
      timeline: () => this.#showTimeline(turn.answer),
    });
    byId("turns").append(turn.answer.node);
    return turn.answer;
  }

  async #retry(turn) {
    if (this.#abort) return;
    const later = this.#turns.splice(this.#turns.indexOf(turn) + 1);
    for (const { answer } of later) answer?.node.remove();
    for (const node of [...byId("turns").querySelectorAll(".question")].slice(this.#turns.length)) node.remove();
    const answered = this.#answer(turn);
    turn.answer.node.focus(); // the button that asked for it is gone
    await answered;
  }

  async #answer(turn) {
    const model = byId("model").value;
    const answer = this.#addAnswer(turn, model);
    const abort = (this.#abort = new AbortController());
    this.composer.setBusy(true);
    this.timeline.show(answer.lanes);
    this.#scrollToEnd();
    try {
      await this.#forgetFirstTurn();
      const { sampling } = this.composer.options;
      const body = { model, messages: this.#messages(turn), ...sampling };
      for await (const part of complete(this.gateway, body, { sessionId: this.#sessionId, signal: abort.signal })) {
        this.#take(answer, part);
      }
      this.#stored = true;
      answer.end("done");
    } catch (error) {
      if (abort.signal.aborted) answer.end("stopped");
      else answer.end("failed", error);
    }
    if (this.#abort !== abort) return; // another conversation has begun meanwhile
    this.#abort = null;
    this.composer.setBusy(false);
    this.timeline.update();
  }

  #take(answer, part) {
    if (part.kind === "opened") {
      // Another tenant had this id: the gateway gave the conversation a new one.
      if (part.sessionId && part.sessionId !== this.#sessionId) {
        this.sessions.use((this.#sessionId = part.sessionId));
        this.sessions.touch(this.#turns[0].text.slice(0, 80));
      }
      return;
    }
    answer.take(part);
    if (part.kind === "events") this.timeline.update();
  }

  // A request without an answer in it gets the stored turns in front: a first turn that is asked again must not.
  async #forgetFirstTurn() {
    if (!this.#stored || this.#turns.length > 1) return;
    await this.gateway.json("DELETE", `/v1/sessions/${encodeURIComponent(this.#sessionId)}`);
    this.#stored = false;
  }

  // Returns the conversation up to and with a turn's question, or its answer as well.
  #messages(last, withAnswer = false) {
    const { system } = this.composer.options;
    const messages = system ? [{ role: "system", content: system }] : [];
    let left = MOST_BODY_CHARS - last.pictures.reduce((sum, url) => sum + url.length, 0);
    for (const turn of this.#turns) {
      const size = turn === last ? 0 : turn.pictures.reduce((sum, url) => sum + url.length, 0);
      left -= size;
      messages.push({ role: "user", content: content(turn, left >= 0) });
      if (turn === last && !withAnswer) break;
      if (turn.answer?.text) messages.push({ role: "assistant", content: turn.answer.text });
      if (turn === last) break;
    }
    return messages;
  }

  #showTimeline(answer) {
    this.timeline.show(answer.lanes);
    byId("chat").classList.add("show-timeline");
    byId("timeline-scroll").focus();
  }

  // Follows the end until the reader scrolls back. Text that comes and goes moves the place as well: up by a little, and
  // the end out of reach.
  #scrolled({ scrollTop, scrollHeight, clientHeight }) {
    const up = this.#top - scrollTop;
    const touched = performance.now() - this.#touchedAt < A_MOMENT_MS;
    this.#top = scrollTop;
    if (scrollHeight - scrollTop - clientHeight < NEAR_PX) this.#following = true;
    else if (up > NEAR_PX || (up > 0 && touched)) this.#following = false;
  }

  #scrollToEnd() {
    this.#following = true;
    byId("scroll").scrollTop = byId("scroll").scrollHeight;
  }
}

function content({ text, pictures }, withPictures) {
  if (!pictures.length) return text;
  if (!withPictures) return `${text}\n[image]`.trim();
  const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...images, ...(text ? [{ type: "text", text }] : [])];
}
