"""
Make the golden files of this folder with the reference code. They are committed; this says how they were made.

    python make_golden.py observation                     # with LIBERO: a stock observation
    python make_golden.py all --references DIR            # with the reference's environment

``DIR`` holds public repositories under these names: ``openvla`` (openvla/openvla c8f03f4), ``openvla-oft``
(moojink/openvla-oft 213c5ff), ``transformers`` (moojink/transformers-openvla-oft bc339d9), ``SimpleVLA-RL``
(PRIME-RL/SimpleVLA-RL 7c51662), ``RLinf`` (RLinf/RLinf a3816b5), and ``torchvision`` (the contents of its wheel). The
environment was Python 3.11 with torch 2.13, tensorflow-cpu 2.21, timm 0.9.16 and tokenizers 0.19.1, on x86-64.

Packages are imported without their ``__init__`` where those need what is not installed. Nothing of the references is
changed; where a constant (the robot) is set from outside, it is set in the way that the reference offers.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any, Union

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import tiny  # noqa: E402

CASES = (
    "images",
    "tensorflow",
    "actions",
    "prompts",
    "simplevla",
    "simplevla_wrist",
    "simplevla_arms",
    "rlinf",
    "rlinf_bfloat16",
    "openvla",
)


def observation() -> None:
    """
    A stock LIBERO observation: first task of LIBERO-Object, its first official state, 10 steps of doing nothing.

    ``observation.npz``, which the references were given, is an earlier one, with the dark floor of MuJoCo 3.17.
    """
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark_dict()["libero_object"]()
    task = suite.get_task(0)
    bddl = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
    env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=256, camera_widths=256)
    env.seed(0)
    env.reset()
    obs = env.set_init_state(suite.get_task_init_states(0)[0])
    for _ in range(10):
        obs, *_ = env.step([0.0] * 6 + [-1.0])
    names = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
    np.savez_compressed(
        HERE / "stock_observation.npz",
        agentview=obs["agentview_image"],
        wrist=obs["robot0_eye_in_hand_image"],
        instruction=task.language,
        **{name.removeprefix("robot0_"): obs[name] for name in names},
    )
    env.close()


# ------------------------------------------------------------------------------------------------------- references


def package(name: str, path: Path) -> None:
    """Make ``name`` importable from ``path`` without running its ``__init__``."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__spec__.submodule_search_locations = module.__path__
    sys.modules[name] = module


def functions(path: Path, names: list[str], **namespace: Any) -> types.SimpleNamespace:
    """Functions of a file that cannot be imported here."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(tree, str(path), "exec"), namespace)
    return types.SimpleNamespace(**{name: namespace[name] for name in names})


def prepare(references: Path) -> None:
    sys.path.insert(0, str(references / "transformers" / "src"))
    package("torchvision", references / "torchvision" / "torchvision")
    sys.modules["torchvision"].__version__ = "0.0"
    sys.modules["torchvision.models"] = None  # type: ignore[assignment]
    package("torchvision.ops", references / "torchvision" / "torchvision" / "ops")
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def build(kwargs: dict[str, Any], **arguments: Any) -> VisionTransformer:
        given = {key: kwargs[key] for key in ("num_classes", "img_size", "act_layer") if key in kwargs}
        return VisionTransformer(patch_size=14, **arguments, **given)

    def tiny_dino(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return build(kwargs, embed_dim=32, depth=3, num_heads=2, init_values=1e-5, reg_tokens=4, no_embed_class=True)

    def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return build(kwargs, embed_dim=48, depth=3, num_heads=2, mlp_ratio=2, class_token=False, global_pool="map")

    for function in (tiny_dino, tiny_siglip):
        function.__module__ = "timm.models.vision_transformer"
        timm.models.register_model(function)


def reference_packages(references: Path, kind: str) -> tuple[Any, Any]:
    """The reference's modules with its model and its processor."""
    if kind == "simplevla":
        root = references / "SimpleVLA-RL" / "verl"
        base = "verl.utils.vla_utils.openvla_oft"
        for name in ("verl", "verl.utils", "verl.utils.vla_utils", base):
            package(name, root.joinpath(*name.split(".")[1:]))
        return tuple(importlib.import_module(f"{base}.{part}_prismatic") for part in ("modeling", "processing"))
    root = references / ("openvla" if kind == "openvla" else "openvla-oft") / "prismatic"
    for name in ("", ".extern", ".extern.hf", ".vla", ".training", ".vla.datasets", ".vla.datasets.rlds"):
        package(f"prismatic{name}", root.joinpath(*name.split(".")[1:]))
    if kind == "openvla":
        base = "prismatic.extern.hf"
        return tuple(importlib.import_module(f"{base}.{part}_prismatic") for part in ("modeling", "processing"))
    root = references / "RLinf" / "rlinf"
    for name in ("", ".models", ".models.embodiment", ".models.embodiment.modules", ".utils",
                 ".models.embodiment.prismatic", ".models.embodiment.openvla_oft.rlinf"):  # fmt: skip
        package(f"rlinf{name}", root.joinpath(*name.split(".")[1:]))
    utils = types.ModuleType("rlinf.utils.utils")
    utils.compute_entropy_from_logits = utils.compute_logprobs_from_logits = lambda logits, target: logits[..., 0]
    sys.modules["rlinf.utils.utils"] = utils
    return (
        importlib.import_module("rlinf.models.embodiment.openvla_oft.rlinf.openvla_oft_action_model"),
        importlib.import_module("rlinf.models.embodiment.prismatic.processing_prismatic"),
    )


