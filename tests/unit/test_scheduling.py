"""The kernel takes the wish for short turns, and for late threads; what is started has it, too."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ctrport import scheduling
from ctrport.scheduling import _ATTRIBUTES, _NUMBERS, TURN

ASK = "from ctrport import scheduling; import subprocess, sys; print(scheduling.ask_for_short_turns(), flush=True);"


def turn_of(pid: int) -> int:
    """Return what the kernel says of a process's turns (sched_getattr(2), whose number is the next)."""
    found = ctypes.create_string_buffer(_ATTRIBUTES.size)
    assert ctypes.CDLL(None).syscall(_NUMBERS[platform.machine()] + 1, pid, found, _ATTRIBUTES.size, 0) == 0
    return int(_ATTRIBUTES.unpack(found.raw)[5])


@pytest.mark.skipif(platform.machine() not in _NUMBERS, reason="the number of the system call is not known")
def test_short_turns_are_asked_for_and_handed_down() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(scheduling.__file__).parents[1])}
    program = f"{ASK} subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as asking:
        assert asking.stdout is not None
        assert [asking.stdout.readline() for _ in range(2)] == ["True\n", "1\n"]
        child = int(Path(f"/proc/{asking.pid}/task/{asking.pid}/children").read_text())
        found = {turn_of(asking.pid), turn_of(child)}
        asking.communicate("\n")
    if turn_of(0):  # older kernels know of no such thing
        assert found == {TURN}


def test_on_a_machine_whose_number_is_not_known_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    assert not scheduling.ask_for_short_turns()


def test_threads_that_are_started_meanwhile_are_woken_late_by_the_clock_and_no_others() -> None:
    def within() -> int:
        found = [0]
        thread = threading.Thread(target=lambda: found.append(scheduling.slack()))
        thread.start()
        thread.join()
        return found[-1]

    before = scheduling.slack()
    with scheduling.late_threads(0.5):
        assert within() == 500_000_000
    assert scheduling.slack() == within() == before
