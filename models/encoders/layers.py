"""The layers of an encoder: BERT's, with the attention of either family.

Modules and parameters carry Hugging Face's names, so that loading a checkpoint is a name match.
Devlin et al. 2019, "BERT": each part's output is added to its input, and a norm follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from kernels.cache import LayerCache
from models.encoders import bigbird, longformer
from models.encoders.sparse import Place, attend

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.attention import Impl
    from models.encoders.config import EncoderConfig
    from models.encoders.sparse import Plan
    from models.encoders.texts import Packed, Shape

CPU_ROWS = 512
"""Tokens of a feed-forward part at once, so that what lies between stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Look:
    """One text of a pass: its tokens, where its keys lie, and where it looks in each layer."""

    tokens: slice
    place: Place
    shape: Shape
    plans: tuple[Plan, ...]
    chosen: Tensor | None  # int64 [global tokens]  places of Longformer's; None: there are none


def looks(config: EncoderConfig, packed: Packed, dtype: torch.dtype) -> list[Look]:
    """Lay out a pass: a cache that all layers fill in turn, and each text's lists of pages.

    Raises:
        UnsupportedModelError: BigBird's random blocks cannot be drawn for a text's length.
    """
    device = packed.ids.device
    cache = LayerCache.allocate(packed.room, config.heads, config.head_dim, dtype, device)
    found = []
    for text, page, tokens in zip(packed.texts, packed.pages, packed.slices(), strict=True):
        if config.family == "longformer":
            plans = tuple(
                longformer.plan(window, config.heads, text.shape, device)
                for window in config.windows
            )
        else:
            plans = bigbird.plans(bigbird.Blocks.of(config), text.shape, device)
        chosen = None
        if config.family == "longformer" and text.shape.global_tokens:
            chosen = torch.tensor(text.shape.global_tokens, device=device)
        place = Place.of(cache, page, len(text.ids), device)
        found.append(Look(tokens, place, text.shape, plans, chosen))
    return found


class Embeddings(nn.Module):
    """A token's vector: its own, its position's and its type's, normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, config.norm_eps)
        self._scale = size**0.5 if config.rescaled else 1.0
        self._pad_id = config.pad_id if config.family == "longformer" else None

    def forward(self, packed: Packed) -> Tensor:
        """[tokens, hidden_size]."""
        place = torch.cat([self._positions(packed.ids[part]) for part in packed.slices()])
        words: Tensor = self.word_embeddings(packed.ids)
        summed = words * self._scale if self._scale != 1 else words
        summed = summed + self.token_type_embeddings(packed.types) + self.position_embeddings(place)
        normed: Tensor = self.LayerNorm(summed)
        return normed

    def _positions(self, ids: Tensor) -> Tensor:
        """int64 [tokens] of one text. Longformer's count what is no padding, from behind its id."""
        if self._pad_id is None:
            return torch.arange(len(ids), device=ids.device)
        there = ids != self._pad_id
        return there.cumsum(0) * there + self._pad_id


class SelfAttention(nn.Module):
    """Where tokens gather from others, before the output projection."""

    def __init__(self, config: EncoderConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value = (
            nn.Linear(size, size, config.qkv_bias) for _ in range(3)
        )
        if config.family == "longformer":
            self.query_global, self.key_global, self.value_global = (
                nn.Linear(size, size) for _ in range(3)
            )
        self._layer, self._heads, self._impl = layer, config.heads, impl
        self._scale = config.head_dim**-0.5

    def forward(self, hidden: Tensor, looks: list[Look]) -> Tensor:
        """[tokens, hidden_size]."""
        query, keys, values = (
            part(hidden).view(len(hidden), self._heads, -1)
            for part in (self.query, self.key, self.value)
        )  # [tokens, heads, head_dim]
        output = torch.empty_like(query)
        for look in looks:
            part = look.tokens
            look.place.write(keys[part], values[part])
            plan = look.plans[self._layer]
            output[part] = attend(query[part], look.place, plan, self._scale, self._impl)
        flat = output.flatten(1)
        for look in looks:
            if look.chosen is not None:
                own = (self.query_global, self.key_global, self.value_global)
                mine = hidden[look.tokens]
                rows = longformer.global_rows(mine, look.chosen, look.shape, *own, self._heads)
                flat[look.tokens].index_copy_(0, look.chosen, rows)
        return flat


class AddAndNorm(nn.Module):
    """A projection that is added to what came before, and normed."""

    def __init__(self, width: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size]."""
        normed: Tensor = self.LayerNorm(self.dense(inner).add_(hidden))
        return normed


class Attention(nn.Module):
    """What Hugging Face's names put under `attention`."""

    def __init__(self, config: EncoderConfig, layer: int, impl: Impl) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer, impl)
        self.output = AddAndNorm(config.hidden_size, config)


class FeedForward(nn.Module):
    """Two projections with an activation between; also the first part of BigBird's QA head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.intermediate = nn.ModuleDict(
            {"dense": nn.Linear(config.hidden_size, config.intermediate_size)}
        )
        self.output = AddAndNorm(config.intermediate_size, config)
        self._activation = config.activation

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden_size]."""
        rows = CPU_ROWS if hidden.device.type == "cpu" else max(len(hidden), 1)
        parts = [self._some(part) for part in torch.split(hidden, rows)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _some(self, hidden: Tensor) -> Tensor:
        inner = activated(self.intermediate["dense"](hidden), self._activation)
        added: Tensor = self.output(inner, hidden)
        return added


class EncoderLayer(FeedForward):
    """Attention, then feed-forward."""

    def __init__(self, config: EncoderConfig, layer: int, impl: Impl) -> None:
        super().__init__(config)
        self.attention = Attention(config, layer, impl)

    def forward(self, hidden: Tensor, looks: list[Look]) -> Tensor:  # type: ignore[override]
        """[tokens, hidden_size]."""
        gathered = self.attention.self(hidden, looks)
        return super().forward(self.attention.output(gathered, hidden))


def activated(inner: Tensor, activation: str) -> Tensor:
    """An activation by its name in config.json (Hendrycks and Gimpel 2016, "GELUs")."""
    if activation == "relu":
        return F.relu(inner)
    return F.gelu(inner, approximate="tanh" if activation == "gelu_new" else "none")
