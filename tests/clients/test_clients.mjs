// What users of the official JavaScript clients do, against the sarai at SARAI_URL with models `lfm2`, `coder`, `minilm`, `omni`,
// `thinker` and `caller`.
// Run by Node's own test runner from a copy beside its packages.

import assert from "node:assert/strict";
import test from "node:test";

import { Ollama } from "ollama";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const url = process.env.SARAI_URL;
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const ollama = new Ollama({ host: url });
const messages = [{ role: "user", content: "What is the weather in Oslo?" }];
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", description: "The weather of a city", parameters: city } }];


// A picture of one colour, as a bitmap file.
function bitmap([red, green, blue]) {
  const file = Buffer.alloc(54 + 64 * 64 * 3);
  file.write("BM");
  for (const [at, value] of [[2, file.length], [10, 54], [14, 40], [18, 64], [22, 64], [34, 64 * 64 * 3]]) {
    file.writeUInt32LE(value, at);
  }
  file.writeUInt16LE(1, 26);
  file.writeUInt16LE(24, 28);
  for (let at = 54; at < file.length; at += 3) file.set([blue, green, red], at);
  return file;
}

test("Both: pictures", async () => {
  for (const [name, colour] of [["red", [250, 10, 10]], ["green", [10, 250, 10]], ["blue", [10, 10, 250]]]) {
    const data = bitmap(colour).toString("base64");
    const content = [{ type: "text", text: "which" }, { type: "image_url", image_url: { url: `data:image/bmp;base64,${data}` } }];
    const asked = { model: "omni", messages: [{ role: "user", content }], temperature: 0 };
    assert.equal((await openai.chat.completions.create(asked)).choices[0].message.content, name);
    assert.equal((await openai.chat.completions.stream(asked).finalChatCompletion()).choices[0].message.content, name);
    const shown = [{ role: "user", content: "which", images: [new Uint8Array(bitmap(colour))] }];
    const seen = await ollama.chat({ model: "omni", messages: shown, options: { temperature: 0 } });
    assert.equal(seen.message.content, name);
    let text = "";
    for await (const part of await ollama.chat({ model: "omni", messages: shown, options: { temperature: 0 }, stream: true })) {
      text += part.message.content;
    }
    assert.equal(text, name);
  }
});

// Half a second of sound, as a WAV file.
function tone(hertz) {
  const file = Buffer.alloc(44 + 16000);
  file.write("RIFF", 0);
  file.writeUInt32LE(file.length - 8, 4);
  file.write("WAVEfmt ", 8);
  for (const [at, value] of [[16, 16], [24, 16000], [28, 32000], [40, 16000]]) file.writeUInt32LE(value, at);
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) file.writeUInt16LE(value, at);
  file.write("data", 36);
  for (let at = 0; at < 8000; at++) file.writeInt16LE(Math.round(12000 * Math.sin((2 * Math.PI * hertz * at) / 16000)), 44 + 2 * at);
  return file;
}

test("OpenAI: sound, several answers, and how likely their tokens were", async () => {
  for (const [name, hertz] of [["low", 250], ["high", 6000]]) {
    const data = tone(hertz).toString("base64");
    const content = [{ type: "text", text: "which" }, { type: "input_audio", input_audio: { data, format: "wav" } }];
    const heard = await openai.chat.completions.create({ model: "omni", messages: [{ role: "user", content }], temperature: 0 });
    assert.equal(heard.choices[0].message.content, name);
  }
  const asked = { model: "lfm2", messages, n: 2, seed: 4, temperature: 1, max_tokens: 5, logprobs: true, top_logprobs: 1 };
  const answers = await openai.chat.completions.create(asked);
  assert.deepEqual(answers.choices.map((choice) => choice.index), [0, 1]);
  for (const choice of answers.choices) {
    assert.equal(choice.logprobs.content.map((token) => token.token).join(""), choice.message.content);
  }
});

test("Both: reasoning, and several calls of one answer", async () => {
  const thought = (await openai.chat.completions.create({ model: "thinker", messages })).choices[0].message;
  assert.deepEqual([thought.reasoning_content.trim(), thought.content], ["It is simple.", "Forty-two it is."]);
  const told = (await ollama.chat({ model: "thinker", messages, think: true })).message;
  assert.deepEqual([told.thinking.trim(), told.content], ["It is simple.", "Forty-two it is."]);
  const both = [...tools, { type: "function", function: { ...tools[0].function, name: "get_time" } }];
  const streamed = await openai.chat.completions.stream({ model: "caller", messages, tools: both }).finalChatCompletion();
  const cities = streamed.choices[0].message.tool_calls.map((call) => JSON.parse(call.function.arguments).city);
  assert.deepEqual(cities, ["Oslo", "Rome"]);
  const called = (await ollama.chat({ model: "caller", messages, tools: both })).message.tool_calls;
  assert.deepEqual(called.map((call) => call.function.arguments.city), ["Oslo", "Rome"]);
});

