#!/usr/bin/env python3
"""The table of what each model does in each API, from what was really asked and answered: `make abilities`.

    abilities.py SARAI > docs/abilities-table.md

A cell says `yes` where the answer was checked and right, whole and streamed, `refused` where it was a 400 with a reason, and what else came
otherwise.
"""

import base64
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from media_files import png, wav
from ports import free_port

CACHE = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
SENSING = f"{CACHE}/sketches/sensing"
MODELS = {
    "SmolLM2-135M-Instruct": {"gguf_path": f"{CACHE}/models/smollm2-135m-instruct-q4_1.gguf"},
    "Gemma-3-270M": {"gguf_path": f"{CACHE}/models/gemma-3-270m-q4_k_m.gguf"},
    "Qwen2.5-Coder-0.5B-Instruct": {"gguf_path": f"{CACHE}/models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"},
    "all-MiniLM-L6-v2": {"gguf_path": f"{CACHE}/models/all-minilm-l6-v2-f16.gguf"},
    "gemma3 + SigLIP (fitted, tiny)": {"gguf_path": f"{SENSING}/fitted/gemma3.gguf", "mmproj_path": f"{SENSING}/fitted/mmproj-gemma3.gguf"},
    "qwen2vl + merger (fitted, tiny)": {"gguf_path": f"{SENSING}/fitted/qwen2vl.gguf", "mmproj_path": f"{SENSING}/fitted/mmproj-qwen2vl.gguf"},
    "qwen2.5-omni's pair (fitted, tiny)": {"gguf_path": f"{SENSING}/fitted/qwen2vl.gguf", "mmproj_path": f"{SENSING}/fitted/mmproj-omni.gguf"},
    "qwen2vl that reasons (random, tiny)": {"gguf_path": f"{SENSING}/random/reasoning.gguf"},
    "one that recites a thought (tiny)": {"gguf_path": f"{SENSING}/reciting/reasoning.gguf"},
    "one that recites two calls (tiny)": {"gguf_path": f"{SENSING}/reciting/calls.gguf"},
    "MiniLM that ranks (random head)": {"gguf_path": f"{CACHE}/sketches/ranking/minilm.gguf"},
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"The {of} of a city", "parameters": CITY}}
    for name, of in (("get_weather", "weather"), ("get_time", "time"))
]
NAMED = {"type": "function", "function": {"name": "get_time"}}
ASK = "What is the weather in Oslo?"


def red():
    return base64.b64encode(png(64, 64, (b"\0" + bytes((250, 10, 10)) * 64) * 64)).decode()


def high():
    data = b"".join(struct.pack("<h", int(12000 * math.sin(math.tau * 6000 * at / 16000))) for at in range(8000))
    return base64.b64encode(wav(data)).decode()


def message_of(body):
    return body["choices"][0]["message"] if "choices" in body else body["message"]


def text_of(body):
    return message_of(body)["content"]


def thought_of(body):
    message = message_of(body)
    return message.get("reasoning_content") or message.get("thinking") or ""


def calls_of(body):
    """The names of what is called, whose arguments are JSON."""
    calls = [call["function"] for call in message_of(body).get("tool_calls") or []]
    assert all(isinstance(json.loads(call["arguments"]) if "choices" in body else call["arguments"], dict) for call in calls)
    return [call["name"] for call in calls]


def image():
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + red()}}


def audio():
    return {"type": "input_audio", "input_audio": {"data": high(), "format": "wav"}}


def is_form(body):
    return isinstance(json.loads(text_of(body))["city"], str)


def is_object(body):
    """One that was not cut."""
    reason = body["choices"][0]["finish_reason"] if "choices" in body else body["done_reason"]
    return "cut by the limit" if reason == "length" else isinstance(json.loads(text_of(body)), dict)


