#!/usr/bin/env python3
"""Plan, dry run and measure of every model that is here, over a grid of settings: `make bench-memory`.

Each row starts a real worker, fills the context of every sequence, and reads what the process then holds. The columns
are MiB: what was planned, what llama.cpp's dry run says, what was measured, and the error of the plan's total. A plan
may not be under by more than 2 % or over by more than 5 %, except where the last column says why. Ends with 1 if one is.
"""

import argparse
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading

MIB = 1 << 20
UNDER, OVER = 2.0, 5.0
PARTS = ["weights mapped", "weights repacked", "kv", "state", "compute"]


class Worker:
    """A worker process, spoken to in its own frames."""

    def __init__(self, binary, path, settings, idle):
        ours, theirs = socket.socketpair()
        command = [binary, "worker", "llama", "bench"]
        self.process = subprocess.Popen(command, stdin=theirs, stderr=subprocess.DEVNULL)
        theirs.close()
        self.socket = ours
        spec = {
            "model": "bench",
            "path": path,
            "context_tokens": settings["ctx"],
            "parallel": settings["parallel"],
            "ubatch_tokens": 256,
            "threads": os.cpu_count(),
            "kv": settings["kv"],
            "flash_attention": settings["flash_attn"] == "on",
            "repack": settings["repack"] == "on",
            "idle": idle,
        }
        self.send({"load": spec})
        self.loaded = self.receive()

    def send(self, frame):
        body = json.dumps(frame).encode()
        self.socket.sendall(struct.pack("<I", len(body)) + body)

    def exactly(self, count):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError("the worker ended")
            data += piece
        return data

    def receive(self):
        return json.loads(self.exactly(struct.unpack("<I", self.exactly(4))[0]))

    def generate(self, identity, prompt, context_tokens):
        sampling = dict.fromkeys(
            "temperature top_p top_k min_p typical_p seed repeat_penalty repeat_last_n presence_penalty"
            " frequency_penalty".split()
        )
        request = {
            "prompt": {"raw": prompt},
            "sampling": {**sampling, "logit_bias": []},
            "stop": [],
            "max_tokens": 8,
            "format": "text",
        }
        frame = {"id": identity, "context_tokens": context_tokens, "request": request}
        self.send({"generate": frame})

    def fill(self, settings):
        """Fills every sequence; returns the tokens of the longest prompt."""
        words = 16
        while True:
            size = self.ask(" ".join(itertools.islice(self.words(0), words)), 1 << 20)
            if size.get("failed") or words > settings["ctx"]:
                break
            per_word = size["done"]["usage"]["prompt_tokens"] / words
            if words > 32:
                break
            words *= 4
        target = int(settings["ctx"] * 0.97 / per_word)
        while True:
            longest, overflow = self.fill_with(target, settings)
            if not overflow:
                return longest
            # Words of other seeds have more tokens.
            target = int(target * 0.97 * settings["ctx"] / overflow)

    def fill_with(self, words, settings):
        """Prompts of so many words at once; returns the longest in tokens, and the tokens of one that was too long."""
        for n in range(1, settings["parallel"] + 1):
            prompt = " ".join(itertools.islice(self.words(n), words))
            self.generate(100 + n, prompt, settings["ctx"])
        waiting, longest, overflow = settings["parallel"], 0, 0
        while waiting:
            frame = self.receive()
            if "failed" in frame:
                error = frame["failed"]["error"]
                if "context_overflow" not in error:
                    raise RuntimeError(error)
                overflow = max(overflow, error["context_overflow"]["prompt_tokens"])
                waiting -= 1
                continue
            event = frame["event"]["event"]
            if "done" in event:
                waiting -= 1
                longest = max(longest, event["done"]["usage"]["prompt_tokens"])
        return longest, overflow

    @staticmethod
    def words(seed):
        """Words without end that differ, so that many rows of the embeddings are used."""
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        state = 12345 + seed * 7919
        while True:
            word = ""
            for _ in range(3 + state % 5):
                state = (state * 1103515245 + 12345) & 0x7FFFFFFF
                word += letters[(state >> 16) % 26]
            yield word

    def ask(self, prompt, context_tokens):
        self.generate(1, prompt, context_tokens)
        while True:
            frame = self.receive()
            if "failed" in frame:
                return frame
            if "done" in frame["event"]["event"]:
                return frame["event"]["event"]

    def memory(self):
        fields = {}
        with open(f"/proc/{self.process.pid}/smaps_rollup") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name in ("Anonymous", "Pss_File"):
                    fields[name] = int(value.split()[0]) / 1024
        return fields["Anonymous"], fields["Pss_File"]

    def close(self):
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def planned(binary, path, settings):
    command = [binary, "plan", path, "--json", "--probe", "--ctx", str(settings["ctx"])]
    command += ["--parallel", str(settings["parallel"]), "--kv", settings["kv"]]
    command += ["--repack", settings["repack"], "--flash-attn", settings["flash_attn"]]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]
    parts = {part["name"]: part["bytes"] / MIB for part in plan["parts"]}
    probe = plan["probe"]
    if "failed" in probe:
        raise RuntimeError(probe["failed"])
    return parts, {name: value / MIB for name, value in probe.items()}, plan["idle_pieces"]


