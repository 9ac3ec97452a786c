"""Serve Qwen2.5-Omni by OpenAI's chat API: text, images, audio and video in, text and speech out.

    python omni_server.py MODEL [--port 8000] [--device cpu] [--name NAME] [--http]

`transformers serve` serves the same models but answers in text only. Here a request with
`"modalities": ["text", "audio"], "audio": {"voice": ..., "format": "wav"}` is answered in speech,
and image_url, input_audio and video_url (with its sound) may all be data URLs.
GET /health, GET /v1/models, POST /v1/chat/completions; one answer is made at a time.
Needs transformers, torch, torchvision, pillow and av.
"""
import argparse
import base64
import io
import json
import pathlib
import threading
import time
import urllib.request
import uuid
import wave
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import PIL.Image
import torch
from transformers import Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniProcessor, TextStreamer

FRAMES_PER_SECOND = 2.0  # of a video, as the model was trained
MOST_FRAMES, MOST_SIDE = 768, 768  # of a video: all of them are in memory at once
SPEECH_RATE, SPEECH_TOKENS_PER_SECOND = 24000, 50  # of what the vocoder makes, and what it makes it from
# The system message that the published model was trained to speak with.
SPEAKER = """You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, \
capable of perceiving auditory and visual inputs, as well as generating text and speech."""
LINKS = {"http": False}  # Whether links are followed: also to servers that only this machine reaches.
UNSUPPORTED = ("tools", "functions", "stop", "logprobs", "response_format", "logit_bias")


