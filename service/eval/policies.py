"""Policies as they are named on the command line and in tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from kernels.errors import KernelError
from kernels.fingerprint import fingerprint
from service.engine.batch import dynamic_policy
from service.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.engine.types import SparsityParams
    from service.sparsity import SparsityConfig


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A policy and its name."""

    name: str
    sparsity: SparsityParams

    def selection(self) -> dict[str, Any] | None:
        """What decides which keys its decode steps read (`kernels.fingerprint`), where content
        does."""
        if self.sparsity.policy != "dynamic":
            return None
        return fingerprint(dynamic_policy(self.sparsity), self.sparsity.dense_layers)


def selections_of(policies: Iterable[NamedPolicy]) -> dict[str, Any]:
    """What decides which keys are read under each policy that selects by content, by its name."""
    found = {policy.name: policy.selection() for policy in policies}
    return {name: selection for name, selection in found.items() if selection is not None}


def parse_policy(text: str, defaults: SparsityConfig) -> NamedPolicy:
    """Read `dense`, `dynamic`, `dynamic:coverage=0.95,max_keys=512`, `dynamic:k=512`, `fixed:...`.

    `prefill=dynamic,prefill_coverage=0.98` has the prompt before its last 128 tokens attend
    sparsely, too; else it is read densely. `k` keys are neither fewer nor more (but for the fewest
    that a sample has), whatever mass they carry; with `sampled=false` they are plain top-k. What
    follows `fixed:` is a pattern, such as `sinks:16+window:1024`.

    Raises:
        ConfigError: naming what cannot be read.
    """
    kind, _, rest = text.strip().partition(":")
    fields: dict[str, object] = {"policy": kind}
    if kind == "fixed":
        fields["pattern"] = rest or defaults.pattern
    elif kind == "dynamic" and rest:
        for part in rest.split(","):
            name, _, value = part.partition("=")
            if name.strip() == "k":
                fields |= {"coverage": 1.0, "min_keys": value, "max_keys": value}
            else:
                fields[name.strip()] = value
    elif kind not in ("dense", "dynamic") or rest:
        raise ConfigError(
            f"cannot read the policy {text!r}: write dense, dynamic, dynamic:coverage=0.95, "
            "dynamic:k=512 or fixed:sinks:16+window:1024"
        )
    try:
        # Prompts are read densely, once for all policies, unless a policy names it otherwise.
        merged = {"prefill": "dense"} | {**defaults.model_dump(exclude_unset=True), **fields}
        return NamedPolicy(text.strip(), type(defaults).model_validate(merged).resolve())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except KernelError as error:
        reason = str(error)
    raise ConfigError(f"cannot read the policy {text!r}: {reason}")
