// One streamed chat completion as a sequence of parts.

import { GatewayError } from "./gateway.js";

// Yields {kind, ...}:
//   opened (sessionId), queued (position, waitS), text, reasoning (text), events (events), finish (reason), usage (usage)
// Raises GatewayError, also where an error frame ends the stream; aborting `signal` raises AbortError.
export async function* complete(gateway, body, { sessionId, signal }) {
  const headers = sessionId ? { "X-Session-ID": sessionId } : {};
  const isLast = (frame) => frame.data === "[DONE]";
  const { response, frames } = await gateway.stream("/v1/chat/completions", { ...body, stream: true }, isLast, { headers, signal });
  yield { kind: "opened", sessionId: response.headers.get("X-Session-ID") };
  for await (const frame of frames) {
    if (frame.comment !== undefined) {
      const queued = /^queued position=(\d+) wait_s=(\d+)$/.exec(frame.comment);
      if (queued) yield { kind: "queued", position: Number(queued[1]), waitS: Number(queued[2]) };
      continue;
    }
    if (!isLast(frame)) yield* parts(JSON.parse(frame.data));
  }
}

function* parts(chunk) {
  if (chunk.error) throw new GatewayError(chunk.error.message, { status: 200, code: chunk.error.code });
  if (chunk.shannon_events) yield { kind: "events", events: chunk.shannon_events };
  const choice = chunk.choices[0];
  if (choice?.delta.reasoning_content) yield { kind: "reasoning", text: choice.delta.reasoning_content };
  if (choice?.delta.content) yield { kind: "text", text: choice.delta.content };
  if (choice?.finish_reason) yield { kind: "finish", reason: choice.finish_reason };
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage };
}
