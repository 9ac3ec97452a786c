#!/usr/bin/env python3
"""The table of what each model does in each API, from what was really asked and answered: `make abilities`.

    abilities.py SARAI > docs/abilities-table.md

A cell says `yes` where the answer was checked and right, `refused` where it was a 400 with a reason, and what else came otherwise.
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
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}}]
ASK = "What is the weather in Oslo?"


def red():
    return base64.b64encode(png(64, 64, (b"\0" + bytes((250, 10, 10)) * 64) * 64)).decode()


def high():
    data = b"".join(struct.pack("<h", int(12000 * math.sin(math.tau * 6000 * at / 16000))) for at in range(8000))
    return base64.b64encode(wav(data)).decode()


def text_of(body):
    return body["choices"][0]["message"]["content"] if "choices" in body else body["message"]["content"]


def calls_of(body):
    message = body["choices"][0]["message"] if "choices" in body else body["message"]
    return [call["function"]["name"] for call in message.get("tool_calls") or []]


def image():
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + red()}}


def audio():
    return {"type": "input_audio", "input_audio": {"data": high(), "format": "wav"}}


def is_form(body):
    return isinstance(json.loads(text_of(body))["city"], str)


# What is asked in each API, and what a right answer is.
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": CITY}}
ABILITIES = {
    "chat": ({}, {}, lambda body: text_of(body) != ""),
    "tools, the model decides": ({"tools": TOOLS}, {"tools": TOOLS}, lambda body: calls_of(body) == ["get_weather"] or text_of(body)),
    "a tool that must be called": ({"tools": TOOLS, "tool_choice": "required"}, None, lambda body: "get_weather" in calls_of(body)),
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
    "pictures": ([image()], {"images": [red()]}, lambda body: text_of(body) == "red"),
    "sound": ([audio()], None, lambda body: text_of(body) == "high"),
    "vectors": ("embeddings", "embed", lambda body: len((body.get("data") or [{"embedding": body["embeddings"][0]}])[0]["embedding"]) == 384),
}


def request(api, model, ability):
    asked = ABILITIES[ability][0 if api == "OpenAI" else 1]
    if asked is None:
        return None
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
    body |= {"temperature": 0, "max_tokens": 40} if api == "OpenAI" else {"options": {"temperature": 0, "num_predict": 40}}
    return ("/v1/chat/completions" if api == "OpenAI" else "/api/chat"), body


def ask(url, path, body):
    wanted = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(wanted, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def cell(url, api, model, ability):
    asked = request(api, model, ability)
    if asked is None:
        return "-"
    status, body = ask(url, *asked)
    if ABILITIES[ability][2] is None and status == 200:
        return "yes" if switches(url, api, asked) else "no effect"
    if status == 400:
        return "refused"
    if status != 200:
        return f"status {status}"
    try:
        return "yes" if ABILITIES[ability][2](body) else "another answer"
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
        models["all-MiniLM-L6-v2"] |= {"context_length": 512}
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
            print("Written by `make abilities`, from what was asked and answered. `yes`: the answer was checked and right. `refused`: a 400")
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
