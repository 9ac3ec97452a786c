"""What users of the official Python clients do, against the sarai at SARAI_URL with models `lfm2`, `coder`, `minilm`, `omni`,
`thinker` and `caller`."""

import asyncio
import base64
import io
import json
import math
import os
import struct
import unittest
import wave
import zlib

import ollama
import openai
import pydantic

URL = os.environ["SARAI_URL"]
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def get_weather(city: str) -> str:
    """
    The weather of a city.

    Args:
        city (str): The city

    Returns:
        str: The weather
    """
    return f"It snows in {city}."


def get_time(city: str) -> str:
    """
    The time of a city.

    Args:
        city (str): The city

    Returns:
        str: The time
    """
    return f"It is noon in {city}."


def png(colour):
    """A picture of one colour."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    lines = (b"\0" + bytes(colour) * 64) * 64
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tone(hertz):
    """Half a second of sound as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        samples = (int(12000 * math.sin(math.tau * hertz * at / 16000)) for at in range(8000))
        sound.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return file.getvalue()


COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


class Answer(pydantic.BaseModel):
    """Of a question about colours."""

    colours: list[str] = pydantic.Field(min_length=1, max_length=3)
    sure: bool


class OpenAI(unittest.TestCase):
    def setUp(self):
        self.client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
        self.addCleanup(self.client.close)

    def test_chat(self):
        answer = self.client.chat.completions.create(model="lfm2", messages=ASK, temperature=0, max_tokens=12)
        self.assertTrue(answer.choices[0].message.content)
        self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)

    def test_stream_is_the_same_answer_and_ends_with_usage(self):
        asked = {"model": "lfm2", "messages": ASK, "temperature": 0, "max_completion_tokens": 12, "seed": 3}
        whole = self.client.chat.completions.create(**asked)
        stream = self.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
        fewer = self.client.chat.completions.create(**asked | {"max_completion_tokens": 3})
        self.assertEqual((fewer.usage.completion_tokens, fewer.choices[0].finish_reason), (3, "length"))

    def test_grammars_and_how_likely_tokens_were_streamed_too(self):
        asked = {"model": "lfm2", "messages": ASK, "temperature": 0, "max_tokens": 8}
        grammar = {"extra_body": {"grammar": 'root ::= ("yes" | "no") "!"'}}
        whole = self.client.chat.completions.create(**asked, **grammar).choices[0].message.content
        chunks = self.client.chat.completions.create(**asked, **grammar, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertIn(whole, ("yes!", "no!"))
        self.assertEqual(streamed, whole)
        likely, text = "", ""
        for chunk in self.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                likely += "".join(token.token for token in (choice.logprobs.content if choice.logprobs else None) or [])
        self.assertEqual(likely, text)

    def test_an_echo_is_refused_and_not_forgotten(self):
        # Ollama answers as if it had not been asked for.
        with self.assertRaises(openai.BadRequestError) as refused:
            self.client.completions.create(model="lfm2", prompt="Once", echo=True, max_tokens=2)
        self.assertEqual(refused.exception.param, "echo")

    def test_pictures_and_sound(self):
        def part(kind, data):
            text = base64.b64encode(data).decode()
            if kind == "image_url":
                return {"type": kind, kind: {"url": f"data:image/png;base64,{text}"}}
            return {"type": kind, kind: {"data": text, "format": "wav"}}

        cases = [(name, part("image_url", png(colour))) for name, colour in COLOURS.items()]
        cases += [(name, part("input_audio", tone(hertz))) for name, hertz in (("low", 250), ("high", 6000))]
        for name, sensed in cases:
            content = [{"type": "text", "text": "which"}, sensed]
            asked = {"model": "omni", "messages": [{"role": "user", "content": content}], "temperature": 0}
            whole = self.client.chat.completions.create(**asked)
            self.assertEqual(whole.choices[0].message.content, name)
            chunks = list(self.client.chat.completions.create(**asked, stream=True))
            self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks), name)
        with self.assertRaises(openai.BadRequestError):
            broken = [part("image_url", b"no picture")]
            self.client.chat.completions.create(model="omni", messages=[{"role": "user", "content": broken}])

    def test_several_answers_and_one_that_goes_on(self):
        asked = {"model": "lfm2", "messages": ASK, "temperature": 1, "seed": 5, "max_tokens": 6}
        whole = self.client.chat.completions.create(**asked, n=3)
        self.assertEqual([choice.index for choice in whole.choices], [0, 1, 2])
        texts = ["", "", ""]
        for chunk in self.client.chat.completions.create(**asked, n=3, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        self.assertEqual(texts, [choice.message.content for choice in whole.choices])
        messages = [*ASK, {"role": "assistant", "content": "Red, green and"}]
        more = {"continue_final_message": True, "add_generation_prompt": False}
        goes_on = self.client.chat.completions.create(
            model="lfm2", messages=messages, temperature=0, max_tokens=4, extra_body=more
        )
        self.assertIn("blue", goes_on.choices[0].message.content.lower())

    def test_content_parts_and_an_alias(self):
        parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
        answer = self.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=4
        )
        self.assertTrue(answer.choices[0].message.content)

    def test_tools_whole_and_streamed_and_their_results(self):
        city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
        asked = {"model": "coder", "messages": WEATHER, "tools": tools, "temperature": 0, "max_tokens": 60}
        for choice in ("auto", "required"):
            whole = self.client.chat.completions.create(**asked, tool_choice=choice)
            call = whole.choices[0].message.tool_calls[0]
            self.assertEqual((call.type, call.function.name), ("function", "get_weather"))
            self.assertEqual(json.loads(call.function.arguments)["city"], "Oslo")
            self.assertEqual(whole.choices[0].finish_reason, "tool_calls")
            with self.client.chat.completions.stream(**asked, tool_choice=choice) as stream:
                final = stream.get_final_completion()
            streamed = final.choices[0].message.tool_calls[0].function
            self.assertEqual((streamed.name, json.loads(streamed.arguments)["city"]), ("get_weather", "Oslo"))
        result = {"role": "tool", "tool_call_id": call.id, "content": "snow"}
        asked["messages"] = [*WEATHER, whole.choices[0].message, result]
        self.assertGreater(self.client.chat.completions.create(**asked).usage.prompt_tokens, whole.usage.prompt_tokens)

    def test_a_named_tool_is_called_and_none_is_not(self):
        city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tools = [{"type": "function", "function": {"name": name, "parameters": city}} for name in ("get_weather", "get_time")]
        asked = {"model": "coder", "messages": WEATHER, "tools": tools, "temperature": 0, "max_tokens": 60}
        named = {"type": "function", "function": {"name": "get_time"}}
        message = self.client.chat.completions.create(**asked, tool_choice=named).choices[0].message
        self.assertEqual([call.function.name for call in message.tool_calls], ["get_time"])
        self.assertFalse(self.client.chat.completions.create(**asked, tool_choice="none").choices[0].message.tool_calls)

    def test_several_calls_of_one_answer(self):
        parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
        tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("get_weather", "get_time")]
        asked = {"model": "caller", "messages": WEATHER, "tools": tools}
        whole = self.client.chat.completions.create(**asked)
        with self.client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion()
        for answer in (whole, streamed):
            calls = [(call.function.name, json.loads(call.function.arguments)["city"]) for call in answer.choices[0].message.tool_calls]
            self.assertEqual(calls, [("get_weather", "Oslo"), ("get_time", "Rome")])

    def test_reasoning_and_log_probabilities(self):
        asked = {"model": "thinker", "messages": ASK, "temperature": 0}
        message = self.client.chat.completions.create(**asked).choices[0].message
        self.assertEqual((message.reasoning_content.strip(), message.content), ("It is simple.", "Forty-two it is."))
        deltas = [chunk.choices[0].delta for chunk in self.client.chat.completions.create(**asked, stream=True) if chunk.choices]
        reasoned = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        self.assertEqual(reasoned, message.reasoning_content)
        asked = {"model": "lfm2", "messages": ASK, "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
        whole = self.client.chat.completions.create(**asked).choices[0]
        self.assertEqual("".join(token.token for token in whole.logprobs.content), whole.message.content)
        self.assertTrue(all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in whole.logprobs.content))

    def test_a_grammar(self):
        only = {"grammar": 'root ::= "certainly" | "never"'}
        answer = self.client.chat.completions.create(model="coder", messages=ASK, extra_body=only)
        self.assertIn(answer.choices[0].message.content, ("certainly", "never"))

    def test_an_answer_parsed_by_pydantic(self):
        for stream in (False, True):
            asked = {"model": "coder", "messages": ASK, "response_format": Answer, "max_tokens": 100}
            if stream:
                with self.client.chat.completions.stream(**asked) as events:
                    answer = events.get_final_completion()
            else:
                answer = self.client.chat.completions.parse(**asked)
            self.assertIsInstance(answer.choices[0].message.parsed, Answer)

    def test_embeddings(self):
        # The client asks for base64 and decodes it.
        made = self.client.embeddings.create(model="minilm", input=["A cat.", "A kitten.", "A bank."])
        cat, kitten, bank = (row.embedding for row in made.data)
        similar = lambda a, b: sum(x * y for x, y in zip(a, b))
        self.assertGreater(similar(cat, kitten), similar(cat, bank) + 0.2)
        plain = self.client.embeddings.create(model="minilm", input="A cat.", encoding_format="float", dimensions=96)
        self.assertEqual(len(plain.data[0].embedding), 96)
        with self.assertRaises(openai.BadRequestError):
            self.client.embeddings.create(model="lfm2", input="A cat.")

    def test_completions(self):
        answer = self.client.completions.create(model="lfm2", prompt="The sky is", max_tokens=6, temperature=0)
        self.assertEqual(answer.usage.completion_tokens, 6)
        stream = self.client.completions.create(
            model="lfm2", prompt="The sky is", max_tokens=6, temperature=0, stream=True
        )
        self.assertEqual("".join(chunk.choices[0].text for chunk in stream), answer.choices[0].text)

    def test_models(self):
        self.assertEqual([model.id for model in self.client.models.list()], ["lfm2", "expert", "coder", "minilm", "omni", "thinker", "caller"])
        self.assertEqual(self.client.models.retrieve("lfm2").id, "lfm2")
        with self.assertRaises(openai.NotFoundError):
            self.client.models.retrieve("nobody")

    def test_a_fallback_is_said_in_the_headers(self):
        raw = self.client.chat.completions.with_raw_response.create(model="expert", messages=ASK, max_tokens=4)
        self.assertEqual(raw.headers["x-sarai-served-by"], "expert@gguf_native")
        self.assertIn("cannot be reached", raw.headers["x-sarai-fallback-reason"])
        self.assertTrue(raw.parse().choices[0].message.content)

    def test_several_streams_at_once_from_the_async_client(self):
        async def ask(client, n):
            stream = await client.chat.completions.create(
                model="lfm2", messages=[{"role": "user", "content": f"Say {n}."}], max_tokens=6, stream=True
            )
            return [chunk async for chunk in stream]

        async def all_at_once():
            async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(ask(client, n) for n in range(6)))

        for chunks in asyncio.run(all_at_once()):
            self.assertIn(chunks[-1].choices[0].finish_reason, ("stop", "length"))

    def test_errors_have_their_types(self):
        with self.assertRaises(openai.NotFoundError) as unknown:
            self.client.chat.completions.create(model="nobody", messages=ASK)
        self.assertEqual(unknown.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError) as overflow:
            self.client.chat.completions.create(model="lfm2", messages=[{"role": "user", "content": "word " * 3000}])
        self.assertEqual(overflow.exception.code, "context_length_exceeded")
        self.assertIn("1024", str(overflow.exception))
        with self.assertRaises(openai.BadRequestError) as hot:
            self.client.chat.completions.create(model="lfm2", messages=ASK, temperature=9)
        self.assertEqual(hot.exception.param, "temperature")


