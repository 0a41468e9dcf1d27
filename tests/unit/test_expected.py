"""What is stored of containers is asked ahead of their start, and never used when it may be something else by now."""

from __future__ import annotations

import asyncio
from typing import Any

from ctrport.containerd import Listed, NotFound
from ctrport.expected import MOST, MOST_ASKED, Expected
from ctrport.model import ContainerKey

WEB = ContainerKey("default", "web")


class Answers:
    """A containerd that answers when it is let, each time with another label."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.asked = 0
        self.cgroup = "/default/web"
        self.fails = False

    async def stored(self, key: ContainerKey, *, annotations: bool) -> Listed:
        self.asked += 1
        label = str(self.asked)
        await self.let.wait()
        if self.fails:
            raise NotFound("no such container")
        return Listed(key, None, {"asked": label}, cgroup=self.cgroup, runs=False)


def expecting() -> tuple[Expected, Answers]:
    answers = Answers()
    containerd: Any = answers
    return Expected(containerd), answers


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def label(expected: Expected, key: ContainerKey = WEB) -> str | None:
    known = expected.get(key)
    return None if known is None else known.labels["asked"]


def test_what_was_asked_is_known_when_the_answer_is_there() -> None:
    async def work() -> None:
        expected, answers = expecting()
        expected.expect(WEB, annotations=False)
        await settled()
        assert expected.get(WEB) is None
        answers.let.set()
        await settled()
        assert label(expected) == "1"
        assert expected.forget(WEB)
        assert expected.get(WEB) is None
        assert not expected.forget(WEB)

    asyncio.run(work())


def test_an_answer_to_what_has_changed_since_is_dropped() -> None:
    async def work() -> None:
        expected, answers = expecting()
        expected.expect(WEB, annotations=False)
        await settled()
        expected.expect(WEB, annotations=False)
        await settled()
        answers.let.set()
        await settled()
        assert label(expected) == "2"
        answers.let.clear()
        expected.expect(WEB, annotations=False)
        assert expected.get(WEB) is None  # what was known may be something else by now
        await settled()
        expected.forget_all()
        answers.let.set()
        await settled()
        assert expected.get(WEB) is None

    asyncio.run(work())


def test_what_is_gone_or_has_no_cgroup_is_not_expected() -> None:
    async def work() -> None:
        expected, answers = expecting()
        answers.let.set()
        answers.cgroup = ""
        expected.expect(WEB, annotations=False)
        await settled()
        assert expected.get(WEB) is None
        answers.cgroup, answers.fails = "/default/web", True
        expected.expect(WEB, annotations=False)
        await settled()
        assert expected.get(WEB) is None

    asyncio.run(work())


def test_no_more_are_asked_for_or_remembered_than_is_worth_it() -> None:
    async def work() -> None:
        expected, answers = expecting()
        keys = [ContainerKey("default", f"web-{number}") for number in range(MOST + 5)]
        for key in keys[: MOST_ASKED + 3]:
            expected.expect(key, annotations=False)
        await settled()
        assert answers.asked == MOST_ASKED
        # Who is no longer waited for is asked all the same until the answer is there.
        expected.forget_all()
        expected.expect(WEB, annotations=False)
        await settled()
        assert answers.asked == MOST_ASKED
        answers.let.set()
        await settled()
        for key in keys:
            expected.expect(key, annotations=False)
            await settled()
        assert [key for key in keys if expected.get(key) is None] == keys[:5]

    asyncio.run(work())
