"""A file system that is soon full."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs of its own size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mounted = False

    def mount(self, size: str) -> None:
        """Mount it, or skip the test where that can't be done."""
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root can mount the small file system that this test fills")
        self.folder.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"a small file system can't be mounted here: {done.stderr.decode().strip()}")
        self._mounted = True

    def grow(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)

    def unmount(self) -> None:
        if self._mounted:
            subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)
