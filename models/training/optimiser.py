"""Muon for the weight matrices and AdamW for embedding and norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.training.llama import MATRICES

if TYPE_CHECKING:
    from models.training.llama import TrainingLlama

_VECTORS = ("embed", "attention_norm", "mlp_norm", "final_norm")


def orthogonalise(x: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest matrix with singular values of one.

    x [matrices, rows, columns], rows <= columns. Coefficients: Jordan et al., Muon (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT  # [matrices, rows, rows]
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


class Optimiser:
    """Both optimisers over one model."""

    def __init__(self, model: TrainingLlama, *, muon_rate: float, adam_rate: float) -> None:
        self._rates = muon_rate, adam_rate
        self._matrices = {name: getattr(model, name) for name in MATRICES}
        self._momenta = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._vectors = {name: getattr(model, name) for name in _VECTORS}
        self._adam = torch.optim.AdamW(
            [
                {"params": [model.embed], "weight_decay": 0.1},
                {"params": [self._vectors[n] for n in _VECTORS[1:]], "weight_decay": 0.0},
            ],
            lr=adam_rate,
            betas=(0.9, 0.95),
            fused=model.embed.is_cuda,
        )
        self._parameters = [*self._matrices.values(), *self._vectors.values()]
        self._low = torch.bfloat16 if model.embed.is_cuda else torch.float32

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with the rates times `factor`; gradients are clipped to norm 1 and cleared."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        muon_rate, adam_rate = (factor * rate for rate in self._rates)
        for group in self._adam.param_groups:
            group["lr"] = adam_rate
        self._adam.step()
        self._muon(muon_rate)
        for parameter in self._parameters:
            parameter.grad = None

    def _muon(self, rate: float) -> None:
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for name, weight in self._matrices.items():
            if weight.grad is None:
                continue
            momentum = self._momenta[name]
            momentum.lerp_(weight.grad, 0.05)
            ahead = weight.grad.lerp(momentum, 0.95)  # Nesterov
            wide = ahead if ahead.shape[1] <= ahead.shape[2] else ahead.mT
            key = wide.shape[1], wide.shape[2]
            groups.setdefault(key, []).append((weight, wide))
        for (_, columns), members in groups.items():
            # One batch a shape: the steps are launch-bound otherwise.
            joint = orthogonalise(torch.cat([wide for _, wide in members]).to(self._low))
            scale = rate * 0.2 * columns**0.5
            for (weight, _), update in zip(
                members, torch.split(joint, members[0][0].shape[0]), strict=True
            ):
                full = update if update.shape == weight.shape else update.mT
                weight.mul_(1.0 - 0.1 * rate).add_(full.to(weight.dtype), alpha=-scale)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name; Adam's step count is the run's."""
        tensors = {f"muon.{name}": momentum for name, momentum in self._momenta.items()}
        for name, parameter in self._vectors.items():
            for moment, tensor in self._adam.state.get(parameter, {}).items():
                if moment != "step":
                    tensors[f"adam.{name}.{moment}"] = tensor
        return tensors

    def load_state(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restores what `state` gave after `steps` steps."""
        for name, momentum in self._momenta.items():
            momentum.copy_(tensors[f"muon.{name}"])
        for name, parameter in self._vectors.items():
            moments = {
                moment: tensors[f"adam.{name}.{moment}"].to(parameter.device, torch.float32)
                for moment in ("exp_avg", "exp_avg_sq")
            }
            on = parameter.device if parameter.is_cuda else "cpu"
            count = torch.tensor(float(steps), device=on)
            self._adam.state[parameter] = {"step": count, **moments}
