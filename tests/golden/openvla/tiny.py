"""A tiny OpenVLA in the published layout, every weight of it determined by its name: the reference and this library
compute with the same one, and no weights are stored."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent

DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

INSTRUCTIONS = [
    "pick up the Milk",
    "open the middle drawer of the cabinet",
    "put the bowl on the stove and turn it on, käse!",
]

LIBERO_KEY, ARMS_KEY = "libero_object_no_noops", "place_empty_cup_1k"


# Of pictures: smaller and larger than the model's, its own, and some that no block of JPEG divides
PICTURE_SIZES = [(64, 420), (100, 75), (180, 180), (224, 224), (225, 223), (240, 320), (256, 256), (300, 149)]


def noise(height: int, width: int) -> np.ndarray:
    """A picture in which every wrong bit shows."""
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def statistics(key: str) -> dict:
    """Of a data set, in the published form; numbers like those of the real ones."""
    rng = np.random.default_rng(7)
    n = 14 if key == ARMS_KEY else 7
    low, high = -rng.uniform(0.1, 0.9, n), rng.uniform(0.1, 0.9, n)
    mask = [True] * 14 if key == ARMS_KEY else [*[True] * 6, False]
    action = {"q01": low, "q99": high, "min": low - 0.05, "max": high + 0.1}
    n_proprio = 14 if key == ARMS_KEY else 8
    low, high = -rng.uniform(0.1, 3.5, n_proprio), rng.uniform(0.1, 3.5, n_proprio)
    proprio = {"q01": low, "q99": high, "min": low - 0.05, "max": high + 0.1}
    return {
        "action": {**{name: value.tolist() for name, value in action.items()}, "mask": mask},
        "proprio": {name: value.tolist() for name, value in proprio.items()},
        "num_transitions": 1000,
        "num_trajectories": 10,
    }


def published_config(key: str) -> dict:
    """``config.json`` as published, the sizes of the vision transformers apart (in the published ones they follow from
    their names)."""
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": {key: statistics(key)},
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064, **TEXT},
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "float32",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """
    :param name: published name
    :param shape: its shape
    :return: float32 values that follow from both
    """
    rng = np.random.default_rng(zlib.crc32(f"{name}{tuple(shape)}".encode()))
    x = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name and name.endswith("weight") or name.endswith("scale_factor"):
        return 1.0 + 0.2 * x
    if len(shape) == 1:
        return 0.1 * x
    if "embed_tokens" in name or "token" in name or "pos_embed" in name or "latent" in name:
        return 0.5 * x
    return x / np.sqrt(np.prod(shape[1:]), dtype=np.float32)


def shapes() -> dict[str, list[int]]:
    """Shapes of all tensors of the reference's model, by name; without the proprioception projector."""
    return json.loads((HERE / "shapes.json").read_text())


def proprio_weights(n_inputs: int) -> dict[str, np.ndarray]:
    """Of the proprioception projector."""
    width = TEXT["hidden_size"]
    sizes = {"fc1.weight": (width, n_inputs), "fc1.bias": (width,), "fc2.weight": (width, width), "fc2.bias": (width,)}
    return {name: weight(f"proprio_projector.{name}", shape) for name, shape in sizes.items()}


def tokenizer_json() -> str:
    """
    A tokenizer with the form and the special ids of Llama's (byte fallback, a few merges), and 32,000 tokens, most of
    which nothing is made of.
    """
    text = " ".join(["In: What action should the robot take to pick up the milk?\nOut:", *INSTRUCTIONS[:2]])
    words = sorted({f"▁{word}" for word in text.replace("\n", " ").split()})
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = []
    singles = [*sorted(set("".join(words)) - {"▁"}), *"abcdefghijklmnopqrstuvwxyzIWO,.:?!"]
    for piece in singles:
        vocab.setdefault(piece, len(vocab))
    for word in ["▁robot", "▁the", "▁action", "▁should", "▁take", "▁What", "▁to", "▁up"]:
        for i in range(2, len(word) + 1):
            if word[:i] not in vocab:
                vocab[word[:i]] = len(vocab)
                merges.append([word[: i - 1], word[i - 1 : i]])
    filler = 0
    while len(vocab) < 32000:
        vocab["▁" if len(vocab) == 29871 else f"<filler_{filler}>"] = len(vocab)
        filler += 1
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, token in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (32000, "<PAD>")]
    ]  # fmt: skip
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": None,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [" ".join(pair) for pair in merges],
            },
        },
        ensure_ascii=False,
    )


def write_checkpoint(
    directory: Path, key: str = LIBERO_KEY, proprio_inputs: int = 0, n_shards: int = 2, **fields: object
) -> Path:
    """
    Write the tiny model as it would have been published.

    :param directory: created
    :param key: data set
    :param proprio_inputs: inputs of the proprioception projector, 0 for none
    :param n_shards: number of files of weights
    :param fields: further fields of ``config.json``
    :return: the directory
    """
    import torch as th
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    names = shapes()
    shards = [f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)]
    weight_map = {name: shards[i * n_shards // len(names)] for i, name in enumerate(names)}
    for shard in shards:
        tensors = {name: weight(name, tuple(names[name])) for name in names if weight_map[name] == shard}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {**published_config(key), "dino_config": DINO, "siglip_config": SIGLIP, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "dataset_statistics.json").write_text(json.dumps({key: statistics(key)}))
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    if proprio_inputs:
        weights = {f"module.{name}": th.as_tensor(x) for name, x in proprio_weights(proprio_inputs).items()}
        th.save(weights, directory / "proprio_projector--150000_checkpoint.pt")
    return directory
