#!/usr/bin/env python3
"""Writes small GGUF files of true architectures with random weights: what they answer is noise, what they take is real.

Each is described by its hyper-parameters, its metadata and its tensors, as llama.cpp's loader asks for them; shapes are
in ggml's order, the row first, and are evaluated over the hyper-parameters. Used by `make bench-memory` and the tests.
"""

import argparse, os, sys, math
import numpy as np
import gguf
from gguf import GGMLQuantizationType as QT
from gguf.constants import GGML_QUANT_SIZES


# ---------------------------------------------------------------- vocab
def byte_unicode():
    bs = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    cs = bs[:]
    n = 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    d = dict(zip(bs, cs))
    return [chr(d[b]) for b in range(256)]


ALNUM = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789"


def words():  # 2-letter, then 3-letter (2-letter + 1) strings; every one is a legal BPE merge
    for a in ALNUM:
        for b in ALNUM:
            yield a, b
    for a in ALNUM:
        for b in ALNUM:
            for c in ALNUM:
                yield a + b, c


CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BPE_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
]


def vocab_bpe(n, pre):
    toks = byte_unicode()
    types = [1] * 256
    sp = len(toks)
    toks += BPE_SPECIAL
    types += [3] * len(BPE_SPECIAL)
    merges = []
    for a, b in words():
        if len(toks) >= n:
            break
        merges.append(a + " " + b)
        toks.append(a + b)
        types.append(1)
    while len(toks) < n:
        toks.append(f"<|dummy_{len(toks)}|>")
        types.append(5)
    return [
        ("tokenizer.ggml.model", "str", "gpt2", "R"),
        ("tokenizer.ggml.pre", "str", pre, "o"),
        ("tokenizer.ggml.tokens", "arr[str]", toks, "R"),
        ("tokenizer.ggml.token_type", "arr[i32]", types, "o"),
        ("tokenizer.ggml.merges", "arr[str]", merges, "R"),
        ("tokenizer.ggml.bos_token_id", "u32", sp, "o"),
        ("tokenizer.ggml.eos_token_id", "u32", sp + 2, "o"),
        ("tokenizer.ggml.padding_token_id", "u32", sp, "o"),
        ("tokenizer.ggml.add_bos_token", "bool", False, "o"),
        ("tokenizer.chat_template", "str", CHATML, "o"),
    ]


