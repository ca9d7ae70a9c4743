"""Trains a small long-context Llama from a folder of text files, in resumable pieces.

    python3 -m models.training.train --text books/train --val books/val --plan full

Running the same command again goes on where the last piece stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from kernels.errors import SaccadeError
from models.training.plans import PLANS, find_plan

_STARTED = time.monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Runs one piece; 0 when it went well, whether or not the plan has ended."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except SaccadeError as error:
        print(error, file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    # Worker processes import this module again and need no torch: it takes them seconds.
    import torch

    from models.training.prepare import prepare
    from models.training.trainer import Settings, Trainer

    plan = find_plan(options.plan)
    cuda = torch.cuda.is_available()
    settings = Settings(
        out=options.out,
        state=options.state,
        deadline=_STARTED + 60 * options.minutes,
        workers=options.workers or max(1, min(14, (os.cpu_count() or 2) - 2)),
        compile_parts=cuda and not options.no_compile,
        steps=options.steps,
        max_shard=options.max_shard_mib * 2**20 if options.max_shard_mib else None,
    )
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        data = prepare(options.text, options.val, plan, Path(scratch), options.state)
        trainer = Trainer(plan, data, settings, seed=options.seed)
        if options.export:
            trainer.export()
        else:
            trainer.run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="models.training.train", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files to train on")
    parser.add_argument("--val", type=Path, help="folder of .txt files to check on")
    parser.add_argument("--out", type=Path, default=Path("models/checkpoints/saccade-12m"))
    parser.add_argument("--state", type=Path, default=Path("build/training-state"))
    parser.add_argument("--plan", default="full", help=f"one of {', '.join(PLANS)}")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="wall clock of this piece, start-up included"
    )
    parser.add_argument("--steps", type=int, help="end this piece after so many steps")
    parser.add_argument("--workers", type=int, help="processes that build batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--max-shard-mib", type=int, help="spread the checkpoint over files of at most this size"
    )
    parser.add_argument(
        "--export", action="store_true", help="only write the checkpoint of the state so far"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
