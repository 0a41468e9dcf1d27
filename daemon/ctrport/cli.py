"""The commands: parse arguments, call, print. What people read goes to stdout, all else to stderr.

Exit status: 0 done, 1 failed, 2 bad usage or bad config, 3 (``plan``) there is something to change. An expected failure
is one line, never a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__, status
from . import ps as ps_
from .lines import Failure
from .terminal import BAD_USAGE, FAILED, TO_CHANGE, complain, fail, one_line, rows, way

if TYPE_CHECKING:
    from .config import Config
    from .firewall import Firewall
    from .live import Outcome
    from .model import Family
    from .rules import Layout

# What takes long to import is imported by the commands that need it: `ctrport ps` asks a running daemon and the kernel,
# and does without gRPC and pydantic.

#: How many events are shown, unless it is said.
EVENTS = 50
#: Where the configuration is, unless it is said.
DEFAULT_PATH = "/etc/ctrport/config.yaml"

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> NoReturn:
    """Run the command line."""
    if "_CTRPORT_COMPLETE" in os.environ:
        from . import completion  # noqa: F401 - a shell asks, and is told in the ways of this module
    cli(prog_name="ctrport")
    raise SystemExit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Docker-style port mapping for containerd."""


def _config_option(command: Command) -> Command:
    return click.option(
        *("--config", "path"),
        default=DEFAULT_PATH,
        show_default=True,
        metavar="FILE",
        type=click.Path(readable=False),  # what cannot be read is said in other words
        help="The configuration.",
    )(command)


def _directory_option(command: Command) -> Command:
    return click.option(
        "--run-dir",
        "directory",
        default=status.DEFAULT_DIRECTORY,
        show_default=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Where the daemon keeps its lock and its status.",
    )(command)


@cli.command()
@_config_option
@_directory_option
@click.option("--verbose", is_flag=True, help="Log each look at a container, too.")
@click.option(
    "--log", "style", type=click.Choice(["lines", "json"]), default="lines", show_default=True, help="How to log."
)
def run(path: str, directory: Path, verbose: bool, style: str) -> None:
    """Run the daemon until SIGTERM."""
    import asyncio

    from . import logs
    from . import run as daemon
    from .events import recorded

    logs.begin(verbose, style)
    config = _load(path)
    _as_root("run")
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(status.only_one(directory))
        except status.AlreadyRunning as error:
            fail(str(error))
        except OSError as error:
            fail(f"the run directory {directory} cannot be used: {error.strerror}")
        held.enter_context(recorded(directory))
        try:
            asyncio.run(daemon.run(config, path, directory, lock))
        except daemon.Failed:
            raise SystemExit(FAILED) from None


@cli.command()
@_config_option
def check(path: str) -> None:
    """Check a configuration, and change nothing."""
    config = _load(path)
    mappings = sum(len(declaration.mappings) for declaration in config.publish)
    click.echo(f"{one_line(path)}: in order; declarations: {len(config.publish)}, mappings: {mappings}")


def _containers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from . import completion

    return completion.containers(context, parameter, incomplete)


