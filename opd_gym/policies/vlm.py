"""Any image-text-to-text model of the transformers library as the body of a VLA."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import torch as th
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available

from opd_gym.checkpoints import resolve_checkpoint
from opd_gym.instructions import decode_instruction
from opd_gym.policies.adapters import cast_parameters
from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, configuring

PROMPT = "What action should the robot take to {instruction}?"
# Which of a processor's files says what class it is, from the newest layout to the oldest
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_MAX_CACHED_PROMPTS = 4096
_FILE_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


class VLMConfig(VLAConfig):
    """
    Configuration of :class:`VLMModel`. The arguments of :class:`VLAConfig`, and:

    :param model: pretrained model to start from: its directory, or its id on the Hugging Face hub (``owner/name``)
    :param vlm_config: configuration of that model, or its values; None to read it
    :param prompt: what is asked about the pictures, with ``{instruction}``
    :param bidirectional: all tokens attend to all others, as in OpenVLA-OFT, where the model takes its masks from
        transformers; otherwise only to those before, as the model was trained
    :param processor_kwargs: arguments with which the processor is read, for instance ``{"do_image_splitting": False}``
        or ``{"max_pixels": 50176}``: fewer and smaller pictures are the cheapest way to a faster policy
    :raises ValueError: not an image-text-to-text model; a prompt without the instruction
    :raises FileNotFoundError: there is no such pretrained model
    """

    model_type = "vlm_vla"
    sub_configs = {"vlm_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        vlm_config: PretrainedConfig | Mapping[str, Any] | None = None,
        prompt: str = PROMPT,
        bidirectional: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        # Whatever else stands in braces is looked up, or padded, with every instruction
        if {part[1:] for part in Formatter().parse(prompt) if part[1] is not None} != {("instruction", "", None)}:
            raise ValueError(f"The prompt must contain {{instruction}}, and nothing else in braces, got {prompt!r}.")
        if not isinstance(bidirectional, bool):
            raise ValueError(f"bidirectional must be True or False, got {bidirectional!r:.80}.")
        if model is not None:
            path = Path(model).expanduser()
            model = str(path.absolute()) if path.exists() else os.fspath(model)
            if vlm_config is None:
                found = AutoConfig.from_pretrained(find_model(model))
                found._name_or_path = ""  # a path of this machine would be saved with the configuration
                vlm_config = found
        if isinstance(vlm_config, Mapping):
            values = dict(vlm_config)
            vlm_config = CONFIG_MAPPING[values.pop("model_type")].from_dict(values)
        if vlm_config is not None and vlm_config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(
                f"{model or 'vlm_config'} is a model of type {vlm_config.model_type!r}, which transformers does not "
                "know as an image-text-to-text model (AutoModelForImageTextToText). A model of only text or only "
                "pictures cannot be the body of a VLA."
            )
        self.model = model
        self.vlm_config = vlm_config
        self.prompt = prompt
        self.bidirectional = bidirectional
        self.processor_kwargs = dict(processor_kwargs or {})
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return 0 if self.vlm_config is None else int(self.vlm_config.get_text_config().hidden_size)

    @property
    def pretrained_model(self) -> str | None:
        """See :attr:`VLAConfig.pretrained_model`."""
        return self.model

    @property
    def base_directory(self) -> Path | None:
        """See :attr:`VLAConfig.base_directory`."""
        return None if self.model is None else find_model(self.model)

    def without_base(self, values: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`VLAConfig.without_base`."""
        return {**values, "model": None}


def find_model(model: str) -> Path:
    """
    :param model: directory, or id on the hub
    :return: the directory
    :raises FileNotFoundError: there is none
    """
    try:
        directory = resolve_checkpoint(model)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(f"The pretrained model {model!r} was not found. {error}") from error
    if not directory.is_dir():
        raise FileNotFoundError(f"The pretrained model {model!r} was not found: {directory} is a file.")
    return directory


# ---------------------------------------------------------------------------------------------------------------------
# Processor


