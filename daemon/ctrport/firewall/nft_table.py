"""Our own table in the kernel: elements over netlink, in this process, and what stands by the program nft."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ..model import Count, Family
from ..nfnetlink import NfTables, Writer
from ..nlmsg import Interrupted, Rejected
from ..programs import Ready
from . import FirewallError, Refused, Unusable
from .commands import TIMEOUT, errors, failure
from .foreign import dropping
from .sets import Element, Set, table
from .standing import Standing
from .tablelink import TableLink
from .tableplan import Held

Announce = Callable[[Writer, int], None]

#: Why the kernel refuses what does not go with what is there: it is not, it is already, it is in use, it overlaps.
_ANOTHER = (errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ENOTEMPTY)
#: What nft says where the kernel refused for that.
_NFT_SAYS = ("No such file or directory", "File exists", "Device or resource busy")
_INSTALL = "nftables (1.0 or later)"


class NftTable:
    """Implements ``TableKernel`` in the network namespace that it is first used in.

    ``announce`` is told of each process that is about to write, this one too, and how many commits it will make.
    """

    def __init__(self, family: Family, announce: Announce = lambda *_: None) -> None:
        self.family = family
        self._announce = announce
        self._kept: TableLink | None = None
        self._me: Writer | None = None
        self._nft = Ready("nft", "--file", "-")

    async def read(self, standing: Standing) -> Held | None:
        """See ``TableKernel.read``."""
        with self._errors("read"):
            return self._link.read(standing)

    async def counts(self, maps: Sequence[Set]) -> list[tuple[str, Count]]:
        """See ``TableKernel.counts``."""
        with self._errors("read"):
            return list(self._link.counts(maps))

    async def dropping(self) -> list[str]:
        """See ``TableKernel.dropping``."""
        with self._errors("read"), contextlib.closing(NfTables()) as tables:
            return [str(each) for each in dropping(tables, self.family)]

    async def load(self, text: str) -> None:
        """See ``TableKernel.load``."""
        with errors(_INSTALL):
            await self._nft.prepare()
            pid = self._nft.waiting()
            if pid is not None:
                self._announce(Writer(pid, "nft"), 1)
            ended = await self._nft.run(timeout=TIMEOUT, input=text)
        if ended.status != 0:
            kind = Refused if any(words in ended.err for words in _NFT_SAYS) else FirewallError
            raise failure(f"the table {table(self.family)} could not be written", ended, kind)

    async def write(self, gone: Sequence[Element], come: Sequence[Element], sets: Mapping[str, Set]) -> None:
        """See ``TableKernel.write``."""
        # Not beside the event loop, though another's commit may be waited for: to come back from there takes longer.
        with self._errors("written"):
            self._say_who_writes()
            self._link.write(gone, come, sets)

    async def delete(self) -> None:
        """See ``TableKernel.delete``."""
        with self._errors("deleted"):
            self._say_who_writes()
            self._link.delete()

    async def close(self) -> None:
        """See ``TableKernel.close``."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        await self._nft.close()

    @property
    def _link(self) -> TableLink:
        if self._kept is None:
            self._kept = TableLink(self.family)
        return self._kept

    def _say_who_writes(self) -> None:
        """Tell the alarm that the next commit is this thread's, as the kernel will call it."""
        if self._me is None or self._me.pid != threading.get_native_id():
            name = Path("/proc/thread-self/comm").read_text().rstrip("\n")
            self._me = Writer(threading.get_native_id(), name)
        self._announce(self._me, 1)

    @contextlib.contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        """Make ours of what the kernel says where our table could not be ``done``."""
        what = f"the table {table(self.family)} could not be {done}"
        try:
            yield
        except Interrupted as error:
            raise FirewallError(f"{what}: it changes all the time") from error
        except Rejected as error:
            kind = Refused if error.errno in _ANOTHER else _kind(error)
            raise kind(f"{what}: {error.strerror}") from error
        except OSError as error:
            raise _kind(error)(f"{what}: {error.strerror or os.strerror(error.errno or 0)}") from error


def _kind(error: OSError) -> type[FirewallError]:
    return Unusable if error.errno in (errno.EPERM, errno.EACCES) else FirewallError
