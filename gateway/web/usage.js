// What keys have spent, by day: as bars by key or by model, and in total.

import { field, h, tell } from "./dom.js";
import { whole } from "./figures.js";
import { bars } from "./charts.js";

const MEASURES = {
  tokens: ["Tokens", (row) => row.prompt_tokens + row.completion_tokens],
  prompt_tokens: ["Prompt tokens", (row) => row.prompt_tokens],
  completion_tokens: ["Completion tokens", (row) => row.completion_tokens],
  requests: ["Requests", (row) => row.requests],
};
const MOST_SERIES = 9;
const DAY_MS = 86_400_000;

export class Usage {
  #rows = null; // until they are loaded
  #names = new Map();
  #width = 0; // of the chart, in pixels

  constructor(gateway) {
    this.gateway = gateway;
    const choice = (id, options) => h("select", { id, onchange: () => this.#draw() }, options.map(([value, text]) => h("option", { value }, text)));
    this.measure = choice("usage-measure", Object.entries(MEASURES).map(([name, [label]]) => [name, label]));
    this.group = choice("usage-group", [["key", "key"], ["model", "model"]]);
    this.days = choice("usage-days", [["14", "14 days"], ["30", "30 days"], ["90", "90 days"]]);
    this.note = h("p", { class: "note bad", role: "status", hidden: true });
    this.totals = h("div", { class: "totals" });
    this.chart = h("div");
    this.node = h("section", { "aria-labelledby": "usage-title" },
      h("header", {}, h("h2", { id: "usage-title" }, "Usage"),
        h("div", { class: "end" }, field("Show", this.measure), field("by", this.group), field("over", this.days))),
      this.note, h("div", { class: "card" }, this.totals, this.chart));
    new ResizeObserver(([{ contentRect: { width } }]) => {
      if (width === this.#width || width === 0) return;
      this.#width = width;
      this.#draw();
    }).observe(this.chart);
  }

  // `names` are the names of keys, by id.
  async load(names) {
    this.#names = names;
    try {
      this.#rows = (await this.gateway.json("GET", "/v1/usage?key_id=all")).data;
      tell(this.note, null);
    } catch (error) {
      tell(this.note, error.message);
    }
    this.#draw();
  }

  #draw() {
    if (!this.#width || !this.#rows) return;
    const [title, value] = MEASURES[this.measure.value];
    const seriesOf = this.group.value === "key" ? (row) => this.#names.get(row.key_id) ?? row.key_id : (row) => row.model;
    const days = lastDays(Number(this.days.value));
    const rows = this.#rows.filter((row) => row.date >= days[0]);
    const totals = new Map();
    for (const row of rows) totals.set(seriesOf(row), (totals.get(seriesOf(row)) ?? 0) + value(row));
    const largest = [...totals].sort((one, other) => other[1] - one[1]).map(([name]) => name);
    const series = largest.length > MOST_SERIES + 1 ? [...largest.slice(0, MOST_SERIES), "others"] : largest;
    const columns = days.map((label) => ({ label, parts: new Map() }));
    for (const row of rows) {
      const parts = columns[days.indexOf(row.date)]?.parts;
      if (!parts) continue; // a day that is still to come where this browser is
      const name = series.includes(seriesOf(row)) ? seriesOf(row) : "others";
      parts.set(name, (parts.get(name) ?? 0) + value(row));
    }
    this.#drawTotals(rows);
    this.chart.replaceChildren(bars(`${title} by ${this.group.value} and day`, columns, series, this.#width));
  }

  #drawTotals(rows) {
    const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
    const errors = rows.reduce((total, row) => total + Object.values(row.errors).reduce((all, count) => all + count, 0), 0);
    const figures = [["Requests", sum("requests")], ["Prompt tokens", sum("prompt_tokens")], ["of them cached", sum("cached_tokens")],
      ["Completion tokens", sum("completion_tokens")], ["Aborted", sum("aborted_requests")], ["Errors", errors]];
    this.totals.replaceChildren(...figures.map(([label, figure]) => h("div", { class: "dial" }, h("div", { class: "label" }, label), h("div", { class: "value" }, whole(figure)))));
  }
}

// Returns the last days in UTC, as the ledger counts them, oldest first.
function lastDays(count) {
  const today = Date.now();
  return Array.from({ length: count }, (_, index) => new Date(today - (count - 1 - index) * DAY_MS).toISOString().slice(0, 10));
}
