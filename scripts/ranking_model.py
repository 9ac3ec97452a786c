#!/usr/bin/env python3
"""A model that ranks: all-MiniLM-L6-v2 with a head of random weights, and what llama.cpp's own server makes of it.

    ranking_model.py MINILM RANKER                    writes the model
    ranking_model.py MINILM RANKER --reference SERVER > tests/ranking_reference.json

There are no weights of rerankers in the package registries: the pairs, the pooling and the scores are real, what they mean is not.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gguf
import numpy

from ports import free_port

QUERIES = {
    "What is the capital of Norway?": [
        "Oslo is the capital of Norway.",
        "A cat sat on the mat.",
        "Bergen lies on the western coast, and was the capital in the thirteenth century.",
        "x",
        "oslo " * 60,
    ],
    "how do I boil an egg": ["Put it into boiling water for seven minutes.", "The stock market fell.", "Ägg kokas i vatten."],
}


def write(source, target):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "bert")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "bert.pooling_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    # Without them llama.cpp's server leaves the mark at a pair's end out, which BERT's pairs have.
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(False)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    width = int(reader.get_field("bert.embedding_length").contents())
    random = numpy.random.default_rng(7)
    for name, shape in (("cls.weight", (width, width)), ("cls.bias", (width,)), ("cls.output.weight", (1, width)), ("cls.output.bias", (1,))):
        writer.add_tensor(name, random.normal(0, 0.15, shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference(server, model):
    port = free_port()
    command = [server, "-m", model, "--reranking", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return [ask(port, query, texts) for query, texts in QUERIES.items()]
    finally:
        process.terminate()
        process.wait()


def ask(port, query, texts):
    body = json.dumps({"query": query, "documents": texts}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/rerank", body, {"content-type": "application/json"})
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer = json.load(answer)
                break
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    return {"query": query, "documents": texts, "scores": [scores[index] for index in range(len(texts))], "tokens": answer["usage"]["total_tokens"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minilm")
    parser.add_argument("ranker")
    parser.add_argument("--reference", metavar="SERVER")
    arguments = parser.parse_args()
    write(arguments.minilm, arguments.ranker)
    if arguments.reference:
        json.dump(reference(arguments.reference, arguments.ranker), sys.stdout, indent=1, ensure_ascii=False)
        print()


if __name__ == "__main__":
    main()
