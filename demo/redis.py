"""A Redis to run as a container: this machine's own program and the libraries it is linked to, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

PROGRAM = "/bin/redis-server"
_LOG = "redis.log"

#: How it is started: reachable from outside, and with nothing kept on disk.
COMMAND = (
    PROGRAM,
    *("--bind", "0.0.0.0", "--port", "6379", "--protected-mode", "no"),
    *("--save", "", "--appendonly", "no", "--dir", "/tmp", "--logfile", f"/{_LOG}"),
)


def make_rootfs(directory: Path) -> int:
    """Make a root filesystem in ``directory``, and return how many files it has. Raises ``FileNotFoundError``."""
    program = shutil.which("redis-server")
    if program is None:
        raise FileNotFoundError("redis-server is not installed: bin/install-tools")
    for name in ("bin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (directory / name).mkdir(parents=True)
    shutil.copy(program, directory / PROGRAM.lstrip("/"))
    listed = subprocess.run(["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    # "libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x...)", and of the loader only the path.
    libraries = set(re.findall(r"(/\S+) \(0x", listed.stdout))
    for library in libraries:
        there = directory / library.lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, there)
    return 1 + len(libraries)


def ready_at(directory: Path) -> datetime | None:
    """Return when Redis said that it takes connections, to the millisecond; None where it did not yet."""
    log = (directory / _LOG).read_text() if (directory / _LOG).exists() else ""
    found = re.search(r"(\d\d \w{3} \d{4} \d\d:\d\d:\d\d\.\d{3}) \S Ready to accept connections", log)
    # The container has no time zone: its clock is the node's, in UTC.
    return None if found is None else datetime.strptime(f"{found[1]} +0000", "%d %b %Y %H:%M:%S.%f %z")
