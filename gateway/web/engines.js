// The engines' state, from GET /ready and GET /metrics every two seconds while it is looked at.

import { h, tell } from "./dom.js";
import { short, percent } from "./figures.js";
import { trace } from "./charts.js";
import { samples } from "./prometheus.js";

const EVERY_MS = 2000;
const KEPT = 60; // two minutes
const NAMES = new Set([
  "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total",
  "shannon_engine_ready", "shannon_engine_unfinished_requests", "shannon_queue_depth", "shannon_tokens_total",
]);

export class Engines {
  #history = new Map(); // engine -> [{at, running, waiting, cache, generated}]
  #timer = null;

  constructor(gateway) {
    this.gateway = gateway;
    this.note = h("p", { class: "note bad", role: "status", hidden: true });
    this.list = h("div", { class: "engine-list" });
    this.node = h("section", { "aria-labelledby": "engines-title" }, h("header", {}, h("h2", { id: "engines-title" }, "Engines")), this.note, this.list);
  }

  start() {
    this.stop();
    const again = async () => {
      if (document.visibilityState === "visible") await this.#look();
      if (this.#timer !== null) this.#timer = setTimeout(again, EVERY_MS);
    };
    this.#timer = 0;
    again();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = null;
  }

  async #look() {
    try {
      const page = await this.gateway.text("/metrics");
      this.#keep(samples(page, NAMES), performance.now());
      tell(this.note, null);
    } catch (error) {
      tell(this.note, error.message);
      if (error.code === "metrics_not_allowed") this.stop(); // the key will not be allowed in two seconds either
    }
    this.list.replaceChildren(...[...this.#history].map(([name, history]) => card(name, history)));
  }

  #keep(found, at) {
    const engines = found.filter((sample) => sample.name === "shannon_engine_ready");
    const sum = (name, label, engine) => {
      const own = found.filter((sample) => sample.name === name && (label === null || sample.labels[label] === engine));
      return own.length ? own.reduce((total, sample) => total + sample.value, 0) : null;
    };
    for (const { labels: { engine }, value } of engines) {
      const queued = sum("shannon_queue_depth", "engine", engine) ?? 0;
      const inVllm = sum("vllm:num_requests_running", "model_name", engine);
      const history = this.#history.get(engine) ?? [];
      history.push({
        at,
        ready: value === 1,
        running: inVllm ?? (sum("shannon_engine_unfinished_requests", "engine", engine) ?? 0) - queued,
        waiting: queued + (sum("vllm:num_requests_waiting", "model_name", engine) ?? 0),
        cache: sum("vllm:kv_cache_usage_perc", "model_name", engine),
        generated: sum("vllm:generation_tokens_total", "model_name", engine) ?? (engines.length === 1 ? completionTokens(found) : null),
      });
      this.#history.set(engine, history.slice(-KEPT));
    }
  }
}

function completionTokens(found) {
  return found.filter((sample) => sample.name === "shannon_tokens_total" && sample.labels.kind === "completion").reduce((total, sample) => total + sample.value, 0);
}

function card(name, history) {
  const now = history.at(-1);
  const rates = history.slice(1).map((sample, index) => (sample.generated === null ? null : Math.max(0, (1000 * (sample.generated - history[index].generated)) / (sample.at - history[index].at))));
  const dials = [
    dial("Running", short(now.running), history.map((sample) => sample.running)),
    dial("Waiting", short(now.waiting), history.map((sample) => sample.waiting)),
    now.cache === null ? null : dial("KV cache in use", percent(now.cache), history.map((sample) => sample.cache), 1),
    now.generated === null ? null : dial("Tokens per second", rates.length ? short(Math.round(rates.at(-1))) : "…", rates),
  ];
  return h("article", { class: "card engine" },
    h("header", {}, h("span", { class: `dot ${now.ready ? "good" : "bad"}` }), h("h3", {}, name), h("span", { class: "muted small" }, now.ready ? "ready" : "not ready")),
    h("div", { class: "dials" }, dials));
}

function dial(label, value, values, most = null) {
  return h("div", { class: "dial" }, h("div", { class: "label" }, label), h("div", { class: "value" }, value), trace(values, most));
}
