"""The Llama that is trained: weights of a kind stacked over the layers, tokens flat.

All work before and after attention is done on flat [tokens, hidden], in functions that are compiled
once and serve every sequence length and layer. Weights are float32; products are in `dtype`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.training.attention import Attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.training.plans import Shape

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention: x [tokens, heads, dim], cos and sin [tokens, dim/2]."""
    first, second = x.float().chunk(2, dim=-1)  # [tokens, heads, dim/2] each
    c, s = cos[:, None], sin[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)


def before_attention(
    x: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and rotary: x [tokens, hidden] -> q, k, v [tokens, heads, head_dim]."""
    weight = torch.cat([q, k, v]).to(x.dtype)  # [(heads + 2 * kv_heads) * head_dim, hidden]
    joint = F.linear(_norm(x, norm, eps), weight)
    queries, keys, values = torch.split(joint, [q.shape[0], k.shape[0], v.shape[0]], dim=-1)
    tokens = x.shape[0]
    return (
        _rotate(queries.reshape(tokens, -1, head_dim), cos, sin),
        _rotate(keys.reshape(tokens, -1, head_dim), cos, sin),
        values.reshape(tokens, -1, head_dim).contiguous(),
    )


def after_attention(
    x: Tensor,
    attended: Tensor,
    o: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    eps: float,
) -> Tensor:
    """Output projection and SwiGLU, each added to x [tokens, hidden]."""
    x = x + F.linear(attended, o.to(x.dtype))
    joint = F.linear(_norm(x, norm, eps), torch.cat([gate, up]).to(x.dtype))
    opened, lifted = joint.chunk(2, dim=-1)  # [tokens, intermediate] each
    return x + F.linear(F.silu(opened) * lifted, down.to(x.dtype))


def token_losses(x: Tensor, norm: Tensor, embed: Tensor, targets: Tensor, eps: float) -> Tensor:
    """Cross-entropy of each token in nats: x [tokens, hidden], targets [tokens] -> [tokens]."""
    logits = F.linear(_norm(x, norm, eps), embed.to(x.dtype)).float()  # [tokens, vocab]
    return F.cross_entropy(logits, targets, reduction="none")


class TrainingLlama(nn.Module):
    """Decoder with tied embeddings, for training and evaluation on whole sequences."""

    def __init__(self, shape: Shape, *, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * std)

        layers, hidden, wide = shape.layers, shape.hidden, shape.intermediate
        q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        residual = 0.02 / math.sqrt(2 * layers)
        self.embed = normal(shape.vocab, hidden)
        self.q = normal(layers, q_size, hidden)
        self.k = normal(layers, kv_size, hidden)
        self.v = normal(layers, kv_size, hidden)
        self.o = normal(layers, hidden, q_size, std=residual)
        self.gate = normal(layers, wide, hidden)
        self.up = normal(layers, wide, hidden)
        self.down = normal(layers, hidden, wide, std=residual)
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        self.attention = Attention()
        self._before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self._after: Callable[..., Tensor] = after_attention
        self._losses: Callable[..., Tensor] = token_losses
        self._rotary: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def compile_parts(self) -> None:
        """Compiles the flat parts; every later training call must have as many tokens."""
        self._before = torch.compile(before_attention, dynamic=False)
        self._after = torch.compile(after_attention, dynamic=False)
        self._losses = torch.compile(token_losses, dynamic=False)

    def eager_parts(self) -> None:
        """Undoes `compile_parts`."""
        self._before, self._after = before_attention, after_attention
        self._losses = token_losses

    def losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Losses of the training step: int64 [rows, length] twice -> float32 [rows * length]."""
        x = self._stack(tokens, self._before, self._after)
        return self._losses(
            x, self.final_norm, self.embed, targets.reshape(-1), self.shape.norm_eps
        )

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and whether the target is the most likely token: [rows, length] each.

        Any number of tokens; never compiled.
        """
        x = self._stack(tokens, before_attention, after_attention)
        hidden = _norm(x, self.final_norm, self.shape.norm_eps)
        weight = self.embed.to(x.dtype)
        losses, hits = [], []
        for part, target in zip(
            torch.split(hidden, 65_536), torch.split(targets.reshape(-1), 65_536), strict=True
        ):
            logits = F.linear(part, weight).float()  # [tokens, vocab]
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(-1) == target)
        return torch.cat(losses).view(tokens.shape), torch.cat(hits).view(tokens.shape)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of every position: int64 [rows, length] -> float32 [rows, length, vocab]."""
        x = self._stack(tokens, before_attention, after_attention)
        hidden = _norm(x, self.final_norm, self.shape.norm_eps)
        return F.linear(hidden, self.embed.to(x.dtype)).float().view(*tokens.shape, -1)

    def _stack(
        self,
        tokens: Tensor,
        before: Callable[..., tuple[Tensor, Tensor, Tensor]],
        after: Callable[..., Tensor],
    ) -> Tensor:
        shape = self.shape
        rows, length = tokens.shape
        cos, sin = self._angles(rows, length)
        x = F.embedding(tokens.reshape(-1), self.embed).to(self.dtype)  # [tokens, hidden]
        stacked = (
            *(getattr(self, name) for name in MATRICES),
            self.attention_norm,
            self.mlp_norm,
        )
        for q, k, v, o, gate, up, down, norm1, norm2 in zip(
            *(weight.unbind(0) for weight in stacked), strict=True
        ):
            heads = before(x, norm1, q, k, v, cos, sin, shape.head_dim, shape.norm_eps)
            attended = self.attention(*heads, rows)  # [tokens, heads * head_dim]
            x = after(x, attended, o, norm2, gate, up, down, shape.norm_eps)
        return x

    def _angles(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every token's position: float32 [rows * length, head_dim / 2]."""
        if (rows, length) not in self._rotary:
            dim, device = self.shape.head_dim, self.embed.device
            powers = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
            speeds = 1.0 / self.shape.rope_theta**powers
            positions = torch.arange(length, dtype=torch.float32, device=device)
            angles = (positions[:, None] * speeds).repeat(rows, 1)
            self._rotary[rows, length] = angles.cos(), angles.sin()
        return self._rotary[rows, length]
