"""Decode steps recorded as CUDA graphs, one for each bucket: a launch of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from kernels.policy import Dynamic
from models.decode_step import DecodeStep
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.cuda import _POOL_HANDLE

    from kernels.cache import LayerCache
    from kernels.policy import Dense
    from models.decode_step import Bucket, Decoded
    from models.decoder import Decoder


class CapturedStep:
    """A bucket's step: replayed on a GPU; on a CPU, for tests, run each time.

    Args:
        decoder: in bfloat16, float16 or float32.
        caches: one a layer.
        bucket: size and kind of the step.
        pool: memory that it shares with other steps, which do not run at the same time; its own
            by default.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        bucket: Bucket,
        pool: _POOL_HANDLE | None = None,
    ) -> None:
        self.bucket = bucket
        self._decoder, self._caches = decoder, caches
        self._device = caches[0].kv.device
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            self._input = DecodeStep.padding(bucket, self._device)
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    self._capture(pool)

    def replay(self, step: DecodeStep) -> Decoded:
        """Run the step.

        Args:
            step: of the bucket's size, on any device. What lies in pinned memory is not to be
                changed before the device has read it.

        Returns:
            What it computed; on a GPU it lasts until any step of the same pool is replayed.
        """
        with torch.inference_mode():
            self._input.packed.copy_(step.packed, non_blocking=True)
            if self._graph is None:
                return self._run()
            self._graph.replay()
            return self._result

    def _capture(self, pool: _POOL_HANDLE | None) -> None:
        self._run()  # compiles, and makes what is made once: a graph could not hold that
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = self._run()

    def _run(self) -> Decoded:
        from models.decode import decode  # a CPU has no Triton

        return decode(self._decoder, self._caches, self._input, self.bucket)


class CapturedSteps:
    """The steps of several buckets, in one memory pool.

    Args:
        decoder: in bfloat16, float16 or float32; weights may change in place, not move.
        caches: one a layer.
        buckets: what to capture.

    Raises:
        ModelError: the decoder's dtype is another, or a policy is plain top-k.
    """

    def __init__(
        self, decoder: Decoder, caches: Sequence[LayerCache], buckets: Iterable[Bucket]
    ) -> None:
        kv = caches[0].kv
        if kv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            name = str(kv.dtype).removeprefix("torch.")
            raise ModelError(
                f"Decode steps are captured in bfloat16, float16 or float32, not in {name}."
            )
        order = sorted(buckets, key=lambda bucket: bucket.batch * bucket.pages, reverse=True)
        if any(isinstance(one.policy, Dynamic) and not one.policy.sampled for one in order):
            raise ModelError("Decode steps are captured for samples, not for plain top-k.")
        gpu = kv.device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if gpu else None
        # The largest first: the others then fit into the memory that it took.
        self._steps = [
            CapturedStep(decoder, caches, bucket, pool)
            for bucket in tqdm(order, desc="Capturing decode steps", disable=not gpu)
        ]

    def find(
        self, rows: int, pages: int, policy: Dense | Dynamic, dense_layers: int = 0
    ) -> CapturedStep | None:
        """The smallest step that holds `rows` rows of `pages` pages; None where none does."""
        fitting = [
            step
            for step in self._steps
            if (step.bucket.policy, step.bucket.dense_layers) == (policy, dense_layers)
            and step.bucket.batch >= rows
            and step.bucket.pages >= pages
        ]
        return min(fitting, key=lambda s: (s.bucket.batch, s.bucket.pages), default=None)
