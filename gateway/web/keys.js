// The keys: a list, and the ways to make, rotate and revoke them. A key itself is shown once, when it is made.

import { announce } from "./announcer.js";
import { button, field, h, tell } from "./dom.js";
import { day } from "./figures.js";

export class KeyList {
  records = [];

  constructor(gateway, models) {
    this.gateway = gateway;
    this.models = models;
    this.note = h("p", { class: "note bad", role: "alert", hidden: true });
    this.body = h("tbody");
    const heads = ["Name", "Id", "Tenant", "Models", "Made", "State"].map((name) => h("th", { scope: "col" }, name));
    this.node = h("section", { class: "keys", "aria-labelledby": "keys-title" },
      h("header", {}, h("h2", { id: "keys-title" }, "Keys"),
        h("div", { class: "end" }, button("New key", { glyph: "plus", onclick: () => this.#askForNew() }))),
      this.note,
      h("div", { class: "scroller card", tabindex: "0", role: "region", "aria-label": "Keys" },
        h("table", {}, h("thead", {}, h("tr", {}, heads, h("td"))), this.body)));
  }

  // Raises GatewayError: without this list there is no admin view.
  async load() {
    this.records = (await this.gateway.json("GET", "/admin/keys")).data;
    this.#draw();
  }

  #draw() {
    const rows = this.records.map((record) => this.#row(record));
    const none = h("tr", {}, h("td", { colspan: 7, class: "muted" }, "No keys in the store yet. Keys from the environment are not listed."));
    this.body.replaceChildren(...(rows.length ? rows : [none]));
  }

  #row(record) {
    const [state, kind] = stateOf(record);
    const actions = state === "revoked" ? [] : [
      button("Rotate", { kind: "quiet", "aria-label": `Rotate ${record.name}`, onclick: () => this.#confirm("Rotate", record) }),
      button("Revoke", { kind: "quiet", "aria-label": `Revoke ${record.name}`, onclick: () => this.#confirm("Revoke", record) }),
    ];
    return h("tr", { class: state === "revoked" ? "void" : "" },
      h("th", { scope: "row" }, `${record.name} `, record.admin && h("span", { class: "badge" }, "admin")),
      h("td", {}, h("span", { class: "mono" }, record.id)), h("td", {}, record.tenant),
      h("td", {}, record.models === null ? "all" : record.models.join(", ") || "none"), h("td", { class: "figures small" }, day(record.created_at)),
      h("td", {}, h("span", { class: `badge ${kind}` }, state)), h("td", {}, h("div", { class: "actions" }, actions)));
  }

  #confirm(action, record) {
    const text = { Rotate: `“${record.name}” gets a new secret, and the old one is void within a second.`, Revoke: `“${record.name}” is void within a second, permanently. Its usage stays.` }[action];
    const failure = h("p", { class: "note bad", role: "alert", hidden: true });
    const dialog = this.#dialog(`${action} this key?`, [h("p", {}, text), failure], action, async () => {
      const [method, path] = action === "Rotate" ? ["POST", `/admin/keys/${record.id}/rotate`] : ["DELETE", `/admin/keys/${record.id}`];
      const changed = await this.#attempt(failure, () => this.gateway.json(method, path));
      if (!changed) return;
      dialog.close();
      await this.load();
      if (changed.key) this.#showSecret(changed);
      else announce(`${record.name} is revoked.`);
    });
  }

  #askForNew() {
    const name = h("input", { id: "new-name", required: true, maxlength: 128, autocomplete: "off" });
    const tenant = h("input", { id: "new-tenant", value: "default", required: true, pattern: "[A-Za-z0-9._\\-]{1,64}", autocomplete: "off" });
    const expires = h("input", { id: "new-expires", type: "date" });
    const perDay = h("input", { id: "new-per-day", type: "number", min: 1, step: 1, placeholder: "no limit" });
    const admin = h("input", { id: "new-admin", type: "checkbox" });
    const boxes = this.models.map((model) => h("input", { type: "checkbox", value: model.id, checked: true }));
    const choice = h("fieldset", {}, h("legend", { class: "small muted" }, "Models"),
      h("div", { class: "model-choice" }, boxes.map((box, index) => h("label", { class: "check small" }, box, this.models[index].id))));
    const failure = h("p", { class: "note bad", role: "alert", hidden: true });
    const parts = [field("Name", name), field("Tenant", tenant, "Sessions and cached prompts are shared within a tenant only."), choice,
      field("Tokens per day", perDay), field("Expires", expires), h("label", { class: "check" }, admin, "May administer"), failure];
    const dialog = this.#dialog("New key", parts, "Make the key", async () => {
      const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
      const spec = {
        name: name.value,
        tenant: tenant.value,
        admin: admin.checked,
        models: chosen.length === boxes.length ? null : chosen,
        tokens_per_day: perDay.value ? Number(perDay.value) : null,
        expires_at: expires.value ? Math.floor(Date.parse(`${expires.value}T23:59:59Z`) / 1000) : null,
      };
      const made = await this.#attempt(failure, () => this.gateway.json("POST", "/admin/keys", spec));
      if (!made) return;
      dialog.close();
      await this.load();
      this.#showSecret(made);
    });
  }

  #showSecret(record) {
    const copy = button("Copy", { glyph: "copy", onclick: () => navigator.clipboard?.writeText(record.key) });
    const parts = [h("p", {}, `The key of “${record.name}”. It can't be shown again.`), h("div", { class: "secret" }, h("code", {}, record.key), copy)];
    this.#dialog("Copy this key now", parts, "Done", (dialog) => dialog.close(), false);
  }

  // Returns what `request` returns, or null after saying what went wrong.
  async #attempt(note, request) {
    try {
      return await request();
    } catch (error) {
      tell(note, error.message);
      return null;
    }
  }

  #dialog(title, parts, action, submit, cancellable = true) {
    const close = () => dialog.close();
    const form = h("form", { onsubmit: (event) => {
      event.preventDefault();
      submit(dialog);
    } }, h("h2", { id: "dialog-title" }, title), ...parts,
    h("div", { class: "actions" }, cancellable && button("Cancel", { onclick: close }), button(action, { kind: "primary", type: "submit" })));
    const dialog = h("dialog", { "aria-labelledby": "dialog-title", onclose: () => dialog.remove() }, form);
    this.node.append(dialog);
    dialog.showModal();
    return dialog;
  }
}

function stateOf(record) {
  if (record.revoked_at !== null) return ["revoked", "bad"];
  if (record.expires_at !== null && record.expires_at * 1000 <= Date.now()) return ["expired", "bad"];
  return ["valid", "good"];
}
