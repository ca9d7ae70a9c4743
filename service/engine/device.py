"""Whether the device still answers after a failure."""

from __future__ import annotations

import torch

from service.errors import EngineDeadError


def check_alive(device: torch.device, error: Exception) -> None:
    """Tell a failed call from a lost device.

    A kernel that read where it may not, or whose assertion failed, takes a process's access to its
    GPU with it: every later call fails, whoever made it, and only a new process has the GPU again.

    Args:
        device: where the failed work ran.
        error: what it raised; on a GPU perhaps what an earlier kernel left.

    Raises:
        EngineDeadError: nothing runs on the device any more.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        # Behind the first line stands advice to developers.
        reason = str(lost).partition("\n")[0]
        raise EngineDeadError(
            f"the GPU no longer answers ({reason}); start the service again"
        ) from error
