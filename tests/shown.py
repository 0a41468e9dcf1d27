"""What the documentation shows to be typed, and where that is tried."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "deploy").glob("*/README.md")),
]

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)

#: Where a command is tried, by its first word. What is not named here is no command.
NODE = "on an embedded node, by tests/node/test_shown_commands.py"
BOOT = "in a booted Debian, by `make boot`"
MAKE = "a target of the Makefile"
NOWHERE = "takes what is not here"
PROGRAMS = {
    NODE: (
        "ctrport ctr iptables-nft ip6tables-nft iptables-legacy iptables-nft-save conntrack nft ip ss sysctl bridge "
        "nsenter tcpdump ps ls cat df findmnt fuser command curl cp mv modprobe promtool"
    ),
    BOOT: "systemctl journalctl systemd-analyze firewall-cmd apt-get tar",
    MAKE: "make",
    NOWHERE: "kubectl podman kind docker nerdctl cilium-dbg",
}
PLACES = {program: place for place, programs in PROGRAMS.items() for program in programs.split()}


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it."""

    page: Path
    text: str

    @property
    def place(self) -> str:
        """Where it is tried."""
        return PLACES[self.text.split()[0]]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def blocks(page: Path) -> list[str]:
    """Return the blocks of a page that are to be typed."""
    return [block for language, block in FENCE.findall(page.read_text()) if language == "sh"]


def code(page: Path) -> list[str]:
    """Return what a page shows to be typed or seen: the lines of its blocks, and what stands between backticks."""
    text = page.read_text()
    fenced = [block for language, block in FENCE.findall(text) if language in ("", "sh")]
    rest = FENCE.sub("", text)
    lines = [line for block in (*fenced, *INDENTED.findall(rest)) for line in joined(block)]
    return [*lines, *re.findall(r"`([^`\n]+)`", rest)]


def joined(block: str) -> list[str]:
    """Return the lines of a block, those that go on in the next as one."""
    return re.sub(r" *\\\n *", " ", block).splitlines()


def commands(page: Path) -> Iterator[Shown]:
    """Yield the commands of a page, each once. The name of a program alone is none."""
    for line in dict.fromkeys(code(page)):
        text = re.split(r" +#|  +", line.strip())[0]
        if text.split(" ")[0] in PLACES and " " in text and "…" not in text:
            yield Shown(page, text)


def texts(place: str) -> list[str]:
    """Return the commands that are tried at a place, each once, in the order of the pages."""
    return [*dict.fromkeys(shown.text for page in PAGES for shown in commands(page) if shown.place == place)]


@dataclass(frozen=True)
class Way:
    """What a command needs that the page takes for granted, and what it has to come to."""

    #: What it is shown beside, where that differs.
    beside: str = ""
    #: Lines of shell that make what it is shown for, and that take away what it has left.
    before: str = ""
    after: str = ""
    #: It goes on until Ctrl-C. Until this is seen a client asks, then that is typed.
    until: str = ""
    #: What it says besides.
    says: str = ""
    #: The program it is run by.
    behind: tuple[str, ...] = ()
    #: Its exit status: where another than 0 is right, the reason is beside it.
    status: tuple[int, ...] = (0,)

    def hold(self, status: int, said: str) -> None:
        """Raise ``AssertionError`` where a command came to something else."""
        assert status in self.status, f"exit status {status}: {said}"
        assert self.says in said, f"no {self.says!r} in {said!r}"
        assert "Traceback" not in said, said
