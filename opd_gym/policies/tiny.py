"""A vision-language-action model of a few million parameters, shaped like the large ones, for two CPU cores."""

from __future__ import annotations

import math
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from opd_gym.policies.body import VLABody, VLAConfig, VLAOutput, check_count

# Two polynomial hashes of a word's bytes, modulo a prime small enough for int64 arithmetic without overflow.
_HASH_PRIME = 2**31 - 1
_HASH_BASES = (1_000_003, 69_069)


class TinyVLAConfig(VLAConfig):
    """
    Configuration of :class:`TinyVLAModel`. The arguments of :class:`VLAConfig`, and:

    :param hidden_size: width of the transformer
    :param num_hidden_layers: number of its layers
    :param num_attention_heads: number of attention heads
    :param intermediate_size: width of the feed-forward layers
    :param stem_channels: channels of the convolutions that turn a picture into tokens
    :param grid_size: a picture becomes about ``grid_size`` x ``grid_size`` tokens
    :param summary_size: width of the summary of all pictures from which the action queries start
    :param vocab_size: number of rows of the hashed word embedding
    :param word_size: width of the word embedding
    :param token_rank: width of the features from which the bins of one token are predicted
    """

    model_type = "tiny_vla"

    def __init__(
        self,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        intermediate_size: int = 512,
        stem_channels: list[int] | tuple[int, ...] = (64, 128, 160),
        grid_size: int = 4,
        summary_size: int = 384,
        vocab_size: int = 4096,
        word_size: int = 64,
        token_rank: int = 64,
        **kwargs: Any,
    ):
        if not isinstance(stem_channels, (list, tuple)) or not stem_channels:
            raise ValueError(f"stem_channels must be a list of at least one integer, got {stem_channels!r}.")
        for channels in stem_channels:
            check_count("stem_channels", channels)
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_hidden_layers", num_hidden_layers),
            ("num_attention_heads", num_attention_heads),
            ("intermediate_size", intermediate_size),
            ("grid_size", grid_size),
            ("summary_size", summary_size),
            ("vocab_size", vocab_size),
            ("word_size", word_size),
            ("token_rank", token_rank),
        ):
            check_count(name, value)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.stem_channels = list(stem_channels)
        self.grid_size = grid_size
        self.summary_size = summary_size
        self.vocab_size = vocab_size
        self.word_size = word_size
        self.token_rank = token_rank
        super().__init__(**kwargs)
        if hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads}."
            )
        if min(self.image_size) < grid_size * 2 ** (len(self.stem_channels) - 1):
            raise ValueError(
                f"Pictures of {tuple(self.image_size)} are too small for a {grid_size} x {grid_size} grid behind "
                f"{len(self.stem_channels)} convolutions. Render larger pictures or pass fewer stem_channels."
            )


