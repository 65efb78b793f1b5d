"""
What OpenVLA costs on this machine: the published size from the disk into memory, and a tiny one beside our own body.

    python benchmarks/openvla_size.py load --folder /somewhere/with/16/GB
    python benchmarks/openvla_size.py speed

``load`` writes a checkpoint of 7.5 billion random weights in the published layout (bfloat16, shards of 5 GB, one in
memory at a time), loads it in a new process and reports seconds and memory, then lets it decide once.

``speed`` asks what the tiny policy of the main job would cost if it were an OpenVLA: OpenVLA's architecture scaled down
to about as many parameters (besides the 32,064 rows of its vocabulary), with two cameras, and the body ``tiny``, take
turns in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from safetensors.torch import save_file
from torch import nn

from opd_gym.instructions import encode_instruction
from opd_gym.policies.openvla import OpenVLAConfig, OpenVLAModel
from opd_gym.policies.openvla.checkpoints import published_layout
from opd_gym.policies.openvla.processing import PromptTokenizer
from opd_gym.policies.tiny import TinyVLAConfig, TinyVLAModel
from opd_gym.versions import write_results

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "openvla"
SHARD = 5 * 10**9
NAME = "openvla-7b-finetuned-libero-object"  # a published name: it tells the profile


def _tiny_golden() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_golden", GOLDEN / "tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def memory(kind: str) -> float:
    """
    :param kind: a line of /proc/self/status: "VmHWM" (peak), "VmRSS" or "RssAnon" (without mapped files)
    :return: GB
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(kind)


def write_random(
    folder: Path,
    profile_name: str = NAME,
    device: th.device | str = "cpu",
    small: bool = False,
    dtype: th.dtype = th.bfloat16,
) -> dict[str, Any]:
    """
    Write a checkpoint with random weights, with which logits have a variance of about 1.

    :param folder: where to; the checkpoint is a folder in it
    :param profile_name: published name of a checkpoint
    :param device: where the weights are drawn
    :param small: a model of a few layers instead of the published size
    :param dtype: of the weights
    :return: its size, and how long writing took
    """
    tiny = _tiny_golden()
    directory = folder / profile_name
    directory.mkdir(parents=True, exist_ok=True)
    published = tiny.published_config(tiny.LIBERO_KEY)
    published["text_config"] = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}
    published["torch_dtype"] = str(dtype).removeprefix("torch.")
    if small:
        published["text_config"] |= {**tiny.TEXT, "hidden_size": 128, "num_hidden_layers": 8}
        published |= {"dino_config": tiny.DINO, "siglip_config": tiny.SIGLIP}
    (directory / "config.json").write_text(json.dumps(published))
    (directory / "dataset_statistics.json").write_text(json.dumps(published["norm_stats"]))
    (directory / "tokenizer.json").write_text(tiny.tokenizer_json(), encoding="utf-8")
    with th.device("meta"):
        model = OpenVLAModel(OpenVLAConfig.from_pretrained(directory))
    state = dict([*model.named_parameters(), *model.named_buffers()])
    shapes = {
        name: part.join(*(state[ours] for ours in (*part.names, *part.reads))).shape
        for name, part in published_layout(model).items()
    }
    began = time.perf_counter()
    shards: list[list[str]] = [[]]
    room = SHARD
    for name, shape in shapes.items():
        size = dtype.itemsize * shape.numel()
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    generator = th.Generator(device).manual_seed(0)
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            bound = (3.0 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.03
            tensor = th.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)
            tensors[name] = (tensor.add_(1.0) if "norm" in name and name.endswith("weight") else tensor).cpu()
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        print(f"{file}: {sum(t.nbytes for t in tensors.values()) / 1e9:.2f} GB", flush=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    count = sum(shape.numel() for shape in shapes.values())
    seconds = time.perf_counter() - began
    size = dtype.itemsize * count / 1e9
    return {"parameters": count, "gigabytes": size, "shards": len(shards), "seconds": seconds}


def load(directory: Path, decide: bool) -> dict[str, Any]:
    """
    Load a checkpoint, in a process that has done nothing else.

    :param directory: the checkpoint
    :param decide: whether to decide once
    :return: seconds, and memory in GB
    """
    before = memory("RssAnon")
    began = time.perf_counter()
    model = OpenVLAModel.from_pretrained(directory, dtype=th.bfloat16)
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) / 1e9,
        "anonymous_before": before,
        "anonymous": memory("RssAnon"),
        "peak_with_mapped_files": memory("VmHWM"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "on_meta": sum(t.is_meta for t in [*model.parameters(), *model.buffers()]),
    }
    if decide:
        images = {key: th.randint(0, 256, (1, 3, 256, 256), dtype=th.uint8) for key in model.config.image_keys}
        instruction = th.as_tensor(encode_instruction("pick up the milk"))[None]
        began = time.perf_counter()
        with th.no_grad():
            if model.autoregressive:
                tokens, output = model.decode(images, instruction, choose=lambda logits: logits.argmax(dim=-1))
            else:
                output = model(images, instruction)
                tokens = output.logits.argmax(dim=-1)
        result["decision_seconds"] = time.perf_counter() - began
        result["tokens"] = tokens[0].tolist()
        result["finite"] = bool(output.logits.isfinite().all())
        result["anonymous_after_decision"] = memory("RssAnon")
    return result


