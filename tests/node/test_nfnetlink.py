"""Changes of nf_tables in one batch, asked of the real kernel in a network namespace of its own."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

from ctrport.nfnetlink import NfTables, comment, delete_rule, handle
from ctrport.nlmsg import Message, Rejected
from embedded.host import Host, inside

T = TypeVar("T")

NOBODY = 999_999  # no rule has this number
#: As many as one message takes a socket more room for than it has.
MANY = 5000


def asking(host: Host, work: Callable[[NfTables], T]) -> T:
    def ask() -> T:
        with contextlib.closing(NfTables()) as tables:
            return work(tables)

    return inside(host.pid, ("net",), ask)


def chain_of(host: Host, name: str, count: int) -> list[int]:
    """Make a chain with so many rules, the first with the comment 0, and return what the kernel calls them."""
    rules = "".join(f"-A {name} -m comment --comment {number}\n" for number in range(count))
    host.run("iptables-nft-restore", "--noflush", input=f"*filter\n:{name} - [0:0]\n{rules}COMMIT\n")
    found = asking(host, lambda tables: tables.rules(socket.AF_INET, "filter", name))
    assert found is not None
    assert [comment(rule) for rule in found] == [str(number) for number in range(count)]
    return list(map(handle, found))


def left(host: Host, name: str) -> list[str]:
    listed = host.run("iptables-nft", "-S", name).stdout.splitlines()
    return [line.rpartition(" ")[2] for line in listed if line.startswith("-A")]


def delete(host: Host, name: str, handles: Sequence[int]) -> None:
    batch = [delete_rule(socket.AF_INET, "filter", name, number) for number in handles]
    asking(host, lambda tables: tables.commit(batch))


def test_rules_go_by_their_numbers_and_the_others_stay(host: Host) -> None:
    handles = chain_of(host, "SOME", 5)
    delete(host, "SOME", (handles[1], handles[4]))
    assert left(host, "SOME") == ["0", "2", "3"]
    delete(host, "SOME", ())
    assert left(host, "SOME") == ["0", "2", "3"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_first_that_is_refused_is_named_and_nothing_is_done(host: Host, place: int) -> None:
    name = f"REFUSED-{place}"
    handles = chain_of(host, name, 2)
    with pytest.raises(Rejected) as refused:
        delete(host, name, [*handles[:place], NOBODY, *handles[place:], NOBODY + 1])
    assert refused.value.errno == errno.ENOENT
    assert refused.value.index == place
    assert left(host, name) == ["0", "1"]


def test_what_nf_tables_does_not_know_is_refused_and_named(host: Host) -> None:
    handles = chain_of(host, "STRANGE", 1)
    batch = [delete_rule(socket.AF_INET, "filter", "STRANGE", handles[0]), Message((10 << 8) | 99, bytes(4))]
    with pytest.raises(Rejected) as refused:
        asking(host, lambda tables: tables.commit(batch))
    assert refused.value.index == 1
    assert left(host, "STRANGE") == ["0"]


def test_one_socket_goes_on_after_a_refusal(host: Host) -> None:
    handles = chain_of(host, "AGAIN", 3)

    def work(tables: NfTables) -> None:
        for number in (NOBODY, NOBODY):
            with pytest.raises(Rejected):
                tables.commit([delete_rule(socket.AF_INET, "filter", "AGAIN", number)])
        tables.commit([delete_rule(socket.AF_INET, "filter", "AGAIN", handles[0])])
        assert len(tables.rules(socket.AF_INET, "filter", "AGAIN") or ()) == 2

    asking(host, work)
    assert left(host, "AGAIN") == ["1", "2"]


def test_thousands_are_one_batch(host: Host) -> None:
    handles = chain_of(host, "MANY", MANY)
    with pytest.raises(Rejected) as refused:
        delete(host, "MANY", [*handles, NOBODY])
    assert refused.value.index == MANY
    assert len(left(host, "MANY")) == MANY
    delete(host, "MANY", handles[:-1])
    assert left(host, "MANY") == [str(MANY - 1)]
