"""Small models that see and hear, of the true architectures: Gemma 3, Qwen2-VL, and Qwen2.5-Omni's pair of encoders.

    sensing_models.py -o FOLDER --template-of QWEN

FOLDER/random has random weights: what they answer means nothing, and depends on every position and value on the way to it, so
that it can be compared with llama.cpp's own server, token for token. FOLDER/fitted has weights set by hand, so that the answer
names the colour of the picture, or the pitch of the sound: encoders that pass the mean colour (or the difference of low and high
frequencies) on, even attention that carries it to the end, and words at the end of it. FOLDER/reciting has models that say the same
whatever they are asked, token for token, where no real ones are to be had: one reasons before it answers, one calls tools, in the form of
Qwen's template, one without its marks.
"""

import argparse
import os
import typing

import gguf
import numpy as np

WIDTH = 64  # Of the text model, and what projectors project to.
COLOURS = ["red", "green", "blue"]
PITCHES = ["low", "high"]
WORDS = COLOURS + PITCHES
# What the dimensions of fitted models stand for; from TEXT on, whatever text means.
COLOUR, SAID, PITCH, CONSTANT, TEXT = 0, 4, 5, 7, 8
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: reasoning stands between marks before the answer, and is left out by writing it empty. It knows a value of its own besides,
# and how hard it is to reason.
REASONING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if mood is defined %}{{ mood }}{% endif %}"
    "{% if reasoning_effort is defined %}{{ 'Effort: ' + reasoning_effort + '.' }}{% endif %}",
).replace(
    " + m['content']",
    " + ('<think>\n' + m['reasoning_content'] + '\n</think>\n\n' if m['reasoning_content'] else '') + m['content']",
)
# What reciting models say, a token each.
REASONED = ["<think>", "\nIt is", " simple", ".\n", "</think>", "\n\nForty", "-two", " it is."]
CALLED = [
    "Let me see.\n", "<tool_call>", '\n{"name": "get_weather",', ' "arguments": {"city":', ' "Os', 'lo"', "}}\n", "</tool_call>",
    "\n<tool_call>", '\n{"name": "get_time", "arguments":', ' {"city": "Ro', 'me"}}', "\n</tool_call>",
]
BARE = ['{"name":', ' "get_weather",', ' "arguments":', ' {"city":', ' "Os', 'lo"', "}}"]
# As Gemma's own, it wants roles to alternate.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if not loop.first and messages[loop.index0 - 1]['role'] == m['role'] %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{'<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def letters_of_bytes():
    """The letter that stands for each byte in vocabularies of GPT-2's kind."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def pairs():
    return [(first, second) for first in LETTERS[:8] for second in LETTERS]


def bpe():
    """A vocabulary of Qwen's kind: the tokens, the one that ends an answer, and the file's keys."""
    special = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "audio_bos", "audio_eos", "AUDIO"]
    tokens = letters_of_bytes() + [f"<|{name}|>" for name in special]
    kinds = [1] * 256 + [3] * len(special)
    joined = [first + second for first, second in pairs()]
    # Words that no text becomes: they are only answers.
    joined += [word for word in WORDS if word not in joined]
    tokens += joined
    kinds += [1] * len(joined)
    end = tokens.index("<|im_end|>")
    return tokens, end, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{first} {second}" for first, second in pairs()],
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def spm():
    """A vocabulary of Gemma's kind."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    control += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    tokens = control + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2 if token == "<unk>" else 3 for token in control] + [6] * 256
    scores = [0.0] * len(tokens)
    for text in ["\u2581", *LETTERS, *LETTERS.upper(), *"0123456789.,?!"]:
        scores.append(-1e6 - len(tokens))
        tokens.append(text)
    for first, second in pairs():
        scores.append(-float(len(tokens)))
        tokens.append(first + second)
    for word in WORDS:
        scores.append(-1e6 - len(tokens))
        tokens.append(word)
    kinds += [1] * (len(tokens) - len(kinds))
    end = tokens.index("<end_of_turn>")
    return tokens, end, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": tokens.index("<bos>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<eos>"),
        "tokenizer.ggml.eot_token_id": end,
        "tokenizer.ggml.unknown_token_id": tokens.index("<unk>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<pad>"),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": GEMMA,
    }