def fetch(url):
    if not url.startswith(("data:", "http://", "https://") if LINKS["http"] else "data:"):
        raise ValueError("only data: URLs are read" + ("" if LINKS["http"] else "; with --http, http: and https: too"))
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def read_audio(data, rate):
    """The first sound track of a file, as one channel of floats."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    with av.open(io.BytesIO(data)) as file:
        frames = [part for frame in file.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([part.to_ndarray()[0] for part in frames + resampler.resample(None)])


def read_video(data, rate):
    """The frames of a video at FRAMES_PER_SECOND, and its sound or None."""
    frames = []
    with av.open(io.BytesIO(data)) as file:
        has_sound = bool(file.streams.audio)
        for frame in file.decode(video=0):
            if frame.time >= len(frames) / FRAMES_PER_SECOND:
                if len(frames) == MOST_FRAMES:
                    raise ValueError(f"a video has {MOST_FRAMES / FRAMES_PER_SECOND:.0f} seconds at most")
                scale = min(1, MOST_SIDE / max(frame.width, frame.height))
                size = [max(2, int(side * scale)) for side in (frame.width, frame.height)]
                frames.append(frame.reformat(*size, format="rgb24").to_ndarray())
    return np.stack(frames), read_audio(data, rate) if has_sound else None


def to_wav(samples):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, SPEECH_RATE, 0, "NONE", ""))
        file.writeframes(samples)
    return buffer.getvalue()


class Omni:
    def __init__(self, model, device, max_speech_seconds):
        self.processor = Qwen2_5OmniProcessor.from_pretrained(model)
        self.model = Qwen2_5OmniForConditionalGeneration.from_pretrained(model, dtype="auto").to(device).eval()
        generation = self.model.generation_config  # the folder's; what it leaves open is in the thinker's
        generation.update(**self.model.thinker.generation_config.to_dict(), defaults_only=True)
        self.model.thinker.generation_config = generation
        self.speech_tokens = int(max_speech_seconds * SPEECH_TOKENS_PER_SECOND)
        self.lock = threading.Lock()

    def read(self, messages):
        """What the model takes, of a chat's text and media."""
        rate = self.processor.feature_extractor.sampling_rate
        chat, images, videos, sounds = [], [], [], []  # sounds: (number of its video or None, samples)
        for message in messages:
            turn = {"role": message["role"], "content": []}
            content = message.get("content") or ""
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                kind = part["type"]
                if kind == "text":
                    turn["content"].append(part)
                    continue
                if kind == "image_url":
                    images.append(PIL.Image.open(io.BytesIO(fetch(part[kind]["url"]))).convert("RGB"))
                elif kind == "input_audio":
                    sounds.append((None, read_audio(base64.b64decode(part[kind]["data"]), rate)))
                elif kind == "video_url":
                    frames, sound = read_video(fetch(part[kind]["url"]), rate)
                    sounds.append((len(videos), sound))
                    videos.append(frames)
                else:
                    raise ValueError(f"content of type {kind} is not supported")
                turn["content"].append({"type": kind.removesuffix("_url").removeprefix("input_")})
            chat.append(turn)
        # The model hears all of the videos or none.
        hears = bool(videos) and all(sound is not None for _, sound in sounds)
        sounds = [(video, sound) for video, sound in sounds if video is None or hears]
        inputs = self.processor(
            text=self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
            images=images or None, videos=videos or None, audio=[sound for _, sound in sounds] or None,
            audio_from_video_indices=[video for video, _ in sounds], load_audio_from_video=hears,
            fps=FRAMES_PER_SECOND, return_tensors="pt",
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        # Pictures are for the thinker alone: generate() would give them to the talker too, which refuses them.
        inputs = {("thinker_" if "pixel" in name else "") + name: value for name, value in inputs.items()}
        return {**inputs, "use_audio_in_video": hears}

    def answer(self, request, speaks, on_text):
        """Text, speech (16-bit samples, or None), why it ended, and the tokens used."""
        if unsupported := [name for name in UNSUPPORTED if request.get(name)]:
            raise ValueError(f"not supported: {', '.join(unsupported)}")
        messages = request["messages"]
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or 1024
        options = {"thinker_max_new_tokens": limit, "generation_mode": None if speaks else "text"}
        if speaks:
            voices = list(self.model.speaker_map)
            options["speaker"] = (request.get("audio") or {}).get("voice") or voices[0]
            if options["speaker"] not in voices:
                raise ValueError(f"audio.voice is one of {', '.join(voices)}")
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": SPEAKER}, *messages]
            # The talker fails on an answer of one token.
            options.update(thinker_max_new_tokens=max(limit, 2), thinker_min_new_tokens=2)
            options["talker_max_new_tokens"] = self.speech_tokens
        if (temperature := request.get("temperature")) is not None:
            options["thinker_do_sample"] = temperature > 0
            options["thinker_temperature"] = temperature or None
        if request.get("top_p") is not None:
            options["thinker_top_p"] = request["top_p"]
        if on_text:
            streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: text and on_text(text)
            options["thinker_streamer"] = streamer
        inputs = self.read(messages)
        with self.lock:
            if request.get("seed") is not None:
                torch.manual_seed(request["seed"])
            result = self.model.generate(**inputs, **options)
        ids, speech = result if speaks else (result, None)
        prompt, total = inputs["input_ids"].shape[1], ids.shape[1]
        ended = int(ids[0, -1]) in np.ravel(self.model.generation_config.eos_token_id)
        used = {"prompt_tokens": prompt, "completion_tokens": total - prompt, "total_tokens": total}
        if speaks:
            speech = (speech.clamp(-1, 1) * 32767).short().cpu().numpy().tobytes()
        text = self.processor.decode(ids[0, prompt:], skip_special_tokens=True)
        return text, speech, "stop" if ended else "length", used


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    streaming = False

    def do_GET(self):
        known = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        pages = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [known]}}
        self.reply(200, pages[self.path]) if self.path in pages else self.fail(404, "no such path")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/v1/chat/completions":
            return self.fail(404, "no such path")
        self.streaming = False
        try:
            self.complete(json.loads(body))
        except ConnectionError:  # the client is gone
            self.close_connection = True
        except (LookupError, TypeError, ValueError, OSError, av.FFmpegError) as error:
            self.fail(400, f"{type(error).__name__}: {error}")
        except Exception as error:
            self.fail(500, f"{type(error).__name__}: {error}")
            raise

    def complete(self, request):
        streams, speaks = bool(request.get("stream")), "audio" in (request.get("modalities") or [])
        form = (request.get("audio") or {}).get("format") or "wav"
        if speaks and form not in (["pcm16"] if streams else ["wav", "pcm16"]):
            raise ValueError(f"audio.format is {'pcm16 in a stream' if streams else 'wav or pcm16'}")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        audio = {"id": f"audio_{uuid.uuid4().hex}"}
        encode = lambda data: base64.b64encode(data).decode()

        def send(delta, reason=None):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            self.event({**head, "object": "chat.completion.chunk", "choices": [choice]})

        def on_text(text):
            send({"audio": {**audio, "transcript": text}} if speaks else {"content": text})

        text, speech, reason, used = self.omni.answer(request, speaks, on_text if streams else None)
        expires = int(time.time()) + 3600
        if streams:
            for start in range(0, len(speech or b""), SPEECH_RATE):  # half a second of 16-bit samples
                send({"audio": {**audio, "data": encode(speech[start : start + SPEECH_RATE])}})
            send({"audio": {**audio, "expires_at": expires}} if speaks else {}, reason)
            if (request.get("stream_options") or {}).get("include_usage"):
                self.event({**head, "object": "chat.completion.chunk", "choices": [], "usage": used})
            return self.event(None)
        message = {"role": "assistant", "content": None if speaks else text}
        if speaks:
            data = encode(to_wav(speech) if form == "wav" else speech)
            message["audio"] = {**audio, "data": data, "transcript": text, "expires_at": expires}
        choice = {"index": 0, "message": message, "finish_reason": reason}
        self.reply(200, {**head, "object": "chat.completion", "choices": [choice], "usage": used})

    def event(self, body):
        """One event of a stream, or for None its end."""
        if not self.streaming:
            self.streaming = True
            self.start(200, "text/event-stream", ("Transfer-Encoding", "chunked"))
        data = f"data: {'[DONE]' if body is None else json.dumps(body)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n%s" % (len(data), data, b"0\r\n\r\n" if body is None else b""))

    def start(self, status, kind, header):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header(*header)
        self.end_headers()

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.start(status, "application/json", ("Content-Length", str(len(data))))
        self.wfile.write(data)

    def fail(self, status, message):
        error = {"error": {"message": message, "type": "server_error" if status == 500 else "invalid_request_error"}}
        self.close_connection = True
        self.event(error) if self.streaming else self.reply(status, error)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="what clients see (default: the last part of MODEL)")
    parser.add_argument("--max-speech-seconds", type=float, default=80)
    parser.add_argument("--http", action="store_true", help="follow http and https links, wherever they lead")
    args = parser.parse_args()
    LINKS["http"] = args.http
    Handler.name = args.name or pathlib.PurePath(args.model).name
    Handler.omni = Omni(args.model, args.device, args.max_speech_seconds)
    server = ThreadingHTTPServer((args.host, args.port), Handler)
    print(f"serving {Handler.name} on http://{args.host}:{server.server_port}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
