"""Tiny random image-text-to-text models as they would lie on the hub: SmolVLM (Idefics3) and Qwen2.5-VL."""

import torch as th
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from opd_gym.policies.vlm import _without_videos

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VOCAB_SIZE = 600


def tokenizer(*special):
    """Bytes as tokens."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    return fast


def smolvlm(directory, template=True):
    words = tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    size = {"longest_edge": 32}
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=True), words, image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>") if template else None,
    )  # fmt: skip
    config = Idefics3Config(
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCAB_SIZE, pad_token_id=words.pad_token_id,
        ).to_dict(),
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, tie_word_embeddings=True,
    )  # fmt: skip
    return write(directory, config, processor)


def qwen(directory):
    words = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    processor = _without_videos(Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}), words,
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in [
        ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
        ("vision_end", "<|vision_end|>"),
    ]}  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return write(directory, Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids), processor)


def write(directory, config, processor):
    th.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
