#!/usr/bin/env python3
"""A real Ollama killed with -9 before a request, while it loads, and in mid-stream, and started again: `make bench-failover`.

Prints, per phase and over several rounds, whether the request was served and by whom, how long after the kill its next
text came, and how long after the restart the host is used again, without traffic. The fallback is a local file that is
loaded or not when the kill comes. Then, at a host of this script's: how long after a client has left the host is told.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

from ports import free_port

ROUNDS = 3
CACHE = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
MODEL = os.path.join(CACHE, "models", "smollm2-135m-instruct-q4_1.gguf")


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


def until(what, is_so, seconds=60):
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if is_so():
                return time.monotonic() - began
        except OSError:
            pass
        time.sleep(0.005)
    sys.exit(f"never came: {what}")


class Ollama:
    def __init__(self, folder):
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{self.port}", "OLLAMA_MODELS": f"{folder}/m", "HOME": folder}
        self.start()
        with open(f"{folder}/Modelfile", "w") as file:
            file.write(f"FROM {MODEL}\n")
        command = [os.environ["SARAI_OLLAMA"], "create", "solar", "-f", f"{folder}/Modelfile"]
        subprocess.run(command, env=self.env, check=True, capture_output=True)

    def start(self):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        command = [os.environ["SARAI_OLLAMA"], "serve"]
        self.process = subprocess.Popen(command, env=self.env, start_new_session=True, **silent)
        until("ollama", lambda: get(f"{self.url}/api/version"))

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def stream(url, on_text=lambda n: None):
    """Texts with their times, who served, and the last event that names who went on."""
    body = {"model": "solar", "stream": True, "max_tokens": 120, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "Write a long story about a river."}]
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    times, resumed, ended = [], None, False
    with urllib.request.urlopen(request, timeout=300) as answer:
        by = answer.headers["x-sarai-served-by"]
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                ended |= line.startswith(b"data: [DONE]")
                continue
            event = json.loads(line[6:])
            resumed = event.get("sarai", {}).get("resumed", resumed)
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                times.append(time.monotonic())
                on_text(len(times))
    return times, by, resumed, ended


def round_of(phase, url, ollama):
    killed = []

    def kill():
        ollama.kill()
        killed.append(time.monotonic())

    if phase == "before":
        kill()
        times, by, resumed, ended = stream(url)
    elif phase == "during load":
        # A fresh host has nothing loaded.
        def wait_and_kill():
            children = f"/proc/{ollama.process.pid}/task"
            until("a runner", lambda: any(open(f"{children}/{task}/children").read() for task in os.listdir(children)))
            kill()

        thread = threading.Thread(target=wait_and_kill)
        thread.start()
        times, by, resumed, ended = stream(url)
        thread.join()
    else:
        times, by, resumed, ended = stream(url, lambda n: kill() if n == 20 else None)
    after = next((at - killed[0] for at in times if at > killed[0] + 0.001), None)
    ollama.start()
    closed = lambda: get(f"{url}/api/ps")["sarai"]["models"][0]["deployments"][0]["breaker"] == "closed"
    recovery = until("recovery", closed)
    return ended, by, bool(resumed), after, recovery


class Started:
    """A server with this configuration."""

    def __init__(self, config, folder):
        port = free_port()
        with open(f"{folder}/sarai.yaml", "w") as file:
            file.write(config)
        command = [sys.argv[1], "serve", "--listen", f"127.0.0.1:{port}", "--config", f"{folder}/sarai.yaml"]
        env = {**os.environ, "SARAI_STATE_DIR": f"{folder}/state"}
        self.server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.port, self.url = port, f"http://127.0.0.1:{port}"

    def __enter__(self):
        until("sarai", lambda: get(f"{self.url}/health") is not None)
        return self

    def __exit__(self, *_):
        self.server.terminate()
        self.server.wait()


LEAVES = 50


def cancellation():
    """A client that leaves before any header came, or in mid-stream: how long until its host sees it."""
    listener, asked, told = socket.create_server(("127.0.0.1", 0)), threading.Semaphore(0), []
    begins = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n"
    line = json.dumps({"message": {"role": "assistant", "content": "word "}, "done": False}).encode() + b"\n"

    def answer(connection):
        head = connection.recv(65536)
        if b"POST" not in head[:8]:
            return connection.close()
        if streams:
            connection.sendall(begins + line)
        asked.release()
        while connection.recv(65536):
            pass
        told.append(time.monotonic())
        heard.release()

    def serve():
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    streams, heard = False, threading.Semaphore(0)
    threading.Thread(target=serve, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        config = f"models:\n  solar: {{ backend: ollama_http, url: \"http://127.0.0.1:{listener.getsockname()[1]}\", model_name: m }}\n"
        with Started(config, folder) as sarai:
            body = json.dumps({"model": "solar", "stream": True, "messages": [{"role": "user", "content": "Hi."}]}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            for name in ("before any header", "in mid-stream"):
                streams, times = name == "in mid-stream", []
                for _ in range(LEAVES):
                    with socket.create_connection(("127.0.0.1", sarai.port)) as client:
                        client.sendall(head + body)
                        asked.acquire()
                        while streams and b"word" not in client.recv(65536):
                            pass
                        left = time.monotonic()
                    heard.acquire()
                    times.append(1000 * (told[-1] - left))
                times.sort()
                spread = f"median {statistics.median(times):.1f} ms, longest {times[-1]:.1f} ms"
                print(f"a client leaves {name:<18} its host is told after: {spread} ({LEAVES} times)", flush=True)


def main():
    cancellation()
    for state in ("not loaded", "resident"):
        for phase in ("before", "during load", "mid-stream"):
            rows = []
            for _ in range(ROUNDS):
                with tempfile.TemporaryDirectory() as folder:
                    ollama = Ollama(folder)
                    kept = "\n    resident: true" if state == "resident" else ""
                    config = (
                        f"models:\n  solar:\n    backend: ollama_http\n    fallback: gguf_native\n    url: {ollama.url}\n"
                        f"    gguf_path: {MODEL}\n    context_length: 2048{kept}\n"
                    )
                    try:
                        with Started(config, folder) as sarai:
                            until("the worker", lambda: not kept or get(f"{sarai.url}/api/ps")["sarai"]["workers"])
                            rows.append(round_of(phase, sarai.url, ollama))
                    finally:
                        ollama.kill()
            ended, by, resumed, after, recovery = zip(*rows)
            medians = f"next text after {statistics.median(after):.2f} s   host used again {statistics.median(recovery):.2f} s after its restart"
            print(f"killed {phase:<12} fallback {state:<10}  {sum(ended)}/{len(rows)} served, {sum(resumed)} resumed   {medians}", flush=True)


main()
