#!/usr/bin/env python3
"""Broken and hostile pictures, sounds, schemas, grammars and tools against the real server and its workers.

    fuzz.py SARAI SENSING MODEL [--minutes 5] [--seed 1]

SENSING is the folder of sensing_models.py's models, MODEL a GGUF file that answers. Every request must be answered with 200 or a
400 that names what is wrong; no worker may die, and the server must go on. What fails is written to fuzz-failure.json.
"""

import argparse
import base64
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import jsonschema
from media_files import png, wav
from ports import free_port
from referencing.exceptions import Unresolvable


def any_png(dice):
    if dice.random() < 0.5:
        width, height = dice.randrange(1, 90), dice.randrange(1, 90)
        lines = b"".join(b"\0" + bytes(dice.randrange(256) for _ in range(3 * width)) for _ in range(height))
        return png(width, height, lines)
    width, height = dice.choice([(1, 1), (2, 2), (17, 9), (64, 64), (300, 2), (5000, 3000), (70000, 70000)])
    depth, colour = dice.choice([(8, 2), (8, 6), (8, 0), (16, 2), (1, 3), (8, 7)])
    rows = min(height, 80)
    data = bytes(dice.randrange(256) for _ in range(min(width, 80) * 4 + 1)) * rows
    return png(width, height, data, depth=depth, colour=colour, interlace=dice.choice([0, 0, 1]))


def bmp(dice):
    width, height = dice.choice([(2, 2), (33, 7), (2**31 - 1, 1), (-4, 4)])
    data = bytes(dice.randrange(256) for _ in range(900))
    head = struct.pack("<2sIHHI", b"BM", 54 + len(data), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, dice.choice([1, 8, 24, 32]), 0, len(data), 1, 1, 0, 0) + data


def gif(dice):
    return b"GIF89a" + struct.pack("<HH", dice.choice([1, 16, 65535]), dice.choice([1, 16, 65535])) + bytes(dice.randrange(256) for _ in range(60))


def webp(dice):
    data = bytes(dice.randrange(256) for _ in range(80))
    return b"RIFF" + struct.pack("<I", 4 + 8 + len(data)) + b"WEBP" + dice.choice([b"VP8 ", b"VP8L", b"VP8X"]) + struct.pack("<I", len(data)) + data


def jpeg(dice):
    head = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffc00011080010001003012200021101031101")
    return head + bytes(dice.randrange(256) for _ in range(200)) + b"\xff\xd9"


def any_wav(dice):
    if dice.random() < 0.5:
        data = bytes(dice.randrange(256) for _ in range(2 * dice.choice([1, 2, 100, 4000])))
        rate = dice.choice([4000, 16000, 44100, 192000])
        return wav(data, rate)
    rate, channels, bits = dice.choice([16000, 1, 0, 4_000_000_000, 44100]), dice.choice([1, 2, 0, 65535]), dice.choice([16, 8, 24, 32, 3])
    kind = dice.choice([1, 3, 2, 0xFFFE, 99])
    data = bytes(dice.randrange(256) for _ in range(dice.choice([0, 1, 2, 999, 6000])))
    length = dice.choice([len(data), 2**32 - 1, 0])
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + length & 0xFFFFFFFF, b"WAVE", b"fmt ", 16, kind, channels, rate & 0xFFFFFFFF, rate * 2 & 0xFFFFFFFF, 2, bits, b"data", length) + data


def flac(dice):
    return b"fLaC" + bytes([0x80, 0, 0, 34]) + bytes(dice.randrange(256) for _ in range(34 + dice.randrange(300)))


def mp3(dice):
    return dice.choice([b"ID3\x04\0\0\0\0\0\x0a", b""]) + b"\xff\xfb\x90\x64" + bytes(dice.randrange(256) for _ in range(dice.randrange(2000)))


def mutated(dice, data):
    data = bytearray(data)
    for _ in range(dice.choice([0, 0, 1, 3, 20])):
        if data:
            data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data[: len(data) - dice.choice([0, 0, 1, dice.randrange(len(data) + 1)])])


def encoded(dice, data):
    text = base64.b64encode(data).decode()
    return dice.choice([text, text, text, text.rstrip("="), text + "*", text[:-1]])


def picture(dice):
    data = encoded(dice, mutated(dice, dice.choice([any_png, bmp, gif, webp, jpeg])(dice)))
    url = dice.choice(["data:image/png;base64,", "data:;base64,", ""]) + data
    return {"type": "image_url", "image_url": {"url": url}}


def sound(dice):
    data = encoded(dice, mutated(dice, dice.choice([any_wav, flac, mp3])(dice)))
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


WORDS = ["type", "object", "array", "string", "integer", "null", "properties", "items", "enum", "anyOf", "$ref", "#/$defs/a", "$defs"]
WORDS += ["not", "if", "then", "else", "oneOf", "allOf", "uniqueItems", "contains", "multipleOf", "patternProperties", "propertyNames"]
WORDS += ["additionalProperties", "prefixItems", "minLength", "maxLength", "minProperties", "maxProperties", "dependentRequired", "boolean", "number"]
WORDS += ["pattern", "^a+$", "(", "minItems", "maxItems", "minimum", "maximum", "required", "const", "format", "date", "a", "", "\u0000", "é"]


