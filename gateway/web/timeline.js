// The timeline: the events of one answer, drawn as a map of lines with a stop for each event.
//
// The list of stops is what screen readers and keyboards use; the map beside it is decoration that repeats it.

import { byId, h, s } from "./dom.js";
import { duration, whole } from "./figures.js";
import { ORCHESTRATOR } from "./lanes.js";

const LEFT = 18; // of lane 0's middle, in pixels
const MOST_WIDTH = 128;
const WIDEST_LANE = 18;
const STARTS = new Set(["WORKFLOW_STARTED", "AGENT_STARTED"]);
const ENDS = new Set(["AGENT_COMPLETED", "WORKFLOW_COMPLETED"]);

export class Timeline {
  #lanes = null;
  #items = [];
  #drawn = null;

  constructor() {
    this.map = byId("timeline-map");
    this.list = h("ol", { class: "stops" });
    this.svg = s("svg", { "aria-hidden": "true" });
    this.map.append(this.svg, this.list);
    new ResizeObserver(() => this.#draw()).observe(this.list);
    this.list.addEventListener("toggle", () => this.#draw(), true);
  }

  // Shows the lanes of an answer, or nothing.
  show(lanes) {
    this.#lanes = lanes;
    this.#items = [];
    this.list.replaceChildren();
    this.update();
  }

  // Takes in what is new in the lanes that are shown.
  update() {
    const stops = this.#lanes?.stops ?? [];
    byId("timeline-empty").hidden = stops.length > 0;
    this.map.hidden = stops.length === 0;
    const scroll = byId("timeline-scroll");
    const following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
    stops.forEach((stop, index) => {
      const known = this.#items[index];
      if (known?.state === stop.state && known?.observed === Boolean(stop.observation)) return;
      const open = known?.node.querySelector("details")?.open ?? false;
      const node = stopItem(stop, open);
      if (known) known.node.replaceWith(node);
      else this.list.append(node);
      this.#items[index] = { node, state: stop.state, observed: Boolean(stop.observation) };
    });
    this.#summarize();
    this.#draw();
    if (following) scroll.scrollTop = scroll.scrollHeight;
  }

  #summarize() {
    const lanes = this.#lanes;
    const agents = lanes ? [...lanes.agents.values()].filter((agent) => agent.id !== ORCHESTRATOR) : [];
    const tools = lanes?.stops.filter((stop) => stop.kind === "TOOL_INVOKED").length ?? 0;
    const parts = [agents.length && `${agents.length} ${agents.length === 1 ? "agent" : "agents"}`, tools && `${tools} ${tools === 1 ? "call" : "calls"}`];
    byId("timeline-summary").textContent = parts.filter(Boolean).join(" · ");
    byId("timeline-legend").hidden = agents.length === 0;
    byId("timeline-legend").replaceChildren(...agents.map((agent) =>
      h("li", { class: agent.state === "failed" ? "failed" : "" },
        h("span", { class: `swatch line-${agent.colour}` }), h("span", { class: "name" }, agent.id), agent.role !== agent.id && agent.role,
        agent.state === "failed" && h("span", { class: "unseen" }, "failed"))));
  }

  #draw() {
    const lanes = this.#lanes;
    if (!lanes?.stops.length || this.map.offsetParent === null) return;
    const pitch = lanes.width > 1 ? Math.min(WIDEST_LANE, MOST_WIDTH / (lanes.width - 1)) : 0;
    this.list.style.paddingLeft = `${LEFT + pitch * (lanes.width - 1) + 20}px`;
    const heights = this.#items.map(({ node }) => node.offsetTop + 14);
    const x = (lane) => LEFT + lane * pitch;
    const signature = JSON.stringify([heights, pitch, lanes.stops.map((stop) => stop.state), lanes.rides]);
    if (signature === this.#drawn) return;
    this.#drawn = signature;
    this.svg.setAttribute("width", x(lanes.width));
    this.svg.setAttribute("height", this.list.offsetHeight);
    this.svg.replaceChildren(...rails(lanes, heights, x), ...stations(lanes, heights, x));
  }
}

function rails(lanes, y, x) {
  const bottom = y.at(-1);
  const bend = 18;
  const lines = [s("path", { class: "line-0", d: `M${x(0)} ${y[0]}V${bottom}` })];
  for (const ride of lanes.rides) {
    const [main, here, start, end] = [x(0), x(ride.lane), y[ride.first], y[ride.last]];
    let path = `M${main} ${start - bend - 4}C${main} ${start - 4} ${here} ${start - bend} ${here} ${start}V${ride.running ? bottom : end}`;
    if (!ride.running && ride.last < y.length - 1) path += `C${here} ${end + bend} ${main} ${end + 4} ${main} ${end + bend + 4}`;
    lines.push(s("path", { class: `line-${ride.colour}`, d: path }));
  }
  return lines;
}

function stations(lanes, y, x) {
  return lanes.stops.map((stop, index) => {
    const large = STARTS.has(stop.kind) || ENDS.has(stop.kind) || stop.kind === "TOOL_INVOKED" || stop.state === "failed";
    const shape = `stop ${large ? "" : "small"} ${stop.state}`;
    const place = stop.kind === "TOOL_INVOKED"
      ? s("rect", { class: shape, x: x(stop.lane) - 4.5, y: y[index] - 4.5, width: 9, height: 9, rx: 2 })
      : s("circle", { class: shape, cx: x(stop.lane), cy: y[index], r: large ? 5 : 3.5 });
    return s("g", { class: `line-${stop.colour}` }, place);
  });
}

function stopItem(stop, open) {
  const details = detailsOf(stop);
  const text = h("span", { class: "text" }, ...sentence(stop));
  const time = h("span", { class: "time" }, stop.endedAt === undefined ? `${(stop.at / 1000).toFixed(1)} s` : `took ${duration(stop.endedAt - stop.at)}`);
  const body = details.length
    ? h("details", { open }, h("summary", {}, text, time), h("dl", { class: "more" }, details))
    : h("div", {}, text, time);
  return h("li", { class: stop.state }, body);
}

function sentence(stop) {
  if (stop.kind === "TOOL_INVOKED") {
    const first = Object.values(stop.payload.params ?? {})[0];
    const state = { running: "", done: "", failed: " failed" }[stop.state];
    return [h("span", { class: "who" }, stop.agent), " ", h("code", {}, stop.payload.tool), state, first ? ` ${String(first).slice(0, 120)}` : ""];
  }
  if (stop.agent === ORCHESTRATOR || stop.message.startsWith(stop.agent)) return [stop.message];
  return [h("span", { class: "who" }, stop.agent), ` ${stop.message}`];
}

// Returns the terms and descriptions of what there is to know beyond the sentence.
function detailsOf(stop) {
  const { role, tool, sources, success, prompt_tokens, completion_tokens, model, ...rest } = stop.payload;
  const pairs = [];
  if (prompt_tokens !== undefined) pairs.push(["tokens", `${whole(prompt_tokens)} in, ${whole(completion_tokens)} out`]);
  for (const [name, value] of Object.entries(rest.params ?? rest)) if (worthShowing(value)) pairs.push([name, value]);
  if (stop.observation) {
    const seen = stop.observation.payload.sources ?? [];
    if (seen.length) pairs.push(["sources", seen]);
    pairs.push([stop.state === "failed" ? "failure" : "result", stop.observation.message]);
  } else if (sources?.length) pairs.push(["sources", sources]);
  return pairs.flatMap(([name, value]) => [h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, describe(value))]);
}

const worthShowing = (value) => value !== null && typeof value === "object" ? Object.keys(value).length > 0 : typeof value === "string";

function describe(value) {
  if (Array.isArray(value)) return h("ul", {}, value.map((entry) => h("li", {}, describe(entry))));
  if (value !== null && typeof value === "object") {
    return Object.entries(value).map(([name, part]) => `${name.replaceAll("_", " ")}: ${Array.isArray(part) ? part.join(", ") : part}`).join(" · ");
  }
  const text = String(value);
  return text.length > 300 ? h("div", { class: "long", tabindex: "0", role: "region", "aria-label": "Text" }, text) : text;
}
