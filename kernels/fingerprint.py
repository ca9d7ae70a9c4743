"""What decides which keys a row reads, and a short name of it.

Two measurements are of the same selection where these agree: the policy, the constants that keys
are scored and drawn by, and which layers attend densely instead.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kernels import budget, codes, masses, sample

if TYPE_CHECKING:
    from types import ModuleType

    from kernels.policy import Dynamic

SURVIVORS = 1.0
"""Share of a row's keys whose codes are scored: nothing is left out before."""
DIGITS = 12
"""Hexadecimal ones of a digest."""


def fingerprint(policy: Dynamic, dense_layers: int = 0) -> dict[str, Any]:
    """What decides the selection, as a results file notes it.

    Args:
        policy: the budget.
        dense_layers: so many of the model's first layers attend densely.

    Returns:
        A `digest` of the rest: `policy`, `dense_layers`, `survivors`, the share of keys that are
        scored one by one, and `scorer`, the constants by module. Without Triton there are no
        planes: queries are then not quantised.
    """
    scorer = {module.__name__.rpartition(".")[2]: _constants(module) for module in _modules()}
    fields = {
        "policy": asdict(policy),
        "dense_layers": dense_layers,
        "survivors": SURVIVORS,
        "scorer": scorer,
    }
    text = json.dumps(fields, sort_keys=True)
    return {"digest": sha256(text.encode()).hexdigest()[:DIGITS], **fields}


def _modules() -> list[ModuleType]:
    """Where the constants stand."""
    modules = [codes, masses, budget, sample]
    if find_spec("triton") is not None:
        from kernels.gpu import lanes  # a CPU has no Triton

        modules.append(lanes)
    return modules


def _constants(module: ModuleType) -> dict[str, float]:
    """A module's public numbers; Triton's constants are wrapped."""
    found = {}
    for name, wrapped in vars(module).items():
        value = getattr(wrapped, "value", wrapped)
        if name.isupper() and not name.startswith("_") and type(value) in (int, float):
            found[name] = value
    return found