def vocab_spm(n):
    toks = ["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
    types = [2, 3, 3, 3, 3, 3, 3]
    scores = [0.0] * len(toks)
    for b in range(256):
        toks.append(f"<0x{b:02X}>")
        types.append(6)
        scores.append(0.0)
    for c in ["\u2581"] + list(ALNUM):
        toks.append(c)
        types.append(1)
        scores.append(-1e6 - len(toks))
    for a, b in words():
        if len(toks) >= n:
            break
        toks.append(a + b)
        types.append(1)
        scores.append(-float(len(toks)))
    while len(toks) < n:
        toks.append(f"<dummy_{len(toks)}>")
        types.append(5)
        scores.append(-1e9)
    return [
        ("tokenizer.ggml.model", "str", "llama", "R"),
        ("tokenizer.ggml.pre", "str", "default", "o"),
        ("tokenizer.ggml.tokens", "arr[str]", toks, "R"),
        ("tokenizer.ggml.scores", "arr[f32]", scores, "o"),
        ("tokenizer.ggml.token_type", "arr[i32]", types, "o"),
        ("tokenizer.ggml.bos_token_id", "u32", 1, "o"),
        ("tokenizer.ggml.eos_token_id", "u32", 2, "o"),
        ("tokenizer.ggml.unknown_token_id", "u32", 0, "o"),
        ("tokenizer.ggml.add_bos_token", "bool", True, "o"),
        ("tokenizer.ggml.add_space_prefix", "bool", False, "o"),
    ]


def vocab_wpm(n):
    toks = ["[PAD]"] + [f"[unused{i}]" for i in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 100..103
    types = [3] + [5] * 99 + [3] * 4
    low = "etaoinshrdlucmfwypvbgkjqxz0123456789.,!?'-:;()"
    for c in low:
        toks += ["\u2581" + c, c]  # "▁x" = word start, "x" = continuation (HF "##x")
    for a, b in words():
        s = a + b
        if s != s.lower():
            continue
        toks += ["\u2581" + s, s]
        if len(toks) >= n:
            break
    toks = toks[:n]
    while len(toks) < n:
        toks.append(f"[dummy{len(toks)}]")
    types += [1] * (n - len(types))
    return [
        ("tokenizer.ggml.model", "str", "bert", "R"),
        ("tokenizer.ggml.pre", "str", "default", "o"),
        ("tokenizer.ggml.tokens", "arr[str]", toks, "R"),
        ("tokenizer.ggml.token_type", "arr[i32]", types, "o"),
        ("tokenizer.ggml.token_type_count", "u32", 2, "R"),
        ("tokenizer.ggml.unknown_token_id", "u32", 100, "o"),
        ("tokenizer.ggml.bos_token_id", "u32", 101, "o"),
        ("tokenizer.ggml.cls_token_id", "u32", 101, "o"),
        ("tokenizer.ggml.seperator_token_id", "u32", 102, "o"),
        ("tokenizer.ggml.padding_token_id", "u32", 0, "o"),
        ("tokenizer.ggml.mask_token_id", "u32", 103, "o"),
    ]


# ---------------------------------------------------------------- spec helpers
# tensor row: (name, "ne0, ne1, ..", req, cond)   req: R required / o optional ; {i} in name => per layer, cond over i
def T(name, shape, req="R", cond=None):
    return (name, shape, req, cond)


def embd(tied=False, norm="output_norm.weight", out_req="o"):
    r = [T("token_embd.weight", "n_embd, n_vocab"), T(norm, "n_embd")]
    if not tied:
        r.append(T("output.weight", "n_embd, n_vocab", out_req))
    return r


def attn(bias=False, qknorm=False, cond=None, q="hk*n_head", wo_in="hk*n_head", kv="n_kv"):
    r = [
        T("blk.{i}.attn_q.weight", f"n_embd, {q}", "R", cond),
        T("blk.{i}.attn_k.weight", f"n_embd, hk*{kv}", "R", cond),
        T("blk.{i}.attn_v.weight", f"n_embd, hv*{kv}", "R", cond),
        T("blk.{i}.attn_output.weight", f"{wo_in}, n_embd", "R", cond),
    ]
    if bias:
        r += [
            T("blk.{i}.attn_q.bias", q, "o", cond),
            T("blk.{i}.attn_k.bias", f"hk*{kv}", "o", cond),
            T("blk.{i}.attn_v.bias", f"hv*{kv}", "o", cond),
        ]
    if qknorm:
        r += [T("blk.{i}.attn_q_norm.weight", "hk", "R", cond), T("blk.{i}.attn_k_norm.weight", "hk", "R", cond)]
    return r


def ffn(gate=True, cond=None):
    r = [T("blk.{i}.ffn_up.weight", "n_embd, n_ff", "R", cond), T("blk.{i}.ffn_down.weight", "n_ff, n_embd", "R", cond)]
    if gate:
        r.insert(0, T("blk.{i}.ffn_gate.weight", "n_embd, n_ff", "R", cond))
    return r


def moe(cond=None):
    return [
        T("blk.{i}.ffn_gate_inp.weight", "n_embd, n_expert", "R", cond),
        T("blk.{i}.ffn_gate_exps.weight", "n_embd, n_ff_exp, n_expert", "R", cond),
        T("blk.{i}.ffn_up_exps.weight", "n_embd, n_ff_exp, n_expert", "R", cond),
        T("blk.{i}.ffn_down_exps.weight", "n_ff_exp, n_embd, n_expert", "R", cond),
    ]


def norms(*names, cond=None):
    return [T("blk.{i}.%s.weight" % n, "n_embd", "R", cond) for n in names]


def shexp(ff, cond=None):
    return [
        T("blk.{i}.ffn_gate_shexp.weight", f"n_embd, {ff}", "R", cond),
        T("blk.{i}.ffn_up_shexp.weight", f"n_embd, {ff}", "R", cond),
        T("blk.{i}.ffn_down_shexp.weight", f"{ff}, n_embd", "R", cond),
    ]


def mamba2(cond=None, norm_req="R", bias_req="R"):
    return [
        T("blk.{i}.ssm_in.weight", "n_embd, 2*d_inner + 2*n_group*d_state + n_ssm_head", "R", cond),
        T("blk.{i}.ssm_conv1d.weight", "d_conv, d_inner + 2*n_group*d_state", "R", cond),
        T("blk.{i}.ssm_conv1d.bias", "d_inner + 2*n_group*d_state", bias_req, cond),
        T("blk.{i}.ssm_dt.bias", "n_ssm_head", "R", cond),
        T("blk.{i}.ssm_a", "1, n_ssm_head", "R", cond),
        T("blk.{i}.ssm_d", "1, n_ssm_head", "R", cond),
        T("blk.{i}.ssm_norm.weight", "d_inner//n_group, n_group", norm_req, cond),
        T("blk.{i}.ssm_out.weight", "d_inner, n_embd", "R", cond),
    ]


def KV(key, typ, val, req="o"):
    return (key, typ, val, req)


RMS = lambda e=1e-6: KV("{a}.attention.layer_norm_rms_epsilon", "f32", e, "R")


def base(ff=True, heads=True):
    r = [
        KV("{a}.context_length", "u32", "n_ctx", "R"),
        KV("{a}.embedding_length", "u32", "n_embd", "R"),
        KV("{a}.block_count", "u32", "n_layer", "R"),
    ]
    if ff:
        r.append(KV("{a}.feed_forward_length", "u32", "n_ff", "M"))
    if heads:
        r += [
            KV("{a}.attention.head_count", "u32", "n_head", "M"),
            KV("{a}.attention.head_count_kv", "u32", "n_kv", "M"),
        ]
    return r


HEADDIM = [KV("{a}.attention.key_length", "u32", "hk", "M"), KV("{a}.attention.value_length", "u32", "hv", "M")]
MOEKV = [
    KV("{a}.expert_count", "u32", "n_expert", "M"),
    KV("{a}.expert_used_count", "u32", "n_used", "M"),
    KV("{a}.expert_feed_forward_length", "u32", "n_ff_exp", "M"),
]
SSMKV = lambda grp=True: [
    KV("{a}.ssm.conv_kernel", "u32", "d_conv", "R"),
    KV("{a}.ssm.inner_size", "u32", "d_inner", "R"),
    KV("{a}.ssm.state_size", "u32", "d_state", "R"),
    KV("{a}.ssm.time_step_rank", "u32", "n_ssm_head", "R"),
] + ([KV("{a}.ssm.group_count", "u32", "n_group", "R")] if grp else [])


def freq(f, req="o"):
    return KV("{a}.rope.freq_base", "f32", f, req)


SPECS = {}


def spec(name, arch, hp, kv, tensors, vocab, note=""):
    SPECS[name] = dict(arch=arch, hp=hp, kv=kv, tensors=tensors, vocab=vocab, note=note)


# ---------------------------------------------------------------- text models
H = lambda **k: dict(
    dict(n_ctx=8192, n_embd=512, n_layer=8, n_ff=1536, n_head=8, n_kv=2, hk=64, hv=64, n_vocab=8192), **k
)

spec(
    "llama",
    "llama",
    H(),
    base()
    + [
        KV("{a}.rope.dimension_count", "u32", "hk", "o"),
        RMS(1e-5),
        freq(500000.0),
        KV("{a}.vocab_size", "u32", "n_vocab"),
    ],
    embd() + [T("rope_freqs.weight", "hk//2", "o")] + norms("attn_norm", "ffn_norm") + attn() + ffn(),
    ("spm",),
    "rope.dimension_count must equal head dim. rope_freqs = llama-3 frequency factors (file has one global copy).",
)

spec(
    "qwen2",
    "qwen2",
    H(),
    base() + [RMS(), freq(1e6)],
    embd() + norms("attn_norm", "ffn_norm") + attn(bias=True, q="n_embd", wo_in="n_embd") + ffn(),
    ("bpe", "qwen2"),
    "q/o dims are n_embd (not hk*n_head): keep n_embd == hk*n_head. output.bias [n_vocab] also optional.",
)

spec(
    "qwen3",
    "qwen3",
    H(n_head=4, hk=128, hv=128),
    base() + HEADDIM + [RMS(), freq(1e6)],
    embd(tied=True) + norms("attn_norm", "ffn_norm") + attn(qknorm=True) + ffn(),
    ("bpe", "qwen2"),
    "Tied here (output.weight optional).",
)

spec(
    "gemma3",
    "gemma3",
    H(n_layer=12, n_head=4, n_kv=1, hk=128, hv=128, n_ctx=32768, n_vocab=16384),
    base()
    + HEADDIM
    + [
        RMS(),
        freq(1e6),
        KV("{a}.rope.freq_base_swa", "f32", 10000.0),
        KV("{a}.attention.sliding_window", "u32", 512, "M"),
        KV("{a}.attention.sliding_window_pattern", "u32", 6),
    ],
    embd(tied=True)
    + norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    + attn(qknorm=True)
    + ffn(),
    ("spm",),
    "Layer il is full attention iff il % 6 == 5 (pattern default 6; key may also be a bool/i32 array[n_layer], 1 = SWA). No sliding_window => all full.",
)

spec(
    "lfm2",
    "lfm2",
    H(n_layer=10, kv=[0, 0, 4, 0, 0, 4, 0, 4, 0, 4]),
    base(heads=False)
    + [
        KV("{a}.attention.head_count", "u32", "n_head", "M"),
        KV("{a}.attention.head_count_kv", "arr[i32]", "kv", "M"),
        RMS(1e-5),
        freq(1e6),
        KV("{a}.shortconv.l_cache", "u32", 3, "R"),
        KV("{a}.vocab_size", "u32", "n_vocab"),
    ],
    embd(tied=True, norm="token_embd_norm.weight")
    + norms("attn_norm", "ffn_norm")
    + ffn()
    + attn(qknorm=True, cond="kv[i]>0", q="n_embd", wo_in="n_embd", kv="kv[i]")
    + [
        T("blk.{i}.shortconv.conv.weight", "3, n_embd", "R", "kv[i]==0"),
        T("blk.{i}.shortconv.in_proj.weight", "n_embd, 3*n_embd", "R", "kv[i]==0"),
        T("blk.{i}.shortconv.out_proj.weight", "n_embd, n_embd", "R", "kv[i]==0"),
    ],
    ("bpe", "lfm2"),
    "kv[i]==0 => recurrent (shortconv) layer. Output norm is named token_embd_norm. Recurrent state/seq/layer: R = n_embd*(l_cache-1), S = ssm sizes = 0.",
)

spec(
    "mamba",
    "mamba",
    H(d_conv=4, d_inner=1024, d_state=16, n_ssm_head=32),
    base(ff=False, heads=False)
    + [KV("{a}.feed_forward_length", "u32", 0), KV("{a}.attention.head_count", "u32", 0), RMS(1e-5)]
    + SSMKV(False)
    + [KV("{a}.ssm.dt_b_c_rms", "bool", False)],
    embd(tied=True)
    + norms("attn_norm")
    + [
        T("blk.{i}.ssm_in.weight", "n_embd, 2*d_inner"),
        T("blk.{i}.ssm_conv1d.weight", "d_conv, d_inner"),
        T("blk.{i}.ssm_conv1d.bias", "d_inner"),
        T("blk.{i}.ssm_x.weight", "d_inner, n_ssm_head + 2*d_state"),
        T("blk.{i}.ssm_dt.weight", "n_ssm_head, d_inner"),
        T("blk.{i}.ssm_dt.bias", "d_inner"),
        T("blk.{i}.ssm_a", "d_state, d_inner"),
        T("blk.{i}.ssm_d", "d_inner"),
        T("blk.{i}.ssm_out.weight", "d_inner, n_embd"),
    ],
    ("bpe", "olmo"),
    "n_ssm_head = ssm.time_step_rank (dt_rank). d_inner must be 2*n_embd. ssm_a / ssm_d have NO .weight suffix.",
)

spec(
    "mamba2",
    "mamba2",
    H(d_conv=4, d_inner=1024, d_state=128, n_ssm_head=16, n_group=1),
    base(ff=False, heads=False)
    + [KV("{a}.feed_forward_length", "u32", 0), KV("{a}.attention.head_count", "u32", 0), RMS(1e-5)]
    + SSMKV(),
    embd(tied=True) + norms("attn_norm") + mamba2(),
    ("bpe", "olmo"),
    "n_ssm_head = ssm.time_step_rank; head_dim = d_inner/n_ssm_head.",
)

spec(
    "falcon-h1",
    "falcon-h1",
    H(d_conv=4, d_inner=1024, d_state=128, n_ssm_head=16, n_group=1),
    base() + HEADDIM + [RMS(1e-5), freq(1e11), KV("{a}.vocab_size", "u32", "n_vocab")] + SSMKV(),
    embd()
    + norms("attn_norm")
    + [T("blk.{i}.ffn_norm", "n_embd")]
    + attn()
    + ffn()
    + mamba2(norm_req="o", bias_req="M"),
    ("bpe", "falcon-h1"),
    "EVERY layer has both a KV cache and a mamba2 state. Quirk: ffn_norm has NO .weight suffix. Optional biases exist for attn_output, ffn_*. ssm_conv1d.bias: loader says optional, graph segfaults without it.",
)

spec(
    "granitehybrid",
    "granitehybrid",
    H(n_layer=8, d_conv=4, d_inner=1024, d_state=128, n_ssm_head=16, n_group=1, kv=[0, 0, 0, 2, 0, 0, 0, 2]),
    base(heads=False)
    + [
        KV("{a}.attention.head_count", "u32", "n_head", "M"),
        KV("{a}.attention.head_count_kv", "arr[i32]", "kv", "M"),
        RMS(1e-5),
        freq(10000.0),
        KV("{a}.rope.scaling.finetuned", "bool", False),
        KV("{a}.logit_scale", "f32", 8.0),
        KV("{a}.residual_scale", "f32", 0.22),
        KV("{a}.embedding_scale", "f32", 12.0),
        KV("{a}.attention.scale", "f32", 0.015625),
    ]
    + SSMKV(),
    embd(tied=True)
    + norms("attn_norm", "ffn_norm")
    + attn(cond="kv[i]>0", kv="kv[i]")
    + mamba2(cond="kv[i]==0", bias_req="M")
    + ffn(),
    ("bpe", "gpt-2"),
    "kv[i]==0 => mamba2 layer. d_inner must be 2*n_embd (GGML_ASSERT). Dense FFN here; with expert_count>0: ffn_gate_inp/[gate,up,down]_exps (n_ff wide) (+ *_shexp if expert_shared_feed_forward_length>0).",
)

spec(
    "qwen3moe",
    "qwen3moe",
    H(n_head=4, hk=128, hv=128, n_expert=16, n_used=4, n_ff_exp=256),
    base() + HEADDIM + [RMS(), freq(1e6)] + MOEKV,
    embd() + norms("attn_norm", "ffn_norm") + attn(qknorm=True) + moe(),
    ("bpe", "qwen2"),
    "ffn_gate_inp stays F32.",
)

spec(
    "qwen3next",
    "qwen3next",
    H(
        n_layer=8,
        n_head=4,
        hk=128,
        hv=128,
        n_expert=16,
        n_used=4,
        n_ff_exp=256,
        n_ff_sh=256,
        d_conv=4,
        d_state=128,
        n_group=2,
        n_ssm_head=4,
        d_inner=512,
    ),
    base()
    + HEADDIM
    + [
        RMS(),
        freq(1e7),
        KV("{a}.rope.dimension_count", "u32", "hk//4", "M"),
        KV("{a}.expert_shared_feed_forward_length", "u32", "n_ff_sh", "M"),
        KV("{a}.full_attention_interval", "u32", 4),
    ]
    + MOEKV
    + SSMKV(),
    embd()
    + norms("attn_norm", "post_attention_norm")
    + attn(qknorm=True, cond="(i+1)%4==0", q="2*hk*n_head")
    + [
        T("blk.{i}.attn_qkv.weight", "n_embd, 2*d_state*n_group + d_state*n_ssm_head", "M", "(i+1)%4!=0"),
        T("blk.{i}.attn_gate.weight", "n_embd, d_state*n_ssm_head", "M", "(i+1)%4!=0"),
        T("blk.{i}.ssm_conv1d.weight", "d_conv, 2*d_state*n_group + d_state*n_ssm_head", "R", "(i+1)%4!=0"),
        T("blk.{i}.ssm_dt.bias", "n_ssm_head", "R", "(i+1)%4!=0"),
        T("blk.{i}.ssm_a", "n_ssm_head", "R", "(i+1)%4!=0"),
        T("blk.{i}.ssm_ba.weight", "n_embd, 2*n_ssm_head", "R", "(i+1)%4!=0"),
        T("blk.{i}.ssm_norm.weight", "d_state", "R", "(i+1)%4!=0"),
        T("blk.{i}.ssm_out.weight", "d_state*n_ssm_head, n_embd", "R", "(i+1)%4!=0"),
    ]
    + moe()
    + [T("blk.{i}.ffn_gate_inp_shexp.weight", "n_embd")]
    + shexp("n_ff_sh"),
    ("bpe", "qwen2"),
    "Layer il is full attention iff (il+1)%4==0, else gated delta net. attn_q is doubled (q+gate). No ffn_norm; post_attention_norm instead. d_inner must be d_state*n_ssm_head. attn_qkv+attn_gate may be replaced by legacy ssm_in.weight [n_embd, 4-part qkvz].",
)

spec(
    "deepseek2",
    "deepseek2",
    H(
        n_layer=6,
        n_head=4,
        n_kv=1,
        lq=256,
        lkv=512,
        rope=64,
        nope=128,
        vmla=128,
        n_dense=1,
        n_expert=16,
        n_used=4,
        n_shared=1,
        n_ff_exp=256,
        hk=576,
        hv=512,
    ),
    base()
    + HEADDIM
    + [
        RMS(),
        freq(10000.0),
        KV("{a}.rope.dimension_count", "u32", "rope", "M"),
        KV("{a}.attention.q_lora_rank", "u32", "lq", "R"),
        KV("{a}.attention.kv_lora_rank", "u32", "lkv", "R"),
        KV("{a}.attention.key_length_mla", "u32", "nope+rope", "M"),
        KV("{a}.attention.value_length_mla", "u32", "vmla", "M"),
        KV("{a}.leading_dense_block_count", "u32", "n_dense", "M"),
        KV("{a}.expert_shared_count", "u32", "n_shared", "R"),
        KV("{a}.expert_weights_scale", "f32", 2.5),
        KV("{a}.expert_weights_norm", "bool", True),
        KV("{a}.expert_gating_func", "u32", 2),
        KV("{a}.vocab_size", "u32", "n_vocab"),
    ]
    + MOEKV[:2]
    + [KV("{a}.expert_feed_forward_length", "u32", "n_ff_exp", "R")],
    embd()
    + norms("attn_norm", "ffn_norm")
    + [
        T("blk.{i}.attn_q_a.weight", "n_embd, lq"),
        T("blk.{i}.attn_q_a_norm.weight", "lq"),
        T("blk.{i}.attn_q_b.weight", "lq, n_head*(nope+rope)"),
        T("blk.{i}.attn_kv_a_mqa.weight", "n_embd, lkv+rope"),
        T("blk.{i}.attn_kv_a_norm.weight", "lkv"),
        T("blk.{i}.attn_k_b.weight", "nope, lkv, n_head"),
        T("blk.{i}.attn_v_b.weight", "lkv, vmla, n_head"),
        T("blk.{i}.attn_output.weight", "n_head*vmla, n_embd"),
    ]
    + ffn(cond="i<n_dense")
    + moe("i>=n_dense")
    + [T("blk.{i}.exp_probs_b.bias", "n_expert", "o", "i>=n_dense")]
    + shexp("n_ff_exp*n_shared", "i>=n_dense"),
    ("bpe", "deepseek-v3"),
    "MLA: head_count_kv=1, key_length = kv_lora_rank+rope, value_length = kv_lora_rank; cache holds K only (V is a view of K). n_layer 26/27 (or 48 with vocab 128256) would mean the 'lite' variant: no q_lora_rank, plain attn_q [n_embd, n_head*(nope+rope)].",
)

spec(
    "gpt-oss",
    "gpt-oss",
    H(n_head=8, n_kv=2, n_expert=8, n_used=4, n_ff_exp=512, n_ff=512, n_ctx=131072),
    base()
    + HEADDIM
    + MOEKV[:2]
    + [
        KV("{a}.expert_feed_forward_length", "u32", "n_ff_exp", "R"),
        RMS(1e-5),
        KV("{a}.attention.sliding_window", "u32", 128, "R"),
        KV("{a}.rope.dimension_count", "u32", "hk"),
        freq(150000.0),
        KV("{a}.rope.scaling.type", "str", "yarn"),
        KV("{a}.rope.scaling.factor", "f32", 32.0),
        KV("{a}.rope.scaling.original_context_length", "u32", 4096),
    ],
    embd(out_req="R")
    + norms("attn_norm", "post_attention_norm")
    + attn(bias=True)
    + [T("blk.{i}.attn_output.bias", "n_embd"), T("blk.{i}.attn_sinks.weight", "n_head")]
    + moe()
    + [
        T("blk.{i}.ffn_gate_inp.bias", "n_expert"),
        T("blk.{i}.ffn_gate_exps.bias", "n_ff_exp, n_expert"),
        T("blk.{i}.ffn_up_exps.bias", "n_ff_exp, n_expert"),
        T("blk.{i}.ffn_down_exps.bias", "n_embd, n_expert"),
    ],
    ("bpe", "gpt-4o"),
    "SWA pattern 2: layer il is SWA iff il%2==0. q/k/v/o widths use n_rot, so rope.dimension_count == hk. output.weight is REQUIRED. Experts written as MXFP4 unless --quant F16/F32.",
)

spec(
    "qwen2vl",
    "qwen2vl",
    H(),
    base()
    + [
        KV("{a}.attention.layer_norm_rms_epsilon", "f32", 1e-6),
        freq(1e6),
        KV("{a}.rope.dimension_sections", "arr[i32]", [8, 12, 12, 0], "R"),
    ],
    embd() + norms("attn_norm", "ffn_norm") + attn(bias=True, q="n_embd", wo_in="n_embd") + ffn(),
    ("bpe", "qwen2"),
    "Sections: exactly 4 entries, sum = hk/2. LLM part of Qwen2-VL, Qwen2.5-VL and Qwen2.5-Omni. This llama.cpp never reads the rms epsilon for qwen2vl (f_norm_rms_eps = 0): with --zeros the output is NaN, so use random weights.",
)

spec(
    "bert",
    "bert",
    H(n_layer=6, n_ctx=512, n_ff=1024, n_kv=8),
    base()
    + [
        KV("{a}.attention.layer_norm_epsilon", "f32", 1e-12, "R"),
        KV("{a}.attention.causal", "bool", False, "M"),
        KV("{a}.pooling_type", "u32", 1),
    ],
    [
        T("token_embd.weight", "n_embd, n_vocab"),
        T("token_types.weight", "n_embd, 2", "o"),
        T("position_embd.weight", "n_embd, n_ctx"),
        T("token_embd_norm.weight", "n_embd"),
        T("token_embd_norm.bias", "n_embd"),
    ]
    + attn(bias=True, q="n_embd", wo_in="n_embd")
    + [
        T("blk.{i}.attn_output.bias", "n_embd", "o"),
        T("blk.{i}.attn_output_norm.weight", "n_embd"),
        T("blk.{i}.attn_output_norm.bias", "n_embd"),
        T("blk.{i}.layer_output_norm.weight", "n_embd"),
        T("blk.{i}.layer_output_norm.bias", "n_embd"),
        T("blk.{i}.ffn_up.bias", "n_ff", "o"),
        T("blk.{i}.ffn_down.bias", "n_embd", "o"),
    ]
    + ffn(gate=False),
    ("wpm",),
    "No KV cache (encoder). pooling: 0 none 1 mean 2 cls 3 last 4 rank. Optional rerank head: cls.weight/bias, cls.output.weight/bias.",
)

spec(
    "gemma-embedding",
    "gemma-embedding",
    H(n_layer=12, n_head=4, n_kv=1, hk=128, hv=128, n_ctx=2048, n_vocab=16384, d2=2048),
    base()
    + HEADDIM
    + [
        RMS(),
        freq(1e6),
        KV("{a}.attention.sliding_window", "u32", 257, "R"),
        KV("{a}.attention.sliding_window_pattern", "u32", 6),
        KV("{a}.pooling_type", "u32", 1, "M"),
        KV("{a}.dense_2_feat_in", "u32", "n_embd"),
        KV("{a}.dense_2_feat_out", "u32", "d2", "M"),
        KV("{a}.dense_3_feat_in", "u32", "d2", "M"),
        KV("{a}.dense_3_feat_out", "u32", "n_embd"),
    ],
    embd(tied=True)
    + [T("dense_2.weight", "n_embd, d2", "o"), T("dense_3.weight", "d2, n_embd", "o")]
    + norms("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    + attn(qknorm=True)
    + ffn(),
    ("spm",),
    "Non-causal, symmetric SWA, no KV cache. dense_* keys and tensors go together or not at all.",
)

# ---------------------------------------------------------------- mmproj
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def VIS(ff=1024, eps=1e-6):
    return [
        KV("clip.vision.embedding_length", "u32", "n_embd", "R"),
        KV("clip.vision.feed_forward_length", "u32", "n_ff", "R"),
        KV("clip.vision.block_count", "u32", "n_layer", "R"),
        KV("clip.vision.projection_dim", "u32", "proj", "R"),
        KV("clip.vision.attention.head_count", "u32", "n_head", "R"),
        KV("clip.vision.attention.layer_norm_epsilon", "f32", eps, "R"),
        KV("clip.vision.image_size", "u32", "img", "R"),
        KV("clip.vision.patch_size", "u32", "patch", "R"),
        KV("clip.vision.image_mean", "arr[f32]", MEAN, "R"),
        KV("clip.vision.image_std", "arr[f32]", STD, "R"),
    ]


def venc(p="v", bias=True, lnbias=True, gate=False, kbias=True, n="n_embd", f="n_ff", L="n_layer"):
    b = p + ".blk.{i}."
    r = []
    for q in ("attn_q", "attn_k", "attn_v", "attn_out"):
        r.append(T(b + q + ".weight", f"{n}, {n}", "R" if q == "attn_out" else "M", L))
        if bias and (kbias or q != "attn_k"):
            r.append(T(b + q + ".bias", n, "M" if q != "attn_out" else "o", L))
    for l in ("ln1", "ln2"):
        r.append(T(b + l + ".weight", n, "M", L))
        if lnbias:
            r.append(T(b + l + ".bias", n, "M" if p == "a" else "o", L))
    fs = ["ffn_gate", "ffn_up"] if gate else ["ffn_up"]
    for g in fs:
        r += [T(b + g + ".weight", f"{n}, {f}", "R" if g == "ffn_up" else "o", L), T(b + g + ".bias", f, "o", L)]
    return r + [T(b + "ffn_down.weight", f"{f}, {n}", "R", L), T(b + "ffn_down.bias", n, "o", L)]


PATCH2 = [
    T("v.patch_embd.weight", "patch, patch, 3, n_embd", "M"),
    T("v.patch_embd.weight.1", "patch, patch, 3, n_embd", "M"),
]
QMERGE = [
    T("mm.0.weight", "4*n_embd, 4*n_embd"),
    T("mm.0.bias", "4*n_embd"),
    T("mm.2.weight", "4*n_embd, proj"),
    T("mm.2.bias", "proj"),
]
V = lambda **k: dict(dict(n_embd=256, n_ff=1024, n_layer=4, n_head=4, proj=512, img=560, patch=14), **k)
CLIP = lambda proj, v=True, a=False: [
    KV("clip.projector_type", "str", proj, "R"),
    KV("clip.has_vision_encoder", "bool", v, "M"),
    KV("clip.has_audio_encoder", "bool", a, "M"),
]

spec(
    "mmproj-qwen2vl",
    "clip",
    V(),
    CLIP("qwen2vl_merger") + VIS(),
    PATCH2 + venc() + [T("v.post_ln.weight", "n_embd", "o"), T("v.post_ln.bias", "n_embd", "o")] + QMERGE,
    None,
    "LayerNorm, QuickGELU (neither use_gelu nor use_silu), no gate. proj must equal the LLM's embedding_length. n_ff must differ from n_embd (up/down swap heuristic).",
)
spec(
    "mmproj-qwen2.5vl",
    "clip",
    V(),
    CLIP("qwen2.5vl_merger")
    + VIS()
    + [
        KV("clip.use_silu", "bool", True),
        KV("clip.vision.n_wa_pattern", "u32", 4, "R"),
        KV("clip.vision.spatial_merge_size", "u32", 2),
    ],
    PATCH2 + venc(lnbias=False, gate=True) + [T("v.post_ln.weight", "n_embd", "o")] + QMERGE,
    None,
    "RMS norm, SwiGLU; full attention iff (il+1)%n_wa_pattern==0.",
)
AUD = [
    KV("clip.audio.embedding_length", "u32", "an_embd", "R"),
    KV("clip.audio.feed_forward_length", "u32", "an_ff", "R"),
    KV("clip.audio.block_count", "u32", "an_layer", "R"),
    KV("clip.audio.projection_dim", "u32", "proj", "R"),
    KV("clip.audio.attention.head_count", "u32", "an_head", "R"),
    KV("clip.audio.attention.layer_norm_epsilon", "f32", 1e-5, "R"),
    KV("clip.audio.num_mel_bins", "u32", "mel", "R"),
]
AENC = (
    [
        T("a.conv1d.1.weight", "3, mel, an_embd"),
        T("a.conv1d.1.bias", "1, an_embd"),
        T("a.conv1d.2.weight", "3, an_embd, an_embd"),
        T("a.conv1d.2.bias", "1, an_embd"),
        T("a.position_embd.weight", "an_embd, 1500", "M"),
    ]
    + venc("a", kbias=False, n="an_embd", f="an_ff", L="an_layer")
    + [
        T("a.post_ln.weight", "an_embd", "o"),
        T("a.post_ln.bias", "an_embd", "o"),
        T("mm.a.fc.weight", "an_embd, proj"),
        T("mm.a.fc.bias", "proj"),
    ]
)
spec(
    "mmproj-qwen2.5o",
    "clip",
    V(an_embd=256, an_ff=1024, an_layer=4, an_head=4, mel=128),
    CLIP("qwen2.5o", True, True)
    + VIS()
    + AUD
    + [
        KV("clip.use_silu", "bool", True),
        KV("clip.vision.n_wa_pattern", "u32", 4, "R"),
        KV("clip.vision.spatial_merge_size", "u32", 2),
    ],
    PATCH2 + venc(lnbias=False, gate=True) + [T("v.post_ln.weight", "n_embd", "o")] + QMERGE + AENC,
    None,
    "clip.projector_type qwen2.5o -> vision acts as qwen2.5vl_merger, audio as qwen2a (whisper encoder; attn_k must NOT have a bias). Vision and audio are two clip contexts; both load v.patch_embd.weight and .weight.1 (duplicated memory).",
)
spec(
    "mmproj-qwen2a",
    "clip",
    V(an_embd=256, an_ff=1024, an_layer=4, an_head=4, mel=128),
    CLIP("qwen2a", False, True) + AUD,
    AENC,
    None,
    "Audio only (Qwen2-Audio).",
)
spec(
    "mmproj-gemma3",
    "clip",
    V(img=224),
    CLIP("gemma3") + VIS() + [KV("clip.use_gelu", "bool", True), KV("clip.vision.projector.scale_factor", "u32", 4)],
    [
        T("v.patch_embd.weight", "patch, patch, 3, n_embd", "M"),
        T("v.patch_embd.bias", "n_embd", "o"),
        T("v.position_embd.weight", "n_embd, (img//patch)**2", "M"),
    ]
    + venc()
    + [
        T("v.post_ln.weight", "n_embd", "o"),
        T("v.post_ln.bias", "n_embd", "o"),
        T("mm.input_projection.weight", "proj, n_embd"),
        T("mm.soft_emb_norm.weight", "n_embd"),
    ],
    None,
    "mm.input_projection is transposed at run time (ne0 = LLM n_embd): keep it F16/F32, never quantised. Tokens = (img/patch/scale)^2.",
)

# ---------------------------------------------------------------- writing
rng = np.random.default_rng(1)


def pick(name, ne, quant, arch):
    base, suf = name.rsplit(".", 1) if "." in name else (name, "")
    if (
        name.endswith("v.patch_embd.weight")
        or name.endswith("patch_embd.weight.1")
        or ("conv1d" in name and name.startswith("a.") and suf == "weight")
    ):
        return QT.F16
    if name == "mm.input_projection.weight":
        return QT.F16
    if (
        suf != "weight"
        or len(ne) == 1
        or "norm" in base
        or any(s in name for s in ("ffn_gate_inp.", "ssm_conv1d", "shortconv.conv", "position_embd", "token_types"))
    ):
        return QT.F32
    if quant == "F32":
        return QT.F32
    if quant == "F16":
        return QT.F16
    if arch == "gpt-oss" and "_exps" in name:
        return QT.MXFP4
    t = {"Q8_0": QT.Q8_0, "Q4_0": QT.Q4_0, "Q4_K": QT.Q4_K, "MIX": QT.Q4_K}[quant]
    if quant == "MIX" and (
        any(s in name for s in ("attn_v.", "ffn_down", "output.weight"))
        and "attn_output" not in name
        or name == "token_embd.weight"
    ):
        t = QT.Q6_K
    if ne[0] % GGML_QUANT_SIZES[t][0]:
        t = QT.Q8_0 if ne[0] % 32 == 0 else QT.F16
    return t


def data_for(t, ne, name, zeros):
    shp = list(reversed(ne))
    n = int(np.prod(ne))
    if t in (QT.F32, QT.F16):
        dt = np.float32 if t == QT.F32 else np.float16
        if zeros and "norm" not in name and ".ln" not in name and "_ln" not in name and "rope_freqs" not in name:
            return np.zeros(shp, dt)
        if "norm" in name or ".ln" in name or "_ln" in name or "rope_freqs" in name:
            return (np.zeros if name.endswith("bias") else np.ones)(shp, dt)
        if name.endswith("ssm_a"):
            return np.full(shp, -1.0, dt)
        return (rng.standard_normal(n, dtype=np.float32) * 0.02).astype(dt).reshape(shp)
    bs, ts = GGML_QUANT_SIZES[t]
    nb = n // bs
    if zeros:
        blk = np.zeros((nb, ts), np.uint8)
    else:
        blk = rng.integers(0, 256, (nb, ts), dtype=np.uint8)

        def f16(col, v):
            blk[:, col : col + 2] = np.frombuffer(np.float16(v).tobytes(), np.uint8)

        if t == QT.Q8_0:
            f16(0, 2.7e-4)
        elif t == QT.Q4_0:
            f16(0, 4.3e-3)
        elif t == QT.Q4_K:
            f16(0, 1e-4)
            f16(2, 7.5e-4)  # d, dmin; scales/qs random
        elif t == QT.Q6_K:
            f16(208, 1.5e-5)
        elif t == QT.MXFP4:
            blk[:, 0] = 119  # e8m0 2^-8
        else:
            blk[:] = 0
    return blk.reshape(shp[:-1] + [ne[0] // bs * ts])


FTYPE = dict(F32=0, F16=1, Q4_0=2, Q8_0=7, Q4_K=14, MIX=15)


def env(s, vocab=None):
    e = dict(s["hp"])
    if vocab and "n_vocab" in e:
        e["n_vocab"] = vocab
    return e


def ev(x, e, **k):
    return eval(x, {}, dict(e, **k)) if isinstance(x, str) else x


def kvs(s, e, name, quant):
    a = s["arch"]
    out = [
        ("general.type", "str", "mmproj" if a == "clip" else "model", "o"),
        ("general.name", "str", f"tiny-{name}", "o"),
        ("general.file_type", "u32", FTYPE[quant], "o"),
        ("general.quantization_version", "u32", 2, "o"),
    ]
    for k, t, v, r in s["kv"]:
        out.append((k.replace("{a}", a), t, v if t == "str" else ev(v, e), r))
    if s["vocab"]:
        v = s["vocab"]
        n = e["n_vocab"]
        out += vocab_bpe(n, v[1]) if v[0] == "bpe" else vocab_spm(n) if v[0] == "spm" else vocab_wpm(n)
    return out


def tensors(s, e):
    for name, shape, req, cond in s["tensors"]:
        if "{i}" not in name:
            yield name, [int(x) for x in ev(f"({shape},)", e)]
            continue
        L = cond if cond in ("n_layer", "an_layer") else "n_layer"
        c = None if cond in ("n_layer", "an_layer") else cond
        for i in range(e[L]):
            if c is None or ev(c, e, i=i):
                yield name.replace("{i}", str(i)), [int(x) for x in ev(f"({shape},)", e, i=i)]


def order(t):  # layer order
    p = t[0].split(".")
    return (0, 0) if "blk" not in p else (1 if p[0] != "a" else 2, int(p[p.index("blk") + 1]))


def write(name, s, path, quant, zeros, vocab):
    e = env(s, vocab)
    w = gguf.GGUFWriter(path, s["arch"])
    for k, t, v, _ in kvs(s, e, name, quant):
        if t == "u32":
            w.add_uint32(k, int(v))
        elif t == "f32":
            w.add_float32(k, float(v))
        elif t == "bool":
            w.add_bool(k, bool(v))
        elif t == "str":
            w.add_string(k, v)
        elif t == "arr[f32]":
            w.add_array(k, [float(x) for x in v])
        else:
            w.add_array(k, list(v))
    tot = 0
    for n, ne in sorted(tensors(s, e), key=order):
        t = pick(n, ne, quant, s["arch"])
        d = data_for(t, ne, n, zeros)
        w.add_tensor(n, d, raw_dtype=t)
        tot += d.nbytes
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tot


if __name__ == "__main__":
    cache = os.environ.get("SARAI_CACHE", os.path.expanduser("~/.cache/sarai"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", default=os.path.join(cache, "sketches"), help="the folder")
    parser.add_argument("--quant", default="MIX", choices=list(FTYPE))
    parser.add_argument("--zeros", action="store_true", help="all weights are zero")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--vocab", type=int, help="tokens of the vocabulary")
    arguments = parser.parse_args()
    os.makedirs(arguments.o, exist_ok=True)
    for name, s in SPECS.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        path = os.path.join(arguments.o, f"{name}-{arguments.quant}.gguf")
        # Written aside, so that a file that is there is whole.
        write(name, s, path + ".part", arguments.quant, arguments.zeros, arguments.vocab)
        os.replace(path + ".part", path)
        print(path)
