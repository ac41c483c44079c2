import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.SHANNON_URL + "/v1", apiKey: process.env.SHANNON_KEY });
const model = "shannon-chat";

const response = await client.responses.create({ model, input: "What are you?" });
console.log(response.output_text);

const events = await client.responses.create({ model, input: "What are you?", stream: true });
for await (const event of events) {
  if (event.type === "response.output_text.delta") process.stdout.write(event.delta);
}
console.log();

const stream = client.responses.stream({ model, input: "What are you?" });
const final = await stream.finalResponse();
console.log(final.output_text);

const kept = await client.responses.retrieve(final.id);
console.log(kept.output_text);

const running = await client.responses.create({ model, input: "Tell me a story.", background: true, ignore_eos: true });
const cancelled = await client.responses.cancel(running.id);
console.log(cancelled.status);
