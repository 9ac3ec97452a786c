#!/usr/bin/env python3
"""The engine beside llama.cpp's own server on the same files and machine: `make bench-engine`.

Both are asked over HTTP in the same way, in turns, for several rounds; medians count, with the lowest and highest round
behind them. `ENGINE="alone entering"` runs some of the parts only; `--peer` names another llama-server.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import inspect
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from media_files import png
from ports import free_port

CACHE = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
MODELS = {
    "smollm2": "smollm2-135m-instruct-q4_1.gguf",
    "gemma": "gemma-3-270m-q4_k_m.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "minilm": "all-minilm-l6-v2-f16.gguf",
}
WORDS = "river stone cloud amber quiet meadow lantern copper violin harbor winter orchard thunder saffron marble".split()


def file_of(model):
    return os.path.join(CACHE, "models", MODELS[model])


def text(seed, words):
    """So many words that no other seed begins with."""
    chosen = random.Random(seed)
    return f"{seed} " + " ".join(chosen.choice(WORDS) for _ in range(words))


class Quota:
    """A control group of either version that grants so many cores' worth of time; needs root."""

    def __init__(self, cores):
        is_first = os.path.isdir("/sys/fs/cgroup/cpu")
        self.folder = f"/sys/fs/cgroup{'/cpu' if is_first else ''}/sarai-bench-{os.getpid()}"
        os.mkdir(self.folder)
        period = 100_000
        file, limit = ("cpu.cfs_quota_us", f"{int(cores * period)}") if is_first else ("cpu.max", f"{int(cores * period)} {period}")
        with open(f"{self.folder}/{file}", "w") as out:
            out.write(limit)

    def enter(self):
        with open(f"{self.folder}/cgroup.procs", "w") as out:
            out.write(str(os.getpid()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(100):
            try:
                return os.rmdir(self.folder)
            except OSError:
                time.sleep(0.1)


class Process:
    """A server that is stopped for certain."""

    # What it does before it is started.
    enters = None

    def start(self, command, env=None):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        silent["preexec_fn"] = Process.enters
        self.process = subprocess.Popen(command, env={**os.environ, **(env or {})}, start_new_session=True, **silent)

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Stock(Process):
    """One llama-server."""

    def __init__(self, peer, model, parallel=1, context=2048, more=(), env=None):
        self.port, self.model = free_port(), model
        command = [peer, "-m", file_of(model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.start([*command, "-np", str(parallel), "-c", str(context * parallel), *more], env)
        self.wait()

    def wait(self):
        until(lambda: self.health() == 200)

    def health(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status


class Sarai(Process):
    """One sarai for all models."""

    def __init__(self, binary, models, parallel=1, context=2048, more=""):
        self.port, self.folder = free_port(), tempfile.TemporaryDirectory()
        with open(f"{self.folder.name}/sarai.yaml", "w") as config:
            config.write("memory: { max_ram_gb: 12, max_concurrent_llms: 4 }\nserver: { max_in_flight: 64 }\nmodels:\n")
            for model in models:
                path = f"gguf_path: {file_of(model)}, context_length: {context}, parallel: {parallel}"
                config.write(f"  {model}: {{ backend: gguf_native, {path}, keep_alive: -1{more} }}\n")
        self.start(
            [binary, "serve", "--listen", f"127.0.0.1:{self.port}", "--config", f"{self.folder.name}/sarai.yaml"],
            {"SARAI_STATE_DIR": f"{self.folder.name}/state"},
        )
        for model in models:
            until(lambda model=model: (embed if model == "minilm" else ask)(self.port, model, "Hi", 1).status == 200)


# What went wrong on other threads: a figure without them is none.
FAILED = []
threading.excepthook = lambda what: (FAILED.append(what.exc_value), sys.__excepthook__(what.exc_type, what.exc_value, what.exc_traceback))


def until(is_so, seconds=120):
    began = time.monotonic()
    while time.monotonic() - began < seconds and not FAILED:
        try:
            if is_so():
                return
        except OSError:
            pass
        time.sleep(0.05)
    sys.exit(f"it never came: {FAILED}")


class Answer:
    """A streamed answer, with the time of each piece."""

    def __init__(self):
        self.status, self.times, self.usage, self.text = 0, [], {}, ""

    @property
    def first(self):
        return self.times[0] - self.began

    @property
    def tokens_per_second(self):
        return (self.usage["completion_tokens"] - 1) / (self.times[-1] - self.times[0])

    def gaps(self, since=0.0, until=float("inf")):
        pairs = zip(self.times, self.times[1:])
        return [after - before for before, after in pairs if since <= before and after <= until]


def ask(port, model, prompt, tokens, answer=None, stop=None, lane="interactive"):
    """Streams a raw completion; `answer` can be watched from another thread, `stop` ends it early. Only sarai knows of lanes."""
    answer = answer or Answer()
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    # No answer of these models ends by itself: all are as long as they were asked for.
    body |= {"stream_options": {"include_usage": True}, "logit_bias": {str(eos): -100 for eos in EOS[model]}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    answer.began = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", "x-sarai-lane": lane})
    response = connection.getresponse()
    answer.status = response.status
    if response.status != 200 and not answer.text:
        answer.text = response.read().decode()
        print(f"{model} at {port}: {response.status} {answer.text[:300]}", file=sys.stderr)
        return answer
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        now, chunk = time.monotonic(), json.loads(line[6:])
        answer.usage = chunk.get("usage") or answer.usage
        piece = "".join(choice.get("text", "") for choice in chunk["choices"])
        # A token that ends within a character has no text of its own; the first one counts all the same.
        if piece or (chunk["choices"] and not answer.times):
            answer.times.append(now)
            answer.text += piece
        if stop and stop.is_set():
            break
    connection.close()
    return answer


EOS = {"smollm2": [0, 2], "gemma": [1, 106], "qwen": [151643, 151645]}


class Beside:
    """A long answer, which runs beside what is measured; knows the gaps between its tokens meanwhile."""

    def __init__(self, port, model, lane="interactive"):
        self.answer, self.stop = Answer(), threading.Event()
        arguments = (port, model, text("beside", 20), 1500, self.answer, self.stop, lane)
        self.thread = threading.Thread(target=ask, args=arguments)

    def __enter__(self):
        self.thread.start()
        until(lambda: len(self.answer.times) > 10)
        self.since = time.monotonic()
        return self

    def gaps(self):
        # The gap that the end falls into counts too.
        told = len(self.answer.times)
        until(lambda: len(self.answer.times) > told + 1)
        return self.answer.gaps(self.since, self.answer.times[-1])

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


class Vectors:
    """How many came, and how long they took."""


def embed(port, model, texts, _=None):
    began, vectors = time.monotonic(), Vectors()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"model": model, "input": texts})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    vectors.status, answer = response.status, json.loads(response.read())
    vectors.seconds = time.monotonic() - began
    vectors.count = len(answer.get("data", []))
    connection.close()
    return vectors


def picture(seed):
    """Noise in blocks, as a PNG file in base64."""
    chosen, side = random.Random(seed), 448
    blocks = [[bytes(chosen.randrange(256) for _ in range(3)) for _ in range(side // 14)] for _ in range(side // 14)]
    lines = b"".join(b"\0" + b"".join(blocks[y // 14][x // 14] for x in range(side)) for y in range(side))
    return base64.b64encode(png(side, side, lines)).decode()


def shown(port, model, seed):
    """Seconds to the first token of an answer to a picture."""
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture(seed)}}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    began = time.monotonic()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer[:300]
    connection.close()
    return time.monotonic() - began


def chat(port, model, prompt, tokens):
    """A whole chat, and its decoding speed as the server measured it."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    seconds = answer["sarai"]["timings_ms"]["decode"] / 1000
    answer["sarai"]["tokens_per_second"] = (answer["usage"]["completion_tokens"] - 1) / seconds
    return answer


def listed(port, model, prompt, tokens, form):
    """A chat that follows a form, if any: its tokens, and how long it took."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    body |= {"response_format": form} if form else {}
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer[:300]
    connection.close()
    return json.loads(answer)["usage"]["completion_tokens"], time.monotonic() - began


def likely(port, model, prompt):
    """The tokens of a greedy answer, and how likely they and others were."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 60, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 5}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer["choices"][0]["logprobs"]["content"]


def at_once(requests):
    """Asks all at the same time; each is the arguments of `ask`."""
    answers = [Answer() for _ in requests]
    threads = [threading.Thread(target=ask, args=(*r, a)) for r, a in zip(requests, answers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def spread(values):
    return f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})"


def report(what, stock, sarai, higher_is_better=True):
    ratio = statistics.median(sarai) / statistics.median(stock)
    better = "" if higher_is_better else ", less is better"
    print(f"{what:<58} stock {spread(stock):<28} sarai {spread(sarai):<28} ratio {ratio:5.2f}{better}", flush=True)


def own_memory(pid):
    """Of a process, in MiB: not pages of files."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon:")).split()[1]) / 1024


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Bench:
    def __init__(self, arguments):
        self.peer, self.binary, self.rounds = arguments.peer, arguments.sarai, arguments.rounds

    def stock(self, model, **settings):
        return Stock(self.peer, model, **settings)

    def sarai(self, models, **settings):
        return Sarai(self.binary, models, **settings)

    def alone(self):
        """One stream: decode and prefill."""
        for model in EOS:
            with self.stock(model) as stock, self.sarai([model]) as sarai:
                decode, prefill = {stock: [], sarai: []}, {stock: [], sarai: []}
                for seed in range(self.rounds):
                    for server in (stock, sarai):
                        decode[server].append(ask(server.port, model, text(seed, 20), 128).tokens_per_second)
                        long = ask(server.port, model, text(1000 + seed, 400), 1)
                        prefill[server].append(long.usage["prompt_tokens"] / long.first)
                report(f"{model}: decode, tokens/s", decode[stock], decode[sarai])
                report(f"{model}: prefill, tokens/s", prefill[stock], prefill[sarai])

    def streams(self):
        """1 to 16 streams of one model."""
        model = "smollm2"
        for count in (1, 2, 4, 8, 16):
            settings = {"parallel": count, "context": 512}
            with self.stock(model, **settings) as stock, self.sarai([model], **settings) as sarai:
                rate, first, uneven = ({stock: [], sarai: []} for _ in range(3))
                for seed in range(self.rounds):
                    for server in (stock, sarai):
                        prompts = [text(seed * 100 + n, 20) for n in range(count)]
                        answers = at_once([(server.port, model, prompt, 64) for prompt in prompts])
                        took = max(a.times[-1] for a in answers) - min(a.began for a in answers)
                        rate[server].append(64 * count / took)
                        first[server].append(statistics.mean(a.first for a in answers))
                        rates = [a.tokens_per_second for a in answers]
                        uneven[server].append(max(rates) / min(rates))
                report(f"{count} streams, tokens/s in all", rate[stock], rate[sarai])
                report(f"{count} streams, mean first token, s", first[stock], first[sarai], False)
                report(f"{count} streams, fastest over slowest", uneven[stock], uneven[sarai], False)

    def entering(self):
        """A prompt of 2,000 tokens enters while streams run."""
        model, settings = "smollm2", {"parallel": 5, "context": 4096}
        with self.stock(model, **settings) as stock, self.sarai([model], **settings) as sarai:
            idle, while_entering, longest, first = ({stock: [], sarai: []} for _ in range(4))
            for seed in range(self.rounds):
                for server in (stock, sarai):
                    answers, ended = [Answer() for _ in range(4)], threading.Event()
                    run = [(server.port, model, text(seed * 10 + n, 20), 2000, a, ended) for n, a in enumerate(answers)]
                    threads = [threading.Thread(target=ask, args=arguments) for arguments in run]
                    for thread in threads:
                        thread.start()
                    until(lambda: all(len(a.times) > 60 for a in answers))
                    entered = time.monotonic()
                    long = ask(server.port, model, text(7000 + seed, 1700), 1)
                    ended.set()
                    for thread in threads:
                        thread.join()
                    before = [gap for a in answers for gap in a.gaps(until=entered)]
                    # A gap that it enters into counts too.
                    during = [gap for a in answers for gap in a.gaps(since=entered - max(before))]
                    p95 = percentile(before, 0.95)
                    idle[server].append(p95 * 1e3)
                    while_entering[server].append(percentile(during, 0.95) / p95)
                    longest[server].append(max(during) / p95)
                    first[server].append(long.first)
            report("4 streams: gap p95 without it, ms", idle[stock], idle[sarai], False)
            report("gap p95 while 2,000 tokens enter, of that", while_entering[stock], while_entering[sarai], False)
            report("longest gap, of that", longest[stock], longest[sarai], False)
            report("first token of the long prompt, s", first[stock], first[sarai], False)

    def prefix(self):
        """16 sessions on 4 slots that share a prefix of 800 tokens, with 1 prefix and with 8."""
        model, settings = "smollm2", {"parallel": 4, "context": 2048}
        for prefixes in (1, 8):
            computed, first = {"stock": [], "sarai": []}, {"stock": [], "sarai": []}
            servers = [("stock", lambda: self.stock(model, **settings)), ("sarai", lambda: self.sarai([model], **settings))]
            for _ in range(self.rounds):
                for name, make in servers:
                    with make() as server:
                        did, waited = self.sessions(server, model, prefixes)
                        computed[name].append(did)
                        first[name].append(waited)
                # Each is the first one by turns.
                servers.reverse()
            computed, first = ({name: list(zip(*rounds)) for name, rounds in all_of.items()} for all_of in (computed, first))
            for turn in range(3):
                report(f"{prefixes} prefixes, turn {turn + 1}: computed over unavoidable", computed["stock"][turn], computed["sarai"][turn], False)
                report(f"{prefixes} prefixes, turn {turn + 1}: mean first token, s", first["stock"][turn], first["sarai"][turn], False)

    def sessions(self, server, model, prefixes):
        order = random.Random(5)
        shared = [text(900 + n, 680) for n in range(prefixes)]
        conversations = [shared[n % prefixes] + " " + text(2000 + n, 10) for n in range(16)]
        known = [0] * 16
        computed, first = [], []
        for turn in range(3):
            turns = list(range(16))
            order.shuffle(turns)
            answers = at_once([(server.port, model, conversations[n], 16) for n in turns])
            did = sum(a.usage["prompt_tokens"] - a.usage["prompt_tokens_details"]["cached_tokens"] for a in answers)
            needed = sum(a.usage["prompt_tokens"] - known[n] for n, a in zip(turns, answers))
            if turn == 0:
                # Each prefix is new once.
                lengths = [ask(server.port, model, one, 1).usage["prompt_tokens"] for one in shared]
                needed -= sum(lengths[n % prefixes] for n in range(16)) - sum(lengths)
            for n, answer in zip(turns, answers):
                # The token that was chosen last is not computed yet.
                known[n] = answer.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1
                conversations[n] += answer.text + " " + text(3000 + 100 * turn + n, 10)
            computed.append(did / needed)
            first.append(statistics.mean(a.first for a in answers))
        return computed, first

    def together(self):
        """Two, three and four models at once, beside stock servers at their defaults and with one thread each."""
        three = list(EOS)
        # The fourth is a file of its own, and so is its worker.
        with tempfile.TemporaryDirectory() as folder:
            again = os.path.join(folder, "again.gguf")
            shutil.copyfile(file_of("smollm2"), again)
            MODELS["again"], EOS["again"] = again, EOS["smollm2"]
            self.beside_stock((["smollm2", "gemma"], three, [*three, "again"]))
            del MODELS["again"], EOS["again"]

    def beside_stock(self, groups):
        for models in groups:
            with self.sarai(models) as sarai:
                rates = {}
                for setting, more in (("defaults", ()), ("-t 1", ("-t", "1"))):
                    servers = [self.stock(model, more=more) for model in models]
                    try:
                        tokens = 24 if setting == "defaults" else 128
                        ports = [server.port for server in servers]
                        rates[setting] = [self.rate(ports, models, tokens, seed) for seed in range(self.rounds if tokens > 24 else 1)]
                        if setting != "defaults":
                            ports = [sarai.port] * len(models)
                            rates["sarai"] = [self.rate(ports, models, tokens, seed) for seed in range(self.rounds)]
                    finally:
                        for server in servers:
                            server.stop()
                report(f"{'+'.join(models)}: tokens/s in all, stock at defaults", rates["defaults"], rates["sarai"])
                report(f"{'+'.join(models)}: tokens/s in all, stock with -t 1", rates["-t 1"], rates["sarai"])
                if len(models) == 2:
                    self.short(sarai)

    def rate(self, ports, models, tokens, seed):
        """Tokens per second of all while all of them run."""
        ended = threading.Event()
        answers = [Answer() for _ in models]
        run = [(port, model, text(seed, 20), 2000, a, ended) for port, model, a in zip(ports, models, answers)]
        threads = [threading.Thread(target=ask, args=arguments) for arguments in run]
        for thread in threads:
            thread.start()
        until(lambda: all(len(a.times) > 2 for a in answers))
        began, before = time.monotonic(), [len(a.times) for a in answers]
        until(lambda: sum(len(a.times) for a in answers) - sum(before) >= tokens * len(models), 60)
        took, after = time.monotonic() - began, [len(a.times) for a in answers]
        ended.set()
        for thread in threads:
            thread.join()
        return (sum(after) - sum(before)) / took

    def short(self, sarai):
        """A prompt of 30 tokens with one token of answer while another model decodes."""
        idle, busy = [], []
        for seed in range(self.rounds):
            idle.append(ask(sarai.port, "smollm2", text(400 + seed, 14), 1).first)
            ended, other = threading.Event(), Answer()
            thread = threading.Thread(target=ask, args=(sarai.port, "gemma", text(seed, 20), 2000, other, ended))
            thread.start()
            until(lambda: len(other.times) > 20)
            busy.append(ask(sarai.port, "smollm2", text(600 + seed, 14), 1).first)
            ended.set()
            thread.join()
        ratio = statistics.median(busy) / statistics.median(idle)
        print(f"30 tokens and one of answer: idle {spread(idle)} s, while another decodes {spread(busy)} s, ratio {ratio:.2f}")

    def prefilling(self):
        """One model reads prompts of 900 tokens while two others decode, beside the settings found by hand: -t 1 for all, and two threads for prompts"""
        decoding, reading = ["smollm2", "gemma"], "qwen"
        hands = {"-t 1": ("-t", "1"), "-t 1 -tb 2": ("-t", "1", "-tb", "2")}
        with self.sarai([*decoding, reading]) as sarai:
            for setting, more in hands.items():
                servers = {model: self.stock(model, more=more) for model in [*decoding, reading]}
                figures = {"decoding": ([], []), "reading": ([], [])}
                try:
                    for seed in range(self.rounds):
                        for side, ports in enumerate(({model: server.port for model, server in servers.items()}, {model: sarai.port for model in servers})):
                            with contextlib.ExitStack() as running:
                                answers = [running.enter_context(Beside(ports[model], model)) for model in decoding]
                                before, began = [len(beside.answer.times) for beside in answers], time.monotonic()
                                asked = ask(ports[reading], reading, text(3000 + 10 * seed + side, 700), 1)
                                took = time.monotonic() - began
                                told = sum(len(beside.answer.times) for beside in answers) - sum(before)
                            figures["decoding"][side].append(told / took)
                            figures["reading"][side].append(asked.usage["prompt_tokens"] / asked.first)
                finally:
                    for server in servers.values():
                        server.stop()
                report(f"tokens/s of the two that decode, stock with {setting}", *figures["decoding"])
                report(f"prompt tokens/s of the third, stock with {setting}", *figures["reading"])

    def lanes(self):
        """An answer of SmolLM2 beside one of the same model or of another one, which is bulk or is not; sarai alone."""
        with self.sarai(["smollm2", "gemma"], parallel=2) as sarai:
            own = lambda seed: ask(sarai.port, "smollm2", text(seed, 20), 120).tokens_per_second
            for other in ("smollm2", "gemma"):
                alone, rates, theirs = [], {"bulk": [], "interactive": []}, {"bulk": [], "interactive": []}
                for seed in range(self.rounds):
                    alone.append(own(seed))
                    for lane in rates:
                        with Beside(sarai.port, other, lane) as beside:
                            before, began = len(beside.answer.times), time.monotonic()
                            rates[lane].append(own(100 + seed))
                            theirs[lane].append((len(beside.answer.times) - before) / (time.monotonic() - began))
                for lane in rates:
                    ratio = statistics.median(rates[lane]) / statistics.median(alone)
                    print(f"beside {lane} of {other}: {spread(rates[lane])} tokens/s, {ratio:.2f} of {spread(alone)} alone; the other {spread(theirs[lane])}")

    def slots(self):
        """Memory of its own that each further sequence of 2,048 tokens takes once it is filled, MiB"""
        for model in ("smollm2", "gemma"):
            takes = ([], [])
            for parallel in (1, 8):
                for side, make in enumerate((self.stock, lambda model, **settings: self.sarai([model], **settings))):
                    with make(model, parallel=parallel) as server:
                        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
                            list(pool.map(lambda n: ask(server.port, model, text(7000 + n, 1500), 8), range(parallel)))
                        takes[side].append(own_memory(self.worker(server) if side else server.process.pid))
            report(f"{model}: each further sequence, MiB", *[[(many - one) / 7] for one, many in takes], False)

    def worker(self, server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/api/ps")
        return json.loads(connection.getresponse().read())["sarai"]["workers"][0]["pid"]

    def cold(self):
        """From nothing to the first token: a stock server's start, and sarai's load on demand."""
        model, stock, sarai = "smollm2", [], []
        with self.sarai([model]) as server:
            for seed in range(self.rounds):
                began = time.monotonic()
                with self.stock(model) as other:
                    ask(other.port, model, text(seed, 20), 1)
                    stock.append(time.monotonic() - began)
                self.unload(server, model)
                sarai.append(ask(server.port, model, text(seed, 20), 1).first)
        report("cold start to the first token, s", stock, sarai, False)

    def park(self):
        """A conversation of 2,000 tokens whose model was unloaded: to its first token, beside computing it."""
        for model in EOS:
            computed, returned = [], []
            with self.sarai([model], context=4096) as server:
                for seed in range(self.rounds):
                    first = ask(server.port, model, text(8000 + seed, 1700), 4)
                    computed.append(first.first)
                    self.unload(server, model)
                    again = ask(server.port, model, text(8000 + seed, 1700) + first.text + " and", 4)
                    returned.append(again.first)
                tokens = first.usage["prompt_tokens"]
            ratio = statistics.median(computed) / statistics.median(returned)
            print(f"{model}: {tokens} tokens computed in {spread(computed)} s; after an unload back in {spread(returned)} s, {ratio:.1f} times as fast")

    def unload(self, server, model):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/api/generate", json.dumps({"model": model, "keep_alive": 0}))
        connection.getresponse().read()
        until(lambda: not self.loaded(server))

    def quota(self):
        """A quota of 1.5 of 2 cores: of the speed without it, which would be 0.75"""
        for model in ("smollm2", "qwen"):
            shares = {(name, what): [] for name in ("stock", "sarai") for what in ("decode", "prefill")}
            for seed in range(self.rounds):
                for name, make in (("stock", lambda: self.stock(model)), ("sarai", lambda: self.sarai([model]))):
                    speeds = []
                    for cores in (None, 1.5):
                        with Quota(cores or 2) as quota:
                            Process.enters = quota.enter if cores else None
                            with make() as server:
                                Process.enters = None
                                decode = ask(server.port, model, text(seed, 20), 200).tokens_per_second
                                long = ask(server.port, model, text(1000 + seed, 1000), 1)
                                speeds.append((decode, long.usage["prompt_tokens"] / long.first))
                    (decode, prefill), (limited_decode, limited_prefill) = speeds
                    shares[name, "decode"].append(limited_decode / decode)
                    shares[name, "prefill"].append(limited_prefill / prefill)
            for what in ("decode", "prefill"):
                report(f"{model}: {what} under 1.5 cores, of that without", shares["stock", what], shares["sarai", what])

    def embed(self):
        """all-MiniLM-L6-v2: 256 texts of 5 to 150 words in one request, and as 16 requests of 16 at once; texts/s"""
        chosen = random.Random(7)
        texts = [text(f"text {n}", chosen.randint(5, 150)) for n in range(256)]
        parts = [texts[n : n + 16] for n in range(0, 256, 16)]
        stock, sarai = ([[], []] for _ in range(2))
        more = ("--embedding", "-b", "512", "-ub", "512")
        with Stock(self.peer, "minilm", 4, 512, more) as peer, Sarai(self.binary, ["minilm"], 1, 512) as ours:
            for _ in range(self.rounds):
                for server, figures in ((peer, stock), (ours, sarai)):
                    assert embed(server.port, "minilm", texts[:4]).count == 4
                    whole = embed(server.port, "minilm", texts)
                    assert whole.count == 256
                    figures[0].append(256 / whole.seconds)
                    began, threads = time.monotonic(), []
                    for part in parts:
                        threads.append(threading.Thread(target=embed, args=(server.port, "minilm", part)))
                        threads[-1].start()
                    for thread in threads:
                        thread.join()
                    figures[1].append(256 / (time.monotonic() - began))
        report("one request, texts/s", stock[0], sarai[0])
        report("16 requests at once, texts/s", stock[1], sarai[1])
        with Sarai(self.binary, ["smollm2", "minilm"], 1, 2048) as ours:
            idle, beside = [], []
            for _ in range(self.rounds):
                idle.append(1000 * percentile(ask(ours.port, "smollm2", text("idle", 20), 100).gaps(), 0.95))
                answer, stop = Answer(), threading.Event()
                thread = threading.Thread(target=ask, args=(ours.port, "smollm2", text("beside", 20), 600, answer, stop))
                thread.start()
                until(lambda: len(answer.times) > 10)
                since = time.monotonic()
                embed(ours.port, "minilm", texts)
                gaps = answer.gaps(since, time.monotonic())
                stop.set()
                thread.join()
                beside.append(1000 * percentile(gaps, 0.95))
        report("SmolLM2's 95th gap alone, and beside 256 texts, ms", idle, beside, False)

    def media(self):
        """Pictures for Qwen through an encoder of SigLIP's size (random weights): first token, and running answers beside them"""
        folder = os.path.join(CACHE, "sketches", "sensing")
        projector = os.path.join(folder, "mmproj-large-896.gguf")
        if not os.path.exists(projector):
            clients = subprocess.run(["scripts/python_clients.sh"], capture_output=True, text=True, check=True).stdout.strip()
            os.makedirs(folder, exist_ok=True)
            subprocess.run([clients, "scripts/sensing_models.py", "-o", folder, "--large", "896"], check=True)
        first, again, idle, beside, longest = ([[], []] for _ in range(5))
        more = ("--mmproj", projector, "-kvu")
        with Stock(self.peer, "qwen", 2, 2048, more) as peer:
            with Sarai(self.binary, ["qwen"], 2, 2048, f", mmproj_path: {projector}") as ours:
                for number in range(self.rounds):
                    for side, server in enumerate((peer, ours)):
                        first[side].append(1000 * shown(server.port, "qwen", number))
                        again[side].append(1000 * shown(server.port, "qwen", number))
                        gaps = ask(server.port, "qwen", text("idle", 20), 60).gaps()
                        idle[side].append(1000 * percentile(gaps, 0.95))
                        with Beside(server.port, "qwen") as answer:
                            shown(server.port, "qwen", 1000 + number)
                            gaps = answer.gaps()
                        beside[side].append(1000 * percentile(gaps, 0.95))
                        longest[side].append(1000 * max(gaps))
        report("first token of a picture, ms", *first, False)
        report("of the same picture again, ms", *again, False)
        report("95th gap of an answer alone, ms", *idle, False)
        report("95th gap beside a picture, ms", *beside, False)
        report("longest gap beside a picture, ms", *longest, False)

    def same(self):
        """Greedy text alone and beside 15 others: how many of 16 are the same, how far behind the chosen token the other one was where they part, and what both took"""
        words = "sea dog stars war cheese love cars trees music rain gold moon bread ships kings sleep".split()
        prompts = [f"Write about {word}. {'It is long ago, ' * n}" for n, word in enumerate(words)]
        exact = ", deterministic: true"
        for model in ("smollm2", "qwen"):
            starts = {
                "stock": lambda: self.stock(model, parallel=8),
                "sarai": lambda: self.sarai([model], parallel=8),
                "sarai" + exact: lambda: self.sarai([model], parallel=8, more=exact),
            }
            for name, start in starts.items():
                with start() as server:
                    began = time.monotonic()
                    alone = [likely(server.port, model, prompt) for prompt in prompts]
                    between = time.monotonic()
                    with concurrent.futures.ThreadPoolExecutor(16) as pool:
                        company = list(pool.map(lambda prompt: likely(server.port, model, prompt), prompts))
                    took = f"alone {between - began:.1f} s, together {time.monotonic() - between:.1f} s"
                behind = []
                for one, other in zip(alone, company):
                    parts = next(((a, b) for a, b in zip(one, other) if a["token"] != b["token"]), None)
                    if parts:
                        known = {token["token"]: token["logprob"] for token in parts[0]["top_logprobs"]}
                        behind.append(parts[0]["logprob"] - known.get(parts[1]["token"], -99))
                furthest = f"; others part where the other token is {max(behind):.2f} or less behind" if behind else ""
                print(f"{model}: {name} {len(words) - len(behind)} of {len(words)} the same{furthest}; {took}", flush=True)

    def forms(self):
        """Running answers beside one that follows a schema, and beside a plain one, Qwen: gaps, and what those beside it get"""
        word = {"type": "object", "properties": {"word": {"type": "string"}, "letters": {"type": "integer"}}, "required": ["word", "letters"]}
        schema = {"type": "json_schema", "json_schema": {"name": "words", "schema": {"type": "array", "items": word, "minItems": 40}}}
        idle, plain, bound, longest, speed = ([[], []] for _ in range(5))
        with self.stock("qwen", parallel=2, context=4096) as peer, self.sarai(["qwen"], parallel=2) as ours:
            for number in range(self.rounds):
                for side, server in enumerate((peer, ours)):
                    gaps = ask(server.port, "qwen", text("idle", 20), 100).gaps()
                    idle[side].append(1000 * percentile(gaps, 0.95))
                    for form, figures in ((None, plain), (schema, bound)):
                        with Beside(server.port, "qwen") as answer:
                            prompt = f"List words of the sea, number {number}."
                            tokens, seconds = listed(server.port, "qwen", prompt, 200, form)
                            gaps = answer.gaps()
                        figures[side].append(1000 * percentile(gaps, 0.95))
                        if form:
                            longest[side].append(1000 * max(gaps))
                            speed[side].append(tokens / seconds)
        report("95th gap of an answer alone, ms", *idle, False)
        report("95th gap beside a plain answer, ms", *plain, False)
        report("95th gap beside one that follows a schema, ms", *bound, False)
        report("longest gap beside one that follows a schema, ms", *longest, False)
        report("tokens/s of the one that follows a schema", *speed)

    def draft(self):
        """Drafting from repeated text (`draft_tokens`), Qwen: rewriting code, and prose where nothing repeats; without and with it, and both deterministic"""
        code = "\n".join(inspect.getsource(part) for part in (Quota, Answer))
        edit = f"Write this code again with `self.times` renamed to `self.moments`, and change nothing else.\n```python\n{code}\n```"
        prose = "Write a long story about a lighthouse keeper who finds a bottle with a letter in it."
        for draft, exact in ((4, ""), (8, ""), (4, ", deterministic: true"), (8, ", deterministic: true")):
            figures = {name: ([], []) for name in ("edit", "prose")}
            same = {name: [] for name in figures}
            with Sarai(self.binary, ["qwen"], 1, 4096, exact) as plain:
                with Sarai(self.binary, ["qwen"], 1, 4096, f", draft_tokens: {draft}{exact}") as ours:
                    for _ in range(self.rounds):
                        for name, prompt in (("edit", edit), ("prose", prose)):
                            texts = []
                            for side, server in enumerate((plain, ours)):
                                said = chat(server.port, "qwen", prompt, 300)
                                figures[name][side].append(said["sarai"]["tokens_per_second"])
                                texts.append(said["choices"][0]["message"]["content"])
                            same[name].append(texts[0] == texts[1])
            for name, (without, with_it) in figures.items():
                alike = "the same text" if all(same[name]) else f"another text in {same[name].count(False)} of {len(same[name])}"
                report(f"{name}, {draft} tokens{exact}, tokens/s ({alike})", without, with_it)

    def loaded(self, server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/api/ps")
        return json.loads(connection.getresponse().read())["models"]


def main():
    parts = ["alone", "streams", "entering", "prefix", "together", "prefilling", "lanes", "slots", "park", "cold", "embed", "media", "forms", "same", "draft", "quota"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}")
    parser.add_argument("--peer", default=os.environ.get("LLAMA_SERVER"), help="a llama-server")
    parser.add_argument("--sarai", default=os.environ.get("SARAI_BINARY"), help="sarai's binary")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    for part in arguments.parts or parts:
        print(f"-- {part}: {getattr(Bench, part).__doc__}", flush=True)
        getattr(bench, part)()
        if FAILED:
            sys.exit(f"{part}: {FAILED}")


if __name__ == "__main__":
    main()