def _namespaces(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from . import completion

    return completion.namespaces(context, parameter, incomplete)


def _filter_options(command: Command) -> Command:
    states = click.Choice(ps_.STATES)
    for option in (
        click.option("--state", "states", multiple=True, type=states, help="Only in this state; repeatable."),
        click.option(
            *("--namespace", "namespaces"),
            multiple=True,
            metavar="GLOB",
            shell_complete=_namespaces,
            help="Only of this of containerd's.",
        ),
        click.option(
            *("--name", "names"),
            multiple=True,
            metavar="GLOB",
            shell_complete=_containers,
            help="Only of this container, or pod:NAMESPACE/NAME.",
        ),
    ):
        command = option(command)
    return command


@cli.command()
@_config_option
@_directory_option
@_filter_options
@click.option("--wide", is_flag=True, help="With the device, who may reach it, the process, and where it is declared.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option("--check", is_flag=True, help="One line, and exit status 1 unless all that is declared is active.")
@click.option("--watch", is_flag=True, help="Go on, and show it again when something of it changes.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="With --watch: end when it was shown N times.")
def ps(
    path: str,
    directory: Path,
    states: tuple[str, ...],
    namespaces: tuple[str, ...],
    names: tuple[str, ...],
    wide: bool,
    as_json: bool,
    check: bool,
    watch: bool,
    count: int | None,
) -> None:
    """Show what is published, and why the rest is not: what is declared, and what of it the kernel holds."""
    from . import seen

    chosen = ps_.Filter(states, namespaces, names)
    if check and (watch or states):
        raise click.UsageError("--check judges every state, once: leave --watch and --state out")
    if watch and as_json:
        raise click.UsageError("--watch is for people: leave --json out")
    if count is not None and not watch:
        raise click.UsageError("--count is for --watch")

    def look() -> seen.Seen:
        return seen.look(directory, lambda: _load(path), chosen)

    if watch:
        seen.watch(look, wide, count)
        return
    try:
        found = look()
    except Failure as error:
        if check:
            down = "" if status.is_running(directory) else "the daemon is down; "
            click.echo(one_line(f"not ok: {down}{error}"), err=as_json)
            raise SystemExit(FAILED) from None
        fail(str(error))
    if not check:
        found.show(wide, as_json)
        return
    right, line = found.verdict()
    if as_json:
        click.echo(found.status.to_json())
    click.echo(one_line(line), err=as_json)
    raise SystemExit(0 if right else FAILED)


def _since(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    from . import happened

    try:
        return None if text is None else happened.moment(text)
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{text!r}; expected 10m, 2h or 3d ago, or 2026-01-31T14:00") from None


@cli.command()
@_directory_option
@_filter_options
@click.option(
    "--since", callback=_since, metavar="WHEN", help="Only from then on: 10m, 2h or 3d ago, or 2026-01-31T14:00."
)
@click.option("--lines", "most", type=click.IntRange(0), metavar="N", help="The last N; without --since 50.")
@click.option("--follow", is_flag=True, help="Go on, and show what comes.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line, for programs.")
def events(
    directory: Path,
    states: tuple[str, ...],
    namespaces: tuple[str, ...],
    names: tuple[str, ...],
    since: datetime | None,
    most: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Show what happened: published, withdrawn, taken over, repaired, reloaded, lost and found again."""
    from . import happened

    chosen = ps_.Filter(states, namespaces, names)
    if most is None and since is None:
        most = EVENTS
    try:
        happened.show(directory, chosen, since, most, follow=follow, as_json=as_json)
    except OSError as error:
        fail(f"what happened cannot be read in {directory}: {error.strerror}")


@cli.command()
@_config_option
@_directory_option
@click.option("--raw", is_flag=True, help="Not as a diff: the text that would be written, as shell that writes it.")
def plan(path: str, directory: Path, raw: bool) -> None:
    """Show what `run` would change in the kernel now, as a diff; change nothing. Exits 3 where there is something."""
    from . import run as daemon
    from .report import pending

    config = _load(path)
    _as_root("plan")
    layout = daemon.layout(config)
    due = _await(pending(config, _await(_firewalls(config, layout)), layout, directory))
    lines = due.script() if raw else due.diff()
    for line in lines:
        colour = None if raw else {"+": "green", "-": "red"}.get(line[:1])
        click.echo(click.style(one_line(line), fg=colour))
    if lines:
        raise SystemExit(TO_CHANGE)
    click.echo("nothing to change", err=raw)


@cli.command()
@click.argument("name")
@click.argument("mappings", nargs=-1, required=True, metavar="MAPPING...")
@_config_option
@_directory_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def publish(name: str, mappings: tuple[str, ...], path: str, directory: Path, as_json: bool) -> None:
    """Give a running container ports, for as long as it exists, and wait until they are open.

    NAME is an id or the beginning of one, NAMESPACE/ID, nerdctl's name, or pod:NAMESPACE/NAME; MAPPING as 8080:80.
    """
    from . import live

    outcome = _change_ports("publish", live.publish, path, directory, name, mappings)
    if as_json:
        click.echo(outcome.to_json())
    elif outcome.publications:
        rows(outcome.publications)
    _end(outcome)


@cli.command()
@click.argument("name")
@click.argument("mappings", nargs=-1, metavar="[MAPPING or HOSTPORT]...")
@_config_option
@_directory_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def unpublish(name: str, mappings: tuple[str, ...], path: str, directory: Path, as_json: bool) -> None:
    """Take back ports that `publish` gave a container, all of them if none is named, and wait until they are closed.

    NAME as for `publish`; MAPPING as 8080:80, HOSTPORT as 8080 or 53/udp.
    """
    from . import live

    outcome = _change_ports("unpublish", live.unpublish, path, directory, name, mappings)
    if as_json:
        click.echo(outcome.to_json())
    else:
        for mapping in outcome.withdrawn:
            click.echo(one_line(f"{outcome.container} {mapping} is withdrawn"))
        if not outcome.withdrawn and not outcome.problems:
            click.echo(one_line(f"{outcome.container} was given nothing by ctrport publish"))
    _end(outcome)


@cli.command()
@click.argument("port", metavar="[ADDRESS:]PORT[/PROTOCOL]")
@click.option("--from", "source", metavar="ADDRESS", help="Who sends the packet; a client on the LAN if not said.")
@_config_option
@_directory_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def explain(port: str, source: str | None, path: str, directory: Path, as_json: bool) -> None:
    """Show what a packet to a port of this node meets, and why it is answered or not; send and change nothing.

    Exits 0 where it works, 1 where it does not, or cannot be told.
    """
    from .explain.answer import explain as explained
    from .explain.fate import Outcome
    from .explain.question import QuestionError, read

    try:
        asked = read(port, source)
        config = _load(path)
        _as_root("explain")
        current, remark = _published(config, directory)
        explanation = _await(explained(asked, current, config))
    except QuestionError as error:
        fail(str(error), BAD_USAGE)
    if remark:
        complain(remark)
    if as_json:
        click.echo(explanation.to_json())
    else:
        way(explanation)
    if explanation.outcome is not Outcome.WORKS:
        raise SystemExit(FAILED)


@cli.command()
@_directory_option
@click.option("--force", is_flag=True, help="Even while the daemon runs, which puts its rules back unless it hangs.")
def clean(directory: Path, force: bool) -> None:
    """Remove every rule of ctrport. Needs neither a configuration nor containerd."""
    from .dataplane import remove_everything
    from .firewall.backends import every_firewall

    _as_root("clean")
    if status.is_running(directory) and not force:
        fail("the daemon runs and would put its rules back: stop it first (systemctl stop ctrport), or say --force")
    removed = [_await(remove_everything(firewall)) for firewall in _await(every_firewall())]
    click.echo("every rule of ctrport is removed" if any(removed) else "there was no rule of ctrport")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what a shell is to read so that it completes commands, options, containers and namespaces."""
    from . import completion

    click.echo(completion.script(shell, cli))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def version(as_json: bool) -> None:
    """Show the version."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"ctrport {__version__}")


def _change_ports(
    command: str,
    change: Callable[[Config, Path, str, Sequence[str]], Coroutine[Any, Any, Outcome]],
    path: str,
    directory: Path,
    name: str,
    mappings: Sequence[str],
) -> Outcome:
    from .amend import Unusable
    from .live import NotDone
    from .named import NoSuch

    _as_root(command, "containerd")
    config = _load(path)
    try:
        return _await(change(config, directory, name, mappings))
    except Unusable as error:
        fail(str(error), BAD_USAGE)
    except (NoSuch, NotDone) as error:
        fail(str(error))


def _end(outcome: Outcome) -> None:
    for problem in outcome.problems:
        complain(f"ctrport: {problem}")
    if outcome.problems:
        raise SystemExit(FAILED)


def _published(config: Config, directory: Path) -> tuple[status.Status | None, str]:
    """Return what is published as far as that is known, and what there is to say of it."""
    from . import seen

    running = status.is_running(directory)
    current = status.read(directory) if running else None
    if current is not None and current.running:
        return current, ""
    try:
        return seen.without_daemon(config, directory), seen.absence(running)
    except Failure as error:
        return None, f"{seen.absence(running)}, and what is to be published is not known: {error}"


async def _firewalls(config: Config, layout: Layout) -> dict[Family, Firewall]:
    from .firewall.backends import firewalls
    from .firewall.detect import choose

    return await firewalls(layout, (await choose(config.firewall.backend)).backend)


def _load(path: str) -> Config:
    """Read the configuration and the parts beside it, or end with every problem they have."""
    from . import configfiles
    from .config import ConfigError

    try:
        return configfiles.load(path)
    except ConfigError as error:
        for problem in error.problems:
            complain(str(problem))
        raise SystemExit(BAD_USAGE) from None
    except configfiles.Unreadable as error:
        fail(str(error), BAD_USAGE)


def _await(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    try:
        return asyncio.run(work)
    except Failure as error:
        fail(str(error))


def _as_root(command: str, what: str = "the kernel's tables") -> None:
    if os.geteuid() != 0:
        fail(f"ctrport {command} needs root: it works with {what}")
