"""Write a tiny Qwen2.5-Omni with random weights, to test a server with all of its inputs and outputs.

    python build_tiny_omni.py FOLDER

The folder has what a published checkpoint has: the weights of the thinker, the talker and
the vocoder, a tokenizer with its chat template, the image, video and audio processors and
the speakers. It loads offline with AutoProcessor and Qwen2_5OmniForConditionalGeneration.
What it says is noise, in text and in speech; what it hears and sees does change the noise.
"""
import json
import sys

import tokenizers
import torch
from transformers import (
    GenerationConfig,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

HIDDEN, HEADS, MEL, SPEAKER = 32, 2, 16, 16
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
]
NAMED = {  # the attributes by which Qwen2_5OmniProcessor finds its tokens
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
TEXT = """You are a helpful assistant. The user sends an image, a sound or a video, and asks a question
about it. What is in the picture? What do you hear? Describe what you see and hear in one short sentence.
the of and to in is that for it as was with on are by this be from or have an they which one you were all
"""
TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|vision_bos|><|IMAGE|><|vision_eos|>' }}
{%- elif part.type == 'audio' -%}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}
{%- elif part.type == 'video' -%}{{ '<|vision_bos|><|VIDEO|><|vision_eos|>' }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


def build_tokenizer():
    """Byte-level BPE as Qwen2's, of the 256 bytes and what merges a few sentences give."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=400, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(), merges=merges, chat_template=TEMPLATE, extra_special_tokens=NAMED,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768,
    )  # fmt: skip
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def build_config(id):
    """The configuration of the published model with every size made small; `id` gives a token's number."""
    attention = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]}
    media = {
        "audio_token_index": id("<|AUDIO|>"),
        "image_token_index": id("<|IMAGE|>"),
        "video_token_index": id("<|VIDEO|>"),
        "audio_start_token_id": id("<|audio_bos|>"),
        "audio_end_token_id": id("<|audio_eos|>"),
        "vision_start_token_id": id("<|vision_bos|>"),
        "vision_end_token_id": id("<|vision_eos|>"),
    }
    language = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "rope_parameters": rope}
    thinker = {
        **media,
        "text_config": {**language, **attention, "vocab_size": 512, "tie_word_embeddings": False,
                        "eos_token_id": id("<|im_end|>"), "pad_token_id": id("<|endoftext|>")},
        "audio_config": {"encoder_layers": 1, "encoder_attention_heads": HEADS, "encoder_ffn_dim": 64,
                         "d_model": HIDDEN, "output_dim": HIDDEN},
        "vision_config": {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 64, "num_heads": HEADS,
                          "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
    }  # fmt: skip
    talker = {
        **media, **language, **attention, "head_dim": HIDDEN // HEADS, "embedding_size": HIDDEN,
        "tts_text_start_token_id": id("<tts_text_bos>"), "tts_text_end_token_id": id("<tts_text_eod>"),
        "tts_text_pad_token_id": id("<tts_pad>"),
    }  # fmt: skip
    dit = {
        "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "head_dim": HIDDEN // HEADS,
        "emb_dim": 16, "mel_dim": MEL, "look_ahead_layers": [1], "look_backward_layers": [0],
        "num_embeds": 8448,  # the talker's whole vocabulary: untrained, it may say any of it
        "enc_emb_dim": SPEAKER, "enc_dim": 16, "enc_channels": [16, 16, 16, 16, 48],
        "enc_attention_channels": 8, "enc_se_channels": 8,
    }  # fmt: skip
    vocoder = {"mel_dim": MEL, "upsample_initial_channel": 64, "resblock_kernel_sizes": [3],
               "resblock_dilation_sizes": [[1, 3, 5]]}  # fmt: skip
    return Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config=talker,
        token2wav_config={"dit_config": dit, "bigvgan_config": vocoder},
    )


def main(folder):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    id = tokenizer.convert_tokens_to_ids
    model = Qwen2_5OmniForConditionalGeneration(build_config(id)).eval()
    # Louder weights than a fresh model's: each input is answered differently, and the speech can be heard.
    for part, factor in ((model.thinker, 8), (model.token2wav.code2wav_bigvgan_model, 6.5)):
        for parameter in part.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(factor)
    text = [tokenizer.decode([i]) if i < len(tokenizer) else "" for i in range(512)]
    silent = [i for i in range(512) if not (text[i].isascii() and text[i].isprintable() and text[i])]
    silent += [id(token) for token in SPECIAL if token != "<|im_end|>"]
    model.generation_config = GenerationConfig(
        eos_token_id=id("<|im_end|>"),
        pad_token_id=id("<|endoftext|>"),
        suppress_tokens=sorted(set(silent)),
        exponential_decay_length_penalty=(12, 1.5),  # ends an answer, which chance alone would not do soon
        do_sample=False,
    )
    model.save_pretrained(folder)
    torch.save(
        {
            name: {
                "bos_token": id("<tts_text_bos>"),
                "cond": torch.randn(1, SPEAKER),
                "ref_mel": torch.randn(1, 30, MEL),
            }
            for name in ("Chelsie", "Ethan")
        },
        f"{folder}/spk_dict.pt",
    )
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=30, return_attention_mask=True),
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens in {folder}")


if __name__ == "__main__":
    main(sys.argv[1])
