"""OpenVLA and OpenVLA-OFT (discrete tokens), on the transformers library's own Llama, DINOv2 and SigLIP."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2WithRegistersModel, DynamicCache, LlamaForCausalLM, SiglipVisionModel

from opd_gym.policies.body import VLABody, VLAOutput
from opd_gym.policies.openvla.configuration import OpenVLAConfig
from opd_gym.policies.openvla.processing import PromptTokenizer, model_proprio, pixel_values


class Unused(nn.Module):
    """
    Weights of a published checkpoint that no output depends on: the last block of either vision transformer and what
    follows it. They are kept so that a checkpoint saved here is complete.

    :param shapes: shapes by published name
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        self.shapes = shapes
        for name, shape in shapes.items():
            self.register_buffer(self.key(name), th.zeros(shape))

    @staticmethod
    def key(name: str) -> str:
        """
        :param name: published name
        :return: name of the buffer
        """
        return name.replace(".", "-")


def _unused_shapes(config: OpenVLAConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    dino, siglip = config.dino_config, config.siglip_config
    for timm, size, inner, n_blocks in (
        ("featurizer", dino.hidden_size, int(dino.hidden_size * dino.mlp_ratio), dino.num_hidden_layers),
        ("fused_featurizer", siglip.hidden_size, siglip.intermediate_size, siglip.num_hidden_layers),
    ):
        block = f"{timm}.blocks.{n_blocks - 1}"
        linear(f"{block}.attn.qkv", size, 3 * size)
        linear(f"{block}.attn.proj", size, size)
        linear(f"{block}.mlp.fc1", size, inner)
        linear(f"{block}.mlp.fc2", inner, size)
        for name in (f"{block}.norm1", f"{block}.norm2", f"{timm}.norm"):
            norm(name, size)
    for j in (1, 2):
        shapes[f"featurizer.blocks.{dino.num_hidden_layers - 1}.ls{j}.scale_factor"] = (dino.hidden_size,)
    size, pool = siglip.hidden_size, "fused_featurizer.attn_pool"
    shapes[f"{pool}.latent"] = (1, 1, size)
    linear(f"{pool}.q", size, size)
    linear(f"{pool}.kv", size, 2 * size)
    linear(f"{pool}.proj", size, size)
    norm(f"{pool}.norm", size)
    linear(f"{pool}.mlp.fc1", size, siglip.intermediate_size)
    linear(f"{pool}.mlp.fc2", siglip.intermediate_size, size)
    return shapes


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP side by side. A patch has the features of both, from their last block but one."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        dino, siglip = copy.deepcopy(config.dino_config), copy.deepcopy(config.siglip_config)
        dino.num_hidden_layers -= 1
        siglip.num_hidden_layers -= 1
        siglip.vision_use_head = False
        self.dino = Dinov2WithRegistersModel(dino)
        self.siglip = SiglipVisionModel(siglip)
        # Not run; as parameters they would wait for gradients in vain
        self.dino.layernorm = self.siglip.post_layernorm = nn.Identity()  # type: ignore[assignment]
        self.dino.embeddings.mask_token = None  # type: ignore[assignment]
        self.unused = Unused(_unused_shapes(config))

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        """
        :param pixels: ``(B, 6, H, W)``: a picture normalised for DINOv2, then for SigLIP
        :return: ``(B, n_patches, dino_size + siglip_size)``
        """
        dino = self.dino(pixels[:, :3]).last_hidden_state
        siglip = self.siglip(pixels[:, 3:]).last_hidden_state
        # CLS and registers go
        return th.cat([dino[:, -siglip.shape[1] :], siglip], dim=2)


class Projector(nn.Module):
    """From features of patches to embeddings of the language model."""

    def __init__(self, vision_size: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_size, 4 * vision_size)
        self.fc2 = nn.Linear(4 * vision_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, patches: th.Tensor) -> th.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(patches)))))


