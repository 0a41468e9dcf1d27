"""`make matrix`: try every row under every setting, and write down what was seen, if it is what should be."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from embedded.node import missing
from tests.matrix.report import PAGE, table, written
from tests.matrix.rows import ROWS, Row, Seen, known
from tests.matrix.settings import PROTOCOLS, Setting, lacking, product
from tests.matrix.street import World, street

#: Seconds after which it gives up: some times what it takes.
LIMIT = 900


@dataclass(frozen=True)
class Tried:
    """What came of a row in a setting: what was seen, or why nothing could be."""

    row: Row
    setting: Setting
    seen: Seen | None
    error: str = ""

    @property
    def wrong(self) -> str | None:
        """What is not as it should be, None where all is."""
        right = self.seen in self.row.expected(self.setting)
        failing = known(self.row, self.setting)
        if failing is None:
            return None if right else self.error or f"seen: {self.seen.value if self.seen else None}"
        return f"{failing.why}: no longer so, to be deleted from KNOWN" if right else None


def tried(settings: tuple[Setting, ...]) -> Iterator[Tried]:
    """Try every row under each of the settings, those of one site on one node."""
    for site, group in itertools.groupby(settings, lambda setting: setting.site):
        here = list(group)
        with street(site, tuple((setting.family, setting.protocol) for setting in here)) as standing:
            for setting in here:
                for row in ROWS:
                    if row.left_out(setting) is None:
                        yield _try(row, World(standing, setting))


def _try(row: Row, world: World) -> Tried:
    try:
        return Tried(row, world.setting, row.probe(world))
    except (AssertionError, OSError) as error:
        return Tried(row, world.setting, None, f"{type(error).__name__}: {error}")


def main() -> int:
    """Return the exit status: 0 where all is as it should be."""
    reason = missing()
    if reason is not None:
        print(f"matrix: {reason}", file=sys.stderr)
        return 1
    lacks = [lack for protocol in PROTOCOLS if (lack := lacking(protocol)) is not None]
    protocols = tuple(protocol for protocol in PROTOCOLS if lacking(protocol) is None)
    begin = time.monotonic()
    results: list[Tried] = []
    for result in tried(product(protocols)):
        if not results or results[-1].setting != result.setting:
            print(f"{time.monotonic() - begin:5.0f} s  {result.setting}", flush=True)
        results.append(result)
        if result.wrong is not None:
            print(f"         {result.row.name}: {result.wrong}", flush=True)
        if time.monotonic() - begin > LIMIT:
            print(f"matrix: not done after {LIMIT} s", file=sys.stderr)
            return 1
    wrong = sum(result.wrong is not None for result in results)
    print(
        f"{time.monotonic() - begin:5.0f} s  {len(results)} tried, {wrong} wrong"
        + "".join(f"; {lack}" for lack in lacks)
    )
    if wrong:
        return 1
    seen = {(result.row, result.setting): result.seen for result in results if result.seen is not None}
    PAGE.write_text(written(PAGE.read_text(), table(seen, lacks)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
