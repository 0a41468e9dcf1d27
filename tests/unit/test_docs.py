"""What the documentation shows is there: commands, options, configurations, files, targets, states, chains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ctrport import cli, config, schema, terminal
from ctrport.events import KINDS
from ctrport.explain.fate import Cause
from ctrport.firewall.tables import HOLDER_CHAINS
from ctrport.model import State
from ctrport.nftports import CHAINS
from ctrport.rules import USER_CHAIN, Layout
from tests.boot import shown_commands as boot
from tests.shown import BOOT, FENCE, MAKE, NOWHERE, PAGES, PLACES, ROOT, blocks, code, texts


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
    places = [one for one in command.params if isinstance(one, click.Argument)]
    while rest:
        option = flags.get(word := rest.pop(0))
        if option is None and places and not word.startswith("-"):
            places = places if places[0].nargs == -1 else places[1:]
            continue
        if option is None:
            return f"{name} has no such option, or takes no such argument: {arguments}"
        if not option.is_flag and not rest:
            return f"{name} wants a value: {arguments}"
        rest = rest if option.is_flag else rest[1:]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    assert [problem for call in command_lines("\n".join(code(page)), "ctrport") if (problem := wrong(call))] == []


def test_the_check_of_commands_sees_what_is_wrong() -> None:
    lines = ("x", "  ctrport frob a", "ctrport ps --yaml", "/opt/bin/ctrport run --config", "ctrport ps a", "")
    calls = command_lines("\n".join(lines), "ctrport")
    assert [wrong(call) is not None for call in calls] == [True] * 4
    calls = command_lines("ctrport publish web 8080:80 53:53/udp --json\nctrport unpublish web\n", "ctrport")
    assert [wrong(call) for call in calls] == [None, None]
    calls = command_lines(
        "ctrport explain 80\nctrport explain 80 81\nctrport ps a\nctrport explain --to a\n", "ctrport"
    )
    assert [wrong(call) is not None for call in calls] == [False, True, True, True]
    calls = command_lines(
        "ctrport check && systemctl x  # y\na && ctrport ps --json | jq\nctrport run --config F", "ctrport"
    )
    assert [wrong(call) for call in calls] == [None, None, None]
    assert [call[0] for call in calls] == ["check", "ps", "run"]


def test_every_command_and_option_is_documented() -> None:
    readme = (ROOT / "README.md").read_text() + _operating()
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
    for language, block in FENCE.findall(page.read_text()):
        if language == "yaml":
            config.parse(block, page.name)
            if "conf.d" in block.splitlines()[0]:
                assert config.parse("", "", [(page.name, block)]).publish


def test_the_configuration_in_the_readme_says_the_defaults() -> None:
    everything = next(code for language, code in FENCE.findall((ROOT / "README.md").read_text()) if "backend:" in code)
    assert config.parse(everything, "README.md") == config.parse("", "")
    for section in (schema.Containerd, schema.Firewall, schema.Metrics):
        for key in section.__dataclass_fields__:
            assert f"  {key}: " in everything


def test_each_condition_of_an_entry_is_explained() -> None:
    text = (ROOT / "README.md").read_text()
    explained = text[text.index("An entry of `publish` has") :]
    for its in (schema.Entry, schema.Match, schema.PodMatch):
        for key in its.__dataclass_fields__:
            assert f"`{key}`" in explained, key


def test_the_transcripts_of_explain_are_what_it_says() -> None:
    golden = Path(__file__).with_name("golden") / "explain"
    assert (golden / "dropped-by-the-operator.txt").read_text() in _operating()
    end = (golden / "works.txt").read_text().splitlines(keepends=True)[-5:]
    assert "".join(end) in _operating()


def test_each_cause_that_explain_names_is_listed() -> None:
    listed = _operating().partition("A cause is one of ")[2].partition(".")[0]
    assert re.findall(r"`([a-z0-9-]+)`", listed) == [cause.value for cause in Cause]


def test_whatever_holds_a_port_is_named() -> None:
    for text in ((ROOT / "README.md").read_text(), _operating(), (ROOT / "CHANGELOG.md").read_text()):
        assert [name for name in (*HOLDER_CHAINS, *CHAINS) if not re.search(rf"\b{name}\b", text)] == []
    reasons = re.findall(r"^\| conflict \| host port … is held by ([A-Za-z_-]+) \|", _operating(), re.MULTILINE)
    assert set(HOLDER_CHAINS) - {"KUBE-NODEPORTS"} | set(CHAINS) <= set(reasons)
    assert "host port … is held by KUBE-NODEPORTS (" in _operating()


def _operating() -> str:
    """Return what operators are told: of every day, of nights, and of installing it."""
    return "\n".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("operating", "troubleshooting", "install"))


def test_what_an_installation_writes_is_listed() -> None:
    listed = re.findall(r"^\| `(/(?:opt|usr|etc)/\S+)` \|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
    assert len(listed) == 5
    script = (ROOT / "bin" / "install").read_text().replace("$config", "/etc/ctrport")
    assert [path for path in listed if path not in script] == []
    for setting in ("PREFIX", "DESTDIR", "PYTHON"):
        assert setting in _operating()


def test_each_exit_status_is_explained() -> None:
    text = (ROOT / "README.md").read_text()
    explained = re.findall(r"^\| ([0-9]) \|", text[text.index("| exit status |") :], re.MULTILINE)
    assert explained == [str(code) for code in (0, terminal.FAILED, terminal.BAD_USAGE, terminal.TO_CHANGE)]


def test_each_kind_of_event_is_explained() -> None:
    rows = re.findall(
        r"^\| (`[^|]+) \|", _operating().partition("### What happened")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)} == set(KINDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_targets_and_files_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for call in command_lines("\n".join(code(page)), "make"):
        assert not call or call[0] in targets
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("text", texts(MAKE))
def test_make_knows_the_targets_and_settings_that_are_shown(text: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    _, target, *settings = text.split()
    assert re.search(rf"^{target}:.* ## ", makefile, re.MULTILINE)
    assert [name for name in settings if not re.search(rf"^{name.partition('=')[0]} \?=", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("text", [text for text in texts(NOWHERE) if text.split()[0] in ("kubectl", "podman", "kind")])
def test_what_is_shown_for_a_cluster_is_what_the_manifests_have(text: str) -> None:
    """No cluster is here to try them on: the files, the names in them, and the command that the image has."""
    manifests = "".join(file.read_text() for file in sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml")))
    for file in re.findall(r" -f (\S+)", text):
        assert (ROOT / file).is_file(), file
    for namespace in re.findall(r" -n (\S+)", text):
        assert f"\n  namespace: {namespace}\n" in manifests
    for kind, name in re.findall(r" (daemonset)/(\S+)", text):
        assert re.search(rf"^kind: {kind}\nmetadata:\n  name: {name}$", manifests, re.MULTILINE | re.IGNORECASE)
    for image in re.findall(r"\S+/ctrport:\S+", text):
        assert f" image: {image}\n" in manifests
    program, _, arguments = text.partition(" -- ")[2].partition(" ")
    if program:
        assert f'ENTRYPOINT ["{program}"]' in (ROOT / "deploy" / "kubernetes" / "Containerfile").read_text()
        assert wrong(shlex.split(arguments)) is None


def test_whatever_is_said_of_a_command_for_make_boot_is_of_one_that_is_shown() -> None:
    assert sorted({*boot.WAYS, *boot.ELSEWHERE} - {*texts(BOOT)}) == []
    assert sorted(boot.WAYS.keys() & boot.ELSEWHERE.keys()) == []


def anchors(page: Path) -> list[str]:
    """Return what the headings of a page are linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    wrong = []
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        there = (page.parent / file).resolve() if file else page
        if not file.startswith("https://") and anchor not in anchors(there):
            wrong.append(f"{file}#{anchor}")
    assert wrong == []


def test_each_page_is_found_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and page.name not in readme] == []


def test_every_program_that_is_shown_is_known() -> None:
    """So that no command is left out because nobody said where it is tried."""
    lines = (line for page in PAGES for block in blocks(page) for line in block.splitlines())
    first = {line.split()[0] for line in lines if line.strip() and not line.startswith((" ", "#", "-", "}", "+"))}
    assert sorted(word for word in first if re.fullmatch(r"[a-z][a-z0-9-]+", word) and word not in PLACES) == []


def test_each_state_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [state for state in explained if state in set(State)] == [state.value for state in State]


def test_each_chain_is_named() -> None:
    rows = re.findall(r"^\| (raw|nat|filter) \| ([^|]+) \|", (ROOT / "docs" / "operating.md").read_text(), re.MULTILINE)
    named = {(table, chain) for table, chains in rows for chain in chains.strip().split(", ")}
    layout = Layout()
    used = {(table.value, chain) for table, chain in (*layout.own_chains, *layout.kernel_chains)}
    assert named == used | {("filter", USER_CHAIN)}
