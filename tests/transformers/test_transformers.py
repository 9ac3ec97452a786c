"""A tiny Qwen2.5-Omni behind sarai: image, audio and video in, text and speech out.

    LD_LIBRARY_PATH=$(python native_libs.py) python test_transformers.py SARAI [BUILT]

Needs what requirements.txt lists. `transformers serve` and omni/omni_server.py are commands of the configuration: each is started
by the first request, admitted by what was declared for it, and ends when it is idle. The weights are random: that an input was
read shows only in an answer that is another one than for another input; and both servers must say the same to the same.
"""

import base64
import io
import json
import math
import os
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import wave

import av
import numpy as np
import PIL.Image

HERE = pathlib.Path(__file__).parent
KEEP_ALIVE_SECONDS = 3


def wav(frequency, rate=16000, seconds=1):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        samples = (int(9000 * math.sin(math.tau * frequency * i / rate)) for i in range(rate * seconds))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return buffer.getvalue()


def png(colour):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(colour, sound=False, seconds=4):
    """A bar that moves over a colour, with a tone or without sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        video = file.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        audio = file.add_stream("aac", rate=16000, layout="mono") if sound else None
        for i in range(10 * seconds):
            picture = np.full((64, 64, 3), colour, np.uint8)
            picture[:, i : i + 8] = 255
            file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(video.encode())
        if audio:
            tone = (9000 * np.sin(math.tau * 440 * np.arange(16000 * seconds) / 16000)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
            frame.sample_rate = 16000
            file.mux(audio.encode(frame))
            file.mux(audio.encode())
    return buffer.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def image(colour):
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(png(colour))}}


def audio(frequency):
    return {"type": "input_audio", "input_audio": {"data": b64(wav(frequency)), "format": "wav"}}


def video(url):
    return {"type": "video_url", "video_url": {"url": url}}


class Sarai:
    """The server with a configuration, while the block runs."""

    def __init__(self, binary, config, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        path = folder / "sarai.yaml"
        path.write_text(json.dumps(config))
        self.command = [binary, "serve", "--config", str(path), "--listen", self.url.removeprefix("http://")]

    def __enter__(self):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        while self.process.poll() is None:
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(0.05)
        self.__exit__(RuntimeError)
        sys.exit("it did not start")

    def __exit__(self, failed, *_):
        self.process.terminate()
        self.process.wait(30)
        if failed:
            self.log.seek(0)
            print(self.log.read()[-8000:])

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return json.load(response)

    def until(self, what, is_so, seconds=60):
        deadline = time.time() + seconds
        while not is_so(self.get(PS)):
            assert time.time() < deadline, f"{what}: not within {seconds} s"
            time.sleep(0.1)

    def post(self, body):
        """The status and the body, of which a stream gives the list of its events."""
        request = urllib.request.Request(self.url + "/v1/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                data, status = response.read().decode(), response.status
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        if body.get("stream"):
            return status, [line[6:] for line in data.split("\n\n") if line.startswith("data: ")]
        return status, json.loads(data)

    def chat(self, model, *parts, **options):
        began = time.time()
        content = [*parts, {"type": "text", "text": "What is this?"}]
        result = self.post({"model": model, "messages": [{"role": "user", "content": content}], **options})
        print(f"  {model:9} {'+'.join([part['type'] for part in parts] + list(options)):45} {time.time() - began:6.2f} s")
        return result

    def text(self, model, *parts, **options):
        status, answer = self.chat(model, *parts, temperature=0, **options)
        assert status == 200, (status, answer)
        assert answer["usage"]["completion_tokens"] > 0 and answer["sarai"]["served_by"] == f"{model}@process", answer
        return answer["choices"][0]["message"]["content"]


# What GET of it tells: workers with their memory.
PS = "/api/ps"


def common(sarai, model):
    """What both servers do; gives their answers."""
    inputs = [[], [image("red")], [image("blue")], [audio(440)], [audio(880)], [image("red"), audio(440)]]
    answers = [sarai.text(model, *parts) for parts in inputs]
    assert len(set(answers)) == len(answers) and all(answers), answers
    status, events = sarai.chat(model, image("red"), temperature=0, stream=True)
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert status == 200 and "".join(deltas) == answers[1] and sum(map(bool, deltas)) > 1, deltas
    assert events[-1] == "[DONE]", events[-1]
    return answers


def of_transformers(sarai, folder):
    answers = common(sarai, "text")
    # It reads videos from files of its machine, not from data URLs.
    answers += [sarai.text("text", video(str(file))) for file in sorted(folder.glob("*.mp4"))]
    assert len(set(answers)) == len(answers), answers
    return answers


def of_omni_server(sarai, folder):
    answers = common(sarai, "speech")
    clips = {file.stem: "data:video/mp4;base64," + b64(file.read_bytes()) for file in folder.glob("*.mp4")}
    answers += [sarai.text("speech", video(clips[name])) for name in sorted(clips)]
    answers += [sarai.text("speech", image("red"), audio(440), video(clips["sound"]))]
    assert len(set(answers)) == len(answers), answers
    status, answer = sarai.chat("speech", max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length", answer

    speech = {"modalities": ["text", "audio"], "temperature": 0, "seed": 1}
    for parts in ([], [image("red")], [audio(440)], [video(clips["sound"])]):
        status, answer = sarai.chat("speech", *parts, **speech, audio={"voice": "Chelsie", "format": "wav"})
        assert status == 200, answer
        said = answer["choices"][0]["message"]["audio"]
        assert said["id"] and said["transcript"] and said["expires_at"] > time.time(), said
        with wave.open(io.BytesIO(base64.b64decode(said["data"]))) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
            samples = file.readframes(file.getnframes())
        assert len(samples) >= 2400 and np.frombuffer(samples, np.int16).std() > 100, "silence"
    form = {"voice": "Chelsie", "format": "pcm16"}
    status, events = sarai.chat("speech", video(clips["sound"]), **speech, audio=form, stream=True)
    assert status == 200 and events.pop() == "[DONE]", events
    chunks = [json.loads(event) for event in events]
    deltas = [chunk["choices"][0]["delta"].get("audio", {}) for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("transcript", "") for delta in deltas) == said["transcript"]
    assert b"".join(base64.b64decode(delta.get("data", "")) for delta in deltas) == samples
    for wrong in ({"audio": {"voice": "nobody", "format": "wav"}}, {"stop": ["x"]}):
        status, answer = sarai.chat("speech", **speech | wrong)
        assert status == 400, (status, answer)
    return answers


def main(binary, built=None):
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        model = pathlib.Path(built) if built else folder / "tiny-omni"
        if not built:
            subprocess.run([python, HERE / "build_tiny_omni.py", model], check=True)
        for name, sound in (("green", False), ("red", False), ("sound", True)):
            (folder / f"{name}.mp4").write_bytes(mp4((20, 200, 30) if name == "green" else (200, 20, 30), sound))
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
        shared = {"backend": "process", "memory_gb": 1.5, "keep_alive": f"{KEEP_ALIVE_SECONDS}s", "env": env}
        serve = [str(pathlib.Path(python).with_name("transformers")), "serve", str(model), "--device", "cpu", "--port", "${PORT}"]
        omni = [python, str(HERE.parent.parent / "omni" / "omni_server.py"), str(model), "--device", "cpu"]
        omni += ["--max-speech-seconds", "1", "--port", "${PORT}"]
        config = {
            "server": {"state_dir": str(folder / "state")},
            # Not enough for both: each makes room for the other.
            "memory": {"max_ram_gb": 2.5, "strategy": "evict_lru"},
            "models": {
                "text": shared | {"command": serve, "model_name": str(model), "ready_path": "/health"},
                "speech": shared | {"command": omni},
            },
        }
        with Sarai(binary, config, folder) as sarai:
            assert sarai.get(PS)["models"] == [], "nothing runs before it is asked for"
            ours = of_transformers(sarai, folder)
            theirs = of_omni_server(sarai, folder)
            running = sarai.get(PS)["models"]
            assert [model["name"] for model in running] == ["speech"], "one made room for the other"
            megabytes = running[0]["size"] / 1e6
            print(f"  omni_server.py was measured at {megabytes:.0f} MB, and declared with 1,611")
            assert 200 < megabytes < 1611, running
            sarai.until("it ends when it is idle", lambda ps: ps["models"] == [], KEEP_ALIVE_SECONDS + 30)
        assert ours[:6] == theirs[:6], (ours[:6], theirs[:6])
        print("all as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])
