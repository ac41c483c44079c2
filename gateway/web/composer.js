// Where a message is written: text, pictures, and the settings that go with it.

import { button, field, h } from "./dom.js";
import { Images } from "./images.js";

export class Composer {
  // `send(text, pictures)` and `stop()` are called when the user wants to.
  constructor(root, { send, stop }) {
    this.send = send;
    this.stop = stop;
    this.busy = false;
    this.text = h("textarea", { id: "message", rows: 1, placeholder: "Write a message", "aria-describedby": "message-hint" });
    this.problem = h("p", { class: "note bad", role: "alert", hidden: true });
    const list = h("ul", { class: "pending", "aria-label": "Pictures to send" });
    this.images = new Images(list, (message) => this.complain(message));
    this.file = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, "aria-label": "Pictures" });
    this.attach = button("Attach pictures", { glyph: "attach", onlyIcon: true, kind: "quiet", onclick: () => this.file.click() });
    this.settings = settings();
    const options = button("Settings", { glyph: "settings", kind: "quiet", "aria-expanded": "false", "aria-controls": "settings" });
    options.addEventListener("click", () => {
      this.settings.hidden = !this.settings.hidden;
      options.setAttribute("aria-expanded", String(!this.settings.hidden));
    });
    this.go = button("Send", { glyph: "send", onlyIcon: true, kind: "primary", type: "submit" });
    this.halt = button("Stop", { glyph: "stop", kind: "danger", onclick: () => this.stop(), hidden: true });
    this.box = h("div", { class: "box" }, list,
      h("label", { class: "unseen", for: "message" }, "Message"), this.text,
      h("div", { class: "tools" }, this.attach, this.file, options,
        h("span", { class: "hint", id: "message-hint" }, "Enter sends, Shift+Enter starts a line"), this.halt, this.go));
    this.form = h("form", {}, this.problem, this.settings, this.box);
    root.replaceChildren(this.form);
    this.#listen();
  }

  // Returns the settings as fields of a request, those left empty left out, and the system prompt.
  get options() {
    const value = (name) => this.settings.querySelector(`#${name}`).value.trim();
    const number = (name) => (value(name) === "" ? undefined : Number(value(name)));
    return { system: value("system"), sampling: { temperature: number("temperature"), max_tokens: number("max-tokens") } };
  }

  complain(message) {
    this.problem.textContent = message ?? "";
    this.problem.hidden = !message;
  }

  // `takesImages` is null where the gateway does not know before the engine has loaded.
  offerImages(takesImages) {
    this.attach.hidden = takesImages === false;
    if (takesImages === false) this.images.clear();
  }

  setBusy(busy) {
    this.busy = busy;
    const focused = busy ? this.go : this.halt;
    const next = busy ? this.halt : this.text;
    const had = document.activeElement === focused;
    this.halt.hidden = !busy;
    this.go.hidden = busy;
    if (had) next.focus();
  }

  focus() {
    this.text.focus();
  }

  #listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.file.addEventListener("change", async () => {
      await this.images.add(this.file.files);
      this.file.value = "";
    });
    this.text.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length && !this.attach.hidden) this.images.add(event.clipboardData.files);
    });
    for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
      this.box.addEventListener(name, (event) => {
        if (this.attach.hidden) return;
        event.preventDefault();
        this.box.classList.toggle("target", over);
        if (name === "drop") this.images.add(event.dataTransfer.files);
      });
    }
  }

  #submit() {
    const text = this.text.value.trim();
    if (this.busy || (!text && !this.images.urls.length)) return;
    if (!this.form.reportValidity()) return;
    this.complain(null);
    const pictures = this.images.urls;
    this.text.value = "";
    this.images.clear();
    this.send(text, pictures);
  }
}

function settings() {
  const system = h("textarea", { id: "system", rows: 1, placeholder: "none" });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: "any", placeholder: "default" });
  const maxTokens = h("input", { id: "max-tokens", type: "number", min: 1, step: 1, placeholder: "default" });
  return h("div", { class: "settings", id: "settings", role: "group", "aria-label": "Settings", hidden: true },
    field("System prompt", system), field("Temperature", temperature), field("Most tokens", maxTokens));
}
