"""The command line where it needs neither root nor a node: what it prints where, and what it ends with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ctrport import __version__, cli, status
from ctrport.events import NAME, Event
from ctrport.status import PublicationStatus, Status

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
publish:
  - match: {container: web}
    ports: ["8080:80", "127.0.0.1:5353:53/udp"]
  - match: {labels: {app: shop}}
    ports: ["9000-9010:9000-9010"]
"""


@dataclass(frozen=True)
class Ended:
    """What a command did: its exit status, and what it printed."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def ctrport(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ctrport", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be somebody without privileges."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass for root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def written(directory: Path, text: str | bytes) -> str:
    path = directory / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


# Usage


def test_version(ctrport: Run) -> None:
    assert ctrport("version") == Ended(0, f"ctrport {__version__}\n", "")


def test_version_for_programs(ctrport: Run) -> None:
    ended = ctrport("version", "--json")
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == {"version": __version__}


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(ctrport: Run, option: str) -> None:
    ended = ctrport(option)
    assert (ended.status, ended.err) == (0, "")
    for command in cli.cli.commands:
        assert re.search(rf"^  {command} +\S", ended.out, re.MULTILINE), command


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_each_command_has_help(ctrport: Run, command: str) -> None:
    ended = ctrport(command, "-h")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: ctrport {command} [OPTIONS]")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["frobnicate"], ["--frobnicate"], ["ps", "--frobnicate"], ["check", "config.yaml"], ["check", "--config"]),
        *(["plan", "config.yaml"], ["plan", "--config"], ["plan", "--json"]),
        *(["publish"], ["publish", "web"], ["unpublish"], ["publish", "web", "8080:80", "--force"]),
        *(["ps", "--check", "--state", "active"], ["ps", "--check", "--watch"], ["ps", "--watch", "--json"]),
        *(["ps", "--state", "gone"], ["ps", "--count", "1"], ["ps", "--watch", "--count", "0"]),
        *(
            ["events", "--since", "noon"],
            ["events", "--since", "999999d"],
            ["events", "--lines", "-1"],
            ["events", "x"],
        ),
        *(["explain"], ["explain", "8080", "8081"], ["explain", "8080", "--from"]),
    ],
    ids=" ".join,
)
def test_bad_usage_is_2_with_nothing_on_stdout(ctrport: Run, arguments: list[str]) -> None:
    ended = ctrport(*arguments)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell_wherever_that_is(
    ctrport: Run, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    ended = ctrport("completion", shell)
    assert (ended.status, ended.err) == (0, "")
    assert "_ctrport_completion" in ended.out
    assert f"_CTRPORT_COMPLETE={shell}_complete" in ended.out


def test_the_module_is_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ctrport", "version"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"ctrport {__version__}\n", "")


# publish, unpublish


@pytest.mark.parametrize("arguments", [["publish", "web", "8080:80"], ["unpublish", "web"]], ids=" ".join)
def test_who_changes_ports_has_to_be_root(ctrport: Run, tmp_path: Path, nobody: None, arguments: list[str]) -> None:
    reason = f"ctrport {arguments[0]} needs root: it works with containerd"
    assert ctrport(*arguments, "--config", str(tmp_path)) == Ended(1, "", f"ctrport: {reason}\n")


def test_a_mapping_that_is_none_is_bad_usage_whatever_else_is_wrong(ctrport: Run, tmp_path: Path, root: None) -> None:
    path = written(tmp_path, f"containerd: {{address: {tmp_path}/nobody}}\n")
    ended = ctrport("publish", "web", "8080:80", "0:80", "--config", path)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == "ctrport: '0:80' has the host port '0'; expected a number from 1 to 65535\n"
    ended = ctrport("publish", "web", "8080:80", "--config", path)
    said = f"containerd cannot be reached at {tmp_path}/nobody: No such file or directory"
    assert ended == Ended(1, "", f"ctrport: {said}\n")


# explain


@pytest.mark.parametrize("port", ["http", "0", "8080/icmp", "::1:80", "8080:80"])
def test_explain_says_what_cannot_be_asked(ctrport: Run, nobody: None, port: str) -> None:
    ended = ctrport("explain", port)
    assert (ended.status, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    assert line.startswith(f"ctrport: '{port}' ")
    assert "; expected " in line


def test_explain_says_that_it_needs_root_when_it_has_understood(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    ended = ctrport("explain", "8080", "--config", written(tmp_path, GOOD))
    assert ended == Ended(1, "", "ctrport: ctrport explain needs root: it works with the kernel's tables\n")


def test_explain_tells_the_problems_of_a_configuration(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    ended = ctrport("explain", "8080", "--config", written(tmp_path, "publish: 1\n"))
    assert (ended.status, ended.out) == (2, "")
    assert "`publish` is '1'; expected " in ended.err


# check


def test_check_counts_what_is_in_order_without_root(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    path = written(tmp_path, GOOD)
    assert ctrport("check", "--config", path) == Ended(0, f"{path}: in order; declarations: 2, mappings: 3\n", "")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "publish: []\n"], ids=["empty", "comment", "no-entry"])
def test_check_takes_a_file_that_publishes_nothing(ctrport: Run, tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert ctrport("check", "--config", path).status == 0


def test_check_shows_every_problem_on_a_line_of_its_own_in_the_order_of_the_file(ctrport: Run, tmp_path: Path) -> None:
    path = written(
        tmp_path,
        'firewall: {chain: INPUT}\npublish:\n  - match: {container: web}\n    ports: ["0:80", "8080:80"]\n'
        '  - match: {}\n    ports: ["8080:80"]\nfoo: 1\n',
    )
    ended = ctrport("check", "--config", path)
    assert (ended.status, ended.out) == (2, "")
    lines = ended.err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{place}" for place in ("1:19", "4:13", "5:12", "7:1")]
    assert all(re.fullmatch(r"\S+:\d+:\d+: .+; expected .+", line) for line in lines)


def test_check_of_what_is_not_yaml(ctrport: Run, tmp_path: Path) -> None:
    path = written(tmp_path, "publish: [\n")
    ended = ctrport("check", "--config", path)
    assert (ended.status, ended.out) == (2, "")
    [line] = ended.err.splitlines()
    assert line.startswith(f"{path}:2:1: this is not YAML: ")


# conf.d beside the file.


def test_check_counts_what_the_files_of_conf_d_add(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    path = written(tmp_path, GOOD)
    (tmp_path / "conf.d").mkdir()
    assert ctrport("check", "--config", path) == Ended(0, f"{path}: in order; declarations: 2, mappings: 3\n", "")
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / "conf.d" / name).write_text(GOOD)
    assert ctrport("check", "--config", path) == Ended(0, f"{path}: in order; declarations: 6, mappings: 9\n", "")


def test_other_files_in_conf_d_are_not_read(ctrport: Run, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    (tmp_path / "conf.d" / "deeper.d").mkdir(parents=True)
    for name in ("README", "a.yml", "a.yaml~", ".a.yaml", "a.yaml.dpkg-old", "deeper.d/a.yaml"):
        (tmp_path / "conf.d" / name).write_text("publish: 1\n")
    assert ctrport("check", "--config", path).status == 0


def test_the_problems_of_every_file_are_shown_the_main_one_first_then_by_name(ctrport: Run, tmp_path: Path) -> None:
    path = written(tmp_path, "foo: 1\n")
    (tmp_path / "conf.d").mkdir()
    for name in ("20-b.yaml", "10-a.yaml", "3-c.yaml"):
        (tmp_path / "conf.d" / name).write_text("publish: 1\nfirewall: {}\n")
    ended = ctrport("check", "--config", path)
    assert (ended.status, ended.out) == (2, "")
    parts = [f"{tmp_path}/conf.d/{name}.yaml:{place}" for name in ("10-a", "20-b", "3-c") for place in ("1:10", "2:1")]
    assert [line.split(": ")[0] for line in ended.err.splitlines()] == [f"{path}:1:1", *parts]


@pytest.mark.parametrize("command", ["check", "run", "plan"])
def test_a_part_in_another_encoding(ctrport: Run, tmp_path: Path, nobody: None, command: str) -> None:
    path = written(tmp_path, GOOD)
    part = tmp_path / "conf.d" / "a.yaml"
    part.parent.mkdir()
    part.write_bytes(b"\xe9")
    expected = f"ctrport: {part}: byte 0 is not UTF-8; expected YAML text\n"
    assert ctrport(command, "--config", path) == Ended(2, "", expected)


def test_a_part_that_is_a_directory(ctrport: Run, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    (tmp_path / "conf.d" / "a.yaml").mkdir(parents=True)
    ended = ctrport("check", "--config", path)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"ctrport: {tmp_path}/conf.d/a.yaml: Is a directory; expected ")


# A file that cannot be read: the same for every command that reads it, and before anything else is asked for.


@pytest.mark.parametrize("command", ["check", "run", "plan"])
def test_a_missing_configuration(ctrport: Run, tmp_path: Path, nobody: None, command: str) -> None:
    path = tmp_path / "none.yaml"
    expected = f"ctrport: {path}: No such file or directory; expected a configuration file (--config)\n"
    assert ctrport(command, "--config", str(path)) == Ended(2, "", expected)


@pytest.mark.parametrize("command", ["check", "run", "plan"])
def test_a_directory_for_a_configuration(ctrport: Run, tmp_path: Path, nobody: None, command: str) -> None:
    expected = f"ctrport: {tmp_path}: Is a directory; expected a configuration file (--config)\n"
    assert ctrport(command, "--config", str(tmp_path)) == Ended(2, "", expected)


@pytest.mark.parametrize("command", ["check", "run", "plan"])
def test_a_configuration_in_another_encoding(ctrport: Run, tmp_path: Path, nobody: None, command: str) -> None:
    path = written(tmp_path, b"# caf\xe9\npublish: []\n")
    expected = f"ctrport: {path}: byte 5 is not UTF-8; expected YAML text\n"
    assert ctrport(command, "--config", path) == Ended(2, "", expected)


def test_run_tells_the_problems_of_a_configuration_before_it_asks_for_root(
    ctrport: Run, tmp_path: Path, nobody: None
) -> None:
    path = written(tmp_path, "publish: 1\n")
    ended = ctrport("run", "--config", path, "--run-dir", str(tmp_path / "run"))
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(f"{path}:1:10: `publish` is '1'; expected ")
    assert not (tmp_path / "run").exists()


# What needs root says so.


@pytest.mark.parametrize(
    ("command", "called"),
    [("run", "run"), ("ps", "ps, while no daemon answers,"), ("clean", "clean"), ("plan", "plan")],
)
def test_what_needs_root_says_so(ctrport: Run, tmp_path: Path, nobody: None, command: str, called: str) -> None:
    options = [] if command == "clean" else ["--config", written(tmp_path, GOOD)]
    options += [] if command == "plan" else ["--run-dir", str(tmp_path / "run")]
    ended = ctrport(command, *options)
    assert ended == Ended(1, "", f"ctrport: ctrport {called} needs root: it works with the kernel's tables\n")
    assert not (tmp_path / "run").exists()


# With a daemon: the lock and the status file are all that it is to a command.

ACTIVE = PublicationStatus(
    namespace="default",
    container="web",
    pod="",
    mapping="8080:80/tcp",
    bound="8080:80/tcp",
    addresses=["172.17.0.2"],
    state="active",
    reason="",
    source="/etc/ctrport/config.yaml:2",
    since="2024-05-01T10:00:00+00:00",
)
UNMATCHED = replace(
    ACTIVE,
    namespace="",
    container="",
    mapping="[2001:db8::1]:81:80/tcp",
    bound="",
    addresses=[],
    state="waiting",
    reason="no running container matches container=[bold]x, " + 40 * "label a.very/long.one=indeed, ",
)
RUNNING = Status(
    version=__version__,
    running=True,
    pid=4242,
    updated="2024-05-01T10:00:00+00:00",
    containerd="connected, version 1.7.0",
    firewall="in line",
    publications=[ACTIVE, UNMATCHED],
)


UNASKED = "the kernel was not asked: that takes root; this is the daemon's word\n"


@contextmanager
def daemon(directory: Path, said: Status | str | None = RUNNING) -> Iterator[None]:
    """Hold the lock as a daemon does that has said this of itself."""
    with status.only_one(directory):
        if isinstance(said, Status):
            status.write(directory, said)
        elif said is not None:
            (directory / "status.json").write_text(said)
        yield


def test_ps_prints_whole_lines_where_no_terminal_is(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    with daemon(tmp_path):
        ended = ctrport("ps", "--run-dir", str(tmp_path))
    assert (ended.status, ended.err) == (0, UNASKED)
    header, active, unmatched = ended.out.splitlines()
    assert header.split() == ["CONTAINER", "MAPPING", "ADDRESS", "STATE", "SINCE", "CONNECTIONS", "REASON"]
    assert active.split()[:4] == ["default/web", "8080:80/tcp", "172.17.0.2", "active"]
    assert re.fullmatch(r"\d+d ago +-", active.split(None, 4)[4])
    # What looks like markup is text, here and above.
    assert unmatched.split(None, 6)[:4] == ["-", "[2001:db8::1]:81:80/tcp", "-", "waiting"]
    assert unmatched.endswith(UNMATCHED.reason.rstrip())
    assert "\x1b" not in ended.out


def test_ps_says_what_keeps_published_ports_from_working(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    with daemon(tmp_path, replace(RUNNING, warnings=["all is lost"])):
        ended = ctrport("ps", "--run-dir", str(tmp_path))
    assert (ended.status, ended.err) == (0, f"{UNASKED}warning: all is lost\n")


def test_ps_gives_programs_the_status_as_it_is(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    with daemon(tmp_path):
        ended = ctrport("ps", "--json", "--run-dir", str(tmp_path))
    assert (ended.status, ended.err) == (0, UNASKED)
    assert Status.from_json(ended.out) == replace(RUNNING, kernel="not asked: that takes root")


@pytest.mark.parametrize(
    "said",
    [None, "", "{", "[]", "null", '{"publications": [{"colour": "red"}]}', replace(RUNNING, running=False)],
    ids=["none", "empty", "half", "list", "null", "another-version", "of-the-last-run"],
)
def test_ps_does_not_take_the_word_of_a_daemon_that_said_nothing_fit(
    ctrport: Run, tmp_path: Path, nobody: None, said: Status | str | None
) -> None:
    with daemon(tmp_path, said):
        ended = ctrport("ps", "--run-dir", str(tmp_path), "--config", written(tmp_path, GOOD))
    assert (ended.status, ended.out) == (1, "")
    assert "needs root" in ended.err


def test_ps_does_not_take_the_word_of_a_daemon_that_is_gone(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    status.write(tmp_path, RUNNING)  # as one that was killed leaves it
    ended = ctrport("ps", "--run-dir", str(tmp_path), "--config", written(tmp_path, GOOD))
    assert (ended.status, ended.out) == (1, "")


def test_ps_wide_says_where_it_is_declared(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    with daemon(tmp_path):
        header, active, _ = ctrport("ps", "--wide", "--run-dir", str(tmp_path)).out.splitlines()
    assert header.split()[6:11] == ["DEVICE", "FROM", "PID", "SANDBOX", "SOURCE"]
    assert ACTIVE.since in active
    assert ACTIVE.source in active


def test_ps_shows_what_is_asked_for(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    def shown(*options: str) -> list[str]:
        ended = ctrport("ps", "--run-dir", str(tmp_path), *options)
        assert ended.status == 0
        return [line.split()[3] for line in ended.out.splitlines()[1:]]

    with daemon(tmp_path):
        assert shown("--state", "waiting") == ["waiting"]
        assert shown("--state", "waiting", "--state", "active") == ["active", "waiting"]
        assert shown("--namespace", "def*", "--name", "w?b") == ["active"]
        assert shown("--name", "default/web", "--name", "x") == ["active"]
        assert shown("--name", "x") == []
        only = ctrport("ps", "--run-dir", str(tmp_path), "--json", "--state", "active").out
        assert [its.mapping for its in Status.from_json(only).publications] == ["8080:80/tcp"]


def test_ps_check_is_one_line_and_an_exit_status(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    with daemon(tmp_path):
        ended = ctrport("ps", "--check", "--run-dir", str(tmp_path))
        assert (ended.status, ended.err) == (1, "")
        [line] = ended.out.splitlines()
        assert line.startswith(
            "not ok: 1 of 2 publications are not active, the worst: waiting - [2001:db8::1]:81:80/tcp"
        )
        ended = ctrport("ps", "--check", "--name", "web", "--run-dir", str(tmp_path))
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.startswith("ok: 1 of 1 publication is active (the kernel: not asked")
        ended = ctrport("ps", "--check", "--name", "shop", "--run-dir", str(tmp_path))
        assert (ended.status, ended.out) == (1, "not ok: nothing is declared that matches\n")
        # Programs get both: the line is for people then.
        ended = ctrport("ps", "--check", "--json", "--run-dir", str(tmp_path))
        assert ended.status == 1
        assert len(Status.from_json(ended.out).publications) == 2
        assert ended.err.startswith("not ok: 1 of 2")


def test_ps_check_of_a_daemon_that_hangs(
    ctrport: Run, tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    with status.only_one(tmp_path) as lock:
        status.write(tmp_path, replace(RUNNING, publications=[ACTIVE]))
        lock.turned()
        assert ctrport("ps", "--check", "--run-dir", str(tmp_path)).status == 0
        monkeypatch.setattr(time, "monotonic", lambda: now + 75)
        ended = ctrport("ps", "--check", "--run-dir", str(tmp_path))
        assert (ended.status, ended.out) == (1, "not ok: the daemon hangs, for 75 s\n")
        ended = ctrport("ps", "--run-dir", str(tmp_path))
        assert (ended.status, len(ended.out.splitlines())) == (0, 2)
        assert "the daemon hangs: it has not come round for 75 s" in ended.err


def test_ps_check_without_daemon_and_root_is_a_line_too(ctrport: Run, tmp_path: Path, nobody: None) -> None:
    ended = ctrport("ps", "--check", "--run-dir", str(tmp_path), "--config", written(tmp_path, GOOD))
    assert (ended.status, ended.err) == (1, "")
    assert ended.out == (
        "not ok: the daemon is down; ctrport ps, while no daemon answers, needs root: "
        "it works with the kernel's tables\n"
    )


def test_ps_watch_prints_a_block_for_each_change(
    ctrport: Run, tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = replace(ACTIVE, state="waiting", reason="it is \x1b[2J gone", since="")
    steps: list[Status] = [
        replace(RUNNING, publications=[ACTIVE], events=1),
        replace(RUNNING, publications=[ACTIVE], events=2, updated="later"),  # no news
        replace(RUNNING, publications=[waiting], warnings=["\x1b[2J"]),
    ]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        status.write(tmp_path, steps[len(slept)])

    monkeypatch.setattr(time, "sleep", sleep)
    with daemon(tmp_path, steps[0]):
        ended = ctrport("ps", "--watch", "--count", "2", "--run-dir", str(tmp_path))
    assert (ended.status, ended.err) == (0, "")
    first, second = ended.out.split("\n\n")
    assert "active" in first
    assert "waiting" in second
    assert "\x1b" not in ended.out
    assert len(slept) == 2


def test_ps_watch_outlives_a_daemon_and_ends_with_ctrl_c(
    ctrport: Run, tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    ended = ctrport("ps", "--watch", "--run-dir", str(tmp_path), "--config", written(tmp_path, GOOD))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == "ctrport ps, while no daemon answers, needs root: it works with the kernel's tables\n"


def test_ps_with_a_daemon_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    program = (
        "import os, sys\nos.geteuid = lambda: 65534\nsys.argv[1:] = ['ps', '--run-dir', sys.argv[1]]\n"
        "from ctrport import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "import ctrport.installed\n"
        "print(*sorted({'grpc', 'google', 'pydantic', 'yaml'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    with daemon(tmp_path):
        ended = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "daemon")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
    assert ended.stderr == f"{UNASKED}\n"


# events


TOLD = [
    ("2024-05-01T10:00:00", Event("started", version="1", pid=7)),
    ("2024-05-01T10:00:01", Event("published", container="default/web", mapping="8080:80/tcp", address="172.17.0.2")),
    ("2024-05-01T10:00:02", Event("conflict", container="default/db", mapping="8080:80/tcp", reason='it is "held"')),
    ("2024-05-02T10:00:00", Event("taken-over", pod="shop/web", sandbox="k8s.io/f00d", mapping="81:80/tcp", was="x")),
    ("2024-05-02T10:00:01", Event("withdrawn", container="default/web", mapping="8080:80/tcp")),
    ("2024-05-02T10:00:02", Event("waiting", container="none", mapping="9:9/tcp", reason="a\nb")),
]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run directory in which this happened, in a land where it is three o'clock when it is noon."""
    lines = ({"v": 1, "time": f"{at}.000+00:00", "event": its.name, **its.fields} for at, its in TOLD)
    (tmp_path / NAME).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with monkeypatch.context() as zone:
        zone.setenv("TZ", "XST-3")
        time.tzset()
        yield tmp_path
    time.tzset()