class Ollama(unittest.TestCase):
    def setUp(self):
        self.client = ollama.Client(host=URL)

    def test_pictures(self):
        for name, colour in COLOURS.items():
            shown = [{"role": "user", "content": "which", "images": [png(colour)]}]
            whole = self.client.chat("omni", messages=shown, options={"temperature": 0})
            self.assertEqual(whole.message.content, name)
            parts = self.client.chat("omni", messages=shown, options={"temperature": 0}, stream=True)
            self.assertEqual("".join(part.message.content for part in parts), name)
            answer = self.client.generate("omni", "which", images=[png(colour)], options={"temperature": 0})
            self.assertEqual(answer.response, name)
        self.assertEqual(self.client.show("omni").capabilities, ["completion", "vision", "audio"])

    def test_chat(self):
        answer = self.client.chat("lfm2", messages=ASK, options={"temperature": 0, "num_predict": 12})
        self.assertTrue(answer.message.content)
        self.assertTrue(answer.done)
        self.assertGreater(answer.eval_count, 0)
        self.assertGreater(answer.eval_duration, 0)

    def test_stream_is_the_same_answer(self):
        asked = {"messages": ASK, "options": {"temperature": 0, "num_predict": 12}}
        whole = self.client.chat("lfm2", **asked)
        parts = list(self.client.chat("lfm2", **asked, stream=True))
        self.assertEqual("".join(part.message.content for part in parts), whole.message.content)
        self.assertTrue(parts[-1].done)
        self.assertIn(parts[-1].done_reason, ("stop", "length"))

    def test_generate(self):
        answer = self.client.generate("lfm2", prompt="Name a colour.", system="Be brief.", options={"num_predict": 4})
        self.assertTrue(answer.response)
        raw = self.client.generate("lfm2", prompt="The sky is", raw=True, options={"num_predict": 4})
        self.assertLess(raw.prompt_eval_count, answer.prompt_eval_count)

    def test_tools_and_their_results(self):
        asked = {"model": "coder", "tools": [get_weather], "options": {"temperature": 0, "num_predict": 60}}
        whole = self.client.chat(messages=WEATHER, **asked)
        calls = [part.message.tool_calls for part in self.client.chat(messages=WEATHER, **asked, stream=True)]
        for call in (whole.message.tool_calls[0], next(call for call in calls if call)[0]):
            self.assertEqual((call.function.name, call.function.arguments["city"]), ("get_weather", "Oslo"))
        result = {"role": "tool", "tool_name": "get_weather", "content": get_weather("Oslo")}
        told = self.client.chat(messages=[*WEATHER, whole.message, result], **asked)
        self.assertGreater(told.prompt_eval_count, whole.prompt_eval_count)

    def test_reasoning_and_several_calls(self):
        answer = self.client.chat("thinker", messages=ASK, think=True)
        self.assertEqual((answer.message.thinking.strip(), answer.message.content), ("It is simple.", "Forty-two it is."))
        parts = list(self.client.chat("thinker", messages=ASK, think=True, stream=True))
        self.assertEqual("".join(part.message.thinking or "" for part in parts), answer.message.thinking)
        called = self.client.chat("caller", messages=WEATHER, tools=[get_weather, get_time]).message.tool_calls
        self.assertEqual([call.function.arguments["city"] for call in called], ["Oslo", "Rome"])

    def test_an_answer_in_a_form(self):
        for stream in (False, True):
            asked = {"messages": ASK, "format": Answer.model_json_schema(), "options": {"num_predict": 100}}
            answer = self.client.chat("coder", **asked, stream=stream)
            text = "".join(part.message.content for part in answer) if stream else answer.message.content
            Answer.model_validate_json(text)

    def test_embeddings(self):
        made = self.client.embed("minilm", input=["A cat.", "A kitten."])
        self.assertEqual([len(vector) for vector in made.embeddings], [384, 384])
        self.assertEqual(len(self.client.embeddings("minilm", prompt="A cat.").embedding), 384)
        self.assertEqual(self.client.show("minilm").capabilities, ["embedding"])

    def test_lists(self):
        names = ["lfm2", "expert", "coder", "minilm", "omni", "thinker", "caller"]
        self.assertEqual([model.model for model in self.client.list().models], [f"{name}:latest" for name in names])
        self.client.generate("lfm2")
        running = next(model for model in self.client.ps().models if model.model == "lfm2:latest")
        self.assertGreater(running.size, 90 << 20)
        shown = self.client.show("lfm2")
        self.assertEqual(shown.details.quantization_level, "Q4_1")
        self.assertEqual(shown.modelinfo["general.architecture"], "llama")
        self.assertIn("im_start", shown.template)

    def test_a_latest_tag_and_errors(self):
        self.assertTrue(self.client.chat("lfm2:latest", messages=ASK, options={"num_predict": 2}).message.content)
        with self.assertRaises(ollama.ResponseError) as unknown:
            self.client.chat("nobody", messages=ASK)
        self.assertEqual(unknown.exception.status_code, 404)


if __name__ == "__main__":
    unittest.main()
