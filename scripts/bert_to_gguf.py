"""Writes a BERT that makes vectors, as sentence-transformers stores it, as a GGUF file: F16 matrices, F32 for the rest.

Needs nothing but Python, so that the demo needs no more either. The names and keys are those that llama.cpp's loader asks for.
"""

import json
import struct
from pathlib import Path

ALIGNMENT = 32
F32, F16 = 0, 1
U32, I32, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
CHUNK = 1 << 18

# A layer's tensors there and here.
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
OTHERS = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.LayerNorm": "token_embd_norm",
}
# Looked up in, row by row: too small for a half to be worth it.
KEPT_WHOLE = ("token_types.weight", "position_embd.weight")


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind: int, data) -> bytes:
    match kind:
        case 8:
            return struct.pack("<I", kind) + string(data)
        case 9:
            of, items = data
            body = b"".join(string(item) for item in items) if of == STRING else struct.pack(f"<{len(items)}i", *items)
            return struct.pack("<IIQ", kind, of, len(items)) + body
        case _:
            return struct.pack("<I" + {U32: "I", I32: "i", FLOAT: "f", BOOL: "?"}[kind], kind, data)


def token(word: str) -> str:
    """llama.cpp marks the beginning of a word, where the vocabulary marks what goes on with one."""
    if word.startswith("[") and word.endswith("]"):
        return word
    return word[2:] if word.startswith("##") else "\u2581" + word


def renamed(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        number, _, inner = stem.removeprefix("encoder.layer.").partition(".")
        return f"blk.{number}.{LAYER[inner]}.{kind}"
    # The head that BERT was trained with, and positions that are only counted.
    return None


def metadata(config: dict, words: list[str], name: str) -> dict:
    special = {word: index for index, word in enumerate(words) if word.startswith("[") and word.endswith("]")}
    kinds = [3 if word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") else 1 for word in words]
    return {
        "general.architecture": (STRING, "bert"),
        "general.name": (STRING, name),
        "general.file_type": (U32, 1),
        "bert.block_count": (U32, config["num_hidden_layers"]),
        "bert.context_length": (U32, config["max_position_embeddings"]),
        "bert.embedding_length": (U32, config["hidden_size"]),
        "bert.feed_forward_length": (U32, config["intermediate_size"]),
        "bert.attention.head_count": (U32, config["num_attention_heads"]),
        "bert.attention.layer_norm_epsilon": (FLOAT, config["layer_norm_eps"]),
        "bert.attention.causal": (BOOL, False),
        "bert.pooling_type": (U32, 1),
        "tokenizer.ggml.model": (STRING, "bert"),
        "tokenizer.ggml.pre": (STRING, "default"),
        "tokenizer.ggml.token_type_count": (U32, config["type_vocab_size"]),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, [token(word) for word in words])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, kinds)),
        "tokenizer.ggml.unknown_token_id": (U32, special["[UNK]"]),
        "tokenizer.ggml.seperator_token_id": (U32, special["[SEP]"]),
        "tokenizer.ggml.padding_token_id": (U32, special["[PAD]"]),
        "tokenizer.ggml.cls_token_id": (U32, special["[CLS]"]),
        "tokenizer.ggml.bos_token_id": (U32, special["[CLS]"]),
        "tokenizer.ggml.eos_token_id": (U32, special["[SEP]"]),
        "tokenizer.ggml.mask_token_id": (U32, special["[MASK]"]),
    }


def convert(config: bytes, vocabulary: bytes, weights: bytes, name: str, target: Path) -> None:
    words = vocabulary.decode().rstrip("\n").split("\n")
    keys = metadata(json.loads(config), words, name)
    (length,) = struct.unpack_from("<Q", weights)
    header, base = json.loads(weights[8 : 8 + length]), 8 + length
    tensors = []
    for there in sorted(header):
        here = renamed(there) if there != "__metadata__" else None
        if here is None:
            continue
        entry = header[there]
        if entry["dtype"] != "F32":
            raise SystemExit(f"bert_to_gguf: {there} is {entry['dtype']}, and only F32 can be read")
        shape = entry["shape"]
        kind = F16 if len(shape) == 2 and here not in KEPT_WHOLE else F32
        begin, end = (base + offset for offset in entry["data_offsets"])
        tensors.append((here, shape, kind, begin, end))
    with target.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
        for key, (kind, data) in keys.items():
            out.write(string(key) + value(kind, data))
        offset = 0
        for here, shape, kind, begin, end in tensors:
            row_first = list(reversed(shape))
            out.write(string(here) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *row_first, kind, offset))
            size = (end - begin) // (2 if kind == F16 else 1)
            offset += -(-size // ALIGNMENT) * ALIGNMENT
        out.write(b"\0" * (-out.tell() % ALIGNMENT))
        for _, _, kind, begin, end in tensors:
            for at in range(begin, end, CHUNK):
                piece = weights[at : min(at + CHUNK, end)]
                count = len(piece) // 4
                out.write(piece if kind == F32 else struct.pack(f"<{count}e", *struct.unpack(f"<{count}f", piece)))
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