class File:
    """A GGUF file in the making, and where its random weights come from."""

    def __init__(self, path, architecture, seed):
        self.path = path
        self.random = np.random.default_rng(seed)
        self.writer = gguf.GGUFWriter(path + ".part", architecture)

    def keys(self, keys):
        for key, value in keys.items():
            if isinstance(value, bool):
                self.writer.add_bool(key, value)
            elif isinstance(value, str):
                self.writer.add_string(key, value)
            elif isinstance(value, list):
                self.writer.add_array(key, value)
            elif isinstance(value, float):
                self.writer.add_float32(key, value)
            else:
                self.writer.add_uint32(key, int(value))

    def single(self, name, values):
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float32))

    def half(self, name, values):
        self.writer.add_tensor(name, np.ascontiguousarray(values, np.float16))

    def any(self, *shape, spread):
        return self.random.standard_normal(shape).astype(np.float32) * spread

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        os.replace(self.path + ".part", self.path)


def reciting_model(path, seed, said, template, width=256):
    """Without attention: each token is followed by the one that the last token of a prompt, a line break, begins."""
    file = File(path, "qwen2", seed)
    tokens, end, vocabulary = bpe()
    letters = letters_of_bytes()
    first = tokens.index(letters[10])
    written = ["".join(letters[byte] for byte in token.encode()) for token in said]
    chain = [first, *range(len(tokens), len(tokens) + len(written)), end]
    vocabulary["tokenizer.ggml.tokens"] = tokens = tokens + written
    # Marks are tokens of their own, as in the models that have them.
    vocabulary["tokenizer.ggml.token_type"] += [4 if token[0] == "<" else 1 for token in said]
    vocabulary["tokenizer.chat_template"] = template
    keys = {
        "context_length": 32768, "embedding_length": width, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
    }
    file.keys({"general.type": "model", "general.name": "reciting", "general.file_type": 1})
    file.keys({f"qwen2.{key}": value for key, value in keys.items()} | vocabulary)
    embedding = file.any(len(tokens), width, spread=1.0)
    output = np.zeros((len(tokens), width), np.float32)
    for token, following in zip(chain, chain[1:]):
        output[following] = embedding[token] / 4
    file.half("token_embd.weight", embedding)
    file.single("output_norm.weight", np.ones(width))
    file.half("output.weight", output)
    for name, shape in (("attn_q", (width, width)), ("attn_k", (width // 2, width)), ("attn_v", (width // 2, width)), ("attn_output", (width, width))):
        file.half(f"blk.0.{name}.weight", np.zeros(shape))
    for name, shape in (("ffn_gate", (64, width)), ("ffn_up", (64, width)), ("ffn_down", (width, 64))):
        file.half(f"blk.0.{name}.weight", np.zeros(shape))
    for name in ("attn_norm", "ffn_norm"):
        file.single(f"blk.0.{name}.weight", np.ones(width))
    for name, size in (("q", width), ("k", width // 2), ("v", width // 2)):
        file.single(f"blk.0.attn_{name}.bias", np.zeros(size))
    file.close()


def text_model(path, architecture, seed, fitted, template=None, layers=2, heads=4, head=16, forward=96):
    file = File(path, architecture, seed)
    is_gemma = architecture == "gemma3"
    kv_heads = 1 if is_gemma else 2
    tokens, end, vocabulary = spm() if is_gemma else bpe()
    if template:
        vocabulary["tokenizer.chat_template"] = template
    keys = {
        "context_length": 32768,
        "embedding_length": WIDTH,
        "block_count": layers,
        "feed_forward_length": forward,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    }
    if is_gemma:
        keys |= {"attention.key_length": head, "attention.value_length": head, "attention.sliding_window": 512}
    else:
        keys |= {"rope.dimension_sections": [2, 3, 3, 0]}
    file.keys({"general.type": "model", "general.name": f"sensing-{architecture}", "general.file_type": 1})
    file.keys({f"{architecture}.{key}": value for key, value in keys.items()} | vocabulary)

    # Gemma multiplies embeddings of tokens itself.
    scale = 1.0 if is_gemma else 8.0
    embedding = np.zeros((len(tokens), WIDTH), np.float32)
    output = np.zeros((len(tokens), WIDTH), np.float32)
    if fitted:
        embedding[:, TEXT:] = file.any(len(tokens), WIDTH - TEXT, spread=0.05 * scale)
        output[:, TEXT:] = file.any(len(tokens), WIDTH - TEXT, spread=0.5)
        for first, words in [(COLOUR, COLOURS), (PITCH, PITCHES)]:
            for number, word in enumerate(words):
                output[tokens.index(word)] = 0
                output[tokens.index(word), first + number] = 4
        for word in WORDS:
            embedding[tokens.index(word), SAID] = 400 * scale
        for number, token in enumerate(tokens):
            if token.startswith("<") or not token.isascii() or not token.strip():
                output[number] = 0
        output[end, SAID] = 4
    else:
        embedding[:] = file.any(len(tokens), WIDTH, spread=0.125 * scale)
        output[:] = file.any(len(tokens), WIDTH, spread=0.3)
    file.half("token_embd.weight", embedding)
    file.single("output_norm.weight", np.ones(WIDTH))
    file.half("output.weight", output)
    for layer in range(layers):
        block = f"blk.{layer}."
        query = file.any(heads * head, WIDTH, spread=0.15)
        key = file.any(kv_heads * head, WIDTH, spread=0.15)
        value = file.any(kv_heads * head, WIDTH, spread=0.15)
        back = file.any(WIDTH, heads * head, spread=0.15)
        up, gate = file.any(forward, WIDTH, spread=0.12), file.any(forward, WIDTH, spread=0.12)
        down = file.any(WIDTH, forward, spread=0.12)
        if fitted:
            # Even attention: the mean of all values.
            query[:], key[:], down[:] = 0, 0, 0
            value[:, :TEXT], value[:TEXT], back[:TEXT], back[:, :TEXT] = 0, 0, 0, 0
            value *= 0.3
            back *= 0.3 if is_gemma else 6
            for sensed in (0, 1, 2, 5, 6):
                value[sensed, sensed] = 1
                back[sensed, sensed] = 20 if is_gemma else 200
            if layer > 0:
                back[:] = 0
        file.single(block + "attn_norm.weight", np.ones(WIDTH))
        file.single(block + "ffn_norm.weight", np.ones(WIDTH))
        file.half(block + "attn_q.weight", query)
        file.half(block + "attn_k.weight", key)
        file.half(block + "attn_v.weight", value)
        file.half(block + "attn_output.weight", back)
        file.half(block + "ffn_gate.weight", gate)
        file.half(block + "ffn_up.weight", up)
        file.half(block + "ffn_down.weight", down)
        if is_gemma:
            file.single(block + "attn_q_norm.weight", np.ones(head))
            file.single(block + "attn_k_norm.weight", np.ones(head))
            file.single(block + "post_attention_norm.weight", np.full(WIDTH, 4.0 if fitted else 1.0))
            file.single(block + "post_ffw_norm.weight", np.ones(WIDTH))
        else:
            for name, width in (("q", heads * head), ("k", kv_heads * head), ("v", kv_heads * head)):
                file.single(block + f"attn_{name}.bias", np.zeros(width))
    file.close()


# What pictures are normalised with before Qwen's encoders.
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PATCH, MEL = 14, 16


class Encoder(typing.NamedTuple):
    """The sizes of an encoder."""

    layers: int = 2
    size: int = 32
    forward: int = 48
    heads: int = 2


SMALL = Encoder()
# As SigLIP's base: what a picture costs does not depend on what the weights are.
LARGE = Encoder(layers=12, size=768, forward=3072, heads=12)


def contrast():
    """Of three colours, each less the mean of the two others."""
    return np.full((3, 3), -0.5) + 1.5 * np.eye(3)


def sizes(kind, epsilon, of=SMALL, width=WIDTH):
    keys = {
        "embedding_length": of.size,
        "feed_forward_length": of.forward,
        "block_count": of.layers,
        "projection_dim": width,
        "attention.head_count": of.heads,
        "attention.layer_norm_epsilon": epsilon,
    }
    return {f"clip.{kind}.{key}": value for key, value in keys.items()}


def encoder(file, letter, fitted, norm_bias=True, gate=False, key_bias=True, of=SMALL):
    """The layers of an encoder; fitted ones pass on what comes."""
    for layer in range(of.layers):
        block = f"{letter}.blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            weights = file.any(of.size, of.size, spread=0.15)
            file.half(f"{block}{name}.weight", weights * (0 if fitted and name == "attn_out" else 1))
            if key_bias or name != "attn_k":
                file.single(f"{block}{name}.bias", np.zeros(of.size))
        for name in ("ln1", "ln2"):
            file.single(f"{block}{name}.weight", np.ones(of.size))
            if norm_bias:
                file.single(f"{block}{name}.bias", np.zeros(of.size))
        for name in ("ffn_gate", "ffn_up") if gate else ("ffn_up",):
            file.half(f"{block}{name}.weight", file.any(of.forward, of.size, spread=0.15))
            file.single(f"{block}{name}.bias", np.zeros(of.forward))
        file.half(f"{block}ffn_down.weight", file.any(of.size, of.forward, spread=0.15) * (0 if fitted else 1))
        file.single(f"{block}ffn_down.bias", np.zeros(of.size))


def gemma_projector(path, seed, fitted, image=56, merged=2, of=SMALL, width=WIDTH):
    file = File(path, "clip", seed)
    file.keys({"general.type": "mmproj", "general.file_type": 1, "clip.projector_type": "gemma3"})
    file.keys({"clip.has_vision_encoder": True, "clip.use_gelu": True, "clip.vision.projector.scale_factor": merged})
    file.keys(sizes("vision", 1e-6, of, width) | {"clip.vision.image_size": image, "clip.vision.patch_size": PATCH})
    file.keys({"clip.vision.image_mean": [0.5] * 3, "clip.vision.image_std": [0.5] * 3})
    patches, bias = file.any(of.size, 3, PATCH, PATCH, spread=0.05), np.zeros(of.size)
    places = file.any((image // PATCH) ** 2, of.size, spread=0.05)
    projection = file.any(of.size, width, spread=0.3)
    if fitted:
        patches[:], places[:], projection[:] = 0, 0, 0
        for colour in range(3):
            patches[colour, colour] = 0.5 / PATCH**2
            bias[colour] = 0.5
        projection[:3, COLOUR : COLOUR + 3] = contrast() * 0.2
    file.half("v.patch_embd.weight", patches)
    file.single("v.patch_embd.bias", bias)
    file.single("v.position_embd.weight", places)
    encoder(file, "v", fitted, of=of)
    if not fitted:
        file.single("v.post_ln.weight", np.ones(of.size))
        file.single("v.post_ln.bias", np.zeros(of.size))
    file.half("mm.input_projection.weight", projection)
    file.single("mm.soft_emb_norm.weight", np.ones(of.size))
    file.close()


def qwen_vision(file, fitted, has_windows):
    file.keys(sizes("vision", 1e-6) | {"clip.vision.image_size": 112, "clip.vision.patch_size": PATCH})
    file.keys({"clip.vision.image_mean": MEAN, "clip.vision.image_std": DEVIATION})
    merged = 4 * SMALL.size
    kernels = [file.any(SMALL.size, 3, PATCH, PATCH, spread=0.05) for _ in range(2)]
    first, first_bias = file.any(merged, merged, spread=0.1), np.zeros(merged)
    second, second_bias = file.any(WIDTH, merged, spread=0.1), np.zeros(WIDTH)
    if fitted:
        for kernel in kernels:
            kernel[:] = 0
            for colour in range(3):
                kernel[colour, colour] = 0.5 / PATCH**2
        first[:], second[:] = 0, 0
        for patch in range(4):
            # Takes mean and deviation back.
            first[:3, patch * SMALL.size : patch * SMALL.size + 3] = 10 * contrast() * np.array(DEVIATION) / 4
        first_bias[:3] = 10 * contrast() @ np.array(MEAN)
        for colour in range(3):
            second[COLOUR + colour, colour] = 0.1
        # Never all zeros: this architecture divides by the length of what it reads.
        second_bias[CONSTANT] = 0.1
    file.half("v.patch_embd.weight", kernels[0])
    file.half("v.patch_embd.weight.1", kernels[1])
    encoder(file, "v", fitted, norm_bias=not has_windows, gate=has_windows)
    if not fitted:
        file.single("v.post_ln.weight", np.ones(SMALL.size))
        if not has_windows:
            file.single("v.post_ln.bias", np.zeros(SMALL.size))
    file.half("mm.0.weight", first)
    file.single("mm.0.bias", first_bias)
    file.half("mm.2.weight", second)
    file.single("mm.2.bias", second_bias)


def qwen_projector(path, seed, fitted):
    file = File(path, "clip", seed)
    file.keys({"general.type": "mmproj", "general.file_type": 1, "clip.projector_type": "qwen2vl_merger"})
    file.keys({"clip.has_vision_encoder": True})
    qwen_vision(file, fitted, has_windows=False)
    file.close()


def omni_projector(path, seed, fitted):
    file = File(path, "clip", seed)
    file.keys({"general.type": "mmproj", "general.file_type": 1, "clip.projector_type": "qwen2.5o"})
    file.keys({"clip.has_vision_encoder": True, "clip.has_audio_encoder": True, "clip.use_silu": True})
    file.keys({"clip.vision.n_wa_pattern": 2, "clip.audio.num_mel_bins": MEL} | sizes("audio", 1e-5))
    qwen_vision(file, fitted, has_windows=True)
    first, second = file.any(SMALL.size, MEL, 3, spread=0.2), file.any(SMALL.size, SMALL.size, 3, spread=0.1)
    projection, bias, places = file.any(WIDTH, SMALL.size, spread=0.2), np.zeros(WIDTH), file.any(1500, SMALL.size, spread=0.05)
    if fitted:
        first[:], second[:], projection[:], places[:] = 0, 0, 0, 0
        low = np.where(np.arange(MEL) < MEL // 2, 1.0, -1.0) * 20 / MEL
        first[0, :, 1], first[1, :, 1] = low, -low
        second[0, 0, 1] = second[1, 1, 1] = 1
        projection[PITCH, 0] = projection[PITCH + 1, 1] = 1
        bias[CONSTANT] = 1
    file.half("a.conv1d.1.weight", first)
    file.single("a.conv1d.1.bias", np.zeros((SMALL.size, 1)))
    file.half("a.conv1d.2.weight", second)
    file.single("a.conv1d.2.bias", np.zeros((SMALL.size, 1)))
    file.single("a.position_embd.weight", places)
    encoder(file, "a", fitted, key_bias=False)
    if not fitted:
        file.single("a.post_ln.weight", np.ones(SMALL.size))
        file.single("a.post_ln.bias", np.zeros(SMALL.size))
    file.half("mm.a.fc.weight", projection)
    file.single("mm.a.fc.bias", bias)
    file.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", required=True, help="the folder")
    parser.add_argument("--template-of", metavar="QWEN", help="a file of Qwen's, whose template calls tools")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--large", type=int, metavar="WIDTH", help="only a large projector, for a model of this width")
    arguments = parser.parse_args()
    if arguments.large:
        path = os.path.join(arguments.o, f"mmproj-large-{arguments.large}.gguf")
        return gemma_projector(path, arguments.seed, False, image=448, merged=2, of=LARGE, width=arguments.large)
    for name, fitted in (("random", False), ("fitted", True)):
        folder = os.path.join(arguments.o, name)
        os.makedirs(folder, exist_ok=True)
        text_model(os.path.join(folder, "gemma3.gguf"), "gemma3", arguments.seed, fitted)
        text_model(os.path.join(folder, "qwen2vl.gguf"), "qwen2vl", arguments.seed, fitted)
        gemma_projector(os.path.join(folder, "mmproj-gemma3.gguf"), arguments.seed + 1, fitted)
        qwen_projector(os.path.join(folder, "mmproj-qwen2vl.gguf"), arguments.seed + 1, fitted)
        omni_projector(os.path.join(folder, "mmproj-omni.gguf"), arguments.seed + 1, fitted)
    text_model(os.path.join(arguments.o, "random", "reasoning.gguf"), "qwen2vl", arguments.seed, False, REASONING)
    folder = os.path.join(arguments.o, "reciting")
    os.makedirs(folder, exist_ok=True)
    reciting_model(os.path.join(folder, "reasoning.gguf"), arguments.seed, REASONED, REASONING)
    template = gguf.GGUFReader(arguments.template_of).get_field("tokenizer.chat_template").contents()
    reciting_model(os.path.join(folder, "calls.gguf"), arguments.seed, CALLED, template)
    reciting_model(os.path.join(folder, "bare.gguf"), arguments.seed, BARE, template)


if __name__ == "__main__":
    main()