def load_processor(directory: str | os.PathLike[str], config: PretrainedConfig, **kwargs: Any) -> ProcessorMixin:
    """
    The processor of a model: its tokenizer, chat template and image processor.

    Many processors also take videos, for which transformers needs torchvision. Without torchvision such a processor is
    read without its part for videos, which no policy uses.

    :param directory: the model's
    :param config: the model's configuration
    :param kwargs: arguments of ``AutoProcessor.from_pretrained``
    :return: the processor
    :raises ValueError: there is none, or it takes no pictures
    """
    processor_class = _processor_class(Path(directory), config)
    if processor_class is None:
        raise ValueError(
            f"{directory} has no processor for pictures and text (processor_config.json, tokenizer.json): copy these "
            "files from the model that it was made from."
        )
    attributes = processor_class.get_attributes()
    if "image_processor" not in attributes:
        raise ValueError(f"{processor_class.__name__} in {directory} processes no pictures, only {attributes}.")
    if "video_processor" in attributes and not is_torchvision_available():
        return _without_videos(processor_class).from_pretrained(directory, local_files_only=True, **kwargs)
    return AutoProcessor.from_pretrained(directory, local_files_only=True, **kwargs)


def _processor_class(directory: Path, config: PretrainedConfig) -> type[ProcessorMixin] | None:
    for name in _PROCESSOR_FILES:
        if (directory / name).is_file():
            found = json.loads((directory / name).read_text(encoding="utf-8")).get("processor_class")
            if found is not None:
                return processor_class_from_name(found)
    if (directory / "tokenizer_config.json").is_file() and type(config) in PROCESSOR_MAPPING:
        found = PROCESSOR_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    return None


