import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.SHANNON_URL + "/v1", apiKey: process.env.SHANNON_KEY });
const messages = [{ role: "user", content: "What are you?" }];

const completion = await client.chat.completions.create({ model: "shannon-chat", messages });
console.log(completion.choices[0].message.content);

const stream = await client.chat.completions.create({ model: "shannon-chat", messages, stream: true });
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
console.log();
