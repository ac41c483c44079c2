// The admin view: engines, usage and keys, for keys that may administer.

import { h, tell } from "./dom.js";
import { Engines } from "./engines.js";
import { KeyList } from "./keys.js";
import { Usage } from "./usage.js";

export class Admin {
  constructor(root, gateway, models) {
    this.gateway = gateway;
    this.engines = new Engines(gateway);
    this.usage = new Usage(gateway);
    this.keys = new KeyList(gateway, models);
    this.note = h("p", { class: "note", role: "status", hidden: true });
    this.parts = h("div", { class: "admin", hidden: true }, this.engines.node, this.usage.node, this.keys.node);
    root.replaceChildren(h("div", { class: "page" },
      h("header", {}, h("h1", { tabindex: "-1" }, "Admin"), h("p", {}, "Engines, usage and keys of this gateway")), this.note, this.parts));
  }

  async open() {
    try {
      await this.keys.load();
    } catch (error) {
      this.parts.hidden = true;
      tell(this.note, error.status === 403 ? "This needs an admin key. Sign in with one to see engines, usage and keys." : error.message);
      return;
    }
    tell(this.note, null);
    this.parts.hidden = false;
    this.engines.start();
    await this.usage.load(new Map(this.keys.records.map((record) => [record.id, record.name])));
  }

  leave() {
    this.engines.stop();
  }

  close() {
    this.leave();
  }
}
