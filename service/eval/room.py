"""How much of an evaluation a device holds at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.cache import LayerCache
from kernels.page import PAGE
from service.engine.sequence import TAIL
from service.errors import GenerationError

if TYPE_CHECKING:
    from models.config import ModelConfig

TOGETHER = {"cpu": 16, "cuda": 160}
"""Sequences that run at once. A GPU's step of one costs as much as of a hundred."""
OWN = 2048
"""Tokens of a question and its answer, with what stands before it in an unfinished page: room is
kept for so many."""
CPU_STEP, GPU_STEP = 2048, 65_536
"""Most tokens of a step: what a CPU's caches hold, and what fills a GPU several times over."""
STEP_BYTES = 2 << 30
"""Most bytes of one layer's activations in a GPU's step."""


@dataclass(frozen=True, slots=True)
class Room:
    """How much runs at once.

    Attributes:
        pages: of each layer's cache.
        together: sequences.
        step: tokens.
    """

    pages: int
    together: int
    step: int

    @staticmethod
    def on(
        device: torch.device,
        config: ModelConfig,
        dtype: torch.dtype,
        tokens: int,
        sharing: int = 1,
    ) -> Room:
        """The room for documents of up to `tokens` tokens; at least for one.

        Args:
            device: where the model runs; its weights are there already.
            config: the model's shape.
            dtype: of weights and cache.
            tokens: of the longest prompt.
            sharing: processes that share a GPU, this one included.

        Raises:
            GenerationError: the device's memory does not hold one document.
        """
        together = TOGETHER.get(device.type, TOGETHER["cpu"])
        document, question = -(-tokens // PAGE), OWN // PAGE
        if device.type != "cuda":
            return Room(document + together * question, together, CPU_STEP)
        free, total = torch.cuda.mem_get_info(device)
        # At most half, so that activations and what kernels need have the rest. Of the total's
        # share, since others may have taken theirs already, or may not.
        most = min(free, total // sharing) // 2
        each = config.layers * LayerCache.bytes_per_page(config.kv_heads, config.head_dim, dtype)
        pages = min(together * (document + question), most // each)
        if pages < document + question:
            raise GenerationError(
                f"a document of {tokens} tokens needs {(document + question) * each / 2**30:.1f} "
                f"GiB of {device}'s memory, and there are {most / 2**30:.1f}: ask for shorter "
                "contexts, or for fewer --workers"
            )
        return Room(pages, together, _step(config, dtype))


def _step(config: ModelConfig, dtype: torch.dtype) -> int:
    """Tokens of a prefill step on a GPU: a whole document, unless the model is wide.

    What a layer keeps of a token at once is, at its widest, the feed-forward's two halves and their
    product, the residual stream beside its norm in float32, and queries and their outputs.
    """
    inner = config.heads * config.head_dim
    numbers = 3 * config.intermediate_size + 4 * config.hidden_size + 4 * inner
    tokens = STEP_BYTES // (numbers * dtype.itemsize)
    return max(TAIL, min(GPU_STEP, tokens // PAGE * PAGE))  # no prompt's tail is cut
