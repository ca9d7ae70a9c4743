"""Decode steps recorded as CUDA graphs, one for each bucket: a launch of the whole model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from models.decode_step import Decoded, DecodeStep
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor
    from torch.cuda import _POOL_HANDLE

    from kernels.cache import LayerCache
    from models.decode_step import Bucket
    from models.decoder import Decoder

_log = logging.getLogger("saccade.models")


class CapturedStep:
    """A bucket's step: replayed on a GPU; on a CPU, for tests, run each time.

    Args:
        decoder: in bfloat16, float16 or float32.
        caches: one a layer.
        bucket: size and kind of the step.
        pool: memory that it shares with other steps, which do not run at the same time; its own
            by default.
        packed: memory of its result, float32, `Decoded.size` numbers or more, likewise.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[LayerCache],
        bucket: Bucket,
        pool: _POOL_HANDLE | None = None,
        packed: Tensor | None = None,
    ) -> None:
        self.bucket = bucket
        self._decoder, self._caches = decoder, caches
        self._device = caches[0].kv.device
        self._graph: torch.cuda.CUDAGraph | None = None
        from kernels.gpu.coder import Coder  # a CPU has no Triton

        with torch.inference_mode():
            self._coder = Coder(caches)
            self._input = DecodeStep.padding(bucket, self._device)
            self._packed = _room([bucket], decoder, self._device) if packed is None else packed
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    self._capture(pool)

    def replay(self, step: DecodeStep) -> Decoded:
        """Run the step.

        Args:
            step: of the bucket's size, on any device. What lies in pinned memory is not to be
                changed before the device has read it.

        Returns:
            What it computed; it lasts until any step that shares its memory is replayed.
        """
        with torch.inference_mode():
            self._input.packed.copy_(step.packed, non_blocking=True)
            if self._graph is None:
                return self._run()
            self._graph.replay()
            return self._result

    def fetch(self, decoded: Decoded) -> Decoded:
        """What this step computed, on its way to the host: there once the device has got to it."""
        gpu = self._device.type == "cuda"
        packed = torch.empty_like(decoded.packed, device="cpu", pin_memory=gpu)
        packed.copy_(decoded.packed, non_blocking=True)
        return Decoded.over(packed, decoded.hidden, self.bucket, self._decoder.config)

    def _capture(self, pool: _POOL_HANDLE | None) -> None:
        self._run()  # compiles, and makes what is made once: a graph could not hold that
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self._result = self._run()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves the thread in its own
        self._graph = graph

    def _run(self) -> Decoded:
        from models.decode import decode

        rest = (self._input, self.bucket, self._packed)
        return decode(self._decoder, self._caches, self._coder, *rest)


class CapturedSteps:
    """The steps of several buckets, in one memory pool.

    A step that cannot be captured is left out. Where memory was short the smaller ones are tried
    all the same; any other failure the next step of the same kind would only repeat.

    Args:
        decoder: in bfloat16, float16 or float32; weights may change in place, not move.
        caches: one a layer.
        buckets: what to capture, at least one.

    Raises:
        ModelError: the decoder's dtype is another, or its layers are not like Llama's.
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
        if not decoder.fused:
            raise ModelError(f"Decode steps of {decoder.config.architecture} are not captured.")
        # The largest first: the others then fit into the memory that it took.
        order = sorted(buckets, key=lambda bucket: bucket.batch * bucket.pages, reverse=True)
        self.failed = 0  # buckets that could not be captured
        self._steps: list[CapturedStep] = []
        gpu = kv.device.type == "cuda"
        pool = torch.cuda.graph_pool_handle() if gpu else None
        packed, broken = None, set()
        for bucket in tqdm(order, unit="step", desc="Capturing decode steps", disable=not gpu):
            if bucket.dynamic in broken:
                self.failed += 1
                continue
            try:
                packed = _room(order, decoder, kv.device) if packed is None else packed
                self._steps.append(CapturedStep(decoder, caches, bucket, pool, packed))
            except Exception as error:  # noqa: BLE001  whatever it is, the model runs without
                _log.warning("%s is not captured", bucket, exc_info=error)
                self.failed += 1
                if not _short_of_memory(error):
                    broken.add(bucket.dynamic)

    def find(
        self, rows: int, pages: int, *, dynamic: bool, dense_layers: int = 0
    ) -> CapturedStep | None:
        """The smallest step that holds `rows` rows of `pages` pages; None where none does."""
        fitting = [
            step
            for step in self._steps
            if (step.bucket.dynamic, step.bucket.dense_layers) == (dynamic, dense_layers)
            and step.bucket.batch >= rows
            and step.bucket.pages >= pages
        ]
        return min(fitting, key=lambda s: (s.bucket.batch, s.bucket.pages), default=None)

    def drop(self, step: CapturedStep) -> None:
        """Find this step no more: its replay failed."""
        self._steps.remove(step)


def _room(buckets: Iterable[Bucket], decoder: Decoder, device: torch.device) -> Tensor:
    """Memory for the result of any one of several steps."""
    size = max(Decoded.size(bucket, decoder.config) for bucket in buckets)
    return torch.empty(size, device=device)


def _short_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice; a graph whose capture it ended may raise an error on top."""
    return isinstance(error, torch.OutOfMemoryError) or (
        error.__context__ is not None and _short_of_memory(error.__context__)
    )