def names(ended: Ended) -> list[str]:
    assert (ended.status, ended.err) == (0, "")
    return [line.split()[2] for line in ended.out.splitlines()]


def test_events_are_lines_in_the_words_of_the_log(ctrport: Run, kept: Path, nobody: None) -> None:
    ended = ctrport("events", "--run-dir", str(kept))
    assert names(ended) == [its.name for _, its in TOLD]
    lines = ended.out.splitlines()
    assert lines[0] == "2024-05-01 13:00:00  started        version=1 pid=7"
    assert lines[2].endswith('container=default/db mapping=8080:80/tcp reason="it is \\"held\\""')
    assert lines[5].endswith('reason="a\\nb"')


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--lines 2", ["withdrawn", "waiting"]),
        ("--lines 0", []),
        ("--since 2024-05-02", ["taken-over", "withdrawn", "waiting"]),
        ("--since 2024-05-02T13:00:01", ["withdrawn", "waiting"]),
        ("--since 2024-05-02T10:00:01+00:00 --lines 1", ["waiting"]),
        ("--since 9999d", [its.name for _, its in TOLD]),
        ("--name web", ["published", "withdrawn"]),
        ("--name pod:shop/*", ["taken-over"]),
        ("--namespace k8s.io", ["taken-over"]),
        ("--namespace default --state conflict", ["conflict"]),
        ("--state active", ["published", "taken-over"]),
        ("--state waiting", ["waiting"]),
    ],
)
def test_events_are_chosen_as_publications_are(ctrport: Run, kept: Path, options: str, expected: list[str]) -> None:
    shown = ctrport("events", "--run-dir", str(kept), *options.split())
    assert [line.split()[2] for line in shown.out.splitlines()] == expected


