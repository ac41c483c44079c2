// Events to stops on lanes: which agent runs on which lane, from which stop to which. Pure data, no nodes.
//
// The orchestrator has lane 0. An agent rides on the lowest lane that is free when it starts, and leaves it when it has
// completed or failed; one that starts again, as a reviewer does each round, rides again. What is said between rides is
// a stop at lane 0. A tool's call and its observation are one stop.

export const ORCHESTRATOR = "orchestrator";
const COLOURS = 9; // besides the orchestrator's own

export class Lanes {
  stops = []; // {agent, kind, message, payload, at, state, lane, colour, observation, endedAt}
  agents = new Map(); // id -> {id, role, colour, state, ride}
  rides = []; // {lane, colour, first, last, running}: first and last are indexes of stops

  // Takes in an event that arrived at `at`, in milliseconds since the request.
  add(event, at) {
    const call = event.type === "TOOL_OBSERVATION" && this.#callOf(event);
    if (call) {
      call.observation = event;
      call.endedAt = at;
      call.state = event.payload.success === false ? "failed" : "done";
      return;
    }
    const agent = this.#agent(event);
    const state = { TOOL_INVOKED: "running", ERROR_OCCURRED: "failed" }[event.type] ?? "done";
    this.stops.push({
      agent: agent.id,
      kind: event.type,
      message: event.message,
      payload: event.payload,
      at,
      state,
      lane: agent.ride?.lane ?? 0,
      colour: agent.colour,
    });
    if (agent.ride) agent.ride.last = this.stops.length - 1;
    if (event.type === "ERROR_OCCURRED") this.#alight(agent, "failed");
    else if (event.type === "AGENT_COMPLETED" || event.type === "WORKFLOW_COMPLETED") this.#alight(agent, "done");
  }

  // Marks what still runs as ended, when no more events will come.
  end(state) {
    for (const agent of this.agents.values()) if (agent.state === "running") this.#alight(agent, state);
    for (const stop of this.stops) if (stop.state === "running") stop.state = state;
  }

  get width() {
    return 1 + Math.max(0, ...this.rides.map((ride) => ride.lane));
  }

  #agent({ agent_id: id, type, payload }) {
    let agent = this.agents.get(id);
    if (!agent) {
      const workers = this.agents.size - (this.agents.has(ORCHESTRATOR) ? 1 : 0);
      const colour = id === ORCHESTRATOR ? 0 : 1 + (workers % COLOURS);
      agent = { id, role: payload.role, colour, state: "running", ride: null };
      this.agents.set(id, agent);
    }
    if (type === "AGENT_STARTED" && !agent.ride) {
      agent.state = "running";
      agent.ride = { lane: this.#freeLane(), colour: agent.colour, first: this.stops.length, last: 0, running: true };
      this.rides.push(agent.ride);
    }
    return agent;
  }

  #freeLane() {
    const taken = new Set(this.rides.filter((ride) => ride.running).map((ride) => ride.lane));
    let lane = 1;
    while (taken.has(lane)) lane += 1;
    return lane;
  }

  #alight(agent, state) {
    agent.state = state;
    if (agent.ride) agent.ride.running = false;
    agent.ride = null;
  }

  #callOf(event) {
    return this.stops.find((stop) =>
      stop.kind === "TOOL_INVOKED" && !stop.observation && stop.agent === event.agent_id && stop.payload.tool === event.payload.tool);
  }
}
