"""Hosts made of Linux namespaces, and the way into them.

Everything that happens in a namespace starts on a thread that entered it and is then thrown away: setns(2) moves only
the calling thread, a socket stays in the namespace it was made in, and a program started there is a direct child, so
that its pid is known and signals reach it (nsenter would stand in between and pass none on).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket as bsd
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

#: Flags of unshare(2), sched.h; the os module has them from Python 3.12 only.
CLONE_FS, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x200, 0x20000, 0x20000000, 0x40000000
#: Flags of mount(2), mount.h.
MS_REC, MS_PRIVATE = 0x4000, 0x40000

#: The namespaces of a host, in the order in which they are entered.
ALL_NAMESPACES = ("mnt", "net", "pid")

#: No host outlives this many seconds, whatever becomes of the process that made it.
LIFETIME = 3600

# The first process of a host. It is the init of a PID namespace: the kernel ends everything in it together with it.
# It goes when the pipe on its stdin closes, which happens also when the process that made it is killed. (A plain
# alarm(2) would do nothing: the init of a PID namespace ignores every signal it has no handler for.)
_INIT = (
    "import select, signal, sys\n"
    "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    f"select.select([sys.stdin], [], [], {LIFETIME})\n"
)

# Done once inside a new host. /sys shows the devices of the network namespace it was mounted in, so it is mounted
# again; the machine's cgroups are carried over, as the fresh one has none.
_SETTLE = """
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
rmdir /run/cgroup
ip link set lo up
cd /proc/sys/net/ipv4/conf
for conf in all default; do
    echo 0 >$conf/forwarding; echo 0 >$conf/rp_filter; echo 0 >$conf/route_localnet; echo 0 >$conf/accept_local
done
for conf in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$conf/forwarding; echo 0 >/proc/sys/net/ipv6/conf/$conf/accept_dad
done 2>/dev/null || true
"""

_libc = ctypes.CDLL(None, use_errno=True)


class CommandError(RuntimeError):
    """A program inside a host failed or took too long."""


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


class _Errand(Generic[T]):
    """One piece of work, done on a thread of its own."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._error: BaseException | None = None

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Do it, and return or raise what it returned or raised."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            thread.join()
        except KeyboardInterrupt:
            thread.join()  # what it started must be known to whoever cleans up
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or traceback and errand hold each other
        return self._results[0]


def inside(pid: int, namespaces: Sequence[str], work: Callable[[], T]) -> T:
    """Return what ``work`` returns on a thread in the given namespaces ("mnt", "net", "pid") of process ``pid``.

    The thread may start programs, but no threads: one that entered a PID namespace can only fork.
    """

    def enter_and_work() -> T:
        with contextlib.ExitStack() as opened:
            # All are opened before any is entered: another mount namespace has another /proc.
            fds = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in namespaces]
            for fd in fds:
                opened.callback(os.close, fd)
            if "mnt" in namespaces:
                # A thread that shares its working directory with others may not change its mount namespace.
                _check(_libc.unshare(CLONE_FS), "unshare")
            for name, fd in zip(namespaces, fds, strict=True):
                _check(_libc.setns(fd, 0), f"entering the {name} namespace of process {pid}")
        return work()

    return _Errand(enter_and_work).result()


