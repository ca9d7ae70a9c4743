"""What happens once before the training clock runs: the attention kernel and compilation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from models.training.attention import choose_attention

if TYPE_CHECKING:
    from models.training.llama import TrainingLlama
    from models.training.plans import Plan


def warm_up(model: TrainingLlama, plan: Plan, *, compile_parts: bool) -> None:
    """Chooses the attention kernel and compiles, or says why training goes on without it."""
    start = time.perf_counter()
    model.attention = choose_attention(plan.shape, model.embed.device, model.dtype)
    print(f"attention: {model.attention}")
    if not compile_parts:
        return
    model.compile_parts()
    try:
        _trial_step(model, plan)
    except RuntimeError as error:
        print(f"compilation failed, training goes on without it: {error}")
        model.eager_parts()
        model.zero_grad(set_to_none=True)
        _trial_step(model, plan)
    print(f"compiled in {time.perf_counter() - start:.1f} s")


def _trial_step(model: TrainingLlama, plan: Plan) -> None:
    length = plan.stages[0].length
    size = (plan.step_tokens // length, length)
    tokens = torch.randint(8, plan.shape.vocab, size, device=model.embed.device)
    with model.attention.context():
        for _ in range(2):
            torch.autograd.backward(model.losses(tokens, tokens).mean())
    model.zero_grad(set_to_none=True)
    if tokens.is_cuda:
        torch.cuda.synchronize()
