"""Processes that end with the one that started them, however that one ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

_LAUNCHER: Final = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the starter of this process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs in the child before the command: asks the kernel to end it with its parent (1 = PR_SET_PDEATHSIG).

Not a `preexec_fn`, which would run Python between fork and exec in a process full of threads. The parent may have died
before the request, hence the second look.
"""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """A command line that runs `command`, whose first part is a path, and gets SIGTERM when its parent ends.

    The kernel takes the end of the *thread* that started a process for the end of the parent, so that thread has to live
    as long as the child. Elsewhere than on Linux a child outlives a parent that is killed.
    """
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
