"""The soak measures: a short one, with its figures, a verdict that agrees with its exit status, nothing left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.node.daemon import ROOT


def test_some_seconds_have_figures_and_a_verdict_that_agrees_with_them() -> None:
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        argv = [sys.executable, "-m", "tests.faults.soak", "--minutes", "0.1"]
        env = {**os.environ, "TMPDIR": directory, "PYTHONPATH": str(ROOT / "daemon")}
        ended = subprocess.run(argv, cwd=ROOT, env=env, text=True, capture_output=True, timeout=100)
        assert not list(Path(directory).iterdir())
    assert not ended.stderr
    rows = [
        list(map(float, row)) for row in re.findall(r"^ +([0-9.]+)" + r" +(\d+)" * 6 + "$", ended.stdout, re.MULTILINE)
    ]
    assert len(rows) == 6, ended.stdout
    seconds, memory, files, programs, events, transactions, _ = zip(*rows, strict=True)
    assert list(seconds) == sorted(seconds)
    assert list(events) == sorted(events)
    assert events[-1] > 0
    assert transactions[-1] > 0
    assert all(10_000 < each < 1_000_000 for each in memory)
    # Memory has no time to be judged; these have.
    assert (files[1], programs[1]) == (files[-1], programs[-1]), ended.stdout
    assert ended.returncode == ("NOT FLAT" in ended.stdout)
    assert ("\nflat\n" in ended.stdout) != ("NOT FLAT" in ended.stdout)