# What is asked in each API, and what a right answer is.
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}
ABILITIES = {
    "chat": ({}, {}, lambda body: text_of(body) != ""),
    "tools, the model decides": ({"tools": TOOLS}, {"tools": TOOLS}, lambda body: "get_weather" in calls_of(body) or text_of(body) != ""),
    "several calls": ({"tools": TOOLS}, {"tools": TOOLS}, lambda body: True if len(calls_of(body)) > 1 else "it made none"),
    "no tool": ({"tools": TOOLS, "tool_choice": "none"}, None, lambda body: calls_of(body) == []),
    "this tool": ({"tools": TOOLS, "tool_choice": NAMED}, None, lambda body: calls_of(body) == ["get_time"]),
    "a tool that must be called": ({"tools": TOOLS, "tool_choice": "required"}, None, lambda body: len(calls_of(body)) > 0),
    "JSON mode": ({"response_format": {"type": "json_object"}, "max_tokens": 400}, {"format": "json"}, is_object),
    "JSON schema": ({"response_format": FORM}, {"format": CITY}, is_form),
    "GBNF": ({"grammar": 'root ::= "yes" | "no"'}, None, lambda body: text_of(body) in ("yes", "no")),
    "log-probabilities": (
        {"logprobs": True, "top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 2},
        lambda body: len((body["choices"][0]["logprobs"]["content"] if "choices" in body else body["logprobs"])[0]["top_logprobs"]) == 2,
    ),
    "several answers": ({"n": 2}, None, lambda body: [choice["index"] for choice in body["choices"]] == [0, 1]),
    "going on from a beginning": ({"continue_final_message": True}, None, lambda body: text_of(body) != ""),
    "reasoning on request": ({"chat_template_kwargs": {"enable_thinking": False}}, {"think": True}, None),
    "reasoning apart": ({}, {}, lambda body: True if thought_of(body) else "it has none"),
    "pictures": ([image()], {"images": [red()]}, lambda body: text_of(body) == "red"),
    "sound": ([audio()], None, lambda body: text_of(body) == "high"),
    "ranking": ("rerank", None, lambda body: sorted(row["index"] for row in body["results"]) == [0, 1]),
    "vectors": ("embeddings", "embed", lambda body: len((body.get("data") or [{"embedding": body["embeddings"][0]}])[0]["embedding"]) == 384),
}


def request(api, model, ability):
    asked = ABILITIES[ability][0 if api == "OpenAI" else 1]
    if asked is None:
        return None
    if asked == "rerank":
        return "/v1/rerank", {"model": model, "query": "A cat?", "documents": ["A cat.", "A war."]}
    if isinstance(asked, str):
        return ("/v1/embeddings" if api == "OpenAI" else "/api/embed"), {"model": model, "input": "A cat."}
    message = {"role": "user", "content": ASK}
    messages = [message]
    body = {"model": model, "messages": messages, "stream": False}
    if isinstance(asked, list):
        message["content"] = [{"type": "text", "text": "which"}, *asked]
    elif "images" in asked:
        message |= {"content": "which", **asked}
    else:
        body |= asked
    if "continue_final_message" in body:
        messages.append({"role": "assistant", "content": "The weather in"})
    tokens = body.pop("max_tokens", 400 if body.get("format") == "json" else 60)
    body |= {"temperature": 0, "max_tokens": tokens} if api == "OpenAI" else {"options": {"temperature": 0, "num_predict": tokens}}
    return ("/v1/chat/completions" if api == "OpenAI" else "/api/chat"), body


def ask(url, path, body):
    wanted = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(wanted, timeout=120) as answer:
            if body.get("stream"):
                return answer.status, put_together(answer.read().decode())
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def put_together(text):
    """The whole answer that a stream says, of either API."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line and not line.startswith(":")]
    is_openai = text.startswith(("data:", ":"))
    assert not is_openai or events.pop() == "[DONE]", text
    choices = {}
    for event in map(json.loads, events):
        assert "error" not in event, event
        for choice in event["choices"] if is_openai else [event]:
            whole = choices.setdefault(choice.get("index", 0), {"index": choice.get("index", 0), "message": {"content": ""}})
            add_to(whole["message"], choice["delta"] if is_openai else choice["message"])
            likely = choice.get("logprobs") or []
            whole.setdefault("logprobs", []).extend(likely.get("content") or [] if is_openai and likely else likely)
            whole |= {name: choice[name] for name in ("finish_reason", "done_reason") if choice.get(name)}
    if not is_openai:
        return choices[0]
    for choice in choices.values():
        choice["logprobs"] = {"content": choice["logprobs"]}
    return {"choices": [choices[index] for index in sorted(choices)]}


def add_to(message, delta):
    for name in ("content", "reasoning_content", "thinking"):
        message[name] = message.get(name, "") + (delta.get(name) or "")
    for call in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        if "arguments" in call["function"] and isinstance(call["function"]["arguments"], str) and "id" not in call:
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        else:
            calls.append(call)


def cell(url, api, model, ability):
    asked = request(api, model, ability)
    if asked is None:
        return "-"
    whole = outcome(url, api, asked, ability)
    if "stream" not in asked[1] or ABILITIES[ability][2] is None:
        return whole
    streamed = outcome(url, api, (asked[0], asked[1] | {"stream": True}), ability)
    return whole if streamed == whole else f"{whole}, streamed: {streamed}"


def outcome(url, api, asked, ability):
    status, body = ask(url, *asked)
    if ABILITIES[ability][2] is None and status == 200:
        return "yes" if switches(url, api, asked) else "no effect"
    if status == 400:
        return "refused"
    if status != 200:
        return f"status {status}"
    try:
        is_right = ABILITIES[ability][2](body)
        return is_right if isinstance(is_right, str) else "yes" if is_right else "another answer"
    except (KeyError, IndexError, TypeError, ValueError):
        return "another answer"


def switches(url, api, asked):
    """Whether the prompt differs with reasoning and without."""
    path, body = asked
    other = {"think": False} if api == "Ollama" else {"chat_template_kwargs": {"enable_thinking": True}}
    count = lambda body: body.get("prompt_eval_count") or body["usage"]["prompt_tokens"]
    return count(ask(url, path, body)[1]) != count(ask(url, path, body | other)[1])


def main():
    with tempfile.TemporaryDirectory() as folder:
        address = f"127.0.0.1:{free_port()}"
        local = {"backend": "gguf_native", "context_length": 2048}
        models = {name: local | files for name, files in MODELS.items()}
        for name in ("all-MiniLM-L6-v2", "MiniLM that ranks (random head)"):
            models[name] |= {"context_length": 512}
        config = {"server": {"state_dir": folder}, "memory": {"max_concurrent_llms": len(models)}, "models": models}
        with open(f"{folder}/sarai.yaml", "w") as file:
            json.dump(config, file)
        server = subprocess.Popen([sys.argv[1], "serve", "--config", file.name, "--listen", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://{address}/health", timeout=1)
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None, "the server has ended"
                    time.sleep(0.05)
            print("# What each model does, in each API\n")
            print("Written by `make abilities`, from what was asked and answered. `yes`: the answer was checked and right, whole and streamed. `refused`: a 400")
            print("that says why. `-`: that API has no field for it. `no effect`: taken, and the prompt stays the same, since the template knows nothing of it.")
            print("Where the model decides about tools, an answer in words is right too.\n")
            for api in ("OpenAI", "Ollama"):
                abilities = [ability for ability in ABILITIES if request(api, "x", ability)]
                print(f"## {api}'s API\n\n| model | {' | '.join(abilities)} |\n|---|{'---|' * len(abilities)}")
                for model in MODELS:
                    cells = [cell(f"http://{address}", api, model, ability) for ability in abilities]
                    print(f"| {model} | {' | '.join(cells)} |", flush=True)
                print()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
