"""What attention did, as answers carry it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.engine.types import Delta, SparsityReport


def report_json(report: SparsityReport) -> dict[str, object]:
    """A report as answers carry it."""
    prefill = report.prefill
    told: dict[str, object] = {
        "policy": report.policy,
        "density": round(report.density, 6),
        "coverage": None if report.coverage is None else round(report.coverage, 6),
        "coverage_p5": None if report.coverage_p5 is None else round(report.coverage_p5, 6),
        "keys_attended": round(report.keys_attended, 1),
        "fallbacks": report.fallbacks,
        "prefill": None
        if prefill is None
        else {
            "policy": prefill.policy,
            "density": round(prefill.density, 6),
            "coverage": None if prefill.coverage is None else round(prefill.coverage, 6),
        },
    }
    if report.attended is not None:
        told["attended"] = [
            {"start": one.start, "end": one.end, "text": one.text, "mass": round(one.mass, 6)}
            for one in report.attended
        ]
    return told


def attended(delta: Delta) -> dict[str, object]:
    """What a delta's token attended to, as a field of its choice; empty where nobody asked."""
    look = delta.look
    if look is None:
        return {}
    return {
        "attended": {
            "visible": look.visible,
            "density": round(look.density, 6),
            "coverage": round(look.coverage, 6),
            "heads": [
                {
                    "layer": one.layer,
                    "head": one.head,
                    "keys": one.keys,
                    "coverage": round(one.coverage, 4),
                    "positions": one.positions,
                    "weights": [round(weight, 4) for weight in one.weights],
                }
                for one in look.heads
            ],
        }
    }
