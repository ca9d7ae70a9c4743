"""The decoder: layers of attention and feed-forward parts, each behind a norm.

What families of models differ in stands in files of its own: `models.norms`, `models.feed_forward`,
`models.rope` and `models.positions`; which of them a model has, `models.config` says. Modules and
parameters carry the names that Hugging Face gives Llama's; how other families name them, and lay
them out, `models.names` knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import Impl
from kernels.patterns.pattern import Pattern
from kernels.softmax import wide
from models.attention import LayerAttention
from models.feed_forward import feed_forward
from models.make import Make
from models.own_patterns import PatternAttention
from models.positions import LearnedPositions
from models.rope import Rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.cache import LayerCache
    from models.attention import Recorder
    from models.config import ModelConfig
    from models.step import StepInput


class Decoder(nn.Module):
    """A causal language model over a paged KV cache, for inference only.

    Parameters are allocated and not filled; `models.loader.load` fills them.

    Args:
        config: shape of the model.
        dtype: of parameters and activations; float64 computes everything in float64.
        device: where it runs; "meta" gives names and shapes without memory.
        impl: backend of the attention ops.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        impl: Impl = Impl.TORCH,
    ) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        make = Make(config, dtype, device, impl)
        self.model = Body(config, make)
        self.lm_head = (
            None if config.tied else make.linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = (
            None if config.rope is None else Rotary(config.rope, config.head_dim, dtype, device)
        )
        self.requires_grad_(False)

    def forward(self, step: StepInput, caches: Sequence[LayerCache], recorder: Recorder) -> Tensor:
        """Run one step, writing its keys and values into the caches.

        Args:
            step: the tokens of the step and how each of them attends.
            caches: one cache a layer, in the decoder's dtype and on its device.
            recorder: takes note of what sparse rows looked at.

        Returns:
            [tokens, hidden_size], after the final norm.
        """
        hidden = self.model.embed(step)  # [tokens, hidden_size]
        angles = None if self.rotary is None else self.rotary.angles(step.positions)
        update: Tensor | None = None  # what the last part adds to the residual stream
        for layer, cache in zip(self.model.layers, caches, strict=True):
            hidden, update = layer(hidden, update, angles, cache, step, recorder)
        _, normed = self.model.norm.add(hidden, update)
        return normed

    @property
    def fused(self) -> bool:
        """Whether `models.decode` computes the model's decode steps: it knows Llama's layers."""
        config = self.config
        alike = (config.norm, config.activation) == ("rms", "swiglu")
        rotated = self.rotary is not None and not (config.position_shape or config.embedding_norm)
        plain = config.slopes is None and config.patterns is None and config.clip_qkv is None
        return alike and rotated and plain

    @property
    def head(self) -> Tensor:
        """Weight of the output layer, [vocab_size, hidden_size]."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token. The caller picks the rows that need them, in chunks.

        Args:
            hidden: [rows, hidden_size], rows of what `forward` returned.

        Returns:
            [rows, vocab_size] in float32, or float64 for a model in float64.
        """
        scores = F.linear(hidden, self.head)  # [rows, vocab_size]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class Body(nn.Module):
    """Embedding, layers and final norm: what Hugging Face's names put under `model`."""

    def __init__(self, config: ModelConfig, make: Make) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = make.embedding(config.vocab_size, size)
        self.positions = (
            LearnedPositions(config.position_shape, size, make) if config.position_shape else None
        )
        self.embedding_norm = make.norm(size) if config.embedding_norm else None
        # One tensor for all layers: what a score loses for each position between key and query.
        slopes = None
        if config.slopes is not None:
            slopes = torch.tensor(config.slopes, dtype=wide(make.dtype), device=make.device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, make, slopes) for layer in range(config.layers)
        )
        self.norm = make.norm(size)

    def embed(self, step: StepInput) -> Tensor:
        """The residual stream before the first layer, [tokens, hidden_size]."""
        hidden: Tensor = self.embed_tokens(step.token_ids)
        if self.positions is not None:
            hidden = hidden + self.positions(step.positions)
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, make: Make, slopes: Tensor | None) -> None:
        super().__init__()
        self.input_layernorm = make.norm(config.hidden_size)
        self.self_attn = Attention(config, layer, make, slopes)
        self.post_attention_layernorm = make.norm(config.hidden_size)
        self.mlp = feed_forward(config, make)

    def forward(
        self,
        hidden: Tensor,
        update: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        step: StepInput,
        recorder: Recorder,
    ) -> tuple[Tensor, Tensor]:
        """One layer: the residual stream [tokens, hidden_size], and what is yet to be added."""
        hidden, normed = self.input_layernorm.add(hidden, update)
        update = self.self_attn(normed, angles, cache, step, recorder)
        hidden, normed = self.post_attention_layernorm.add(hidden, update)
        return hidden, self.mlp(normed)


class Attention(nn.Module):
    """Projections around the attention layer of `models.attention`."""

    def __init__(self, config: ModelConfig, layer: int, make: Make, slopes: Tensor | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.parts = [config.heads, config.kv_heads, config.kv_heads]
        sizes = [heads * config.head_dim for heads in self.parts]
        self.qkv = make.joint(config.hidden_size, sum(sizes), bias=config.qkv_bias)
        self.q_proj, self.k_proj, self.v_proj = self.qkv.parts(sizes)
        self.o_proj = make.linear(sizes[0], config.hidden_size, bias=config.output_bias)
        self.q_norm = make.head_norm(config.head_dim) if config.qk_norm else None
        self.k_norm = make.head_norm(config.head_dim) if config.qk_norm else None
        self.clip = config.clip_qkv
        patterns = None if config.patterns is None else config.patterns[layer]
        scale = config.head_dim**-0.5
        self.attend: LayerAttention | PatternAttention
        if patterns is None:
            self.attend = LayerAttention(layer, scale, config.windows[layer], make.impl, slopes)
        else:
            own = tuple(map(Pattern.parse_causal, patterns))
            self.attend = PatternAttention(layer, scale, own, make.impl)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        step: StepInput,
        recorder: Recorder,
    ) -> Tensor:
        """Attention of one layer, [tokens, hidden_size] to the same."""
        qkv = self.qkv(hidden)  # [tokens, (heads + 2 * kv_heads) * head_dim]
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        query = self._write(qkv, angles, cache, step)
        output = self.attend(query, cache, step, recorder)
        projected: Tensor = self.o_proj(output.flatten(1))  # [tokens, hidden_size]
        return projected

    def _write(
        self,
        qkv: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        step: StepInput,
    ) -> Tensor:
        """Write the step's keys and values; its queries [tokens, heads, head_dim], rotated."""
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if self.attend.impl is Impl.TRITON and angles is not None:
            from kernels.gpu.rotate import rotate_and_write  # a CPU has no Triton

            weights = None if norms is None else (norms[0].weight, norms[1].weight)
            eps = 0.0 if norms is None else norms[0].eps
            return rotate_and_write(qkv, angles, step.slots, cache, weights, eps)
        if self.attend.impl is Impl.NUMBA and norms is None and angles is not None:
            from kernels.cpu import layer  # numba takes a moment

            return layer.rotate_and_write(qkv, angles, step.slots, cache)
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        # [tokens, heads, head_dim], and twice [tokens, kv_heads, head_dim]
        query, keys, values = torch.split(heads, self.parts, dim=1)
        if norms is not None:
            query, keys = norms[0](query), norms[1](keys)
        if angles is not None:
            query, keys = Rotary.rotate(query, angles), Rotary.rotate(keys, angles)
        cache.write(step.slots, keys, values)
        return query
