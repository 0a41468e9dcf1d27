"""What `make dist` has built: installed where there is neither a network, nor a compiler, nor pip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded.host import CommandError, Host

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

#: All that bin/install calls.
PROGRAMS = ["cat", "chmod", "cp", "dirname", "find", "grep", "id", "ln", "mkdir", "mv", "readlink", "rm", "sed", "sh"]

# What an installation writes to becomes the host's own, and empty.
_PRIVATE = """
for directory in /etc/ctrport /etc/systemd/system /usr/local/sbin /opt; do
    mkdir -p $directory
    mount -t tmpfs -o mode=755 tmpfs $directory
done
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one archive there is, unpacked."""
    archives = [*(ROOT / "dist").glob("ctrport-*.tar.gz")]
    assert len(archives) == 1, "make dist builds it"
    directory = tmp_path_factory.mktemp("archive")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(directory, filter="tar")
        names = archive.getnames()
        assert names == sorted(names)
        assert {(file.uid, file.gid, file.uname) for file in archive} == {(0, 0, "")}
        assert len({file.mtime for file in archive}) == 1
    [tree] = directory.iterdir()
    return tree


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[tuple[Host, dict[str, str]]]:
    """A host without a network, and an environment with no more programs than any machine has."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        assert found is not None, name
        (programs / name).symlink_to(found)
    env = {"PATH": str(programs), "CC": "", "PYTHONPATH": "", "PIP_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    with Host("bare") as host:
        host.script(_PRIVATE)
        yield host, env


def interpreter(version: str) -> str:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in (sys.executable, f"python{version}", *found, f"/usr/bin/python{version}"):
        path = shutil.which(candidate)
        question = (
            "import sys; print(sys.version_info[:2] == tuple(map(int, sys.argv[1].split('.'))) and sys.executable)"
        )
        if path is not None:
            said = subprocess.run([path, "-c", question, version], capture_output=True, text=True, check=False).stdout
            if said.strip() not in ("", "False"):
                return said.strip()
    pytest.skip(f"there is no Python {version} here")


@pytest.mark.parametrize("version", PYTHONS)
def test_it_installs_without_network_and_compiler(
    unpacked: Path, bare: tuple[Host, dict[str, str]], version: str
) -> None:
    host, env = bare
    python = interpreter(version)
    assert shutil.which("cc", path=env["PATH"]) is None
    assert host.run("ip", "-brief", "link").stdout.split()[0] == "lo"

    done = host.run(str(unpacked / "install"), env={**env, "PYTHON": python}, cwd="/", timeout=100)
    assert done.stderr == ""  # with legacy tables, or it would say so
    assert "systemd does not run here" in done.stdout

    its = {**env, "PATH": "/usr/local/sbin"}
    assert host.run("ctrport", "version", env=its, cwd="/").stdout.startswith("ctrport ")
    assert "in order" in host.run("ctrport", "check", env=its, cwd="/").stdout
    module = "import sys, ctrport, iptc; print(sys.version_info[:2], ctrport.__file__, iptc.__file__)"
    said = host.run("/opt/ctrport/bin/python", "-I", "-c", module).stdout
    assert said.startswith(str(tuple(map(int, version.split(".")))))
    assert said.count("/opt/ctrport/lib/") == 2
    assert not host.path("/opt/ctrport/bin/pip").exists()

    host.run(str(unpacked / "uninstall"), cwd="/")  # which removes rules, and so takes iptables
    assert not host.path("/opt/ctrport").exists()


def test_what_lacks_a_wheel_is_refused(unpacked: Path, bare: tuple[Host, dict[str, str]], tmp_path: Path) -> None:
    host, env = bare
    tree = tmp_path / "tree"
    shutil.copytree(unpacked, tree)
    next((tree / "wheels").glob("click-*.whl")).unlink()
    with pytest.raises(CommandError, match="No matching distribution found for click"):
        host.run(str(tree / "install"), env={**env, "PYTHON": interpreter("3.11")}, cwd="/", timeout=100)
    assert not host.path("/opt/ctrport").exists()
    shutil.rmtree(tree / "wheels")
    with pytest.raises(CommandError, match="there is no pip in"):
        host.run(str(tree / "install"), env={**env, "PYTHON": interpreter("3.11")}, cwd="/")