def grid(quick):
    base = {"ctx": 2048, "parallel": 1, "kv": "f16", "repack": "on", "flash_attn": "on"}
    changes = [{}, {"ctx": 512}, {"parallel": 4}, {"kv": "q8_0"}, {"kv": "q4_0"}, {"repack": "off"}]
    if not quick:
        changes += [{"ctx": 8192}, {"flash_attn": "off"}, {"ctx": 4096, "parallel": 2, "kv": "q8_0", "repack": "off"}]
    return [{**base, **change} for change in changes]


def why(name, error, parts, file, anonymous):
    """Why an error outside the bounds is no fault of the plan, if it is none."""
    untouched = parts["weights mapped"] + parts["binary"] - file
    total = sum(parts.values())
    own = total - parts["weights mapped"] - parts["binary"]
    if error > OVER and untouched / total * 100 > error - OVER:
        return f"{untouched:.0f} MiB of embeddings were not looked up"
    if error > OVER and total < 120 and own - anonymous < 6:
        return "less than 6 MiB, of a file made small"
    return ""


def main():
    cache = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--binary", default=os.path.join(cache, "target/release/sarai"))
    parser.add_argument("--quick", action="store_true", help="a smaller grid")
    arguments = parser.parse_args()
    columns = ["weights", "repack", "kv+state", "compute", "other", "total"]
    print(
        f"{'model':<22} {'settings':<26}",
        *(f"{c:>17}" for c in columns),
        f"{'anon':>13} {'file':>13} {'error':>7}  why",
    )
    bad = 0
    for path in arguments.files:
        for settings in grid(arguments.quick):
            name = os.path.basename(path).removesuffix(".gguf").removesuffix("-MIX")[:22]
            label = "{ctx}x{parallel} {kv} repack={repack} fa={flash_attn}".format(**settings)
            try:
                parts, probe, idle = planned(arguments.binary, path, settings)
            except RuntimeError as reason:
                print(f"{name:<22} {label:<26} llama.cpp does not allow it: {str(reason)[:80]}")
                continue
            worker = Worker(arguments.binary, path, settings, idle)
            watchdog = threading.Timer(600, worker.process.kill)
            watchdog.start()
            try:
                worker.fill(settings)
                anonymous, file = worker.memory()
            finally:
                watchdog.cancel()
                worker.close()
            total = sum(parts.values())
            error = (total / (anonymous + file) - 1) * 100
            reason = why(name, error, parts, file, anonymous)
            outside = not -UNDER <= error <= OVER
            bad += outside and not reason
            kv = parts.get("kv", 0) + parts.get("state", 0)
            pairs = [
                (parts.get("weights mapped", 0), probe["weights"]),
                (parts.get("weights repacked", 0), probe["repacked"]),
                (kv, probe["context"]),
                (parts.get("compute", 0), probe["compute"]),
            ]
            cells = [f"{planned:8.1f}/{probed:8.1f}" for planned, probed in pairs]
            other = sum(value for part, value in parts.items() if part not in PARTS)
            own = total - parts["weights mapped"] - parts["binary"]
            mapped = parts["weights mapped"] + parts["binary"]
            cells += [f"{other:17.1f}", f"{total:8.1f}/{anonymous + file:8.1f}"]
            print(
                f"{name:<22} {label:<26}",
                *cells,
                f"{own:6.1f}/{anonymous:6.1f} {mapped:6.1f}/{file:6.1f}",
                f"{error:+6.1f}%{' ' if not outside else '!'} {reason}",
                flush=True,
            )
    print(f"{bad} outside of -{UNDER} % to +{OVER} % without a reason; cells are planned/dry run, and planned/measured")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
