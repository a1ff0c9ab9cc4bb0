"""What the operating system says about this process: resident memory, and its peak since it was last asked."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def settle() -> int | None:
    """Give back what nobody uses, start the peak anew where the system lets one, -> bytes that the process has now"""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    return status("VmRSS") or maximum()


def peak() -> int | None:
    """The most bytes that the process had since it settled (elsewhere than on Linux: since it began)"""
    return status("VmHWM") or maximum()


def status(name: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in (PROCESS / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


def maximum() -> int | None:
    """The most that the process ever had, by getrusage; None where there is no such thing."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
