"""Trains a small long-context Llama from a folder of text files, in resumable pieces.

    python3 -m models.training.train --text books/train --val books/val --plan full

Running the same command again goes on where the last piece stopped. With `--start CHECKPOINT` a new
run begins with the weights and the tokenizer of an exported checkpoint. On a host with several GPUs
all of them train one model; pieces of one run may have different numbers of GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from kernels.errors import SaccadeError
from models.training.errors import TrainingError
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

    from models.training.launch import train_together
    from models.training.prepare import prepare
    from models.training.run import Settings
    from models.training.trainer import Trainer

    plan = find_plan(options.plan)
    cuda = torch.cuda.is_available()
    world = _world(options.gpus, torch.cuda.device_count() if cuda else None)
    settings = Settings(
        out=options.out,
        state=options.state,
        deadline=_STARTED + 60 * options.minutes,
        workers=options.workers or max(1, min(14, ((os.cpu_count() or 2) - 2) // world)),
        compile_parts=cuda and not options.no_compile,
        steps=options.steps,
        max_shard=options.max_shard_mib * 2**20 if options.max_shard_mib else None,
        start=options.start,
    )
    with tempfile.TemporaryDirectory(prefix="training-") as folder:
        scratch = Path(folder)
        data = prepare(options.text, options.val, plan, scratch, options.state, settings.start)
        if options.export:
            Trainer(plan, data, settings, seed=options.seed).export()
        elif world > 1:
            train_together(world, plan, data, settings, seed=options.seed)
        else:
            Trainer(plan, data, settings, seed=options.seed).run()
    return 0


def _world(asked: int | None, gpus: int | None) -> int:
    """Processes to train with; `gpus` is None on a CPU, where any number may share it."""
    world = asked if asked is not None else gpus or 1
    if world < 1 or (gpus is not None and world > gpus):
        there = f"there are {gpus}" if gpus is not None else "at least 1 is needed"
        raise TrainingError(f"--gpus {world} cannot be had: {there}.")
    return world


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
    parser.add_argument("--workers", type=int, help="processes that build batches, a GPU")
    parser.add_argument("--gpus", type=int, help="train on so many GPUs; default: all of this host")
    parser.add_argument(
        "--start", type=Path, help="checkpoint folder that a new run takes its weights from"
    )
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
