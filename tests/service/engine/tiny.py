"""A tiny random decoder behind a real engine, in float64 by default."""

from __future__ import annotations

import asyncio
import itertools

import tokenizers
import torch

from kernels.attention import Impl
from models.decoder import Decoder
from models.tokenizer import Tokenizer
from service.engine.types import SamplingParams, SparsityParams
from tests.models import tiny as models_tiny

VOCAB = 256
EOS = 0


def letters():
    """A tokenizer with one token a character: token i is the character U+0100 + i."""
    vocab = {chr(0x100 + i): i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=chr(0x100)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


def tiny_config(**changes):
    """The tiny model's, with a token for each of `letters`."""
    fields = {"vocab_size": VOCAB, "intermediate_size": 64, "eos_ids": (EOS,), "dtype": "float64"}
    return models_tiny.tiny_config(**(fields | changes))


def make_decoder(dtype=torch.float64, seed=0, config=None, impl=Impl.TORCH, device="cpu"):
    config = config or tiny_config()
    decoder = Decoder(config, dtype, device, impl)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            # Large enough that attention is peaked and the greedy answer varies.
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * (1.0 if "embed" in name else 0.35))
    return decoder


def level(decoder):
    """The model with smaller queries: its attention is level enough to leave pages of a prompt."""
    for layer in decoder.model.layers:
        layer.self_attn.q_proj.weight.mul_(0.15)
    return decoder


class Harness:
    def __init__(self, engine, runner, decoder):
        self.engine, self.runner, self.decoder = engine, runner, decoder
        self._ids = itertools.count()

    async def generate(self, prompt, sampling=None, sparsity=None, n=1, delay=0.0, priority=0):
        """All deltas of one request."""
        await asyncio.sleep(delay)
        stream = self.engine.submit(
            prompt,
            sampling or greedy(8),
            sparsity or dynamic(),
            n=n,
            priority=priority,
            request_id=f"r{next(self._ids)}",
        )
        return [delta async for delta in stream]

    def run(self, *calls):
        """Run several `generate` calls together; deltas of each."""

        async def gather():
            return await asyncio.wait_for(asyncio.gather(*calls), 120)

        return asyncio.run(gather())

    def tokens(self, prompt, *args, **kwargs):
        [deltas] = self.run(self.generate(prompt, *args, **kwargs))
        return tokens_of(deltas)


def tokens_of(deltas, index=0):
    return [t for delta in deltas if delta.index == index for t in delta.token_ids]


def text_of(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


def greedy(max_tokens, **changes):
    return SamplingParams(
        **({"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | changes)
    )


def dynamic(**changes):
    return SparsityParams(
        **(
            {
                "policy": "dynamic",
                "coverage": 0.9,
                "min_keys": 0,
                "max_keys": 160,
                "sampled": True,
                "dense_layers": 0,
                "min_coverage": 0.0,
                "pattern": "sinks:4+window:64",
                "allow_brownout": True,
            }
            | changes
        )
    )


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (length,), generator=generator).tolist()
