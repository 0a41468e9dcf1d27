"""The process that writes legacy tables of one family with python-iptables (libiptc): ``... legacy_worker FAMILY``.

A process of its own, for what the library does to the one it is in: it swaps file descriptor 1, takes one thread, stays
in the network namespace of its first use, finds no targets of IPv6 once it made a rule of IPv4, and leaves less of the
stack after each value that it refuses. Commits come on stdin as a line of JSON each, and each is answered with one.

What others write is not lost: every table is read and committed under the lock of ``iptables -w``, and a commit that
fails because somebody took no lock is made anew from what the table holds by then.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import fcntl
import glob
import json
import os
import re
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from .entries import Commit, Entry, Extension, Step, from_json
from .text import TAG

#: Seconds to wait for others that hold the lock. kube-proxy holds it for less than one.
LOCK_TIMEOUT = 10
#: How often a commit is made anew that another's, made without the lock, came before.
ATTEMPTS = 10

_PR_SET_PDEATHSIG = 1
_IFNAMSIZ = 16
# In an xt_entry_match: the name in 29 bytes, of which the kernel fills no more than it needs; revision 0; the text.
_COMMENT = re.compile(rb"comment\0.{21}\0(" + TAG.pattern.encode() + rb")\0", re.DOTALL)
_NAME_OFFSET, _NAME_SIZE = 2, 29  # in an xt_entry_target


class _Refused(Exception):
    """A table could not be written, for a reason that leaves this process as good as before."""


class _Changed(_Refused):
    """The table does not hold what the steps take for granted: to read it anew will help."""


def main() -> None:
    """Answer until stdin ends."""
    family = int(sys.argv[1])
    # Ctrl-C in a terminal is for the daemon, which ends this one when it is done. Killed, it takes this one along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The library puts pipes where file descriptor 1 is while it reads a parameter.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        library: _Library | str = _Library(family)
    except ImportError as error:
        library = f"python-iptables is not installed ({error}): pip install 'ctrport[legacy]', which needs a C compiler"
    except Exception as error:
        library = f"python-iptables cannot be used: {error}"
    for line in sys.stdin:
        answer, is_over = _answer(library, from_json(line))
        print(json.dumps(answer), file=answers, flush=True)
        if is_over:
            return


def _answer(library: _Library | str, commits: Sequence[Commit]) -> tuple[dict[str, object], bool]:
    """Return what to say to a line, and whether this process has to go."""
    answer: dict[str, object] = {"error": "", "unusable": False, "changed": False, "waited": 0.0}
    if isinstance(library, str):
        return answer | {"error": library, "unusable": True}, False
    library.waited, is_over = 0.0, False
    try:
        library.write(commits)
    except _Refused as error:
        unusable = "Permission denied" in str(error)
        answer |= {"error": str(error), "unusable": unusable, "changed": isinstance(error, _Changed)}
    except Exception as error:
        # A value was refused, though all were checked before they came here: that cost a piece of the stack.
        answer["error"], is_over = f"{type(error).__name__}: {error}", True
    return answer | {"waited": library.waited}, is_over


class _Library:
    """python-iptables for one family. ``waited`` adds up the seconds that others had the lock."""

    def __init__(self, family: int) -> None:
        self.waited = 0.0
        iptc = _load()
        self._error = iptc.IPTCError
        self._v6 = family == 6
        self._table, self._rule = (iptc.Table6, iptc.Rule6) if self._v6 else (iptc.Table, iptc.Rule)
        # A target that is no verdict is looked for among the chains of every table, which makes the tables that are
        # not there. Where one goes is known here.
        self._table.existing_table_names.update(dict.fromkeys(self._table.ALL, False))

    def write(self, commits: Sequence[Commit]) -> None:
        """Commit one after the other. Raises ``_Refused``."""
        # What takes time comes before the lock: nobody waits for the making of 10,000 rules.
        made = [(each, [None if s.entry is None else self._made(s.entry) for s in each.steps]) for each in commits]
        for each, entries in made:
            for left in reversed(range(ATTEMPTS)):
                try:
                    with self._locked():
                        self._commit(each, entries)
                    break
                except self._error as error:
                    said = re.sub(r"b'(.*)'", r"\1", str(error))
                    if "temporarily unavailable" not in said or not left:
                        raise _Changed(f"the table {each.table} could not be written: {said}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        began = time.monotonic()
        with ExitStack() as held:
            try:
                held.enter_context(_lock())
            finally:
                self.waited += time.monotonic() - began
            yield

    def _commit(self, commit: Commit, entries: Sequence[bytes | None]) -> None:
        table = self._table(commit.table, autocommit=False)
        try:
            table.refresh()  # always: what it read before is not what the table holds
            chains = _Chains(table, commit.steps)
            for step, entry in zip(commit.steps, entries, strict=True):
                chains.carry_out(step, entry)
            table.commit()
        finally:
            table.close()

    def _made(self, entry: Entry) -> bytes:
        """Return a rule in the kernel's form."""
        rule = self._rule()
        if entry.source:
            rule.src = entry.source
        if entry.destination:
            rule.dst = entry.destination
        if entry.protocol:
            rule.protocol = entry.protocol
        ip = rule.get_ip()
        inverted = {"ini": (entry.in_device, 1), "outi": (entry.out_device, 2)}
        for prefix, (device, flag) in inverted.items():
            # Not by the library: for IPv6 its masks compare one bit of each byte, so that docker0 is also eocker0.
            name = device.removeprefix("!").encode()
            if name:
                ip.invflags |= flag if device.startswith("!") else 0
                setattr(ip, f"{prefix}face", name)
                setattr(ip, f"{prefix}face_mask", b"\xff" * (len(name) + 1))
        for match in entry.matches:
            _set(rule.create_match(match.name), match)
        if entry.target is not None:
            _set(rule.create_target(entry.target.name), entry.target)
        else:
            # By the name of no target it is a standard one, and what stands in it then may be a chain that comes only
            # with this commit.
            rule.create_target("").standard_target = entry.jump
        return bytes(rule.rule)


