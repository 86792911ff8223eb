// The official client in JavaScript: node openai.mjs URL KEY TOOL, one JSON object out.
import OpenAI from "openai";

const [, , baseURL, apiKey, tool] = process.argv;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const model = "teller";
const user = (content) => [{ role: "user", content }];
const tools = [{ type: "function", function: JSON.parse(tool) }];
const told = {};

const whole = await client.chat.completions.create({ model, messages: user("fox") });
told.whole = whole.choices[0].message.content;

told.streamed = "";
const stream = await client.chat.completions.create({ model, messages: user("fox"), stream: true });
for await (const chunk of stream) told.streamed += chunk.choices[0]?.delta?.content ?? "";

const calling = client.chat.completions.stream({ model, messages: user("rain"), tools });
const called = (await calling.finalChatCompletion()).choices[0];
told.reason = called.finish_reason;
told.calls = called.message.tool_calls.map((call) => JSON.parse(call.function.arguments));
const results = called.message.tool_calls.map((call) => ({
  role: "tool",
  tool_call_id: call.id,
  content: "wet",
}));
const after = await client.chat.completions.create({
  model,
  messages: [...user("rain"), called.message, ...results],
  tools,
});
told.after = after.choices[0].message.content;

const response = await client.responses.create({ model, input: "fox" });
told.response = response.output_text;
const events = client.responses.stream({ model, input: "fox" });
told.events = (await events.finalResponse()).output_text;

try {
  await client.chat.completions.create({ model, messages: user("fox"), seed: -1 });
} catch (error) {
  told.error = { name: error.constructor.name, status: error.status, message: error.message };
}
console.log(JSON.stringify(told));
