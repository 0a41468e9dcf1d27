"""A machine that is booted from a tree of files: a systemd of its own, with its own network and nothing of it kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from embedded.host import ALL_NAMESPACES, Place, end_process
from embedded.wait import eventually

if TYPE_CHECKING:
    from typing_extensions import Self

CGROUPS = Path("/sys/fs/cgroup")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}

PROGRAMS = ("systemd-nspawn", "debootstrap", "ip")


def missing() -> str | None:
    """Say what this machine lacks to boot another, or None."""
    if os.geteuid() != 0:
        return "it needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: bin/install-boot-tools"
    if "cgroup2" not in Path("/proc/filesystems").read_text():
        return "the kernel has no cgroup v2"
    return None


class Machine(Place):
    """A booted machine, until it is closed. What is written to its files goes with it; ``root`` stays as it was."""

    def __init__(self, root: Path, log: IO[str]) -> None:
        self._name = f"ctrport-boot-{os.getpid()}"
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_cgroups)
            self._nspawn = subprocess.Popen(
                [
                    *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", f"--machine={self._name}"),
                    *("--register=no", "--keep-unit", "--volatile=overlay", "--link-journal=no", "--private-network"),
                    # As a machine has: runc makes keyrings, and systemd filters with BPF where it has cgroup v2.
                    *("--capability=all", "--system-call-filter=@keyring bpf", "--console=pipe"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},  # cgroup v2, whatever this machine has
                preexec_fn=self._enter_cgroups,
            )
            undo.callback(self._power_off)
            pid = eventually(self._first_process, within=30, what="the machine's first process")
            super().__init__(self._name, pid, ALL_NAMESPACES)
            undo.callback(Place.close, self)
            self.state = eventually(self._settled, within=60, what="the machine being booted")
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Power off, and remove what the machine took on this one."""
        self._undo.close()

    def shell(self, text: str, *arguments: str, timeout: float = 60) -> str:
        """Run lines of shell that stop at the first failure, and return what they print."""
        return self.run("sh", "-ec", text, "sh", *arguments, timeout=timeout).stdout

    def command(self, *argv: str, timeout: float = 60) -> str:
        """Run a program, and return what it prints. Raises ``CommandError`` where it fails."""
        return self.run("env", "-i", *(f"{k}={v}" for k, v in ENVIRONMENT.items()), *argv, timeout=timeout).stdout

    def outer_pid(self, pid: int) -> int:
        """Return what this process calls process ``pid`` of the machine."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                text = status.read_text()
                numbers = text.partition("\nNSpid:")[2].split("\n")[0].split()
                if len(numbers) > 1 and int(numbers[1]) == pid and self._name in (status.parent / "cgroup").read_text():
                    return int(numbers[0])
        raise RuntimeError(f"process {pid} of the machine is not there")

    def show(self, unit: str, key: str) -> str:
        """Return a property of a unit."""
        return self.command("systemctl", "show", "--property", key, "--value", unit).strip()

    def journal(self, unit: str) -> str:
        """Return what a unit has logged, and systemd of it."""
        return self.command("journalctl", "--no-pager", "--output=cat", "--unit", unit)

    def _settled(self) -> str | None:
        said = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return said if said in ("running", "degraded") else None

    def _first_process(self) -> int:
        assert self._nspawn.poll() is None, "systemd-nspawn has ended"
        pid = self._nspawn.pid
        with contextlib.suppress(OSError):
            for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
                # Between the two it makes a child that sets things up.
                other = [os.stat(f"/proc/{which}/ns/pid").st_ino for which in (child, pid)]
                if other[0] != other[1] and Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                    return child
        return 0

    def _power_off(self) -> None:
        if self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)  # which systemd-nspawn takes as the power button
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nspawn.wait(20)
        end_process(self._nspawn)

    def _hierarchies(self) -> list[Path]:
        """Every hierarchy of control groups: one under cgroup v2."""
        if (CGROUPS / "cgroup.procs").exists():
            return [CGROUPS]
        return [each for each in CGROUPS.iterdir() if not each.is_symlink() and (each / "cgroup.procs").exists()]

    def _enter_cgroups(self) -> None:
        for hierarchy in self._hierarchies():
            own = hierarchy / self._name
            own.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):  # empty in a new one of cgroup v1, which then takes no process
                if (own / name).exists() and not (own / name).read_text().strip():
                    (own / name).write_text((hierarchy / name).read_text())
            (own / "cgroup.procs").write_text(str(os.getpid()))

    def _remove_cgroups(self) -> None:
        for hierarchy in self._hierarchies():
            below = [Path(path) for path, _, _ in os.walk(hierarchy / self._name, topdown=False)]
            end = time.monotonic() + 5
            while below and time.monotonic() < end:
                for path in below:
                    with contextlib.suppress(OSError):
                        path.rmdir()
                below = [path for path in below if path.exists()]
                time.sleep(0.01 if below else 0)
