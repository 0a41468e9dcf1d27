"""A root filesystem for containers, made of busybox alone: there is no image registry to ask."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def make_rootfs(directory: Path) -> Path:
    """Make a root filesystem in ``directory``, with every command that the machine's static busybox has."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise FileNotFoundError("busybox is not installed")
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
        (directory / name).mkdir(parents=True)
    shutil.copy(busybox, directory / "bin" / "busybox")
    applets = subprocess.run([busybox, "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (directory / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (directory / "etc" / "resolv.conf").touch()
    return directory