def load_weights(model: Any, proprio: int = 0) -> None:
    import torch as th

    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("proprio_projector"):
            state[name] = th.as_tensor(tiny.weight(name, tuple(tensor.shape)))
    if proprio:
        state |= {f"proprio_projector.{name}": th.as_tensor(x) for name, x in tiny.proprio_weights(proprio).items()}
    model.load_state_dict(state)
    model.eval()
    names = {name: list(x.shape) for name, x in state.items() if not name.startswith("proprio_projector")}
    (HERE / "shapes.json").write_text(json.dumps(names, indent=0) + "\n")


def make_config(config_class: Any, key: str, **fields: Any) -> Any:
    config = config_class(**{**tiny.published_config(key), **fields})
    config.timm_model_ids = ["tiny_dino", "tiny_siglip"]
    return config


def make_tokenizer(**kwargs: Any) -> Any:
    from transformers import LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.json"
        path.write_text(tiny.tokenizer_json(), encoding="utf-8")
        return LlamaTokenizerFast(tokenizer_file=str(path), pad_token="<PAD>", legacy=False, **kwargs)


PREPROCESSOR = dict(
    use_fused_vision_backbone=True,
    image_resize_strategy="resize-naive",
    input_sizes=[[3, 224, 224]] * 2,
    interpolations=["bicubic"] * 2,
    means=[[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
    stds=[[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
)


def tensorflow_functions(references: Path) -> types.SimpleNamespace:
    """SimpleVLA-RL's image path and its treatment of the gripper."""
    import math

    import tensorflow as tf
    from PIL import Image

    root = references / "SimpleVLA-RL" / "verl"
    rollout = functions(
        root / "workers" / "rollout" / "rob_rollout.py", ["crop_and_resize", "center_crop_image"],
        tf=tf, np=np, Image=Image,
    )  # fmt: skip
    libero = functions(
        root / "utils" / "libero_utils.py",
        ["resize_image", "get_libero_image", "get_libero_wrist_image", "quat2axisangle", "normalize_gripper_action",
         "invert_gripper_action"],
        tf=tf, np=np, math=math,
    )  # fmt: skip
    return types.SimpleNamespace(**vars(rollout), **vars(libero))


def stock() -> dict[str, np.ndarray]:
    with np.load(HERE / "observation.npz") as file:
        return dict(file)


def seen_by_simplevla(references: Path) -> tuple[Any, Any]:
    """The two cameras' pictures as PIL pictures, ready for the processor."""
    from PIL import Image

    tf = tensorflow_functions(references)
    obs = {"agentview_image": stock()["agentview"], "robot0_eye_in_hand_image": stock()["wrist"]}
    pictures = (tf.get_libero_image(obs, 224), tf.get_libero_wrist_image(obs, 224))
    return tuple(tf.center_crop_image(Image.fromarray(picture).convert("RGB")) for picture in pictures)


def prompt_of(instruction: str) -> str:
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def save(name: str, **arrays: Any) -> None:
    np.savez_compressed(HERE / f"{name}.npz", **{key: np.asarray(value) for key, value in arrays.items()})


# ------------------------------------------------------------------------------------------------------------- cases


def images(references: Path) -> None:
    _, processing = reference_packages(references, "simplevla")
    processor = processing.PrismaticImageProcessor(**PREPROCESSOR)
    agentview, wrist = seen_by_simplevla(references)
    _, processing = reference_packages(references, "rlinf")
    import torch as th

    rlinf = processing.PrismaticImageProcessor(**PREPROCESSOR)
    turned = th.as_tensor(stock()["agentview"][::-1, ::-1].copy()).permute(2, 0, 1)[None, None]
    bicubic = rlinf(turned, return_tensors="pt")["pixel_values"][0, 0]
    mean, std = (th.tensor(PREPROCESSOR[key][1])[:, None, None] for key in ("means", "stds"))
    from PIL import Image

    wide = np.hstack([stock()["agentview"][:240], stock()["wrist"][:240, :64]])  # 240 x 320, as RoboTwin's
    save(
        "images",
        wide=np.asarray(tensorflow_functions(references).center_crop_image(Image.fromarray(wide)))[::4, ::4],
        agentview=np.asarray(agentview),
        wrist=np.asarray(wrist)[::4, ::4],
        bicubic=((bicubic[3:] * std + mean) * 255).round().to(th.uint8).permute(1, 2, 0).numpy(),
        pixels=processor(agentview, return_tensors="pt")["pixel_values"][0][:, ::8, ::8].numpy(),
        bicubic_pixels=bicubic[:, ::8, ::8].numpy(),
    )


def tensorflow(references: Path) -> None:
    """Checksums of pictures of many sizes after openvla-oft's resize, and as its model sees them."""
    import tensorflow as tf
    from PIL import Image

    oft = functions(
        references / "openvla-oft" / "experiments" / "robot" / "openvla_utils.py",
        ["resize_image_for_policy", "crop_and_resize", "center_crop_image", "check_image_format",
         "prepare_images_for_vla"],
        tf=tf, np=np, Image=Image, OPENVLA_IMAGE_SIZE=224, Tuple=tuple, Union=Union, List=list, Any=Any,
    )  # fmt: skip
    crops = types.SimpleNamespace(center_crop=True)
    sums = {}
    for height, width in tiny.PICTURE_SIZES:
        picture = tiny.noise(height, width)
        seen = np.asarray(oft.prepare_images_for_vla([picture], crops)[0])
        sums[f"{height}x{width}"] = [
            zlib.crc32(part.tobytes()) for part in (oft.resize_image_for_policy(picture, 224), seen)
        ]
    (HERE / "tensorflow.json").write_text(json.dumps(sums, indent=0) + "\n")


def actions(references: Path) -> None:
    """Every token of every dimension to what SimpleVLA-RL gives LIBERO."""
    modeling, _ = reference_packages(references, "simplevla")
    tf = tensorflow_functions(references)
    self = types.SimpleNamespace(get_action_stats=lambda key: tiny.statistics(key)["action"])
    centers = np.linspace(-1, 1, 256)
    centers = (centers[:-1] + centers[1:]) / 2.0
    ids = np.repeat(np.arange(31744, 32000)[:, None], 7, axis=1)
    bins = np.clip(32000 - ids - 1, a_min=0, a_max=254)
    unnormalised = modeling.OpenVLAForActionPrediction._unnormalize_actions(self, centers[bins], tiny.LIBERO_KEY)
    executed = tf.invert_gripper_action(tf.normalize_gripper_action(unnormalised, binarize=True))
    quaternions = np.random.default_rng(0).normal(size=(16, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    quaternions[0] = [0.0, 0.0, 0.0, 1.0]
    save(
        "actions",
        ids=ids[:, 0],
        bins=bins[:, 0],
        unnormalised=unnormalised,
        executed=executed,
        quaternions=quaternions,
        axis_angles=[tf.quat2axisangle(q.copy()) for q in quaternions],
    )


def prompts(references: Path) -> None:
    tokenizer = make_tokenizer(padding_side="left")
    arrays = {}
    for i, instruction in enumerate(tiny.INSTRUCTIONS):
        arrays[f"simplevla_{i}"] = tokenizer(prompt_of(instruction)).input_ids + [29871]
        # RLinf ends the prompt with a space instead
        arrays[f"rlinf_{i}"] = tokenizer(prompt_of(instruction) + " ").input_ids
    save("prompts", **arrays)


def _simplevla(references: Path, name: str, key: str, n_images: int, proprio: np.ndarray | None) -> None:
    import torch as th

    modeling, processing = reference_packages(references, "simplevla")
    config = make_config(
        modeling.OpenVLAConfig, key, use_proprio=proprio is not None,
        proprio_dim=0 if proprio is None else proprio.shape[1], attn_implementation="sdpa",
    )  # fmt: skip
    model = modeling.OpenVLAForActionPrediction(config)
    model.vision_backbone.set_num_images_in_input(n_images)
    load_weights(model, 0 if proprio is None else proprio.shape[1])
    processor = processing.PrismaticImageProcessor(**PREPROCESSOR)
    agentview, wrist = (processor(x, return_tensors="pt")["pixel_values"][0] for x in seen_by_simplevla(references))
    order = [[agentview, wrist, agentview], [wrist, agentview, wrist]]
    pixels = th.stack([th.cat(row[:n_images]) for row in order])
    tokenizer = make_tokenizer()
    ids = [th.tensor(tokenizer(prompt_of(text)).input_ids + [29871]) for text in tiny.INSTRUCTIONS[:2]]
    # As in process_input: padded on the right, then sorted so that the padding is on the left
    padded = th.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    order = th.argsort(padded.eq(tokenizer.pad_token_id).int(), dim=1, descending=True, stable=True)
    padded = th.gather(padded, 1, order)
    mask = padded.ne(tokenizer.pad_token_id)
    arguments = dict(proprio=None if proprio is None else th.as_tensor(proprio))
    logits = []
    model.language_model.register_forward_hook(lambda module, args, output: logits.append(output.logits))
    with th.no_grad():
        features = model.vision_backbone(pixels)
        projected = model.projector(features)
        actions, response = model.generate_action_verl(
            input_ids=padded, pixel_values=pixels, attention_mask=mask, padding_idx=tokenizer.pad_token_id,
            do_sample=False, unnorm_key=key, temperature=1.0, **arguments,
        )  # fmt: skip
        n_tokens = response.shape[1]
        # The padding is behind the stop token, so the actions begin where each prompt ends
        prefix = projected.shape[1] + (proprio is not None)
        rows = [row[prefix + len(x) - 1 :][:n_tokens] for row, x in zip(logits[0], ids, strict=True)]
        alone = model.forward(  # the first prompt without any padding, in the code path of training
            input_ids=ids[0][None], pixel_values=pixels[:1], attention_mask=th.ones_like(ids[0][None]),
            proprio=None if proprio is None else arguments["proprio"][:1],
        )  # fmt: skip
    save(
        name,
        features=features[:, ::32],
        projected=projected[:, ::32],
        logits=th.stack(rows)[:, ::7, -320:-64],
        alone=alone[:, ::7, -320:-64],
        response=response,
        actions=actions,
    )


def simplevla(references: Path) -> None:
    _simplevla(references, "simplevla", tiny.LIBERO_KEY, 1, None)


def normalised_proprio(proprio: np.ndarray, key: str, kind: str) -> np.ndarray:
    references = Path(os.environ["OPENVLA_REFERENCES"])
    path = references / "SimpleVLA-RL" / "verl" / "workers" / "rollout" / "rob_rollout.py"
    function = functions(path, ["normalize_proprio"], np=np, ACTION_PROPRIO_NORMALIZATION_TYPE=kind).normalize_proprio
    return function(proprio, tiny.statistics(key)["proprio"]).astype(np.float32)


def libero_proprio() -> np.ndarray:
    obs = stock()
    tf = tensorflow_functions(Path(os.environ["OPENVLA_REFERENCES"]))
    state = np.concatenate([obs["eef_pos"], tf.quat2axisangle(obs["eef_quat"].copy()), obs["gripper_qpos"]])
    return np.stack([state, state])


def arms_proprio() -> np.ndarray:
    return np.random.default_rng(3).uniform(-3, 3, (2, 14))


def simplevla_wrist(references: Path) -> None:
    proprio = normalised_proprio(libero_proprio(), tiny.LIBERO_KEY, "bounds_q99")
    _simplevla(references, "simplevla_wrist", tiny.LIBERO_KEY, 2, proprio)


def simplevla_arms(references: Path) -> None:
    proprio = normalised_proprio(arms_proprio(), tiny.ARMS_KEY, "bounds")
    _simplevla(references, "simplevla_arms", tiny.ARMS_KEY, 3, proprio)


def rlinf(references: Path) -> None:
    import torch as th

    _rlinf(references, "rlinf", th.float32)


def rlinf_bfloat16(references: Path) -> None:
    import torch as th

    _rlinf(references, "rlinf_bfloat16", th.bfloat16)


def _rlinf(references: Path, name: str, dtype: Any) -> None:
    import torch as th

    modeling, processing = reference_packages(references, "rlinf")
    config = make_config(
        modeling.OpenVLAOFTConfig, tiny.LIBERO_KEY, unnorm_key="libero_object", attn_implementation="sdpa"
    )
    model = modeling.OpenVLAOFTForRLActionPrediction(
        config, action_dim=7, num_action_chunks=8, add_value_head=False, max_prompt_length=128
    )
    load_weights(model)
    model.to(dtype)  # as RLinf's get_model does: buffers are cast too
    image_processor = processing.PrismaticImageProcessor(**PREPROCESSOR)
    tokenizer = make_tokenizer(padding_side="left")
    processor = processing.MultiInputPrismaticProcessor(image_processor=image_processor, tokenizer=tokenizer)
    model.setup_config_and_processor(config, processor)
    pictures = np.stack([stock()[key][::-1, ::-1] for key in ("agentview", "wrist")])
    obs = {
        "main_images": th.as_tensor(pictures),
        "wrist_images": None,
        "states": None,
        "task_descriptions": tiny.INSTRUCTIONS[:2],
    }
    with th.no_grad():
        actions, result = model.predict_action_batch(env_obs=obs, do_sample=False)
        inputs = {key: value for key, value in result["forward_inputs"].items()}
        logits = model.default_forward(forward_inputs=inputs).logits[:, -57:-1]
    save(
        name,
        logits=logits[:, ::7, -320:-64].float(),
        response=inputs["action_tokens"].reshape(2, -1),
        actions=actions,
        prompt_length=inputs["input_ids"].shape[1],
    )


def openvla(references: Path) -> None:
    import torch as th

    modeling, processing = reference_packages(references, "openvla")
    # The fork's attention is bidirectional in "sdpa" only
    config = make_config(modeling.OpenVLAConfig, tiny.LIBERO_KEY, attn_implementation="eager")
    model = modeling.OpenVLAForActionPrediction(config)
    load_weights(model)
    processor = processing.PrismaticImageProcessor(**PREPROCESSOR)
    pixels = processor(seen_by_simplevla(references)[0], return_tensors="pt")["pixel_values"]
    ids = th.tensor([make_tokenizer()(prompt_of(tiny.INSTRUCTIONS[0])).input_ids + [29871]])
    mask = th.ones_like(ids)
    with th.no_grad():
        # Trained models answer with action tokens by themselves
        arguments = dict(
            pixel_values=pixels, attention_mask=mask, do_sample=False,
            prefix_allowed_tokens_fn=lambda batch, ids: list(range(31744, 32000)),
        )  # fmt: skip
        actions = model.predict_action(ids, tiny.LIBERO_KEY, **arguments)
        generated = model.generate(ids, max_new_tokens=7, return_dict_in_generate=True, output_logits=True, **arguments)
        given = th.tensor([[31999, 31744, 31872, 31800, 31900, 31850, 31750]])
        full = th.cat([ids, given], dim=1)
        forced = model(input_ids=full, pixel_values=pixels, attention_mask=th.ones_like(full)).logits[:, -8:-1]
    save(
        "openvla",
        response=generated.sequences[:, -7:],
        logits=th.stack(generated.logits, dim=1)[..., -320:-64],
        given=given,
        forced=forced[..., -320:-64],
        actions=actions,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["observation", "all", *CASES])
    parser.add_argument("--references", type=Path)
    arguments = parser.parse_args()
    if arguments.case == "observation":
        observation()
    elif arguments.case == "all":
        for case in CASES:  # each in a process: the references' constants are set once
            robot = "ALOHA" if case == "simplevla_arms" else "LIBERO"
            environment = {
                **os.environ,
                "ROBOT_PLATFORM": robot,
                "OPENVLA_REFERENCES": str(arguments.references),
                "PYTHONPATH": "",
            }
            command = [sys.executable, __file__, case, "--references", str(arguments.references)]
            subprocess.run(command, check=True, env=environment)
    else:
        prepare(arguments.references)
        globals()[arguments.case](arguments.references)


if __name__ == "__main__":
    main()
