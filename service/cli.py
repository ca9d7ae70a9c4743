"""The `saccade` command: errors become one sentence and a non-zero exit."""

from __future__ import annotations

import importlib.util
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of `saccade`."""
    # Ctrl-C ends the process without a traceback until a command takes it over: loading takes a
    # second or two.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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


def _shadowing_package() -> str | None:
    """Where a regular package called `kernels` lies; ours is a namespace folder, without origin."""
    spec = importlib.util.find_spec("kernels")
    return None if spec is None else spec.origin


def _stop(sentence: str) -> NoReturn:
    sys.exit(f"saccade: {sentence}")


if __name__ == "__main__":
    main()
