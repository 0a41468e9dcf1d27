"""What `make soak` calls flat, and what not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.faults.soak import GRAIN, SLOPE, Sample, judged, main

Figure = Callable[[float], float]


def constant(minute: float) -> float:
    return 50


def samples(memory: Figure = constant, files: Figure = constant, programs: Figure = constant) -> Sequence[Sample]:
    return [
        Sample(60 * minute, round(memory(minute)), round(files(minute)), round(programs(minute)), 0, 0, 0)
        for minute in range(11)
    ]


@pytest.mark.parametrize(
    "memory",
    [
        constant,
        lambda minute: 60000 + 5000 * min(minute, 2),  # gets used to it
        lambda minute: 60000 + 900 * (minute % 2),  # up and down
        lambda minute: 60000 + SLOPE * minute * 0.9,
        lambda minute: 60000 - 500 * minute,
    ],
)
def test_what_is_flat(memory: Figure) -> None:
    assert judged(samples(memory)).wrong == ()


def test_memory_that_grows_is_not_flat() -> None:
    verdict = judged(samples(lambda minute: 60000 + 3000 * minute))
    assert verdict.slope == pytest.approx(3000)
    assert verdict.wrong == ("memory grows by 3000 KiB a minute (128 may be)",)


def test_a_leak_that_is_hidden_by_ups_and_downs_is_found() -> None:
    assert judged(samples(lambda minute: 60000 + 400 * minute + 1000 * (minute % 2))).wrong


def test_a_short_run_is_not_judged_by_a_step_of_the_allocator() -> None:
    steps = [Sample(3.0 * n, 60000 + (round(GRAIN / 2) if n > 3 else 0), 30, 2, 0, 0, 0) for n in range(6)]
    assert judged(steps).wrong == ()


@pytest.mark.parametrize("what", ["files", "programs"])
def test_one_more_of_what_is_counted_is_one_too_many(what: str) -> None:
    def grows(minute: float) -> float:
        return 30 + minute // 10

    verdict = judged(samples(**{what: grows}))
    assert verdict.wrong == (f"{'open files' if what == 'files' else what}: 30 became 31",)


def test_a_number_of_minutes_without_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0", "x", "1000", "nan"):
        with pytest.raises(SystemExit) as ended:
            main(["--minutes", text])
        assert ended.value.code == 2
        assert f"{text!r} is not a number from 0.1 to 55" in capsys.readouterr().err
