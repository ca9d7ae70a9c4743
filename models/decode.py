"""One decode step of a fixed size: a token of each sequence, in few launches and without a wait.

Computes what `models.decoder.Decoder.forward` computes for single tokens, in the kernels of Triton,
which a CPU does not have. Sizes depend on the bucket alone, and everything else is read on the
device, so that a CUDA graph can hold the step (`models.graph`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from kernels.gpu.decode import attend
from kernels.gpu.dense_step import rotate_and_attend
from kernels.gpu.linear import linear
from kernels.gpu.rotate import rotate_and_write
from kernels.gpu.stream import Stream
from kernels.policy import Dynamic
from kernels.timing import Phases
from models.decode_step import Decoded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from kernels.cache import LayerCache, Rows
    from models.attention import LayerAttention
    from models.decode_step import Bucket, DecodeStep
    from models.decoder import Decoder, DecoderLayer
    from models.feed_forward import SwiGLU


def decode(
    decoder: Decoder,
    caches: Sequence[LayerCache],
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
        step: the input, padded to the bucket's size.
        bucket: how the rows attend.
        packed: float32, `Decoded.size` numbers or more: where the result goes.
    """
    body = decoder.model
    hidden: Tensor = body.embed_tokens(step.token_ids)  # [batch, hidden_size]
    tickets = step.slots.new_zeros(bucket.batch * decoder.config.kv_heads, dtype=torch.int32)
    stream = Stream(hidden)
    rows = {window: step.rows.within(window) for window in set(decoder.config.windows)}
    assert decoder.rotary is not None and decoder.fused
    # Ordinary launches, behind which the rows are settled: see `rotate_and_attend`.
    angles = decoder.rotary.angles(step.positions)
    attention = _Attention(angles, step.slots, rows, tickets, bucket)
    for module, cache in zip(body.layers, caches, strict=True):
        layer = cast("DecoderLayer", module)
        attention(layer, stream, cache)
        norm, mlp = layer.post_attention_layernorm, cast("SwiGLU", layer.mlp)
        gate_up, down = mlp.gate_up, mlp.down_proj
        inner = stream.gated_linear((norm.weight, norm.eps), gate_up.weight, gate_up.bias)
        stream.add(inner, down.weight, down.bias)
    decoded = Decoded.over(packed, hidden, bucket, decoder.config)
    normed = stream.normed((body.norm.weight, body.norm.eps), decoded.finite)
    linear(normed, decoder.head, output=decoded.logits)
    if decoded.keys is not None and decoded.coverage is not None:
        decoded.keys.copy_(torch.stack(attention.keys))
        torch.stack(attention.coverage, out=decoded.coverage)
    return replace(decoded, hidden=normed)


@dataclass(frozen=True, slots=True)
class _Attention:
    """Attention of a step's layers, and note of what they looked at."""

    angles: tuple[Tensor, Tensor]  # [batch, 1, head_dim / 2]
    slots: Tensor  # int64 [batch]
    rows: Mapping[int | None, Rows]  # by sliding window
    tickets: Tensor  # int32 [batch * kv_heads]  see `rotate_and_attend`
    bucket: Bucket
    keys: list[Tensor] = field(default_factory=list)  # int32 [batch, kv_heads] of each layer
    coverage: list[Tensor] = field(default_factory=list)  # [batch, heads] of each layer

    def __call__(self, layer: DecoderLayer, stream: Stream, cache: LayerCache) -> None:
        """Add a layer's attention to the residual stream."""
        module, norm = layer.self_attn, layer.input_layernorm
        # [batch, (heads + 2 * kv_heads) * head_dim]
        qkv = stream.linear((norm.weight, norm.eps), module.qkv.weight, module.qkv.bias)
        norms, eps = None, 0.0
        if module.q_norm is not None and module.k_norm is not None:
            norms, eps = (module.q_norm.weight, module.k_norm.weight), module.q_norm.eps
        attention = cast("LayerAttention", module.attend)
        rows, scale = self.rows[attention.window], attention.scale
        policy = self.bucket.policy
        if isinstance(policy, Dynamic) and attention.layer >= self.bucket.dense_layers:
            query = rotate_and_write(qkv, self.angles, self.slots, cache, norms, eps)
            found = attend(query, cache, rows, policy, scale, Phases())
            output = found.output
            self.keys.append(found.keys)
            self.coverage.append(found.coverage)
        else:
            output, lse = rotate_and_attend(
                qkv, self.angles, self.slots, cache, rows, self.tickets, scale, norms, eps
            )
            if isinstance(policy, Dynamic):
                self.keys.append(rows.visible.int()[:, None].expand(-1, cache.kv_heads))
                self.coverage.append(torch.ones_like(lse).where(lse.isfinite(), torch.nan))
        stream.add(output.flatten(1), module.o_proj.weight, module.o_proj.bias)
