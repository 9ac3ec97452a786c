"""What llama.cpp's own server answers to pictures and sound, on the random models of sensing_models.py.

    senses_reference.py LLAMA_SERVER MODELS > tests/senses_reference.json

MODELS is the folder that sensing_models.py has written. The tests ask sarai the same and compare token counts and text.
Pictures have sizes that need no scaling, which differs between versions of llama.cpp.
"""

import base64
import json
import math
import random
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request

from media_files import png, wav
from ports import free_port

PAIRS = {"gemma3": ("gemma3", False), "qwen2vl": ("qwen2vl", False), "omni": ("qwen2vl", True)}
GEMMA_SIDE = 56
LEAST_MARGIN = 0.05


def noise(width, height, seed):
    """Coloured noise in blocks, so that every line and column differs."""
    dice = random.Random(seed)
    cells = [[bytes(dice.randrange(256) for _ in range(3)) for _ in range(width // 14)] for _ in range(height // 14)]
    lines = b"".join(b"\0" + b"".join(cells[y // 14][x // 14] for x in range(width)) for y in range(height))
    return png(width, height, lines, 9)


def beats(hertz, seconds):
    rate = 16000
    samples = (round(12000 * math.sin(math.tau * hertz * at / rate) * (at % 2000) / 2000) for at in range(int(rate * seconds)))
    return wav(b"".join(struct.pack("<h", sample) for sample in samples), rate)


def text(words):
    return {"type": "text", "text": words}


def picture(width, height, seed):
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(noise(width, height, seed)).decode()}}


def sound(hertz, seconds):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(beats(hertz, seconds)).decode(), "format": "wav"}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def conversations(hears, side, seed):
    """Each of them with pictures of its own."""
    wide = (side, side) if side == GEMMA_SIDE else (112, 56)
    yield [user(picture(side, side, seed + 1), text("what is it"))]
    yield [user(text("look"), picture(*wide, seed + 2), text("then say what it is"))]
    yield [user(picture(side, side, seed + 3), picture(*wide, seed + 4), text("what differs"))]
    yield [
        user(text("first"), picture(side, side, seed + 5)),
        {"role": "assistant", "content": "seen"},
        user(text("one"), text("two"), picture(side, side, seed + 6), text("three")),
    ]
    yield [user(text("no picture at all"))]
    if hears:
        yield [user(sound(440, 0.3), text("what is it"))]
        yield [user(text("look"), picture(*wide, seed + 7), text("and listen"), sound(3000, 0.2), text("then answer"))]


def ask(port, messages):
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer = json.load(answer)
    choice = answer["choices"][0]
    margins = [tops[0]["logprob"] - tops[1]["logprob"] for tops in (token["top_logprobs"] for token in choice["logprobs"]["content"])]
    return {
        "messages": messages,
        "prompt_tokens": answer["usage"]["prompt_tokens"],
        "text": choice["message"]["content"],
        "margin": round(min(margins), 4),
    }


def main():
    server, models = sys.argv[1:]
    cases = []
    for name, (model, hears) in PAIRS.items():
        port = free_port()
        command = [server, "-m", f"{models}/random/{model}.gguf", "--mmproj", f"{models}/random/mmproj-{name}.gguf"]
        command += ["--host", "127.0.0.1", "--port", str(port), "-c", "2048", "-t", "2", "-np", "1", "-fit", "off"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert process.poll() is None, f"{command} has ended"
                    time.sleep(0.05)
            side = GEMMA_SIDE if name == "gemma3" else 84
            for number in range(len(list(conversations(hears, side, 0)))):
                # Two tokens that are nearly as likely would make another one of them a matter of rounding.
                tries = (list(conversations(hears, side, seed))[number] for seed in range(0, 1000, 10))
                answers = (ask(port, messages) for messages in tries)
                cases.append({"model": name} | next(answer for answer in answers if answer["margin"] > LEAST_MARGIN))
        finally:
            process.kill()
            process.wait()
    json.dump(cases, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
