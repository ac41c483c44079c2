// Server-sent events out of a response's body, for requests that EventSource can't make: those with a key and a body.

// Yields {event, data} for each event, and {comment} for each comment. Ends with the body.
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = "message";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const ended of lines) {
        const line = ended.endsWith("\r") ? ended.slice(0, -1) : ended;
        if (line === "") {
          if (data.length) yield { event, data: data.join("\n") };
          event = "message";
          data = [];
        } else if (line.startsWith(":")) {
          yield { comment: line.slice(1).trim() };
        } else {
          const [, name, value] = /^([^:]*)(?:: ?)?(.*)$/s.exec(line);
          if (name === "data") data.push(value);
          else if (name === "event") event = value;
        }
      }
    }
  } finally {
    // A reader that leaves early frees the connection, which is how the gateway learns of it.
    reader.cancel().catch(() => {});
  }
}
