"""What a shell completes: commands and options by click, containers and namespaces by what the daemon says of itself.

Names are strangers' words, and a shell makes more of some characters than one likes: only plain ones are offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from click import Command, Context, Parameter
from click.shell_completion import BashComplete, ShellComplete, add_completion_class, get_completion_class

from . import status
from .status import Status

SHELLS = ("bash", "zsh", "fish")
#: By what the script asks the command for completions, as click has it.
VARIABLE = "_CTRPORT_COMPLETE"

_PLAIN = re.compile(r"[A-Za-z0-9._:/-]+")


class Bash(BashComplete):
    """Click's, for words that have colons in them, too: bash parts them there (COMP_WORDBREAKS)."""

    _before = ""  # of the word to be completed: up to its last colon, which bash leaves as it is

    def source(self) -> str:
        """See ``ShellComplete``: whichever version of bash is here, it may be meant for another machine."""
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        """See ``ShellComplete``."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        parted = False
        for word in (*args, incomplete):
            if words and (word == ":" or parted):
                words[-1] += word
            else:
                words.append(word)
            parted = word == ":"
        was_parted = ":" in (*args, incomplete)
        *args, incomplete = words
        if was_parted and ":" in incomplete:
            self._before = incomplete[: incomplete.rindex(":") + 1]
        return args, incomplete

    def complete(self) -> str:
        """See ``ShellComplete``."""
        args, incomplete = self.get_completion_args()
        found = [item for item in self.get_completions(args, incomplete) if item.value.startswith(self._before)]
        for item in found:
            item.value = item.value[len(self._before) :]
        return "\n".join(map(self.format_completion, found))


add_completion_class(Bash)


def script(shell: str, cli: Command) -> str:
    """Return what a shell is to read so that it completes the command line."""
    its = get_completion_class(shell)
    assert its is not None
    return its(cli, {}, "ctrport", VARIABLE).source()


def _offering(names: Callable[[Status], Iterable[str]]) -> Callable[[Context, Parameter, str], list[str]]:
    """Return what offers such names out of the status of the run directory that the command line has."""

    def offer(context: Context, parameter: Parameter, incomplete: str) -> list[str]:
        directory = context.params.get("directory") or Path(status.DEFAULT_DIRECTORY)
        said = status.read(directory)
        found = sorted(set(names(said))) if said is not None else []
        return [name for name in found if name.startswith(incomplete) and _PLAIN.fullmatch(name)]

    return offer


#: Of containers, and of pods as ``pod:NAMESPACE/NAME``.
containers = _offering(
    lambda said: (its.name if its.pod else its.container for its in said.publications if its.container)
)
#: Of containerd.
namespaces = _offering(lambda said: (its.namespace for its in said.publications if its.namespace))
