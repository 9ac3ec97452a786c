#!/usr/bin/env python3
"""Several models in less memory than they ask for, in a real control group: `make bench-cage`.

A server and its workers run in a memory control group (version 1 or 2, whichever the machine has) without swap. Four
clients ask three models with contexts of 2k, 8k and 16k, by a seeded trace of short prompts and of some that fill what
their model reserves. The limits go from "one model barely fits" to "all fit". Each server runs the same traces under
the same limits: sarai, the real Ollama at its defaults and with OLLAMA_MAX_LOADED_MODELS=1, and llama.cpp's server in
router mode with --models-max 3 and 1.

A request counts as servable if the same server answers it alone under the same limit: what failed is asked again so,
in a server of its own. An honest refusal is an error with a status of 4xx or 503 before any text.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from ports import free_port

MIB = 1 << 20
CACHE = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
MODELS = {
    "qwen": ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 2048),
    "smollm": ("smollm2-135m-instruct-q4_1.gguf", 8192),
    "gemma": ("gemma-3-270m-q4_k_m.gguf", 16384),
}
CLIENTS = 4
HANG_SECONDS = 180
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word".split()
)


class Cage:
    """A memory control group with a limit, and what happens in it."""

    def __init__(self, limit):
        self.v1 = os.path.isdir("/sys/fs/cgroup/memory")
        with open("/proc/self/cgroup") as lines:
            groups = [line.strip().split(":", 2) for line in lines]
        wanted = "memory" if self.v1 else ""
        own = next(path for _, controllers, path in groups if wanted in controllers.split(","))
        root = "/sys/fs/cgroup/memory" if self.v1 else "/sys/fs/cgroup"
        parent = os.path.join(root, own.strip("/")) if os.path.isdir(os.path.join(root, own.strip("/"))) else root
        self.path = os.path.join(parent, f"sarai-cage-{os.getpid()}-{time.monotonic_ns()}")
        os.mkdir(self.path)
        self.write("memory.limit_in_bytes" if self.v1 else "memory.max", limit)
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if os.path.exists(os.path.join(self.path, swap)):
                self.write(swap, limit if self.v1 else 0)
        self.limit = limit
        self.peak = self.tight = 0
        self.watching = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def write(self, file, value):
        with open(os.path.join(self.path, file), "w") as out:
            out.write(str(value))

    def read(self, file, key):
        with open(os.path.join(self.path, file)) as lines:
            for line in lines:
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value)
        return 0

    def enter(self):
        self.write("cgroup.procs", os.getpid())

    def watch(self):
        step = 0.05
        while not self.watching.wait(step):
            anonymous = self.read("memory.stat", "total_rss" if self.v1 else "anon")
            self.peak = max(self.peak, anonymous)
            self.tight += step * (anonymous > 0.95 * self.limit)

    def kills(self):
        return self.read("memory.oom_control" if self.v1 else "memory.events", "oom_kill")

    def major_faults(self):
        return self.read("memory.stat", "total_pgmajfault" if self.v1 else "pgmajfault")

    def processes(self):
        with open(os.path.join(self.path, "cgroup.procs")) as lines:
            return [int(line) for line in lines]

    def close(self):
        self.watching.set()
        self.watcher.join()
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            for process in self.processes():
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        os.rmdir(self.path)


class Server:
    """One server under test, in a cage."""

    def __init__(self, kind, limit, tools):
        self.folder = tempfile.mkdtemp(prefix="sarai-cage-")
        self.port = free_port()
        self.cage = Cage(limit)
        environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
        command = getattr(self, kind.split("-")[0])(kind, environment, tools)
        self.log = open(os.path.join(self.folder, "log"), "w")
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=self.log,
            stderr=self.log,
            cwd=self.folder,
            preexec_fn=self.cage.enter,
            start_new_session=True,
        )
        self.wait()

    def sarai(self, kind, environment, tools):
        environment["SARAI_STATE_DIR"] = os.path.join(self.folder, "state")
        lines = ["server:", f"  listen: 127.0.0.1:{self.port}", "  max_in_flight: 64", "memory:", "  max_ram_gb: 1000"]
        lines += ["  max_concurrent_llms: 3", "  strategy: evict_lru", "models:"]
        for name, (file, context) in MODELS.items():
            lines += [f"  {name}:", "    backend: gguf_native", f"    gguf_path: {tools['models']}/{file}"]
            lines += [
                f"    context_length: {context}",
                "    parallel: 4",
                "    shared_context: true",
                "    deadlines:",
                "      load_seconds: 290",
                "      queue_seconds: 290",
            ]
            lines += ["      first_token_seconds: 290"]
        config = os.path.join(self.folder, "sarai.yaml")
        with open(config, "w") as out:
            out.write("\n".join(lines) + "\n")
        return [tools["sarai"], "serve", "--config", config]

    def ollama(self, kind, environment, tools):
        environment["OLLAMA_HOST"] = f"127.0.0.1:{self.port}"
        environment["OLLAMA_MODELS"] = tools["ollama_store"]
        environment["HOME"] = self.folder
        if kind.endswith("-1"):
            environment["OLLAMA_MAX_LOADED_MODELS"] = "1"
        return [tools["ollama"], "serve"]

    def router(self, kind, environment, tools):
        preset = os.path.join(self.folder, "models.ini")
        with open(preset, "w") as out:
            out.write("version = 1\n")
            for name, (file, context) in MODELS.items():
                out.write(f"[{name}]\nmodel = {tools['models']}/{file}\nc = {context}\n")
        command = [tools["llama_server"], "--host", "127.0.0.1", "--port", str(self.port)]
        return command + ["--models-preset", preset, "--models-max", kind.split("-")[1]]

    def wait(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the server did not come up; see {self.folder}/log")

    def ask(self, request):
        """One streamed completion: outcome, seconds to the first token, tokens."""
        model, prompt, tokens = request
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        started = time.monotonic()
        first, count, ended, status = None, 0, False, 0
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            status = response.status
            if status != 200:
                text = response.read(400).decode(errors="replace")
                return ("refused" if 400 <= status < 500 or status == 503 else "failed", None, 0, f"{status} {text}")
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    ended = True
                    break
                event = json.loads(data)
                if "error" in event:
                    return "failed", first, count, str(event["error"])
                count = (event.get("usage") or {}).get("completion_tokens", count)
                choices = event.get("choices") or []
                if choices and choices[0].get("text") and first is None:
                    first = time.monotonic() - started
        except TimeoutError:
            return "hang", first, count, "no byte for 180 s"
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            return "failed", first, count, repr(error)
        finally:
            connection.close()
        if not ended:
            return "failed", first, count, "cut"
        return "ok", first, count, ""

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        self.cage.close()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def trace(seed, requests):
    """Which model is asked what, in order: mostly short prompts, one in eight fills what its model reserves."""
    rng = random.Random(seed)
    made = []
    for n in range(requests):
        model = rng.choice(list(MODELS))
        context = MODELS[model][1]
        # The words are one token each with all three tokenizers; the long prompts of the long contexts are a quarter
        # of them, or a run would take an hour of prefill.
        length = int(context * (0.85 if context <= 2048 else 0.2)) if n % 8 == 7 else rng.randint(10, 120)
        prompt = " ".join(rng.choice(WORDS) for _ in range(length))
        made.append((model, prompt, rng.randint(8, 48)))
    return made


def run(kind, limit, seed, arguments, tools):
    server = Server(kind, limit, tools)
    requests = trace(seed, arguments.requests)
    outcomes = [None] * len(requests)
    lock, next_request = threading.Lock(), iter(range(len(requests)))

    def client():
        while True:
            with lock:
                index = next(next_request, None)
            if index is None:
                return
            outcomes[index] = server.ask(requests[index])

    started = time.monotonic()
    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    took = time.monotonic() - started
    row = {
        "server": kind,
        "limit": limit // MIB,
        "seed": seed,
        "kills": server.cage.kills(),
        "peak": server.cage.peak / MIB,
        "tight": server.cage.tight,
        "faults": server.cage.major_faults(),
        "took": took,
    }
    if arguments.keep_logs:
        shutil.copy(os.path.join(server.folder, "log"), f"{arguments.keep_logs}/{kind}-{limit // MIB}-{seed}.log")
    server.close()
    first = sorted(outcome[1] for outcome in outcomes if outcome[0] == "ok" and outcome[1] is not None)
    at = lambda share: first[min(len(first) - 1, int(share * len(first)))] if first else float("nan")
    tokens = sum(outcome[2] for outcome in outcomes if outcome[0] == "ok")
    count = lambda what: sum(outcome[0] == what for outcome in outcomes)
    row.update(
        ok=count("ok"), refused=count("refused"), hangs=count("hang"), p50=at(0.5), p95=at(0.95), rate=tokens / took
    )
    row["lost"] = lost(kind, limit, [(r, o) for r, o in zip(requests, outcomes) if o[0] != "ok"], tools, row)
    return row


def lost(kind, limit, failed, tools, row):
    """How many of these the same server answers alone, under the same limit."""
    servable = 0
    for request, outcome in failed:
        server = Server(kind, limit, tools)
        alone = server.ask(request)
        server.close()
        servable += alone[0] == "ok"
        print(
            f"    {kind} {limit // MIB} MiB: {request[0]} {outcome[0]} ({outcome[3][:160]}); alone {alone[0]}",
            file=sys.stderr,
        )
        row["refused"] -= alone[0] == "ok" and outcome[0] == "refused"
    return servable


def make_ollama_store(tools):
    """Imports the three files into a store, outside of any cage."""
    store = os.path.join(CACHE, "cage-store")
    tools["ollama_store"] = store
    marker = os.path.join(store, "made")
    if os.path.exists(marker):
        return
    port = free_port()
    environment = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": store}
    server = subprocess.Popen([tools["ollama"], "serve"], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        for name, (file, context) in MODELS.items():
            with tempfile.NamedTemporaryFile("w", suffix=".Modelfile") as modelfile:
                modelfile.write(f"FROM {tools['models']}/{file}\nPARAMETER num_ctx {context}\n")
                modelfile.flush()
                command = [tools["ollama"], "create", name, "-f", modelfile.name]
                subprocess.run(command, env=environment, check=True, capture_output=True)
        open(marker, "w").close()
    finally:
        server.terminate()
        server.wait()


COLUMNS = "server limit seed ok lost refused hangs kills peak tight faults p50 p95 rate took".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", default="560,760,1400", help="MiB, separated by commas")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--servers", default="sarai,ollama-3,ollama-1,router-3,router-1")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--sarai", default=os.path.join(CACHE, "target/release/sarai"))
    parser.add_argument("--ollama", default=os.environ.get("SARAI_OLLAMA"))
    parser.add_argument("--llama-server", default=os.environ.get("LLAMA_SERVER"), help="see docs/memory.md for one")
    parser.add_argument("--keep-logs", help="a folder for the servers' logs")
    parser.add_argument("--json", help="a file for the rows")
    arguments = parser.parse_args()
    tools = {
        "sarai": arguments.sarai,
        "ollama": arguments.ollama,
        "llama_server": arguments.llama_server,
        "models": os.environ.get("SARAI_MODELS", os.path.join(CACHE, "models")),
    }
    servers = arguments.servers.split(",")
    for kind, tool in (("ollama", "ollama"), ("router", "llama_server")):
        if not tools[tool] and any(server.startswith(kind) for server in servers):
            print(f"LEFT OUT: {kind}, for want of --{tool.replace('_', '-')}", file=sys.stderr)
            servers = [server for server in servers if not server.startswith(kind)]
    if tools["ollama"]:
        make_ollama_store(tools)
    print(
        "MiB, seconds, tokens/s; lost: servable requests that were not answered; refused: honest ones that were not servable"
    )
    print(" ".join(f"{column:>8}" for column in COLUMNS), flush=True)
    rows = []
    for limit in (int(limit) * MIB for limit in arguments.limits.split(",")):
        for seed in (int(seed) for seed in arguments.seeds.split(",")):
            for kind in servers:
                row = run(kind, limit, seed, arguments, tools)
                rows.append(row)
                cells = [row[column] for column in COLUMNS]
                print(
                    " ".join(f"{cell:8.2f}" if isinstance(cell, float) else f"{cell:>8}" for cell in cells), flush=True
                )
    if arguments.json:
        with open(arguments.json, "w") as out:
            json.dump(rows, out, indent=1)
    sys.exit(not compare(rows))


def mean(rows, column):
    return sum(row[column] for row in rows) / len(rows)


def compare(rows):
    """Means over the seeds at each limit, sarai beside the best peer that lost nothing; whether all targets are met."""
    met = True
    for limit in sorted({row["limit"] for row in rows}):
        by = {}
        for row in rows:
            if row["limit"] == limit:
                by.setdefault(row["server"], []).append(row)
        harm = lambda rows: sum(row["kills"] + row["lost"] + row["hangs"] for row in rows)
        ours = by.pop("sarai", [])
        sound = {name: rows for name, rows in by.items() if not harm(rows)}
        if not ours:
            continue
        met &= not harm(ours)
        print(f"{limit} MiB: sarai lost, killed or hung {harm(ours)}; sound peers: {', '.join(sound) or 'none'}")
        for column, is_better in (("rate", max), ("p50", min), ("p95", min), ("faults", min)):
            if sound:
                name = is_better(sound, key=lambda name: mean(sound[name], column))
                value, best = mean(ours, column), mean(sound[name], column)
                is_met = value == is_better(value, best)
                met &= is_met
                print(f"  {column:6} {value:8.2f} against {best:8.2f} of {name}: {'met' if is_met else 'NOT MET'}")
    return met


if __name__ == "__main__":
    main()
