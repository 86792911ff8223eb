// Vercel's AI SDK, by chat completions or responses: node ai.mjs URL KEY TOOL chat|responses.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const [, , baseURL, apiKey, given, api] = process.argv;
const { description, parameters } = JSON.parse(given);
const model = createOpenAI({ baseURL, apiKey })[api]("teller");
const told = {};

told.whole = (await generateText({ model, prompt: "fox" })).text;

told.streamed = "";
for await (const piece of streamText({ model, prompt: "fox" }).textStream) told.streamed += piece;

told.calls = [];
const weather = tool({
  description,
  inputSchema: jsonSchema(parameters),
  execute: async (input) => {
    told.calls.push(input);
    return "wet";
  },
});
const ask = { model, prompt: "rain", tools: { weather }, stopWhen: stepCountIs(3) };
told.after = (await generateText(ask)).text;
let text = "";
for await (const piece of streamText(ask).textStream) text += piece;
told.afterStreamed = text;

const shape = { model, schema: jsonSchema(parameters), prompt: "plainly" };
told.object = (await generateObject(shape)).object;

try {
  await generateText({ model, prompt: "fox", maxOutputTokens: 10000000, maxRetries: 0 });
} catch (error) {
  told.error = { status: error.statusCode, message: error.message };
}
console.log(JSON.stringify(told));
