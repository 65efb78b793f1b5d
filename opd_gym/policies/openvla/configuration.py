"""Configuration of OpenVLA: the published ``config.json``, and what else is needed to run the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from transformers import Dinov2WithRegistersConfig, LlamaConfig, PretrainedConfig, SiglipVisionConfig

from opd_gym.actions import statistics_of_positions
from opd_gym.checkpoints import CONFIG_FILE
from opd_gym.checks import check_range
from opd_gym.policies.body import VLAConfig, check_count, configuring
from opd_gym.policies.openvla.published import (
    MODEL_TYPE,
    InputProfile,
    complete_values,
    data_set,
    get_profile,
    locate,
    read_values,
)

# The same in every published checkpoint. Written so that other software can read what is saved here.
PUBLISHED_FIELDS = {
    "arch_specifier": "no-align+fused-gelu-mlp",
    "hf_llm_id": "meta-llama/Llama-2-7b-hf",
    "image_resize_strategy": "resize-naive",
    "llm_backbone_id": "llama2-7b-pure",
    "llm_max_length": 2048,
    "output_projector_states": False,
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "use_fused_vision_backbone": True,
    "vision_backbone_id": "dinosiglip-vit-so-224px",
}

# ImageNet's, rounded to bfloat16, as in the published preprocessor_config.json
PIXEL_MEANS = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
PIXEL_STDS = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))


def _sub_config(config_class: type[PretrainedConfig], given: Any, **published: Any) -> Any:
    if isinstance(given, PretrainedConfig):
        return given
    # Notes of transformers and not arguments
    values = {k: v for k, v in (given or {}).items() if k not in ("model_type", "torch_dtype", "transformers_version")}
    return config_class(**{**published, **values})


class OpenVLAConfig(VLAConfig):
    """
    Configuration of :class:`OpenVLAModel`. The arguments of :class:`VLAConfig`, of which ``statistics`` follow from
    ``norm_stats`` where there are any, and:

    :param text_config: of the language model; None for Llama-2-7B with the 32,064 rows of OpenVLA
    :param dino_config: of the first vision transformer; None for DINOv2 ViT-L/14 with registers at 224 pixels
    :param siglip_config: of the second; None for SigLIP So400m/14 at 224 pixels
    :param norm_stats: statistics of the data sets, ``{name: {"action": {"q01": ..., "q99": ..., "mask": ...},
        "proprio": ...}}``
    :param unnorm_key: name of the data set whose statistics turn tokens into actions; None if there is one only
    :param input_profile: name of an :class:`InputProfile`
    :param libero_images: the training pictures are those of LIBERO's data sets: raw pictures of MuJoCo turned by 180
        degrees, which makes them upright and mirrored. Other pictures are not mirrored
    :param normalization: "bounds_q99" if actions and proprioception were normalised with q01 and q99, "bounds" with min
        and max
    :param gripper: "open_is_one" if the last action dimension is 1 for an open gripper and 0 for a closed one (LIBERO),
        see :func:`opd_gym.actions.decode_tokens`; None if it is as the env wants it
    :param joint_positions: actions are joint positions in rad and gripper openings from 0 to 1, of two arms (RoboTwin);
        :attr:`statistics` are those of the same tokens in the units of the envs here
    :param proprio_inputs: inputs of the proprioception projector; 0 if there is none. 8 inputs are position,
        axis-angle and fingers, which are made from LIBERO's 9 numbers (position, quaternion, fingers)
    :param pad_to_multiple_of: number of rows at the end of the embeddings that belong to no token
    :param pad_token_id: token that fills up shorter prompts
    :param rounded_frequencies: the weights were used in bfloat16, in which some profiles round the frequencies of the
        rotary positions (:attr:`InputProfile.rounded_frequencies`). Loading a checkpoint finds it out
    :param pixel_means: means of the three channels for either vision transformer
    :param pixel_stds: standard deviations, likewise
    :raises ValueError: unknown profile, normalisation, data set or vision backbone; statistics that do not fit
    """

    model_type = MODEL_TYPE
    sub_configs = {  # noqa: RUF012
        "text_config": LlamaConfig,
        "dino_config": Dinov2WithRegistersConfig,
        "siglip_config": SiglipVisionConfig,
    }

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        dino_config: dict[str, Any] | PretrainedConfig | None = None,
        siglip_config: dict[str, Any] | PretrainedConfig | None = None,
        norm_stats: dict[str, Any] | None = None,
        unnorm_key: str | None = None,
        input_profile: str = "simplevla-rl",
        libero_images: bool = True,
        normalization: str = "bounds_q99",
        gripper: str | None = "open_is_one",
        joint_positions: bool = False,
        proprio_inputs: int = 0,
        pad_to_multiple_of: int = 64,
        pad_token_id: int = 32000,
        rounded_frequencies: bool = False,
        pixel_means: Any = PIXEL_MEANS,
        pixel_stds: Any = PIXEL_STDS,
        image_keys: list[str] | tuple[str, ...] = ("agentview",),
        image_size: list[int] | tuple[int, int] = (256, 256),
        proprio_dim: int = 0,
        statistics: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        profile = get_profile(input_profile)
        flags = dict(
            libero_images=libero_images, joint_positions=joint_positions, rounded_frequencies=rounded_frequencies
        )
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r:.80}.")
        if gripper not in (None, "open_is_one"):
            raise ValueError(f'gripper must be "open_is_one" or None, got {gripper!r:.80}.')
        if not isinstance(norm_stats or {}, Mapping) or not all(
            isinstance(statistics_of, Mapping) for statistics_of in (norm_stats or {}).values()
        ):
            raise ValueError(f"norm_stats must map data sets to statistics, got {norm_stats!r:.80}.")
        counts = dict(proprio_inputs=proprio_inputs, pad_to_multiple_of=pad_to_multiple_of, pad_token_id=pad_token_id)
        for name, count in counts.items():
            check_count(name, count, least=0)
        for name, pixels, interval in (
            ("pixel_means", pixel_means, "(-inf, inf)"),
            ("pixel_stds", pixel_stds, "(0, inf)"),
        ):
            if np.shape(pixels) != (2, 3):
                raise ValueError(f"{name} must be two rows of three numbers, got {pixels!r:.80}.")
            for number in np.ravel(pixels):
                check_range(interval, **{name: float(number)})
        if normalization not in ("bounds", "bounds_q99"):
            raise ValueError(f'normalization must be "bounds" or "bounds_q99", got {normalization!r}.')
        backbone = kwargs.get("vision_backbone_id", PUBLISHED_FIELDS["vision_backbone_id"])
        if backbone != PUBLISHED_FIELDS["vision_backbone_id"]:
            raise ValueError(
                f"The checkpoint's vision backbone is {backbone!r}; OpenVLA's is "
                f"{PUBLISHED_FIELDS['vision_backbone_id']!r}, and no other is supported."
            )
        for name, value in PUBLISHED_FIELDS.items():
            setattr(self, name, kwargs.pop(name, value))
        self.text_config = _sub_config(LlamaConfig, text_config, vocab_size=32064, pad_token_id=pad_token_id)
        self.dino_config = _sub_config(
            Dinov2WithRegistersConfig, dino_config, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            patch_size=14, image_size=224, num_register_tokens=4, layerscale_value=1e-5,
        )  # fmt: skip
        # GELU and not its tanh approximation, which transformers' own SigLIP uses: so was OpenVLA trained
        self.siglip_config = _sub_config(
            SiglipVisionConfig, siglip_config, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
            num_attention_heads=16, patch_size=14, image_size=224, hidden_act="gelu",
        )  # fmt: skip
        for name, part in (("dino_config", self.dino_config), ("siglip_config", self.siglip_config)):
            check_count(f"num_hidden_layers of {name}", part.num_hidden_layers)
            check_count(f"patch_size of {name}", part.patch_size)
            check_count(f"image_size of {name}", part.image_size, least=part.patch_size)
        self.norm_stats = norm_stats or {}
        self.unnorm_key = unnorm_key
        self.input_profile = input_profile
        self.libero_images = libero_images
        self.normalization = normalization
        self.gripper = gripper
        self.joint_positions = joint_positions
        self.proprio_inputs = proprio_inputs
        self.pad_to_multiple_of = pad_to_multiple_of
        self.rounded_frequencies = rounded_frequencies
        self.pixel_means = [list(row) for row in pixel_means]
        self.pixel_stds = [list(row) for row in pixel_stds]
        kwargs.setdefault("n_bins", kwargs.pop("n_action_bins", 256))
        kwargs.pop("image_sizes", None)
        kwargs.setdefault("n_tokens", 56 if profile.parallel else 7)
        if self.norm_stats:
            # Those that were saved may be another data set's by now
            statistics = self._action_statistics()
        super().__init__(
            image_keys=image_keys,
            image_size=image_size,
            proprio_dim=proprio_dim,
            statistics=statistics,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        if self.action_ids.start < 0:
            raise ValueError(
                f"The vocabulary of {self.text_config.vocab_size} is too small for {self.n_bins} bins and "
                f"{pad_to_multiple_of} rows of padding."
            )
        if pad_token_id >= self.text_config.vocab_size:
            raise ValueError(f"pad_token_id {pad_token_id} is outside of {self.text_config.vocab_size} tokens.")
        if proprio_inputs and proprio_inputs != proprio_dim and (proprio_dim, proprio_inputs) != (9, 8):
            raise ValueError(
                f"The proprioception projector has {proprio_inputs} inputs, the observation {proprio_dim} numbers. "
                "Set proprio_dim to the env's: as many as the projector's, or LIBERO's 9 for a projector of 8."
            )
        if proprio_inputs and self.norm_stats:
            n_statistics = np.size(self.data_statistics("proprio")["q01"])
            if n_statistics != proprio_inputs:
                raise ValueError(
                    f"The proprioception projector has {proprio_inputs} inputs, the proprioception statistics of "
                    f"{data_set(self.norm_stats, unnorm_key)!r} are for {n_statistics}. Choose the data set that the "
                    "checkpoint was trained on (unnorm_key), or put its statistics into dataset_statistics.json."
                )
        if statistics is not None and np.size(statistics["q01"]) != self.action_dim:
            raise ValueError(
                f"The statistics are for {np.size(statistics['q01'])} action dimensions, action_dim is "
                f"{self.action_dim}."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return self.text_config.hidden_size

    @property
    def profile(self) -> InputProfile:
        """What :attr:`input_profile` means."""
        return get_profile(self.input_profile)

    @property
    def vision_size(self) -> int:
        """Side of the pictures that the vision transformers see, in pixels."""
        return int(self.dino_config.image_size)

    @property
    def n_patches(self) -> int:
        """Number of tokens that all pictures of an observation become."""
        return len(self.image_keys) * (self.vision_size // int(self.dino_config.patch_size)) ** 2

    @property
    def action_ids(self) -> slice:
        """The ids of the action tokens; the highest id is the lowest bin."""
        end = self.text_config.vocab_size - self.pad_to_multiple_of
        return slice(end - self.n_bins, end)

    def data_statistics(self, kind: str) -> dict[str, Any]:
        """
        :param kind: "action" or "proprio"
        :return: ``q01``, ``q99`` (or min and max, under these names) and ``mask``, of :attr:`unnorm_key`'s data set;
            ``min`` and ``max`` as well where constant dimensions do not follow from these
        :raises ValueError: no or several data sets and no :attr:`unnorm_key`; unknown data set; statistics missing
        """
        key = data_set(self.norm_stats, self.unnorm_key)
        values = self.norm_stats[key].get(kind)
        low, high = ("q01", "q99") if self.normalization == "bounds_q99" else ("min", "max")
        if not values or low not in values or high not in values:
            raise ValueError(f"The statistics of {key!r} have no {kind!r} with {low!r} and {high!r}.")
        mask = values.get("mask", np.ones(np.shape(values[low]), dtype=bool))
        statistics = {"q01": values[low], "q99": values[high], "mask": mask}
        if "min" in values and "max" in values:
            constant = np.equal(values["min"], values["max"])
            if (constant != np.equal(values[low], values[high]) & mask).any():
                # Which dimensions are constant does not follow from the bounds
                statistics |= {"min": values["min"], "max": values["max"]}
        return statistics

    def _action_statistics(self) -> dict[str, Any]:
        statistics = self.data_statistics("action")
        if self.joint_positions:
            statistics = statistics_of_positions(statistics)
        return statistics if self.gripper is None else {**statistics, "gripper": self.gripper}

    def check_spaces(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """
        See :meth:`VLAConfig.check_spaces`. Instructions may be of any length: they become a prompt.
        """
        found = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
        if "instruction" in found:
            self.instruction_length = int(np.prod(found["instruction"].shape or (1,)))
        super().check_spaces(observation_space, action_space)

    def to_dict(self) -> dict[str, Any]:
        """Our fields, and the published ones where other software expects them."""
        values = super().to_dict()
        # As transformers 4 has it; newer ones read both
        rope = dict(values["text_config"].get("rope_parameters") or {})
        if "rope_theta" in rope:
            kind, theta = rope.pop("rope_type", "default"), rope.pop("rope_theta")
            scaling = None if kind == "default" else {**rope, "type": kind}
            values["text_config"] |= {"rope_theta": theta, "rope_scaling": scaling}
        values["n_action_bins"] = self.n_bins
        values["image_sizes"] = [self.vision_size, self.vision_size]
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """Everything: other software has other defaults."""
        return self.to_dict()

    @classmethod
    def from_checkpoint(cls, directory: Path, values: Mapping[str, Any], **fields: Any) -> OpenVLAConfig:
        """
        See :meth:`VLAConfig.from_checkpoint`. What a published ``config.json`` leaves out is inferred.

        :param directory: the checkpoint
        :param values: its ``config.json``
        :param fields: arguments of this class that are known besides
        :return: its configuration
        """
        return cls.from_dict(complete_values(directory, values, **fields))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **fields: Any
    ) -> OpenVLAConfig:
        """
        :param pretrained_model_name_or_path: directory of a published checkpoint, or its id on the hub
        :param fields: arguments of this class that are known besides, or to differ
        :return: its configuration
        """
        directory = locate(pretrained_model_name_or_path)
        values = read_values(directory)
        with configuring(directory / CONFIG_FILE):
            return cls.from_checkpoint(directory, values, **fields)