test("OpenAI: a chat, and the same streamed", async () => {
  const asked = { model: "lfm2", messages, temperature: 0, max_tokens: 8 };
  // The first one computes the prompt in another order than those that find it in the cache.
  await openai.chat.completions.create(asked);
  const whole = await openai.chat.completions.create(asked);
  let text = "";
  for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, whole.choices[0].message.content);
});

test("OpenAI: tools, whole and streamed", async () => {
  const asked = { model: "coder", messages, tools, temperature: 0, max_tokens: 60 };
  for (const tool_choice of ["auto", "required"]) {
    const whole = await openai.chat.completions.create({ ...asked, tool_choice });
    const streamed = await openai.chat.completions.stream({ ...asked, tool_choice }).finalChatCompletion();
    for (const answer of [whole, streamed]) {
      const { name, arguments: text } = answer.choices[0].message.tool_calls[0].function;
      assert.deepEqual([name, JSON.parse(text).city], ["get_weather", "Oslo"]);
      assert.equal(answer.choices[0].finish_reason, "tool_calls");
    }
    // The template shows the model its call and the result.
    const called = whole.choices[0].message;
    const told = [...messages, called, { role: "tool", tool_call_id: called.tool_calls[0].id, content: '{"degrees": -3}' }];
    const asked_again = { ...asked, messages: told, max_tokens: 8 };
    const after = await openai.chat.completions.create(asked_again);
    assert.ok(after.usage.prompt_tokens > whole.usage.prompt_tokens + 30);
    const counted = { ...asked_again, stream_options: { include_usage: true } };
    const { usage } = await openai.chat.completions.stream(counted).finalChatCompletion();
    assert.equal(usage.prompt_tokens, after.usage.prompt_tokens);
  }
});

test("OpenAI: an answer parsed by zod, and vectors", async () => {
  const form = z.object({ colours: z.array(z.string()).max(3), sure: z.boolean(), count: z.number().int() });
  const asked = { model: "coder", messages, response_format: zodResponseFormat(form, "answer"), max_tokens: 100 };
  const answer = await openai.chat.completions.parse(asked);
  assert.equal(typeof answer.choices[0].message.parsed.sure, "boolean");
  assert.ok(Number.isInteger(answer.choices[0].message.parsed.count));
  assert.deepEqual(answer.sarai.degraded, []);
  const streamed = await openai.chat.completions.stream(asked).finalChatCompletion();
  assert.equal(typeof streamed.choices[0].message.parsed.sure, "boolean");
  const coded = await openai.embeddings.create({ model: "minilm", input: "A cat.", encoding_format: "base64" });
  assert.equal(Buffer.from(coded.data[0].embedding, "base64").length, 4 * 384);
  const made = await openai.embeddings.create({ model: "minilm", input: ["A cat.", "A bank."] });
  assert.deepEqual(made.data.map((row) => row.embedding.length), [384, 384]);
  const short = await openai.embeddings.create({ model: "minilm", input: "A cat.", dimensions: 64 });
  assert.equal(short.data[0].embedding.length, 64);
});

