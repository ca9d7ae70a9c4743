"""The decoder: Llama's layers, with the few switches that Mistral, Qwen2 and Qwen3 need.

Modules and parameters carry Hugging Face's names, so that loading a checkpoint is a name match.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from kernels.attention import Impl
from models.attention import LayerAttention
from models.joint import Joint
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
        make = _Make(dtype, device, impl)
        self.model = Body(config, make, impl)
        self.lm_head = (
            None if config.tied else make.linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = Rotary(config.rope, config.head_dim, dtype, device)
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
        hidden: Tensor = self.model.embed_tokens(step.token_ids)  # [tokens, hidden_size]
        angles = self.rotary.angles(step.positions)
        update: Tensor | None = None  # what the last part adds to the residual stream
        for layer, cache in zip(self.model.layers, caches, strict=True):
            hidden, update = layer(hidden, update, angles, cache, step, recorder)
        _, normed = self.model.norm.add(hidden, update)
        return normed

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

    def __init__(self, config: ModelConfig, make: _Make, impl: Impl) -> None:
        super().__init__()
        self.embed_tokens = make.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, make, impl) for layer in range(config.layers)
        )
        self.norm = make.norm(config.hidden_size, config.norm_eps)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, make: _Make, impl: Impl) -> None:
        super().__init__()
        self.input_layernorm = make.norm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer, make, impl)
        self.post_attention_layernorm = make.norm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config, make, impl)

    def forward(
        self,
        hidden: Tensor,
        update: Tensor | None,
        angles: tuple[Tensor, Tensor],
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

    def __init__(self, config: ModelConfig, layer: int, make: _Make, impl: Impl) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.parts = [config.heads, config.kv_heads, config.kv_heads]
        sizes = [heads * config.head_dim for heads in self.parts]
        self.qkv = make.joint(config.hidden_size, sum(sizes), bias=config.qkv_bias)
        self.q_proj, self.k_proj, self.v_proj = self.qkv.parts(sizes)
        self.o_proj = make.linear(sizes[0], config.hidden_size, bias=config.output_bias)
        self.q_norm = make.norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = make.norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.attend = LayerAttention(layer, config.head_dim**-0.5, config.windows[layer], impl)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        step: StepInput,
        recorder: Recorder,
    ) -> Tensor:
        """Attention of one layer, [tokens, hidden_size] to the same."""
        query = self._write(self.qkv(hidden), angles, cache, step)
        output = self.attend(query, cache, step, recorder)
        projected: Tensor = self.o_proj(output.flatten(1))  # [tokens, hidden_size]
        return projected

    def _write(
        self, qkv: Tensor, angles: tuple[Tensor, Tensor], cache: LayerCache, step: StepInput
    ) -> Tensor:
        """Write the step's keys and values; its rotated queries [tokens, heads, head_dim]."""
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        if self.attend.impl is Impl.TRITON:
            from kernels.gpu.rotate import rotate_and_write  # a CPU has no Triton

            weights = None if norms is None else (norms[0].weight, norms[1].weight)
            eps = 0.0 if norms is None else norms[0].eps
            return rotate_and_write(qkv, angles, step.slots, cache, weights, eps, coded=False)
        if self.attend.impl is Impl.NUMBA and norms is None:
            from kernels.cpu import layer  # numba takes a moment

            return layer.rotate_and_write(qkv, angles, step.slots, cache)
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        # [tokens, heads, head_dim], and twice [tokens, kv_heads, head_dim]
        query, keys, values = torch.split(heads, self.parts, dim=1)
        if norms is not None:
            query, keys = norms[0](query), norms[1](keys)
        cache.write(step.slots, Rotary.rotate(keys, angles), values)
        return Rotary.rotate(query, angles)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, config: ModelConfig, make: _Make, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = make.joint(outer, 2 * inner, bias=bias)
        self.gate_proj, self.up_proj = self.gate_up.parts([inner, inner])
        self.down_proj = make.linear(inner, outer, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Feed-forward of each token, [tokens, hidden_size] to the same."""
        both = self.gate_up(hidden)  # [tokens, 2 * intermediate_size]
        if self.impl is Impl.TRITON:
            from kernels.gpu.layer import silu_mul  # a CPU has no Triton

            inner = silu_mul(both)
        elif self.impl is Impl.NUMBA:
            from kernels.cpu.layer import silu_mul as silu_mul_on_cpu  # numba takes a moment

            inner = silu_mul_on_cpu(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        output: Tensor = self.down_proj(inner)
        return output


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32 or wider."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str, impl: Impl
    ) -> None:
        super().__init__()
        self.eps = eps
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)

    def add(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of both, [tokens, size], and its norm; None adds nothing."""
        if self.impl is Impl.TRITON:
            from kernels.gpu.layer import add_norm  # a CPU has no Triton

            return add_norm(hidden, update, self.weight, self.eps)
        if self.impl is Impl.NUMBA:
            from kernels.cpu.layer import add_norm as add_norm_on_cpu  # numba takes a moment

            return add_norm_on_cpu(hidden, update, self.weight, self.eps)
        total = hidden if update is None else hidden + update
        return total, self(total)


class _Make:
    """Builds modules with parameters allocated on one device in one dtype, and not filled."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, impl: Impl) -> None:
        self.dtype, self.device, self.impl = dtype, device, impl

    def linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
        # By way of "meta", which skips torch's random initialisation of every weight.
        empty = nn.Linear(inputs, outputs, bias=bias, dtype=self.dtype, device="meta")
        return empty.to_empty(device=self.device)

    def joint(self, inputs: int, outputs: int, *, bias: bool) -> Joint:
        return Joint.of(self.linear(inputs, outputs, bias=bias))

    def embedding(self, rows: int, size: int) -> nn.Embedding:
        empty = nn.Embedding(rows, size, dtype=self.dtype, device="meta")
        return empty.to_empty(device=self.device)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps, self.dtype, self.device, self.impl)