def _without_videos(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    # transformers reads from the signature of the constructor which parts a processor has
    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        parts = dict(image_processor=image_processor, tokenizer=tokenizer, video_processor=None)
        processor_class.__init__(self, **parts, chat_template=chat_template, **kwargs)

    return type(processor_class.__name__, (processor_class,), {"__init__": __init__})


def pack_processor(processor: ProcessorMixin) -> th.Tensor:
    """
    :param processor: a processor
    :return: its files as uint8, to be saved with weights
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(Path(folder).iterdir())}
    return th.as_tensor(np.frombuffer(json.dumps(files).encode(), dtype=np.uint8).copy())


def unpack_processor(packed: th.Tensor, config: PretrainedConfig) -> ProcessorMixin:
    """
    :param packed: what :func:`pack_processor` gave
    :param config: the model's configuration
    :return: the processor
    :raises ValueError: it is not what :func:`pack_processor` gives
    """
    try:
        files = {
            name: base64.b64decode(content, validate=True)
            for name, content in json.loads(packed.cpu().numpy().tobytes()).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The packed processor is damaged: expected a JSON object of files, got {error!r}.") from error
    # They come from a checkpoint, which may be anybody's: a path in a name would write outside the folder
    wrong = [name for name in files if not _FILE_NAME.fullmatch(name)]
    if wrong:
        raise ValueError(f"The packed processor is damaged or malicious: {wrong[:3]} are not plain file names.")
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return load_processor(folder, config)


# ---------------------------------------------------------------------------------------------------------------------
# Model


class VLMModel(VLABody):
    """
    A vision-language model that answers with action tokens, all at once: pictures and prompt go through it as its
    processor prepares them, followed by proprioception (if any) and one learned placeholder for each action token.
    A head classifies the outputs at the placeholders into bins. It starts as the rows of the model's output embedding
    for the last 256 tokens of its vocabulary.

    :param config: its configuration
    :param vlm: the pretrained model; None for one with random weights
    :raises ValueError: the model has no output embedding, or fewer tokens than there are bins
    """

    config_class = VLMConfig  # type: ignore[assignment]
    config: VLMConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: VLMConfig, vlm: PreTrainedModel | None = None):
        super().__init__(config)
        if config.vlm_config is None:
            raise ValueError('The body "vlm" needs a model: body_kwargs={"model": <directory or owner/name>}.')
        if vlm is None:
            vlm = AutoModelForImageTextToText.from_config(attention_config(config))
        output = vlm.get_output_embeddings()
        if output is None or vlm.base_model is vlm:
            raise ValueError(
                f"{type(vlm).__name__} has no language model with an output embedding on top: it cannot be a body here."
            )
        if len(output.weight) < config.n_bins:
            raise ValueError(
                f"{type(vlm).__name__} has {len(output.weight)} tokens, fewer than the {config.n_bins} bins of an "
                "action."
            )
        hidden_size = config.hidden_size
        self.bins = nn.Linear(hidden_size, config.n_bins, bias=output.bias is not None)
        self.placeholders = nn.Embedding(config.n_tokens, hidden_size)
        self.proprio = nn.Linear(config.proprio_dim, hidden_size) if config.proprio_dim else None
        self.full_rank_modules = ("bins", "placeholders", *(["proprio"] if config.proprio_dim else []))
        nn.init.normal_(self.placeholders.weight, std=0.02)
        with th.no_grad():
            self.bins.weight.copy_(output.weight[-config.n_bins :])
            if output.bias is not None:
                self.bins.bias.copy_(output.bias[-config.n_bins :])
        self.vlm: Any = vlm.base_model
        if config.bidirectional:
            # The masks follow from the configuration; where there is no mask, attention asks its module
            for module in self.vlm.modules():
                if getattr(module, "is_causal", False):
                    module.is_causal = False  # type: ignore[assignment]
        self.processor: ProcessorMixin | None = None
        self._packed_processor = th.zeros(0, dtype=th.uint8)
        self._prompts: dict[bytes, str] = {}
        self.post_init()

    @classmethod
    def create(cls, config: VLAConfig, dtype: th.dtype = th.float32) -> VLMModel:
        """See :meth:`VLABody.create`."""
        assert isinstance(config, VLMConfig)
        directory = config.base_directory
        if directory is None:  # its weights come later
            return super().create(config, dtype)  # type: ignore[return-value]
        vlm = AutoModelForImageTextToText.from_pretrained(
            directory, config=attention_config(config), dtype=dtype, local_files_only=True
        )
        body: VLMModel = cls(config, vlm)
        for name in body.full_rank_modules:
            cast_parameters(body.get_submodule(name), dtype)
        body.set_processor(load_processor(directory, vlm.config, **config.processor_kwargs))
        return body

    def set_processor(self, processor: ProcessorMixin) -> None:
        """
        :param processor: turns pictures and text into the model's inputs
        """
        self.processor = processor
        self._packed_processor = pack_processor(processor)
        self._prompts.clear()

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    # -------------------------------------------------------------------------------------------------------- inputs

    def _prompt(self, instruction: np.ndarray) -> str:
        processor: Any = self.processor
        key = instruction.tobytes()
        if key not in self._prompts:
            if len(self._prompts) >= _MAX_CACHED_PROMPTS:
                self._prompts.clear()
            text = self.config.prompt.format(instruction=decode_instruction(instruction))
            n_images = len(self.config.image_keys)
            if getattr(processor, "chat_template", None):
                content = [*[{"type": "image"}] * n_images, {"type": "text", "text": text}]
                message = {"role": "user", "content": content}
                text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            else:
                text = f"{processor.image_token}\n" * n_images + text
            self._prompts[key] = text
        return self._prompts[key]

    def inputs(self, images: dict[str, th.Tensor], instruction: th.Tensor) -> dict[str, th.Tensor]:
        """
        What the model's processor makes of a batch; shorter prompts are padded at the beginning.

        :param images: uint8 ``(B, 3, H, W)`` of each camera
        :param instruction: uint8 ``(B, N)``, UTF-8 bytes, zero padded
        :return: arguments of the model
        :raises RuntimeError: there is no processor
        """
        processor: Any = self.processor
        if processor is None:
            raise RuntimeError("This model has no processor: give it one with set_processor(), or load a checkpoint.")
        cameras = [images[key].permute(0, 2, 3, 1).cpu().numpy() for key in self.config.image_keys]
        batch = processor(
            text=[self._prompt(row) for row in instruction.cpu().numpy()],
            images=[list(pictures) for pictures in zip(*cameras, strict=True)],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        # Half precision is autocast's business, and a model's own
        return {name: value.to(self.device) for name, value in batch.items() if isinstance(value, th.Tensor)}

    def forward(
        self, images: dict[str, th.Tensor], instruction: th.Tensor, proprio: th.Tensor | None = None
    ) -> VLAOutput:
        """See :meth:`VLABody.forward`."""
        inputs = self.inputs(images, instruction)
        ids = inputs["input_ids"]
        batch, width = ids.shape
        added = [self.placeholders.weight.expand(batch, -1, -1)]
        if self.proprio is not None:
            assert proprio is not None
            added.insert(0, self.proprio(proprio.to(self.proprio.weight.dtype))[:, None])
        tail = th.cat(added, dim=1)
        n_added = tail.shape[1]
        for name, value in inputs.items():
            if value.shape == ids.shape:
                # Added tokens count (masks: 1) and are text (types: 0); their ids are that of a text token
                fill = ids[:, -1:] if name == "input_ids" else value.new_full((batch, 1), int("mask" in name))
                inputs[name] = th.cat([value, fill.expand(-1, n_added)], dim=1)

        def replace(module: nn.Module, args: Sequence[th.Tensor], embeddings: th.Tensor) -> th.Tensor:
            return th.cat([embeddings[:, :width], tail.to(embeddings.dtype)], dim=1)

        # Not as `inputs_embeds`: models find their pictures' places, and positions, by the ids
        handle = self.get_input_embeddings().register_forward_hook(replace)
        try:
            output = self.vlm(**inputs, use_cache=False, return_dict=True)
        finally:
            handle.remove()
        hidden = output.last_hidden_state[:, -self.config.n_tokens :].to(self.bins.weight.dtype)
        return VLAOutput(logits=self.bins(hidden).float(), hidden=hidden.mean(dim=1).float())

    # ----------------------------------------------------------------------------------------------- reading, writing

    def get_extra_state(self) -> th.Tensor:
        """The processor's files, so that they are saved with the weights."""
        return self._packed_processor

    def set_extra_state(self, state: th.Tensor) -> None:
        """
        :param state: what :meth:`get_extra_state` gave
        """
        if len(state):
            assert self.config.vlm_config is not None
            self.set_processor(unpack_processor(state, self.config.vlm_config))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> VLMModel:
        """
        Load a checkpoint that :meth:`save_pretrained` wrote.

        :param pretrained_model_name_or_path: its directory
        :param args: see ``PreTrainedModel.from_pretrained``
        :param kwargs: likewise
        :return: the model
        """
        body: VLMModel = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        assert body.config.vlm_config is not None
        with configuring(Path(pretrained_model_name_or_path) / _PROCESSOR_FILES[0]):
            body.set_processor(load_processor(pretrained_model_name_or_path, body.config.vlm_config))
        return body

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """
        Write weights, configuration and the processor's files: all that is needed, without the pretrained model.

        :param save_directory: created if needed
        :param kwargs: see ``PreTrainedModel.save_pretrained``
        """
        state = {name: value for name, value in self.state_dict().items() if name != "_extra_state"}
        base, self.config.model = self.config.model, None
        try:
            super().save_pretrained(save_directory, state_dict=state, **kwargs)
        finally:
            self.config.model = base
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)


def attention_config(config: VLMConfig) -> PretrainedConfig:
    """
    :param config: configuration of the body
    :return: a copy of the pretrained model's, whose decoder attends as the body says
    """
    vlm_config = copy.deepcopy(config.vlm_config)
    assert vlm_config is not None
    if config.bidirectional:
        # transformers makes the mask of a decoder bidirectional where its configuration says so
        vlm_config.get_text_config().is_causal = False
    return vlm_config
