"""The files of a Debian that can be booted, and what ``make install`` takes from the package index.

Both come from the network, and are kept below ``.boot`` until ``make clean``: a booted machine has no network, and what
it writes goes with it. The tree is built anew when what it holds is to be another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".boot"

SUITE = "bookworm"
MIRROR = os.environ.get("MIRROR", "http://deb.debian.org/debian")
PACKAGES = (
    *("systemd-sysv", "dbus", "iproute2", "procps", "kmod", "util-linux", "ca-certificates", "busybox-static"),
    *("containerd", "runc", "containernetworking-plugins"),
    *("iptables", "nftables", "firewalld"),
    *("make", "python3", "python3-venv", "python3-dev", "gcc", "libc6-dev"),
)
#: Seconds that building may take.
LIMIT = 900

_PACKAGES = """
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends "$@"
apt-get clean
systemctl disable firewalld.service nftables.service
"""

_DOWNLOAD = """
python3 -m venv /tmp/venv
/tmp/venv/bin/pip download --quiet --disable-pip-version-check --dest /wheels '/src[legacy]' 'hatchling>=1.24'
rm -rf /tmp/venv
"""


class Unbuilt(Exception):
    """The tree could not be built; the message says why."""


def tree(say: Callable[[str], None]) -> Path:
    """Return the directory of the tree, built where it is not there yet."""
    root = KEPT / "root"
    if _is_of(root, _recipe()):
        return root
    say(f"building {SUITE} below {KEPT}: some minutes, once")
    _remove(root)
    new = KEPT / "root.new"
    _remove(new)
    KEPT.mkdir(exist_ok=True)
    try:
        _run("debootstrap", "--variant=minbase", SUITE, str(new), MIRROR)
        # Not by debootstrap, which cannot configure all of them.
        _inside(new, _PACKAGES, *PACKAGES)
        (new / "etc/machine-id").write_text("")  # each boot makes one up
        new.rename(root)
    except BaseException:
        _remove(new)
        raise
    _mark(root, _recipe())
    return root


def wheels(root: Path, say: Callable[[str], None]) -> Path:
    """Return the directory of what ``make install`` takes from the package index, for the Python of the tree."""
    found = KEPT / "wheels"
    recipe = _digest((ROOT / "pyproject.toml").read_text(), _recipe())
    if _is_of(found, recipe):
        return found
    say("fetching what make install takes from the package index")
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir(parents=True)
    settings = [f"--setenv={key}={value}" for key, value in os.environ.items() if key.startswith("PIP_")]
    certificates = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
    trusted = [f"--bind-ro={path}" for path in certificates if Path(path).exists()]
    sources = [f"--bind-ro={ROOT / name}:/src/{name}" for name in ("pyproject.toml", "README.md", "LICENSE", "daemon")]
    options = ("--volatile=overlay", f"--bind={found}:/wheels", *settings, *trusted, *sources)
    _inside(root, _DOWNLOAD, options=options)
    for ours in found.glob("ctrport-*"):
        ours.unlink()  # what is installed is the source
    _mark(found, recipe)
    return found


def _recipe() -> str:
    return _digest(SUITE, *PACKAGES)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _mark(directory: Path, recipe: str) -> None:
    directory.with_suffix(".recipe").write_text(recipe)


def _is_of(directory: Path, recipe: str) -> bool:
    mark = directory.with_suffix(".recipe")
    return directory.is_dir() and mark.exists() and mark.read_text() == recipe


def _remove(directory: Path) -> None:
    # An earlier run may have been killed while debootstrap had /proc and /sys mounted there.
    for name in ("proc", "sys"):
        while os.path.ismount(directory / name):
            _run("umount", "--recursive", str(directory / name))
    shutil.rmtree(directory, ignore_errors=True)


def _inside(root: Path, script: str, *arguments: str, options: Sequence[str] = ()) -> None:
    """Run lines of shell on the tree, with this machine's network."""
    nspawn = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--machine=ctrport-tree-{os.getpid()}")
    network = ("--resolv-conf=bind-host", f"--directory={root}")
    _run(*nspawn, *network, *options, "sh", "-ec", script, "sh", *arguments)


def _run(*argv: str) -> None:
    try:
        ended = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unbuilt(f"{argv[0]}: {error}") from error
    if ended.returncode != 0:
        raise Unbuilt(f"{argv[0]} failed: {(ended.stderr.strip() or ended.stdout.strip())[-500:]}")
