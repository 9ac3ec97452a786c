#!/usr/bin/env python3
"""Half an hour of everything at once on real models, with flat memory and file descriptors: `make soak`.

Clients chat, stream, leave in mid-stream, ask for forms and calls, make vectors, show pictures and sounds, send garbage. Memory and descriptors of the server
and of each worker are sampled; those of the last fifth must be those of the second, but for a little. `MINUTES=5` is shorter.
"""

import base64
import io
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import wave

from bench_engine import CACHE, MODELS, Process, free_port, picture, text, until

GROWTH_MIB, GROWTH_FILES = 8, 3
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]


def file_of(model):
    return os.path.join(CACHE, "models", MODELS[model])


class Client(threading.Thread):
    def __init__(self, url, seed, ended):
        super().__init__(daemon=True)
        self.url, self.random, self.ended, self.counts = url, random.Random(seed), ended, {}

    def run(self):
        while not self.ended.is_set():
            what = self.random.choice([self.chat, self.stream, self.leave, self.form, self.call, self.vectors, self.sense, self.garbage])
            try:
                outcome = what()
            except urllib.error.HTTPError as error:
                outcome = error.code
                error.close()
            except Exception as error:
                # A connection that breaks off, half an answer: whatever it is, it is none.
                outcome = repr(error).replace(" ", "_")
            key = f"{what.__name__} {outcome}"
            self.counts[key] = self.counts.get(key, 0) + 1

    def post(self, path, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=300)

    def asked(self, model="smollm2", **more):
        # Now and then a prompt that others have too, or a long one.
        words = self.random.choice([5, 10, 20, 100])
        content = text(self.random.choice([1, 2, 3, self.random.random()]), words)
        return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": self.random.randint(1, 60)} | more

    def chat(self):
        with self.post("/v1/chat/completions", self.asked()) as answer:
            return json.load(answer)["choices"][0]["finish_reason"] in ("stop", "length")

    def stream(self):
        with self.post("/api/chat", self.asked(stream=True, options={"num_predict": self.random.randint(1, 60)})) as answer:
            last = json.loads(list(answer)[-1])
            return last["done"] if "done" in last else "torn"

    def leave(self):
        with self.post("/v1/chat/completions", self.asked(stream=True, max_tokens=400)) as answer:
            for _ in range(self.random.randint(1, 12)):
                answer.readline()
        return "left"

    def form(self):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
        with self.post("/api/chat", self.asked(stream=False, format=schema, options={"num_predict": 40})) as answer:
            return json.load(answer)["done"]

    def call(self):
        with self.post("/v1/chat/completions", self.asked("qwen", tools=TOOLS, tool_choice="required", max_tokens=40)) as answer:
            return json.load(answer)["choices"][0]["finish_reason"] in ("tool_calls", "length")

    def vectors(self):
        texts = [text(self.random.random(), self.random.randint(1, 60)) for _ in range(self.random.randint(1, 20))]
        with self.post("/v1/embeddings", {"model": "minilm", "input": texts}) as answer:
            return len(json.load(answer)["data"]) == len(texts)

    def sense(self):
        if self.random.random() < 0.5:
            data = picture(self.random.randrange(40))
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        else:
            file = io.BytesIO()
            with wave.open(file, "wb") as sound:
                sound.setparams((1, 2, 16000, 0, "NONE", ""))
                sound.writeframes(self.random.randbytes(2 * self.random.randint(1, 30000)))
            part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}
        content = [{"type": "text", "text": text(self.random.random(), 5)}, part]
        asked = {"model": "omni", "messages": [{"role": "user", "content": content}], "max_tokens": 5}
        with self.post("/v1/chat/completions", asked) as answer:
            return json.load(answer)["choices"][0]["finish_reason"] in ("stop", "length")

    def garbage(self):
        with self.post(self.random.choice(["/v1/chat/completions", "/api/chat", "/v1/embeddings"]), self.random.randbytes(200)) as answer:
            return answer.status


def sample(pid):
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        kib = next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))
    return kib / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def main():
    minutes, port = float(os.environ.get("MINUTES", "30")), free_port()
    with tempfile.TemporaryDirectory() as folder, Process() as sarai:
        with open(f"{folder}/sarai.yaml", "w") as config:
            config.write("memory: { max_ram_gb: 6, max_concurrent_llms: 4 }\nmodels:\n")
            for model, parallel in (("smollm2", 4), ("qwen", 2), ("minilm", 1)):
                role = ", role: embedding" if model == "minilm" else ""
                config.write(f"  {model}: {{ backend: gguf_native, gguf_path: {file_of(model)}, context_length: 2048, parallel: {parallel}{role} }}\n")
            fitted = os.path.join(CACHE, "sketches", "sensing", "fitted")
            files = f"gguf_path: {fitted}/qwen2vl.gguf, mmproj_path: {fitted}/mmproj-omni.gguf"
            config.write(f"  omni: {{ backend: gguf_native, {files}, context_length: 4096, parallel: 2 }}\n")
        command = [sys.argv[1], "serve", "--listen", f"127.0.0.1:{port}", "--config", f"{folder}/sarai.yaml"]
        sarai.start(command, {"SARAI_STATE_DIR": f"{folder}/state"})
        url = f"http://127.0.0.1:{port}"
        get = lambda path: json.load(urllib.request.urlopen(url + path, timeout=30))
        until(lambda: get("/health"))
        ended = threading.Event()
        clients = [Client(url, seed, ended) for seed in range(6)]
        # All workers are there from the beginning.
        first = clients[0]
        for what in (first.chat, first.call, first.vectors, first.sense):
            what()
        for client in clients:
            client.start()
        pids = {"server": sarai.process.pid} | {row["models"]: row["pid"] for row in get("/api/ps")["sarai"]["workers"]}
        samples, began = {name: [] for name in pids}, time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            time.sleep(5)
            for name, pid in pids.items():
                samples[name].append(sample(pid))
        ended.set()
        for client in clients:
            client.join(300)
        hanging = sum(client.is_alive() for client in clients)
        counts = {}
        for client in clients:
            for key, count in client.counts.items():
                counts[key] = counts.get(key, 0) + count
        print(f"{minutes:.0f} minutes, {sum(counts.values())} requests: {dict(sorted(counts.items()))}")
        is_flat = True
        for name, rows in samples.items():
            fifth = len(rows) // 5
            early, late = rows[fifth : 2 * fifth], rows[-fifth:]
            memory, files = ([statistics.median(row[n] for row in part) for part in (early, late)] for n in (0, 1))
            print(f"{name:<8} anonymous {memory[0]:7.1f} -> {memory[1]:7.1f} MiB   descriptors {files[0]:.0f} -> {files[1]:.0f}")
            is_flat &= memory[1] - memory[0] <= GROWTH_MIB and files[1] - files[0] <= GROWTH_FILES
        bad = [key for key in counts if not (key.split()[1] in ("True", "left") or key == "garbage 400")]
        if bad or hanging or not is_flat:
            sys.exit(f"not flat, or not answered as it should: {bad}; {hanging} clients hang")


main()