def stands_still(pid: int) -> bool:
    """Whether no thread of a process runs, as after SIGSTOP: that takes a moment to reach the last of them."""
    stats = [stat.read_text() for stat in Path("/proc", str(pid), "task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] in "Tt" for stat in stats)


def end_process(process: subprocess.Popen[Any], within: float = 5.0) -> None:
    """End a program, politely first, and close its pipes."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a stopped one would not notice
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Place:
    """Somewhere with a network namespace, where programs run and sockets are made; what is left there ends with it."""

    def __init__(self, name: str, entry: int, namespaces: Sequence[str]) -> None:
        self.name = name
        self._entry = entry
        self._namespaces = tuple(namespaces)
        self._on_close = contextlib.ExitStack()
        self._closed = False

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | None = None,
        timeout: float = 30,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end. ``env`` is added to this process's environment.

        Raises CommandError when it takes longer than ``timeout``, or fails and ``check`` is set.
        """
        process = self._start(
            argv,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired as error:
            raise CommandError(f"{self.name}: {' '.join(argv)}: not done after {timeout:g} s") from error
        finally:
            if process.poll() is None:
                process.kill()
            end_process(process)
        if check and process.returncode != 0:
            said = err.strip() or out.strip() or "said nothing"
            raise CommandError(f"{self.name}: {' '.join(argv)}: exit status {process.returncode}: {said}")
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def spawn(self, *argv: str, **popen: Any) -> subprocess.Popen[str]:
        """Start a program that runs until it is ended, at the latest with this place.

        Takes what subprocess.Popen takes; ``env`` replaces the environment, as there.
        """
        # Ctrl-C in a terminal is for the process that made the host, which then ends the rest in order.
        popen.setdefault("start_new_session", True)
        process = self._start(argv, **popen)
        self._on_close.callback(end_process, process)
        return process

    def socket(
        self,
        kind: bsd.SocketKind = bsd.SOCK_STREAM,
        family: bsd.AddressFamily = bsd.AF_INET,
        proto: int = 0,
    ) -> bsd.socket:
        """Return a new socket in this network namespace. Note that an open socket keeps the namespace alive."""
        return self.sockets(1, kind, family, proto)[0]

    def sockets(
        self,
        count: int,
        kind: bsd.SocketKind = bsd.SOCK_STREAM,
        family: bsd.AddressFamily = bsd.AF_INET,
        proto: int = 0,
    ) -> list[bsd.socket]:
        """Return ``count`` new sockets in this network namespace, for the price of one visit."""
        return self._inside(("net",), lambda: [bsd.socket(family, kind, proto) for _ in range(count)])

    def path(self, path: str | Path) -> Path:
        """Return where a path in here is found from outside: a file to read or write, a Unix socket to connect to."""
        return Path(f"/proc/{self._entry}/root", str(path).lstrip("/"))

    def at_close(self, ending: Callable[[], object]) -> None:
        """Have something done when this place ends; last come, first served."""
        self._on_close.callback(ending)

    def close(self) -> None:
        """End what was started here. To be called once or more."""
        self._on_close.close()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self, argv: Sequence[str], **popen: Any) -> subprocess.Popen[str]:
        started: list[subprocess.Popen[str]] = []
        try:
            self._inside(self._namespaces, lambda: started.append(subprocess.Popen(argv, text=True, **popen)))
        except KeyboardInterrupt:
            # Nobody else would reap it, and the host's init cannot end before its last child is reaped.
            for process in started:
                process.kill()
                end_process(process)
            raise
        return started[0]

    def _inside(self, namespaces: Sequence[str], work: Callable[[], T]) -> T:
        if self._closed:  # by now the pid may be another's, and its namespaces the machine's
            raise RuntimeError(f"{self.name} has ended")
        return inside(self._entry, namespaces, work)


class Host(Place):
    """A machine of its own as far as network, mounts and processes go. ``pid`` is its init, seen from outside."""

    def __init__(self, name: str) -> None:
        self._init = _start_init()
        self.pid = self._init.pid
        super().__init__(name, self.pid, ALL_NAMESPACES)
        self.at_close(self._end_init)
        try:
            self.script(_SETTLE)
        except BaseException:
            self.close()
            raise

    def script(self, text: str, *arguments: str) -> str:
        """Run lines of shell that stop at the first failure, and return what they print."""
        return self.run("sh", "-ec", text, "sh", *arguments).stdout

    def sysctl(self, key: str, value: str | int) -> None:
        """Set a kernel parameter of this network namespace; ``key`` as a path, such as "net/ipv4/ip_forward"."""
        self.script('echo "$2" >"/proc/sys/$1"', key, str(value))

    def _end_init(self) -> None:
        self._init.kill()
        end_process(self._init)


def _start_init() -> subprocess.Popen[bytes]:
    def start() -> subprocess.Popen[bytes]:
        _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID), "making namespaces")
        # Before anything is mounted: where / is shared, as under systemd, the machine would get the mount as well.
        _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "making mounts private")
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # not ours: somebody may wait for the end of it
            cwd="/",
            start_new_session=True,
        )

    return _Errand(start).result()