class ProprioProjector(nn.Module):
    """From proprioception to one embedding of the language model."""

    def __init__(self, n_inputs: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(n_inputs, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: th.Tensor) -> th.Tensor:
        return self.fc2(F.gelu(self.fc1(proprio)))


@dataclass
class Sequence:
    """
    Embeddings for the language model.

    :param embeddings: ``(B, N, hidden_size)``
    :param mask: 1 where there is a token, 0 for padding, ``(B, N)``
    """

    embeddings: th.Tensor
    mask: th.Tensor

    @property
    def positions(self) -> th.Tensor:
        """Positions ``(B, N)``, in which padding does not count."""
        return (self.mask.cumsum(dim=1) - 1).clamp(min=0)

    def append(self, embeddings: th.Tensor) -> Sequence:
        """
        :param embeddings: ``(B, M, hidden_size)``, no padding
        :return: the longer sequence
        """
        mask = self.mask.new_ones(embeddings.shape[:2])
        return Sequence(th.cat([self.embeddings, embeddings], dim=1), th.cat([self.mask, mask], dim=1))


class OpenVLAModel(VLABody):
    """
    BOS, the patches of each picture, proprioception (if any) and the prompt go through a language model, which predicts
    the action tokens: one after the other (OpenVLA), or all at once, with attention in both directions, from as many
    empty embeddings at the end of the prompt (OpenVLA-OFT). The bins are the last 256 tokens of the vocabulary.

    The padding of shorter prompts lies before the prompt and has no positions. The code that trained the published
    checkpoints pads in other places (SimpleVLA-RL at the end, RLinf between BOS and prompt up to a fixed length), to
    the same effect.

    :param config: its configuration
    """

    config_class = OpenVLAConfig  # type: ignore[assignment]
    config: OpenVLAConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer", "Dinov2WithRegistersLayer", "SiglipEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        hidden_size = config.hidden_size
        self.vision_backbone = VisionBackbone(config)
        vision_size = config.dino_config.hidden_size + config.siglip_config.hidden_size
        self.projector = Projector(vision_size, hidden_size)
        self.proprio_projector = ProprioProjector(config.proprio_inputs, hidden_size) if config.proprio_inputs else None
        self.language_model = LlamaForCausalLM(config.text_config)
        self.tokenizer: PromptTokenizer | None = None
        self.post_init()
        self._round_frequencies()

    def _init_weights(self, module: nn.Module) -> None:
        # The parts that are models of transformers have initialised themselves.
        if isinstance(module, (Projector, ProprioProjector)):
            for layer in module.children():
                nn.init.normal_(layer.weight, std=self.config.text_config.initializer_range)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def reset_computed_buffers(self, device: th.device | str) -> None:
        """
        Compute the buffers that no checkpoint holds.

        :param device: where they go
        """
        decoder, embeddings = self.language_model.model, self.vision_backbone.siglip.embeddings
        decoder.rotary_emb = type(decoder.rotary_emb)(self.config.text_config).to(device)
        self._round_frequencies()
        embeddings.position_ids = th.arange(embeddings.num_positions, device=device)[None]  # type: ignore[assignment]

    def _round_frequencies(self) -> None:
        if self.config.rounded_frequencies and self.config.profile.rounded_frequencies:
            for frequencies in self.language_model.model.rotary_emb.buffers():
                frequencies.copy_(frequencies.bfloat16())

    # ------------------------------------------------------------------------------------------------- the sequence

    @property
    def autoregressive(self) -> bool:
        """See :attr:`VLABody.autoregressive`."""
        return not self.config.profile.parallel

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def _prompt(self, instruction: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        if self.tokenizer is None:
            raise RuntimeError(
                "This OpenVLA has no tokenizer: a published checkpoint brings one (tokenizer.json), a new model gets "
                "one by model.tokenizer = PromptTokenizer(Path('tokenizer.json').read_text())."
            )
        ids, mask = self.tokenizer(instruction.cpu().numpy(), self.config.pad_token_id)
        return th.as_tensor(ids, device=self.device), th.as_tensor(mask, device=self.device)

    def encode_images(self, images: dict[str, th.Tensor]) -> th.Tensor:
        """
        :param images: uint8 ``(B, 3, H, W)`` of each camera, upright
        :return: embeddings of all patches, ``(B, n_patches, hidden_size)``
        """
        pixels = pixel_values([images[key] for key in self.config.image_keys], self.config).to(self.dtype)
        patches = self.vision_backbone(pixels.flatten(0, 1))
        return self.projector(patches).reshape(len(pixels), self.config.n_patches, -1)

    def prefix(
        self, images: dict[str, th.Tensor], instruction: th.Tensor, proprio: th.Tensor | None = None
    ) -> Sequence:
        """
        Everything before the action tokens.

        :param images: uint8 ``(B, 3, H, W)`` of each camera
        :param instruction: uint8 ``(B, N)``, UTF-8 bytes, zero padded
        :param proprio: float ``(B, P)`` or None
        :return: BOS, patches, proprioception, padding, prompt
        """
        ids, mask = self._prompt(instruction)
        text = self.get_input_embeddings()(ids)
        seen = [self.encode_images(images)]
        if self.proprio_projector is not None:
            assert proprio is not None
            seen.append(self.proprio_projector(model_proprio(proprio, self.config).to(self.dtype))[:, None])
        begin = Sequence(text[:, :1], mask[:, :1]).append(th.cat(seen, dim=1))
        return Sequence(th.cat([begin.embeddings, text[:, 1:]], dim=1), th.cat([begin.mask, mask[:, 1:]], dim=1))

    def _action_embeddings(self, tokens: th.Tensor) -> th.Tensor:
        # The lowest bin is the highest id
        return self.get_input_embeddings()(self.config.action_ids.stop - 1 - tokens.long())

    def _bins(self, hidden: th.Tensor) -> th.Tensor:
        return self.language_model.lm_head(hidden)[..., self.config.action_ids].flip(-1)

    def _hidden(self, sequence: Sequence, cache: DynamicCache | None = None, last: int | None = None) -> th.Tensor:
        """
        Outputs of the language model's last layer, ``(B, N, hidden_size)``.

        :param sequence: all tokens so far
        :param cache: keys and values of the tokens before the last ``last``, whose own are added; None for no cache
        :param last: so many tokens are new; None for all
        """
        start = 0 if last is None or cache is None else sequence.embeddings.shape[1] - last
        causal = {} if self.autoregressive else {"is_causal": False}
        return self.language_model.model(
            inputs_embeds=sequence.embeddings[:, start:],
            attention_mask=sequence.mask,
            position_ids=sequence.positions[:, start:],
            past_key_values=cache,
            use_cache=cache is not None,
            **causal,
        ).last_hidden_state

    # -------------------------------------------------------------------------------------------------------- logits

    def forward(
        self,
        images: dict[str, th.Tensor],
        instruction: th.Tensor,
        proprio: th.Tensor | None = None,
        tokens: th.Tensor | None = None,
    ) -> VLAOutput:
        """
        :param images: uint8 ``(B, 3, H, W)`` of each camera, upright
        :param instruction: uint8 ``(B, N)``, UTF-8 bytes, zero padded
        :param proprio: float ``(B, P)`` or None
        :param tokens: autoregressive models only: the tokens ``(B, n_tokens)`` before which each token is predicted
        :return: logits ``(B, n_tokens, n_bins)``, from the lowest bin to the highest, and the summary that the first of
            them is predicted from
        """
        sequence = self.prefix(images, instruction, proprio)
        n_tokens = self.config.n_tokens
        first = sequence.embeddings.shape[1] - 1
        if self.autoregressive:
            if tokens is None:
                raise ValueError("An autoregressive model predicts a token from those before it: pass `tokens`.")
            sequence = sequence.append(self._action_embeddings(tokens[:, :-1]))
        else:
            batch, width = len(sequence.mask), sequence.embeddings.shape[2]
            sequence = sequence.append(sequence.embeddings.new_zeros(batch, n_tokens, width))
            if self.config.profile.stop_token:
                stop = th.full((batch, 1), self.config.text_config.eos_token_id, device=self.device)
                sequence = sequence.append(self.get_input_embeddings()(stop))
        hidden = self._hidden(sequence)[:, first : first + n_tokens]
        return VLAOutput(logits=self._bins(hidden).float(), hidden=hidden[:, 0].float())

    def decode(
        self,
        images: dict[str, th.Tensor],
        instruction: th.Tensor,
        proprio: th.Tensor | None = None,
        *,
        choose: Callable[[th.Tensor], th.Tensor],
    ) -> tuple[th.Tensor, VLAOutput]:
        """See :meth:`VLABody.decode`."""
        sequence = self.prefix(images, instruction, proprio)
        # With gradient checkpointing, layers in training mode drop the cache without an error; rollouts are in
        # evaluation mode
        cache = None if self.training else DynamicCache(config=self.config.text_config)
        hidden = self._hidden(sequence, cache)[:, -1:]
        summary = hidden[:, 0].float()
        logits: list[th.Tensor] = []
        tokens: list[th.Tensor] = []
        for i in range(self.config.n_tokens):
            if i > 0:
                sequence = sequence.append(self._action_embeddings(tokens[-1][:, None]))
                hidden = self._hidden(sequence, cache, last=1)[:, -1:]
            logits.append(self._bins(hidden)[:, 0].float())
            tokens.append(choose(logits[-1]))
        return th.stack(tokens, dim=1), VLAOutput(logits=th.stack(logits, dim=1), hidden=summary)

    # ----------------------------------------------------------------------------------------------- reading, writing

    def get_extra_state(self) -> th.Tensor:
        """The tokenizer, so that it is saved with the weights."""
        state = b"" if self.tokenizer is None else self.tokenizer.to_bytes()
        return th.as_tensor(np.frombuffer(state, dtype=np.uint8).copy())

    def set_extra_state(self, state: th.Tensor) -> None:
        """
        :param state: what :meth:`get_extra_state` gave
        """
        found = bytes(state.cpu().numpy())
        self.tokenizer = PromptTokenizer.from_bytes(found) if found else None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: OpenVLAConfig | None = None,
        dtype: th.dtype | None = None,
        device: th.device | str = "cpu",
        attn_implementation: str | None = None,
        **hub_kwargs: Any,
    ) -> OpenVLAModel:
        """
        Load a checkpoint in the published layout, one tensor after the other.

        :param pretrained_model_name_or_path: its directory, or its id on the hub
        :param config: its configuration; None to read it
        :param dtype: type of the weights; None for the one they are stored in
        :param device: where they go
        :param attn_implementation: "eager", "sdpa", "flash_attention_2", ...; None for what transformers thinks best
        :param hub_kwargs: what ``AutoModel`` passes on about the hub; a checkpoint that is here needs none
        :return: the model, in evaluation mode
        """
        del hub_kwargs
        from opd_gym.policies.openvla.checkpoints import load_model
        from opd_gym.policies.openvla.published import locate

        directory = locate(pretrained_model_name_or_path)
        config = config or OpenVLAConfig.from_pretrained(directory)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        return load_model(cls, directory, config, dtype, device)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], max_shard_size: int = 5 * 10**9, **_: Any
    ) -> None:
        """
        Write a checkpoint in the published layout.

        :param save_directory: created if needed
        :param max_shard_size: largest size of a file of weights, in bytes
        """
        from opd_gym.policies.openvla.checkpoints import save_model

        save_model(self, save_directory, max_shard_size)
