"""Questions about documents of 65,536 tokens, dense and dynamic; 1 where dynamic answers fewer.

python tests/bench/far.py [--documents N]

Of rows that see many keys other ones are probed than of short rows (`kernels.budget.FAR`): what
goes wrong there shows in no document that is quickly read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.engine.build import device_name, machine_name  # noqa: E402  (runs uninstalled)
from service.eval.cell import Cell  # noqa: E402
from service.eval.evaluation import Evaluation  # noqa: E402
from service.eval.policies import parse_policy  # noqa: E402
from service.eval.results import Results, table  # noqa: E402
from service.sparsity import SparsityConfig  # noqa: E402

MODEL = ROOT / "models/checkpoints/saccade-12m"
TASKS = ("multi-value", "variables")
CONTEXT = 65_536
POLICIES = ("dense", "dynamic:coverage=0.98")
LOSS = 0.05
"""Of dense attention's right answers, at the most; a thousand of them say 0.002."""


def main() -> None:
    """Ask, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1, help="of each task")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    device = torch.device(device_name("auto"))
    evaluation = Evaluation(MODEL, device, questions=10, seed=0, workers=given.workers)
    config = SparsityConfig()
    policies = tuple(parse_policy(policy, config) for policy in POLICIES)
    cells = [Cell(task, CONTEXT, given.documents, policies) for task in TASKS]
    settings = evaluation.settings(MODEL.name, None, config)
    results = Results.start(None, "far.py", settings, None, machine_name(device))
    evaluation.fill(cells, results, None)
    print(table(results.records))
    lost = [r for r in results.records if r.loss is not None and r.loss > LOSS]
    for record in lost:
        print(f"{record.task}: {record.loss:.0%} fewer right answers than dense attention's")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