def scaled_openvla(input_profile: str) -> OpenVLAModel:
    """
    OpenVLA's architecture with about as many parameters as the body ``tiny``, two cameras, 7 or 8 x 7 tokens.

    :param input_profile: see :class:`OpenVLAConfig`
    :return: the model, with random weights
    """
    tiny = _tiny_golden()
    vision = dict(hidden_size=96, num_hidden_layers=5, num_attention_heads=4, image_size=64, patch_size=8)
    config = OpenVLAConfig(
        text_config=dict(
            vocab_size=32064, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        ),
        dino_config=dict(vision, num_register_tokens=4),
        siglip_config=dict(vision, intermediate_size=256),
        norm_stats={tiny.LIBERO_KEY: tiny.statistics(tiny.LIBERO_KEY)},
        input_profile=input_profile,
        image_keys=["agentview", "wrist"],
        image_size=[64, 64],
        proprio_inputs=8,
        proprio_dim=9,
    )
    model = OpenVLAModel(config)
    model.tokenizer = PromptTokenizer(tiny.tokenizer_json())
    return model


def tiny_body() -> TinyVLAModel:
    """
    :return: the body of the main job, with random weights
    """
    config = TinyVLAConfig.from_spaces(
        spaces.Dict(
            agentview=spaces.Box(0, 255, (64, 64, 3), np.uint8),
            wrist=spaces.Box(0, 255, (64, 64, 3), np.uint8),
            instruction=spaces.Box(0, 255, (128,), np.uint8),
            proprio=spaces.Box(-np.inf, np.inf, (9,), np.float32),
        ),
        spaces.MultiDiscrete([256] * 56),
    )
    return TinyVLAModel(config)  # type: ignore[arg-type]


def _inputs(batch: int) -> dict[str, Any]:
    generator = th.Generator().manual_seed(0)
    images = {
        key: th.randint(0, 256, (batch, 3, 64, 64), dtype=th.uint8, generator=generator)
        for key in ("agentview", "wrist")
    }
    instruction = th.as_tensor(encode_instruction("pick up the milk and place it in the basket"))[None].repeat(batch, 1)
    return {"images": images, "instruction": instruction, "proprio": th.zeros(batch, 9)}


def decide(model: nn.Module, batch: int) -> Callable[[], Any]:
    """
    :return: a function that makes ``batch`` decisions
    """
    inputs = _inputs(batch)

    @th.no_grad()
    def run() -> Any:
        if model.autoregressive:  # type: ignore[truthy-function]
            return model.decode(**inputs, choose=lambda logits: logits.argmax(dim=-1))  # type: ignore[operator]
        return model(**inputs).logits.argmax(dim=-1)

    return run


def learn(model: nn.Module, batch: int) -> Callable[[], Any]:
    """
    :return: a function that computes the gradient of a cross-entropy over ``batch`` decisions
    """
    inputs = _inputs(batch)
    labels = th.zeros(batch, model.config.n_tokens, dtype=th.long)  # type: ignore[union-attr,arg-type]
    if model.autoregressive:  # type: ignore[truthy-function]
        inputs["tokens"] = labels

    def run() -> None:
        model.zero_grad()
        th.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()

    return run


def speed(repeats: int) -> dict[str, Any]:
    """
    :param repeats: turns of each model
    :return: by model: parameters, decisions and tokens per second, seconds of a gradient over 32 decisions
    """
    models: dict[str, nn.Module] = {
        "tiny": tiny_body(),
        "OpenVLA-OFT, scaled down": scaled_openvla("simplevla-rl"),
        "OpenVLA, scaled down": scaled_openvla("openvla"),
    }
    jobs: dict[str, Callable[[nn.Module], Callable[[], Any]]] = {
        "decide_1": lambda m: decide(m, 1),
        "decide_8": lambda m: decide(m, 8),
        "gradient_32": lambda m: learn(m, 32),
    }
    times: dict[str, dict[str, list[float]]] = {name: {job: [] for job in jobs} for name in models}
    for job, make in jobs.items():
        runs = {name: make(model) for name, model in models.items()}
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                times[name][job].append(time.perf_counter() - began)
    rows = {}
    for name, model in models.items():
        seconds = {job: float(np.median(values)) for job, values in times[name].items()}
        n_tokens = int(model.config.n_tokens)  # type: ignore[union-attr,arg-type]
        rows[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameters_without_vocabulary": sum(
                p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n
            ),
            "n_tokens": n_tokens,
            "decisions_per_second_1": 1 / seconds["decide_1"],
            "decisions_per_second_8": 8 / seconds["decide_8"],
            "tokens_per_second_8": 8 * n_tokens / seconds["decide_8"],
            "gradient_32_seconds": seconds["gradient_32"],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "speed"))
    parser.add_argument("--folder", type=Path, default=Path("runs/openvla_size"), help="for the checkpoint")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint")
    parser.add_argument("--no-decision", action="store_true", help="load only")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/openvla_size"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.folder / NAME
    if args.child:
        print(json.dumps(load(directory, not args.no_decision)), flush=True)
        return
    if args.what == "speed":
        results: dict[str, Any] = {"threads": th.get_num_threads(), "speed": speed(args.repeats)}
    else:
        written = write_random(args.folder)
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"Loading failed:\n{done.stderr[-3000:]}")
        results = {"written": written, "loaded": json.loads(done.stdout.splitlines()[-1])}
        if not args.keep:
            shutil.rmtree(directory)
    results["cores"] = os.cpu_count()
    print(json.dumps(results, indent=1))
    args.output.mkdir(parents=True, exist_ok=True)
    write_results(args.output / f"{args.what}.json", results)


if __name__ == "__main__":
    main()