def split_words(instruction: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    UTF-8 bytes to words, each named by two hashes; no vocabulary and no Python loop over the batch.

    Words are runs of letters and digits, without regard to the case of ASCII letters; each character of three or more
    bytes is a word of its own (scripts written without spaces).

    :param instruction: uint8 ``(B, N)``, zero padded
    :return: hashes ``(B, W, 2)`` and a mask of true words ``(B, W)``; W is the longest instruction's number of words
    """
    text = instruction.long()
    text = th.where((text >= 65) & (text <= 90), text + 32, text)
    in_word = ((text >= 48) & (text <= 57)) | ((text >= 97) & (text <= 122)) | (text >= 128)
    before = F.pad(in_word, (1, 0))[:, :-1]
    start = in_word & (~before | (text >= 0xE0))
    word = start.cumsum(dim=1) * in_word
    n_words = max(int(word.max()), 1)
    position = th.arange(text.shape[1], device=text.device).expand_as(text)
    offset = position - th.where(start, position, 0).cummax(dim=1).values
    hashes = []
    for base in _HASH_BASES:
        powers = [1]
        for _ in range(text.shape[1] - 1):
            powers.append(powers[-1] * base % _HASH_PRIME)
        terms = (text + 1) * th.tensor(powers, device=text.device)[offset] % _HASH_PRIME
        # Index 0 collects what is between words.
        sums = terms.new_zeros(len(text), n_words + 1).scatter_add_(1, word, terms)
        hashes.append(sums[:, 1:] % _HASH_PRIME)
    mask = th.arange(1, n_words + 1, device=text.device) <= word.max(dim=1, keepdim=True).values
    return th.stack(hashes, dim=-1), mask


class WordEmbedding(nn.Module):
    """Words as vectors: the sum of two rows of one hashed table, so that two words rarely share both."""

    def __init__(self, config: TinyVLAConfig):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.word_size)

    def forward(self, instruction: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        hashes, mask = split_words(instruction)
        words = self.table(hashes % self.table.num_embeddings).sum(dim=2)
        return words * mask[..., None], mask


class ImageStem(nn.Module):
    """
    Patches and convolutions from a picture to a grid of features. The instruction scales and shifts the channels
    (FiLM), so that the features tell the named object from the others before the transformer sees them.
    """

    def __init__(self, config: TinyVLAConfig):
        super().__init__()
        channels = config.stem_channels
        # Larger pictures get larger patches: the cost of the rest stays the same.
        patch = min(config.image_size) // (config.grid_size * 2 ** (len(channels) - 1))
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], patch, patch)]
        grid = [size // patch for size in config.image_size]
        for n_in, n_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [nn.GroupNorm(8, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, stride=2, padding=1)]
            grid = [math.ceil(size / 2) for size in grid]
        layers += [nn.GroupNorm(8, channels[-1]), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.film = nn.Linear(config.word_size, 2 * channels[-1])
        self.n_cells = grid[0] * grid[1]

    def forward(self, image: th.Tensor, sentence: th.Tensor) -> th.Tensor:
        """
        :param image: uint8 ``(B, 3, H, W)``
        :param sentence: ``(B, word_size)``
        :return: ``(B, n_cells, channels)``
        """
        x = (image.float() / 127.5 - 1.0).contiguous(memory_format=th.channels_last)
        scale, shift = self.film(sentence)[:, :, None, None].chunk(2, dim=1)
        x = F.silu(self.layers(x) * (1.0 + scale) + shift)
        return x.flatten(2).transpose(1, 2)


class Layer(nn.Module):
    """Pre-norm transformer layer, every token sees every other."""

    def __init__(self, config: TinyVLAConfig):
        super().__init__()
        width = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, config.intermediate_size)
        self.mlp_out = nn.Linear(config.intermediate_size, width)

    def forward(self, x: th.Tensor, mask: th.Tensor | None, last: int | None = None) -> th.Tensor:
        """
        :param x: ``(B, N, width)``
        :param mask: True where a token may be looked at, ``(B, 1, 1, N)``
        :param last: compute only the last so many tokens
        """
        batch, n, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, n, 3, self.n_heads, width // self.n_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if last is not None:
            query, x = query[:, :, -last:], x[:, -last:]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, -1, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class TinyVLAModel(VLABody):
    """
    Tokens of each picture, of the instruction's words and of proprioception go through one small bidirectional
    transformer together with one query for each action of the chunk; from a query's output come the bins of all
    dimensions of that action, in parallel. The queries start from a summary in which every cell of the grids has
    weights of its own, so that position need not be read out of averages over cells.

    :param config: its configuration
    """

    config_class = TinyVLAConfig  # type: ignore[assignment]
    config: TinyVLAConfig

    def __init__(self, config: TinyVLAConfig):
        super().__init__(config)
        width = config.hidden_size
        self.words = WordEmbedding(config)
        self.word_project = nn.Linear(config.word_size, width)
        self.word_position = nn.Embedding(config.instruction_length, width)
        self.sentence = nn.Linear(config.word_size, config.word_size)
        self.stems = nn.ModuleDict({key: ImageStem(config) for key in config.image_keys})
        channels = config.stem_channels[-1]
        n_cells = sum(stem.n_cells for stem in self.stems.values())  # type: ignore[misc]
        self.cell_project = nn.Linear(channels, width)
        self.cell_position = nn.Embedding(n_cells, width)
        self.summary = nn.Linear(n_cells * channels, config.summary_size)
        self.summary_to_queries = nn.Linear(config.summary_size, config.chunk_size * width)
        self.proprio = nn.Linear(config.proprio_dim, width) if config.proprio_dim else None
        self.queries = nn.Embedding(config.chunk_size, width)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(width)
        self.token_features = nn.Linear(width, config.action_dim * config.token_rank)
        self.bins = nn.Linear(config.token_rank, config.n_bins)
        self.bin_bias = nn.Embedding(config.n_tokens, config.n_bins)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            # PyTorch's own initialisation; transformers would leave weights of the meta device uninitialised.
            module.reset_parameters()
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if module is self.words.table:
            nn.init.normal_(module.weight, std=math.sqrt(0.5))
        elif module is self.bin_bias:
            nn.init.zeros_(module.weight)

    def forward(
        self, images: dict[str, th.Tensor], instruction: th.Tensor, proprio: th.Tensor | None = None
    ) -> VLAOutput:
        words, word_mask = self.words(instruction)
        batch, n_words = word_mask.shape
        sentence = F.silu(self.sentence(words.sum(dim=1) / word_mask.sum(dim=1, keepdim=True).clamp(min=1)))
        word_tokens = self.word_project(words) + self.word_position.weight[:n_words]
        cells = th.cat([self.stems[key](images[key], sentence) for key in self.config.image_keys], dim=1)
        summary = F.silu(self.summary(cells.flatten(1)))
        n_queries = self.config.chunk_size
        queries = self.queries.weight + self.summary_to_queries(summary).view(batch, n_queries, -1)
        tokens = [word_tokens, self.cell_project(cells) + self.cell_position.weight]
        if self.proprio is not None:
            assert proprio is not None
            tokens.append(self.proprio(proprio)[:, None])
        x = th.cat([*tokens, queries], dim=1)
        mask = None
        if not bool(word_mask.all()):
            mask = F.pad(word_mask, (0, x.shape[1] - n_words), value=True)[:, None, None]
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        x = self.norm(self.layers[-1](x, mask, last=n_queries))
        features = F.silu(self.token_features(x)).view(batch, self.config.n_tokens, self.config.token_rank)
        return VLAOutput(logits=self.bins(features) + self.bin_bias.weight, hidden=x.mean(dim=1))
