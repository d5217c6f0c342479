"""Which devices there are, and how much memory was taken on one."""

import os
import sys

from polymodal.errors import ConfigError


def best_device() -> str:
    """A GPU where there is one; of several processes on a machine each its own."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    own = os.environ.get("LOCAL_RANK")
    return "cuda" if own is None else f"cuda:{int(own) % torch.cuda.device_count()}"


def check_device(name: str) -> None:
    """Make sure that a device is known and on this machine, before anything is loaded."""
    import torch

    kind, colon, number = name.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in here or (colon and not number.isdecimal()):
        raise ConfigError(f"device {name!r} is none that is known; choose cpu, cuda, cuda:NUMBER or mps")
    if int(number or 0) >= here[kind]:
        found = ", ".join(other for other, count in here.items() if count)
        raise ConfigError(f"device {name!r} is not on this machine, which has {found}; leave it out to take the best")


def peak_memory() -> int | None:
    """The most bytes that this process held: on its GPU where there is one, else in all; None where nobody counts."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
