"""What real shells make of what `ctrport completion` prints for them."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrport import status
from ctrport.status import PublicationStatus, Status
from tests.node.terminal import Terminal, environment, install

NAMES = (
    *(("default", "web", ""), ("default", "web-2", ""), ("staging", "db", "")),
    *(("k8s.io", "f00d", "shop/web-0"), ("k8s.io", "cafe", "shop/api-0"), ("k8s.io", "beef", "'x\\n$(reboot)/y'")),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory in which a daemon says this, and the command beside it."""
    publications = [
        PublicationStatus(namespace, container, pod, "80:80/tcp", "", [], "waiting", "", "f:1", "")
        for namespace, container, pod in NAMES
    ]
    status.write(tmp_path, Status("1", True, 1, "", "", "", publications=publications))
    install(tmp_path)
    return tmp_path


def script(run: Path, shell: str) -> Path:
    printed = subprocess.run(
        ["ctrport", "completion", shell], env=environment(run), capture_output=True, text=True, check=True
    )
    assert printed.stderr == ""
    path = run / f"ctrport.{shell}"
    path.write_text(printed.stdout)
    return path


class Bash:
    """Asked by its completion function, with the words parted as bash parts them."""

    def __init__(self, run: Path) -> None:
        self._run, self._script = run, script(run, "bash")

    def completed(self, line: str) -> list[str]:
        words = [
            part
            for word in line.split(" ")
            for part in (re.split("([:=])", word) if word else [""])
            if part or not word
        ]
        asked = (
            f"source {self._script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
            "_ctrport_completion ctrport; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        ended = subprocess.run(
            ["bash", "--norc", "-c", asked], env=environment(self._run), capture_output=True, text=True, check=True
        )
        assert ended.stderr == ""
        begin = re.split("[:=]", line.split(" ")[-1])
        # What is left of the last break stays as it is.
        before = line.split(" ")[-1].removesuffix(begin[-1])
        return [before + found for found in ended.stdout.split()]


class Fish:
    """Asked what it would complete."""

    def __init__(self, run: Path) -> None:
        self._run, self._script = run, script(run, "fish")

    def completed(self, line: str) -> list[str]:
        asked = f"source {self._script}; complete -C {shlex.quote(line)}"
        ended = subprocess.run(
            ["fish", "--no-config", "-c", asked], env=environment(self._run), capture_output=True, text=True, check=True
        )
        assert ended.stderr == ""
        return [found.partition("\t")[0] for found in ended.stdout.splitlines()]


@pytest.fixture(params=[Bash, Fish], ids=["bash", "fish"])
def shell(request: pytest.FixtureRequest, run: Path) -> Bash | Fish:
    its: Bash | Fish = request.param(run)
    return its


def test_commands_options_states_and_names_are_completed(shell: Bash | Fish, run: Path) -> None:
    ps = f"ctrport ps --run-dir {run} "
    assert "events" in shell.completed("ctrport e")
    assert {"--state", "--run-dir", "--wide"} <= set(shell.completed("ctrport ps --"))
    assert shell.completed("ctrport ps --state w") == ["waiting"]
    assert shell.completed(f"{ps}--name web") == ["web", "web-2"]
    assert shell.completed(f"{ps}--name web --namespace s") == ["staging"]
    assert shell.completed(f"{ps}--name nobody") == []
    assert shell.completed(f"{ps}--name pod:") == ["pod:shop/api-0", "pod:shop/web-0"]
    assert shell.completed(f"{ps}--name pod:shop/w") == ["pod:shop/web-0"]
    assert shell.completed(f"ctrport events --run-dir {run} --namespace k") == ["k8s.io"]
    # Where no daemon has said anything there is nothing to offer, and nothing to complain of.
    assert shell.completed(f"ctrport ps --run-dir {run}/none --name web") == []


@pytest.fixture(params=["bash", "zsh"])
def terminal(request: pytest.FixtureRequest, run: Path) -> Iterator[Terminal]:
    its = script(run, request.param)
    if request.param == "bash":
        terminal = Terminal(run, "bash", "--norc", "--noprofile", "-i")
        begin = f"bind 'set bell-style none'; source {its}; PS1=ready'> '\n"
    else:
        terminal = Terminal(run, "zsh", "-f", "-i")
        begin = f"unsetopt beep; autoload -U compinit; compinit -u -D; source {its}; PS1=ready'> '\n"
    try:
        terminal.type(begin)
        terminal.wait_for("ready> ")
        yield terminal
    finally:
        terminal.close()


def test_who_types_gets_names_with_a_tab(terminal: Terminal, run: Path) -> None:
    terminal.type("ctrport ps --run-dir " + str(run) + " --namespace sta\t")
    terminal.wait_for("--namespace staging ")
    terminal.type("--name pod:shop/w\t")
    terminal.wait_for("--name pod:shop/web-0 ")
    terminal.type("--st\t")
    terminal.wait_for("--state ")
    terminal.type("wai\t")
    terminal.wait_for("waiting ")
