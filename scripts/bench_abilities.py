#!/usr/bin/env python3
"""What pictures, sound and vectors take, beside what was planned for them: the second part of `make bench-memory`.

    bench_abilities.py BINARY MODELS SKETCHES PYTHON

Each row starts the real server with one model and asks for the most that it takes: the largest picture, the longest sound, a batch of the
longest texts. Memory is the most that the worker had at any moment, looked at all the time. The columns are MiB. A plan may not be
under: then the program ends with 1.
"""

import base64
import concurrent.futures
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import urllib.request

from media_files import png, wav

MIB = 1 << 20


class Server:
    """sarai with one model."""

    def __init__(self, binary, model):
        self.folder = tempfile.TemporaryDirectory()
        config = os.path.join(self.folder.name, "sarai.yaml")
        with open(config, "w") as file:
            json.dump({"models": {"m": {"backend": "gguf_native", **model}}}, file)
        command = [binary, "serve", "--listen", "127.0.0.1:0", "--config", config]
        environment = {**os.environ, "SARAI_STATE_DIR": self.folder.name}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        said = ""
        while "stop " not in said:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server has ended: {said}")
            said += line
        self.url = re.search(r"http://[\d.]+:\d+", said)[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        self.folder.cleanup()

    def ask(self, path, body=None):
        data = None if body is None else json.dumps({"model": "m", **body}).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=600) as answer:
            return json.load(answer)

    def worker(self):
        return next(engine for engine in self.ask("/api/pool/ledger")["engines"] if engine["pid"])


def held(pid):
    """What is a process's own."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


class Peak(threading.Thread):
    """The most memory of its own that a process has had while this ran."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.most, self.is_over = pid, 0, threading.Event()

    def run(self):
        while not self.is_over.wait(0.005):
            self.most = max(self.most, held(self.pid))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.join()


def stripes(width, height, seed):
    """A picture in base64, another one for each seed."""
    row = b"\0" + bytes((seed * 31 + at // 3) % 251 for at in range(3 * width))
    return base64.b64encode(png(width, height, row * height, 1)).decode()


def tone(seconds, rate=16000):
    wave = b"".join(struct.pack("<h", round(9000 * math.sin(math.tau * 440 * at / rate))) for at in range(rate))
    return base64.b64encode(wav(wave * seconds, rate)).decode()


def show(server, part):
    content = [part, {"type": "text", "text": "what is it"}]
    server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0})


def pictures(server):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + stripes(4096, 3072, seed)}} for seed in range(4)]
        list(pool.map(lambda part: show(server, part), parts))


def sound(server):
    show(server, {"type": "input_audio", "input_audio": {"data": tone(300), "format": "wav"}})


def vectors(server):
    texts = [" ".join(f"word{n * k % 977}" for k in range(400)) for n in range(64)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: server.ask("/api/embed", {"input": texts}), range(4)))


def main():
    binary, models, sketches, python = sys.argv[1:]
    sensing = os.path.join(sketches, "sensing")
    large = os.path.join(sensing, "mmproj-large-896.gguf")
    if not os.path.exists(large):
        subprocess.run([python, "scripts/sensing_models.py", "-o", sensing, "--large", "896"], check=True)
    fitted = os.path.join(sensing, "fitted")
    omni = {"gguf_path": f"{fitted}/qwen2vl.gguf", "mmproj_path": f"{fitted}/mmproj-omni.gguf", "context_length": 9000, "parallel": 2}
    qwen = {"gguf_path": f"{models}/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "mmproj_path": large, "context_length": 2048, "parallel": 2}
    rows = [
        ("pictures of 4096 x 3072, an encoder of SigLIP's size", qwen, pictures),
        ("pictures of 4096 x 3072, small Qwen2.5-Omni", omni, pictures),
        ("300 seconds of sound, small Qwen2.5-Omni", omni, sound),
        ("vectors of 4 x 64 long texts, all-MiniLM-L6-v2", {"gguf_path": f"{models}/all-minilm-l6-v2-f16.gguf", "role": "embedding"}, vectors),
    ]
    bad = 0
    print(f"{'what':<56} {'loaded':>8} {'peak':>8} {'planned':>8}  of the memory that is the worker's own")
    for what, model, ask in rows:
        with Server(binary, model) as server:
            server.ask("/api/generate", {})
            worker = server.worker()
            # What is mapped of files is others' too.
            planned = sum(part["bytes"] for part in worker["planned"] if part["name"] not in ("weights mapped", "binary"))
            loaded = held(worker["pid"])
            with Peak(worker["pid"]) as peak:
                ask(server)
            bad += peak.most > planned
            print(f"{what:<56} {loaded / MIB:8.1f} {peak.most / MIB:8.1f} {planned / MIB:8.1f}", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
