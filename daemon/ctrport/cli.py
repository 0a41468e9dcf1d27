"""The commands: parse arguments, call, print. What people read goes to stdout, all else to stderr.

Exit status: 0 done, 1 failed, 2 bad usage or bad config, 3 (``plan``) there is something to change. An expected failure
is one line, never a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__, configfiles, logs, status
from .config import DEFAULT_PATH, Config, ConfigError
from .containerd import ContainerdError
from .firewall import Firewall, FirewallError
from .terminal import BAD_USAGE, FAILED, TO_CHANGE, complain, fail, one_line, table, way

if TYPE_CHECKING:
    from .model import Family
    from .rules import Layout

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> NoReturn:
    """Run the command line."""
    cli(prog_name="ctrport")
    raise SystemExit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Docker-style port mapping for containerd."""


def _config_option(command: Command) -> Command:
    return click.option(
        "--config", "path", default=DEFAULT_PATH, show_default=True, metavar="FILE", help="The configuration."
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
def run(path: str, directory: Path, verbose: bool) -> None:
    """Run the daemon until SIGTERM."""
    from . import run as daemon

    logs.begin(verbose)
    config = _load(path)
    _as_root("run")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(status.only_one(directory))
        except status.AlreadyRunning as error:
            fail(str(error))
        except OSError as error:
            fail(f"the run directory {directory} cannot be used: {error.strerror}")
        try:
            _await(daemon.run(config, path, directory))
        except OSError as error:
            fail(f"it cannot go on: {error.strerror or error}")


@cli.command()
@_config_option
def check(path: str) -> None:
    """Check a configuration, and change nothing."""
    config = _load(path)
    mappings = sum(len(declaration.mappings) for declaration in config.publish)
    click.echo(f"{one_line(path)}: in order; declarations: {len(config.publish)}, mappings: {mappings}")


@cli.command()
@_config_option
@_directory_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def ps(path: str, directory: Path, as_json: bool) -> None:
    """Show what is published, and why the rest is not."""
    running = status.is_running(directory)
    current = status.read(directory) if running else None
    if current is None or not current.running:
        _as_root("ps, while no daemon answers,")
        current = _await(_without_daemon(_load(path), directory))
        click.echo(f"{_absence(running)}; this is what can be seen without it", err=True)
    if as_json:
        click.echo(current.to_json())
    else:
        table(current)


@cli.command()
@_config_option
@_directory_option
def plan(path: str, directory: Path) -> None:
    """Show what `run` would change in the kernel now, as a diff; change nothing. Exits 3 where there is something."""
    from . import run as daemon
    from .report import pending

    config = _load(path)
    _as_root("plan")
    layout = daemon.layout(config)
    lines = _await(pending(config, _await(_firewalls(config, layout)), layout, directory))
    for line in lines:
        colour = {"+": "green", "-": "red"}.get(line[:1])
        click.echo(click.style(one_line(line), fg=colour))
    if lines:
        raise SystemExit(TO_CHANGE)
    click.echo("nothing to change")


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
    from . import run as daemon
    from .dataplane import remove_everything

    _as_root("clean")
    if status.is_running(directory) and not force:
        fail("the daemon runs and would put its rules back: stop it first (systemctl stop ctrport), or say --force")
    removed = [_await(remove_everything(firewall)) for firewall in _await(daemon.every_firewall())]
    click.echo("every rule of ctrport is removed" if any(removed) else "there was no rule of ctrport")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def version(as_json: bool) -> None:
    """Show the version."""
    click.echo(json.dumps({"version": __version__}) if as_json else f"ctrport {__version__}")


def _published(config: Config, directory: Path) -> tuple[status.Status | None, str]:
    """Return what is published as far as that is known, and what there is to say of it."""
    running = status.is_running(directory)
    current = status.read(directory) if running else None
    if current is not None and current.running:
        return current, ""
    try:
        return asyncio.run(_without_daemon(config, directory)), _absence(running)
    except (FirewallError, ContainerdError) as error:
        return None, f"{_absence(running)}, and what is to be published is not known: {error}"


def _absence(running: bool) -> str:
    """Say why there is no word of the daemon's."""
    return "the daemon is just starting, or cannot write its status" if running else "the daemon is down"


async def _without_daemon(config: Config, directory: Path) -> status.Status:
    from . import run as daemon
    from .report import without_daemon

    layout = daemon.layout(config)
    return await without_daemon(config, await _firewalls(config, layout), layout, directory)


async def _firewalls(config: Config, layout: Layout) -> dict[Family, Firewall]:
    from . import run as daemon
    from .firewall.detect import choose

    return await daemon.firewalls(layout, (await choose(config.firewall.backend)).backend)


def _load(path: str) -> Config:
    """Read the configuration and the parts beside it, or end with every problem they have."""
    try:
        return configfiles.load(path)
    except ConfigError as error:
        for problem in error.problems:
            complain(str(problem))
        raise SystemExit(BAD_USAGE) from None
    except configfiles.Unreadable as error:
        fail(str(error), BAD_USAGE)


def _await(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except (FirewallError, ContainerdError) as error:
        fail(str(error))


def _as_root(command: str) -> None:
    if os.geteuid() != 0:
        fail(f"ctrport {command} needs root: it works with the kernel's tables")
