"""What the documentation shows is there: commands, options, configurations, files, targets, states, chains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ctrport import cli, config, terminal
from ctrport.firewall.tables import HOLDER_CHAINS
from ctrport.model import State
from ctrport.nftports import CHAINS
from ctrport.rules import USER_CHAIN, Layout

ROOT = Path(__file__).resolve().parents[2]
DOCS = ("docs/operating.md", "docs/paths.md", "docs/docker.md", "deploy/kubernetes/README.md")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS)]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def shown(page: Path) -> str:
    """Return a page's code alone: blocks, and what stands between backticks."""
    text = page.read_text()
    fenced = [code for language, code in _FENCE.findall(text) if language in ("", "sh")]
    rest = _FENCE.sub("", text)
    return "\n".join([*fenced, *_INDENTED.findall(rest), *re.findall(r"`([^`\n]+)`", rest)])


def command_lines(text: str, program: str) -> list[list[str]]:
    """Return the arguments of each call of ``program``: at the start of a line, behind a path, or behind ``&&``."""
    calls = re.findall(rf"(?:^|&& )[ ]*(?:/\S*/)?{program}(?= |$)([^\n#;|&]*)", text, re.MULTILINE)
    return [shlex.split(re.split(r" {2,}", call.rstrip())[0]) for call in calls]


def wrong(arguments: list[str]) -> str | None:
    """Return what of a call of ctrport's does not exist, or None."""
    if not arguments:
        return None
    name, *rest = arguments
    command = cli.cli.commands.get(name)
    if command is None:
        return f"no command {name}"
    flags = {flag: one for one in command.params if isinstance(one, click.Option) for flag in one.opts}
    while rest:
        option = flags.get(rest.pop(0))
        if option is None:
            return f"{name} has no such option, and takes no arguments: {arguments}"
        if not option.is_flag and not rest:
            return f"{name} wants a value: {arguments}"
        rest = rest if option.is_flag else rest[1:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    assert [problem for call in command_lines(shown(page), "ctrport") if (problem := wrong(call))] == []


def test_the_check_of_commands_sees_what_is_wrong() -> None:
    calls = command_lines("x\n  ctrport publish a\nctrport ps --yaml\n/opt/bin/ctrport run --config\n", "ctrport")
    assert [wrong(call) is not None for call in calls] == [True, True, True]
    calls = command_lines(
        "ctrport check && systemctl x  # y\na && ctrport ps --json | jq\nctrport run --config F", "ctrport"
    )
    assert [wrong(call) for call in calls] == [None, None, None]
    assert [call[0] for call in calls] == ["check", "ps", "run"]


def test_every_command_and_option_is_documented() -> None:
    readme = (ROOT / "README.md").read_text() + (ROOT / "docs" / "operating.md").read_text()
    for name, command in cli.cli.commands.items():
        assert f"| `ctrport {name}` |" in readme
        for option in command.params:
            assert option.opts[0] in readme, f"{name} {option.opts[0]}"


def test_the_unit_runs_a_command_that_exists() -> None:
    unit = (ROOT / "systemd" / "ctrport.service").read_text()
    [start] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert start.startswith("/opt/ctrport/bin/ctrport ")
    assert wrong(start.split()[1:]) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configurations_are_taken(page: Path) -> None:
    for language, code in _FENCE.findall(page.read_text()):
        if language == "yaml":
            config.parse(code, page.name)
            if "conf.d" in code.splitlines()[0]:
                assert config.parse("", "", [(page.name, code)]).publish


def test_the_configuration_in_the_readme_says_the_defaults() -> None:
    everything = next(code for language, code in _FENCE.findall((ROOT / "README.md").read_text()) if "backend:" in code)
    assert config.parse(everything, "README.md") == config.parse("", "")
    for section in (config.Containerd, config.Firewall):
        for key in section.__dataclass_fields__:
            assert f"  {key}: " in everything


def test_each_condition_of_an_entry_is_explained() -> None:
    text = (ROOT / "README.md").read_text()
    explained = text[text.index("An entry of `publish` has") :]
    for schema in (config._Entry, config._Match, config._PodMatch):
        for key in schema.__dataclass_fields__:
            assert f"`{key}`" in explained, key


def test_whatever_holds_a_port_is_named() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "operating.md", ROOT / "CHANGELOG.md"):
        text = page.read_text()
        assert [name for name in (*HOLDER_CHAINS, *CHAINS) if not re.search(rf"\b{name}\b", text)] == []
    reasons = re.findall(r"^\| conflict \| host port … is held by ([A-Za-z_-]+) \|", _operating(), re.MULTILINE)
    assert set(HOLDER_CHAINS) - {"KUBE-NODEPORTS"} | set(CHAINS) <= set(reasons)
    assert "host port … is held by KUBE-NODEPORTS (" in _operating()


def _operating() -> str:
    return (ROOT / "docs" / "operating.md").read_text()


def test_what_an_installation_writes_is_listed() -> None:
    listed = re.findall(r"^\| `(/(?:opt|usr|etc)/\S+)` \|", _operating().partition("## Install")[2], re.MULTILINE)
    assert len(listed) == 5
    script = (ROOT / "bin" / "install").read_text().replace("$config", "/etc/ctrport")
    assert [path for path in listed if path not in script] == []
    for setting in ("PREFIX", "DESTDIR", "PYTHON"):
        assert setting in _operating()


def test_each_exit_status_is_explained() -> None:
    text = (ROOT / "README.md").read_text()
    explained = re.findall(r"^\| ([0-9]) \|", text[text.index("| exit status |") :], re.MULTILINE)
    assert explained == [str(code) for code in (0, terminal.FAILED, terminal.BAD_USAGE, terminal.TO_CHANGE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_files_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for call in command_lines(shown(page), "make"):
        assert not call or call[0] in targets
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_each_state_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [state for state in explained if state in set(State)] == [state.value for state in State]


def test_each_chain_is_named() -> None:
    rows = re.findall(r"^\| (raw|nat|filter) \| ([^|]+) \|", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    named = {(table, chain) for table, chains in rows for chain in chains.strip().split(", ")}
    layout = Layout()
    used = {(table.value, chain) for table, chain in (*layout.own_chains, *layout.kernel_chains)}
    assert named == used | {("filter", USER_CHAIN)}
