"""The demonstration tells the truth: it ends well where every step holds, and badly where one does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded.node import CGROUPS
from tests.node.daemon import ROOT


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the demonstration keeps what it makes: a path short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        yield Path(directory)


# For what never comes, so that it is not waited for as long as on a node that is slow.
_IMPATIENT = """
import sys
from demo import demo
demo.PATIENCE = 4.0
sys.exit(demo.main())
"""


def demo(directory: Path, *arguments: str, impatient: bool = False) -> subprocess.Popen[str]:
    argv = [sys.executable, *(["-c", _IMPATIENT] if impatient else ["-m", "demo.demo"]), *arguments]
    env = {**os.environ, "TMPDIR": str(directory)}
    return subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(directory: Path, *arguments: str, impatient: bool = False) -> tuple[int, str]:
    process = demo(directory, *arguments, impatient=impatient)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def test_every_step_holds(directory: Path) -> None:
    status, said = run(directory)
    assert status == 0, said
    for line in (
        "ok SET greeting hello  -> OK",
        "ok GET greeting        -> hello",
        "-j DNAT --to-destination 172.17.0.2:6379  # default/redis 6379:6379/tcp",
        "ok 198.51.100.1:6379 is refused again, as seen from the LAN",
        "ok iptables-save says the same as before ctrport was started",
        "Every step held.",
    ):
        assert line in said, said
    assert "ms after containerd's start event" in said
    assert "\033" not in said  # no colours where nobody looks


def test_a_port_that_does_not_open_is_a_failure_with_the_log(directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('publish:\n  - match: {container: redis}\n    ports: ["6380:6379"]\n')
    status, said = run(directory, "--config", str(config), impatient=True)
    assert status == 1, said
    assert "FAILED step 4: 198.51.100.1:6379 did not open for the LAN within 4 s" in said
    assert "published container=default/redis mapping=6380:6379/tcp" in said
    assert "Every step held." not in said
    assert not list(directory.iterdir())


def test_a_daemon_that_does_not_start_is_a_failure_with_its_reason(directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text('publish:\n  - match: {container: redis}\n    ports: ["6379:"]\n')
    status, said = run(directory, "--config", str(config))
    assert status == 1, said
    assert "FAILED step 3: ctrport ended with status 2 instead of becoming ready" in said
    assert "config.yaml:3:13: '6379:' has no container port" in said


def test_an_interrupt_removes_everything(directory: Path) -> None:
    process = demo(directory)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("5. "):
            break
    [node] = directory.iterdir()
    assert cgroups(node.name)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; all that was made is removed" in said
    assert not list(directory.iterdir())
    assert not cgroups(node.name)


def cgroups(name: str) -> list[Path]:
    return [*CGROUPS.glob(name), *CGROUPS.glob(f"*/{name}")]
