"""One decode step of a fixed size: a token of each sequence, in few launches and without a wait.

Computes what `models.decoder.Decoder.forward` computes for single tokens, in the kernels of Triton,
which a CPU does not have. Sizes depend on the bucket alone, and everything else is read on the
device, so that a CUDA graph can hold the step (`models.graph`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from kernels.gpu.attend import dense_decode
from kernels.gpu.decode import attend
from kernels.gpu.layer import add_norm
from kernels.gpu.linear import gated_linear, linear
from kernels.gpu.rotate import rotate_and_write
from kernels.policy import Dynamic
from kernels.timing import Phases
from models.decode_step import Decoded

CHOICE = Dynamic()
"""What a step fixes of its rows' policies: all but the limits, which are each row's own."""

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from kernels.gpu.coder import Coder
    from models.attention import LayerAttention
    from models.decode_step import Bucket, DecodeStep
    from models.decoder import Attention, Decoder, DecoderLayer
    from models.feed_forward import SwiGLU


def decode(
    decoder: Decoder,
    caches: Sequence[LayerCache],
    coder: Coder,
    step: DecodeStep,
    bucket: Bucket,
    packed: Tensor,
) -> Decoded:
    """Run a step, writing its keys and values, and the codes of pages that it completes.

    Keys, values and codes depend on the step and on what the cache holds before the row's own key:
    a step that is run again, by whatever code, writes over what it wrote.

    Args:
        decoder: in bfloat16, float16 or float32, on a GPU (or under Triton's interpreter), whose
            layers are like Llama's (`Decoder.fused`).
        caches: one a layer.
        coder: of these caches.
        step: the input, padded to the bucket's size.
        bucket: how the rows attend.
        packed: float32, `Decoded.size` numbers or more: where the result goes.
    """
    body, update = decoder.model, None
    hidden: Tensor = body.embed_tokens(step.token_ids)  # [batch, hidden_size]
    rows = {window: step.rows.within(window) for window in set(decoder.config.windows)}
    assert decoder.rotary is not None and decoder.fused
    angles = decoder.rotary.angles(step.positions)
    attention = _Attention(angles, step.slots, step.limits, rows, bucket)
    for module, cache in zip(body.layers, caches, strict=True):
        layer = cast("DecoderLayer", module)
        norm = layer.input_layernorm
        hidden, normed = add_norm(hidden, update, norm.weight, norm.eps)
        update = attention(layer.self_attn, normed, cache)
        norm = layer.post_attention_layernorm
        hidden, normed = add_norm(hidden, update, norm.weight, norm.eps)
        mlp = cast("SwiGLU", layer.mlp)
        gate_up, down = mlp.gate_up, mlp.down_proj
        update = linear(gated_linear(normed, gate_up.weight, gate_up.bias), down.weight, down.bias)
    _, normed = add_norm(hidden, update, body.norm.weight, body.norm.eps)
    decoded = Decoded.over(packed, normed, bucket, decoder.config)
    linear(normed, decoder.head, output=decoded.logits)
    torch.sum(normed, -1, dtype=torch.float32, out=decoded.total)
    if decoded.keys is not None and decoded.coverage is not None:
        decoded.keys.copy_(torch.stack(attention.keys))
        torch.stack(attention.coverage, out=decoded.coverage)
    coder(step.slots)
    return decoded


@dataclass(frozen=True, slots=True)
class _Attention:
    """Attention of a step's layers, and note of what they looked at."""

    angles: tuple[Tensor, Tensor]  # [batch, 1, head_dim / 2]
    slots: Tensor  # int64 [batch]
    limits: Tensor  # float32 [batch, 4]
    rows: Mapping[int | None, Rows]  # by sliding window
    bucket: Bucket
    keys: list[Tensor] = field(default_factory=list)  # int32 [batch, kv_heads] of each layer
    coverage: list[Tensor] = field(default_factory=list)  # [batch, heads] of each layer

    def __call__(self, module: Attention, normed: Tensor, cache: LayerCache) -> Tensor:
        """What a layer's attention adds to the residual stream, [batch, hidden_size]."""
        query = self._project(module, normed, cache)
        attention = cast("LayerAttention", module.attend)
        rows, scale = self.rows[attention.window], attention.scale
        if self.bucket.dynamic and attention.layer >= self.bucket.dense_layers:
            found = attend(query, cache, rows, CHOICE, scale, Phases(), self.limits)
            output = found.output
            self.keys.append(found.keys)
            self.coverage.append(found.coverage)
        else:
            output, lse = dense_decode(query, cache, rows, scale)
            if self.bucket.dynamic:
                self.keys.append(rows.visible.int()[:, None].expand(-1, cache.kv_heads))
                self.coverage.append(torch.ones_like(lse).where(lse.isfinite(), torch.nan))
        return linear(output.flatten(1), module.o_proj.weight, module.o_proj.bias)

    def _project(self, module: Attention, normed: Tensor, cache: LayerCache) -> Tensor:
        """A layer's queries [batch, heads, head_dim]; its keys and values go into the cache."""
        # [batch, (heads + 2 * kv_heads) * head_dim]
        qkv = linear(normed, module.qkv.weight, module.qkv.bias)
        if module.q_norm is None or module.k_norm is None:
            return rotate_and_write(qkv, self.angles, self.slots, cache)
        norms = module.q_norm.weight, module.k_norm.weight
        return rotate_and_write(qkv, self.angles, self.slots, cache, norms, module.q_norm.eps)