test("OpenAI: errors have their types", async () => {
  await assert.rejects(openai.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
  await assert.rejects(openai.chat.completions.create({ model: "lfm2", messages, tools }), OpenAI.BadRequestError);
});

test("Ollama: a chat, tools, a form and vectors", async () => {
  const options = { temperature: 0, num_predict: 60 };
  const whole = await ollama.chat({ model: "coder", messages, tools, options });
  const calls = [];
  for await (const part of await ollama.chat({ model: "coder", messages, tools, options, stream: true })) {
    calls.push(...(part.message.tool_calls ?? []));
  }
  for (const call of [whole.message.tool_calls[0], calls[0]]) {
    assert.deepEqual([call.function.name, call.function.arguments.city], ["get_weather", "Oslo"]);
  }
  const formed = await ollama.chat({ model: "coder", messages, format: city, options });
  assert.equal(typeof JSON.parse(formed.message.content).city, "string");
  let text = "";
  for await (const part of await ollama.chat({ model: "coder", messages, format: city, options, stream: true })) {
    text += part.message.content;
  }
  assert.equal(typeof JSON.parse(text).city, "string");
  const told = [...messages, whole.message, { role: "tool", tool_name: "get_weather", content: '{"degrees": -3}' }];
  const after = await ollama.chat({ model: "coder", messages: told, tools, options: { num_predict: 1 } });
  assert.ok(after.prompt_eval_count > whole.prompt_eval_count + 30);
  const short = await ollama.embed({ model: "minilm", input: ["A cat."], dimensions: 64 });
  assert.equal(short.embeddings[0].length, 64);
  const made = await ollama.embed({ model: "minilm", input: ["A cat."] });
  assert.equal(made.embeddings[0].length, 384);
});

test("OpenAI: a grammar, a named tool, none, and going on from a beginning, whole and streamed", async () => {
  const both = async (asked) => {
    const whole = await openai.chat.completions.create(asked);
    const streamed = await openai.chat.completions.stream(asked).finalChatCompletion();
    return [whole.choices[0], streamed.choices[0]];
  };
  const grammar = 'root ::= ("yes" | "no") "!"';
  for (const { message } of await both({ model: "lfm2", messages, temperature: 0, max_tokens: 10, grammar })) {
    assert.match(message.content, /^(yes|no)!$/);
  }
  const two = [...tools, { type: "function", function: { ...tools[0].function, name: "get_time" } }];
  const asked = { model: "coder", messages, tools: two, temperature: 0, max_tokens: 60 };
  const named = { type: "function", function: { name: "get_time" } };
  for (const { message } of await both({ ...asked, tool_choice: named })) {
    assert.deepEqual(message.tool_calls.map((call) => call.function.name), ["get_time"]);
  }
  for (const { message } of await both({ ...asked, tool_choice: "none" })) assert.ok(!message.tool_calls?.length && message.content);
  const begun = [...messages, { role: "assistant", content: "The weather in Oslo is" }];
  for (const { message } of await both({ model: "coder", messages: begun, continue_final_message: true, temperature: 0, max_tokens: 8 })) {
    assert.ok(message.content && !message.content.startsWith("The weather in Oslo is"), message.content);
  }
});

test("OpenAI: streamed sound, answers side by side, reasoning, and how likely tokens were", async () => {
  const data = tone(250).toString("base64");
  const content = [{ type: "text", text: "which" }, { type: "input_audio", input_audio: { data, format: "wav" } }];
  const heard = await openai.chat.completions.stream({ model: "omni", messages: [{ role: "user", content }], temperature: 0 }).finalChatCompletion();
  assert.equal(heard.choices[0].message.content, "low");
  const texts = ["", ""], likely = ["", ""];
  const asked = { model: "lfm2", messages, n: 2, seed: 4, temperature: 1, max_tokens: 5, logprobs: true, top_logprobs: 1 };
  for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true })) {
    for (const choice of chunk.choices) {
      texts[choice.index] += choice.delta.content ?? "";
      likely[choice.index] += (choice.logprobs?.content ?? []).map((token) => token.token).join("");
    }
  }
  assert.deepEqual(likely, texts);
  let thought = "", said = "";
  for await (const chunk of await openai.chat.completions.create({ model: "thinker", messages, stream: true })) {
    thought += chunk.choices[0]?.delta?.reasoning_content ?? "";
    said += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.deepEqual([thought.trim(), said], ["It is simple.", "Forty-two it is."]);
});

test("Ollama: a prompt with a picture, a suffix, and how likely tokens were", async () => {
  const images = [new Uint8Array(bitmap([10, 250, 10]))];
  const asked = { model: "omni", prompt: "which", images, options: { temperature: 0 } };
  assert.equal((await ollama.generate(asked)).response, "green");
  let text = "";
  for await (const part of await ollama.generate({ ...asked, stream: true })) text += part.response;
  assert.equal(text, "green");
  const filled = await ollama.generate({ model: "coder", prompt: "def product(first, second):\n    return ", suffix: "\n", options: { temperature: 0, num_predict: 8 } });
  assert.match(filled.response, /first \* second/);
  const told = await ollama.chat({ model: "lfm2", messages, logprobs: true, top_logprobs: 2, options: { num_predict: 4 } });
  assert.equal(told.logprobs.map((token) => token.token).join(""), told.message.content);
  assert.equal(told.logprobs[0].top_logprobs.length, 2);
});