def _set(module: Any, extension: Extension) -> None:
    for option, value in extension.options:
        module.set_parameter(option, value)
    # As Rule.final_check() does, but while the flags are still this one's: that one has to read all parameters back.
    module._final_check()


class _Chains:
    """The chains of one table that is to be committed, with the tags of the rules where they are needed."""

    def __init__(self, table: Any, steps: Sequence[Step]) -> None:
        self._table = table
        self._tags: dict[str, list[str]] = {}
        self._former: dict[tuple[str, str], bytes] = {}
        again = {(step.chain, step.tag) for step in steps if step.do == "again"}
        for chain in dict.fromkeys(step.chain for step in steps if step.do in ("again", "remove")):
            tags = self._tags[chain] = []
            for pointer in self._entries(chain):
                raw = ctypes.string_at(pointer, pointer[0].next_offset)
                found = _COMMENT.search(raw)
                tags.append(found[1].decode() if found else "")
                if (chain, tags[-1]) in again:
                    self._former.setdefault((chain, tags[-1]), self._with_its_target(raw, pointer))

    def carry_out(self, step: Step, entry: bytes | None) -> None:
        """Do one step. Raises ``IPTCError``, or ``_Refused`` for a rule that is not there."""
        match step.do:
            case "new":
                self._table.create_chain(step.chain)
                self._tags[step.chain] = []
            case "empty":
                self._table.flush_entries(step.chain)
                self._tags[step.chain] = []
            case "delete":
                self._table.delete_chain(step.chain)
            case "add":
                assert entry is not None
                self._add(step, entry)
            case "again":
                if (step.chain, step.tag) not in self._former:
                    raise self._missing(step)
                self._add(step, self._former[step.chain, step.tag])
            case "remove":
                if step.tag not in self._tags[step.chain]:
                    raise self._missing(step)
                position = self._tags[step.chain].index(step.tag)
                self._do(self._library.iptc_delete_num_entry, step.chain, position)
                del self._tags[step.chain][position]
            case other:
                raise AssertionError(other)

    def _add(self, step: Step, entry: bytes) -> None:
        tags = self._tags.get(step.chain)
        buffer = (ctypes.c_ubyte * len(entry)).from_buffer_copy(entry)
        if step.position is None:
            self._table.append_entry(step.chain, buffer)
        else:
            self._table.insert_entry(step.chain, buffer, step.position - 1)
        if tags is not None:
            tags.insert(len(tags) if step.position is None else step.position - 1, step.tag)

    def _missing(self, step: Step) -> _Changed:
        return _Changed(f"the chain {step.chain} of the table {self._table.name} holds no rule {step.tag!r}")

    @property
    def _library(self) -> Any:
        return self._table._iptc

    def _do(self, function: Callable[..., int], chain: str, *arguments: int) -> None:
        """Call what the library binds and offers no method for."""
        if function(chain.encode(), *arguments, self._table._handle) != 1:
            raise _Changed(f"the chain {chain} of the table {self._table.name}: {self._table.strerror().decode()}")

    def _entries(self, chain: str) -> Iterator[Any]:
        pointer = self._library.iptc_first_rule(chain.encode(), self._table._handle)
        while pointer:
            yield pointer
            pointer = self._library.iptc_next_rule(pointer, self._table._handle)

    def _with_its_target(self, raw: bytes, pointer: Any) -> bytes:
        """Return an entry with the name of the chain or verdict in it, which the kernel has as a number."""
        name = self._library.iptc_get_target(pointer, self._table._handle) or b""
        start = pointer[0].target_offset + _NAME_OFFSET
        return raw[:start] + name.ljust(_NAME_SIZE, b"\0") + raw[start + _NAME_SIZE :]


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the lock that ``iptables -w`` waits for. Raises ``_Refused`` where others hold it for too long."""
    path = os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock"  # as iptables has it

    def expired(*_: object) -> None:
        raise _Refused(f"somebody has held the lock {path} for {LOCK_TIMEOUT} s")

    try:
        lock = os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _Refused(f"the lock {path} cannot be used: {error.strerror}") from error
    before = signal.signal(signal.SIGALRM, expired)
    try:
        signal.alarm(LOCK_TIMEOUT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(0)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.close(lock)


def _load() -> Any:
    """Import the library. It has no types, and a name of it is all that the rest of this module can go by."""
    directory = next((path for each in _directories() if os.path.isdir(path := f"{each}/xtables")), None)
    if directory is not None:
        os.environ.setdefault("XTABLES_LIBDIR", directory)
    # That of setuptools takes 0.2 s to import, and all that is asked is a path.
    os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    asked = ctypes.util.find_library
    # Or it asks ldconfig, gcc and ld, some of which a node does not have, in 14 processes.
    ctypes.util.find_library = lambda name: _shared_object(name) or asked(name)
    try:
        import iptc
    finally:
        ctypes.util.find_library = asked
    return iptc


def _shared_object(name: str) -> str | None:
    """Return where a C library is, with its version in the file's name, which the library goes by."""
    found = (path for each in _directories() for path in sorted(glob.glob(f"{each}/lib{name}.so.*"), key=len))
    return next(found, None)


@cache
def _directories() -> list[str]:
    architecture = sysconfig.get_config_var("MULTIARCH")
    names = [f"lib/{architecture}"] if architecture else []
    return [f"{root}/{name}" for name in (*names, "lib64", "lib") for root in ("/usr", "")]


if __name__ == "__main__":
    main()