def test_events_for_programs(ctrport: Run, kept: Path) -> None:
    ended = ctrport("events", "--run-dir", str(kept), "--json", "--lines", "2")
    assert [json.loads(line) for line in ended.out.splitlines()] == [
        json.loads(line) for line in (kept / NAME).read_text().splitlines()[-2:]
    ]


def test_events_are_followed_until_ctrl_c(ctrport: Run, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(["reloaded", "stopped"])

    def sleep(_: float) -> None:
        name = next(steps, None)
        if name is None:
            raise KeyboardInterrupt
        with (kept / NAME).open("a") as file:
            file.write(json.dumps({"v": 1, "time": "2024-05-03T10:00:00.000+00:00", "event": name}) + "\n")

    monkeypatch.setattr(time, "sleep", sleep)
    assert names(ctrport("events", "--run-dir", str(kept), "--follow", "--lines", "1")) == [
        *("waiting", "reloaded", "stopped")
    ]


def test_where_nothing_was_kept_there_is_nothing_to_show(ctrport: Run, tmp_path: Path) -> None:
    ended = ctrport("events", "--run-dir", str(tmp_path))
    assert ended == Ended(0, "", f"nothing to show was kept in {tmp_path}\n")


def test_events_that_cannot_be_read(ctrport: Run, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    ended = ctrport("events", "--run-dir", str(tmp_path))
    assert ended == Ended(1, "", f"ctrport: what happened cannot be read in {tmp_path}: Is a directory\n")


def test_clean_refuses_while_a_daemon_holds_the_lock(ctrport: Run, tmp_path: Path, root: None) -> None:
    with daemon(tmp_path):
        ended = ctrport("clean", "--run-dir", str(tmp_path))
    assert (ended.status, ended.out) == (1, "")
    [line] = ended.err.splitlines()
    assert line.startswith("ctrport: the daemon runs and would put its rules back")


def test_a_second_daemon_names_the_first_and_leaves_its_status_alone(ctrport: Run, tmp_path: Path, root: None) -> None:
    path = written(tmp_path, GOOD)
    with daemon(tmp_path):
        ended = ctrport("run", "--config", path, "--run-dir", str(tmp_path))
        assert status.read(tmp_path) == RUNNING
    expected = f"ctrport: another daemon runs already (pid {os.getpid()}, run directory {tmp_path})\n"
    assert ended == Ended(1, "", expected)


def test_a_run_directory_that_cannot_be_made(ctrport: Run, tmp_path: Path, root: None) -> None:
    path = written(tmp_path, GOOD)
    ended = ctrport("run", "--config", path, "--run-dir", f"{path}/run")
    assert (ended.status, ended.out) == (1, "")
    [line] = ended.err.splitlines()
    assert f"{path}/run" in line