def anything(dice, depth=0):
    kind = dice.randrange(7 if depth < 4 else 4)
    if kind == 0:
        return dice.choice([0, 1, -1, 3, 10**6, 2**63, 1.5, -0.0])
    if kind == 1:
        return dice.choice([True, False, None])
    if kind in (2, 3):
        return dice.choice(WORDS)
    if kind == 4:
        return [anything(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(WORDS): anything(dice, depth + 1) for _ in range(dice.randrange(5))}


def schema(dice):
    body = anything(dice)
    if dice.random() < 0.7:
        body = {"type": "object", "properties": {"a": body}, "required": ["a"]}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": body}}}


PIECES = ["root", "::=", '"a"', "[a-z]", "[^", "]", "(", ")", "*", "+", "?", "{2,3}", "{9999999}", "|", "\n", "x", "root", "\\", "é", "#", "."]


def grammar(dice):
    return {"grammar": "root ::= " + " ".join(dice.choice(PIECES) for _ in range(dice.randrange(12)))}


def tools(dice):
    name = dice.choice(["f", "a_b", "", "x" * 300, "é", "f\u0000", 5])
    tool = {"type": dice.choice(["function", "function", "other"]), "function": {"name": name, "parameters": anything(dice)}}
    choice = dice.choice(["auto", "required", "none", {"type": "function", "function": {"name": "f"}}, anything(dice)])
    return {"tools": [tool] * dice.choice([1, 2]), "tool_choice": choice}


def request(dice):
    """A body, and the kind of it."""
    kind = dice.choice(["picture", "picture", "sound", "sound", "schema", "schema", "grammar", "tools"])
    body = {"max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": "Say something."}]}
    if kind in ("picture", "sound"):
        part = (picture if kind == "picture" else sound)(dice)
        body["messages"][0]["content"] = [{"type": "text", "text": "x"}, part] if dice.random() < 0.5 else [part]
        return kind, body | {"model": dice.choice(["omni", "gemma"]) if kind == "picture" else "omni"}
    return kind, body | {"model": "text"} | {"schema": schema, "grammar": grammar, "tools": tools}[kind](dice)


def start(binary, sensing, model, folder):
    address = f"127.0.0.1:{free_port()}"
    fitted = os.path.join(sensing, "fitted")
    local = {"backend": "gguf_native", "context_length": 2048, "parallel": 2, "keep_alive": -1}
    models = {
        "text": local | {"gguf_path": model},
        "omni": local | {"gguf_path": f"{fitted}/qwen2vl.gguf", "mmproj_path": f"{fitted}/mmproj-omni.gguf"},
        "gemma": local | {"gguf_path": f"{fitted}/gemma3.gguf", "mmproj_path": f"{fitted}/mmproj-gemma3.gguf"},
    }
    config = os.path.join(folder, "sarai.yaml")
    with open(config, "w") as file:
        json.dump({"server": {"state_dir": folder}, "memory": {"max_concurrent_llms": 3}, "models": models}, file)
    process = subprocess.Popen([binary, "serve", "--config", config, "--listen", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/health", timeout=1)
            return process, f"http://{address}"
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                sys.exit("the server has ended")
            time.sleep(0.05)


def post(url, body):
    ask = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(ask, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def pids(url):
    with urllib.request.urlopen(f"{url}/api/ps", timeout=10) as answer:
        return {model["name"]: model["sarai"]["pid"] for model in json.load(answer)["models"]}


def has_form(body, answer):
    """Whether an answer that ended by itself keeps its schema, as far as that is not said to be lost."""
    form = body.get("response_format")
    choice = answer.get("choices", [{}])[0]
    if not form or choice.get("finish_reason") != "stop" or body.get("tools"):
        return True
    try:
        value = json.loads(choice["message"]["content"])
    except ValueError:
        return False
    schema = form["json_schema"]["schema"]
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError):
        return True
    try:
        return bool(answer["sarai"]["degraded"]) or jsonschema.Draft202012Validator(schema).is_valid(value)
    # What refers to itself or elsewhere is nothing that Python's validator could tell.
    except (RecursionError, Unresolvable, re.error):
        return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("sensing")
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(arguments.binary, arguments.sensing, arguments.model, folder)
        try:
            end = time.time() + 60 * arguments.minutes
            before = {}
            while time.time() < end:
                kind, body = request(dice)
                try:
                    status, answer = post(url, body)
                except (OSError, ValueError) as error:
                    status, answer = 0, repr(error)
                after = pids(url) if process.poll() is None else {}
                died = [name for name, pid in before.items() if after.get(name) != pid]
                before |= after
                counts[kind, status] = counts.get((kind, status), 0) + 1
                says = (status == 200 and has_form(body, answer)) or (status == 400 and bool(answer["error"]["message"]))
                if not says or died or process.poll() is not None:
                    with open("fuzz-failure.json", "w") as file:
                        json.dump(body, file)
                    sys.exit(f"{kind}: {status} {json.dumps(answer)[:600]}; died: {died}; the request is in fuzz-failure.json")
        finally:
            process.terminate()
            process.wait()
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:8} {status} {count:7}")


if __name__ == "__main__":
    main()
