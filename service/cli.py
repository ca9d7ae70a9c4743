"""The `saccade` command: errors become one sentence and a non-zero exit."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of `saccade`."""
    # Ctrl-C ends the process without a traceback until a command takes it over: loading takes a
    # second or two.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _prepare_threads()
    shadow = _shadowing_package()
    if shadow is not None:
        _stop(
            f"another installed package called `kernels` ({shadow}) hides Saccade's; remove it "
            "(pip uninstall kernels) or use an environment of its own for Saccade"
        )
    # Late: these imports fail where the package is hidden.
    from kernels.errors import SaccadeError
    from service.commands.app import app

    try:
        app()
    except SaccadeError as error:
        _stop(str(error))
    sys.exit(0)


def _prepare_threads() -> None:
    """What torch reads from the environment when it is loaded; what is set there is kept.

    Its threads wait asleep: spinning, they would take the cores of those that select keys. And
    large tensors lie in huge pages: the keys of a long context are read here and there.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _shadowing_package() -> str | None:
    """Where a regular package called `kernels` lies; ours is a namespace folder, without origin."""
    spec = importlib.util.find_spec("kernels")
    return None if spec is None else spec.origin


def _stop(sentence: str) -> NoReturn:
    sys.exit(f"saccade: {sentence}")


if __name__ == "__main__":
    main()
