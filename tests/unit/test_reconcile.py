"""How often everything is looked at again, whether or not anybody announced anything."""

from __future__ import annotations

import pytest

from ctrport.reconcile import TICK, ticks_to_resync


@pytest.mark.parametrize(
    ("took", "seconds"),
    [(0.0, 60), (0.01, 60), (0.03, 60), (0.05, 100), (0.2, 400), (1.0, 600), (60.0, 600)],
)
def test_what_costs_much_is_done_seldomer_and_not_never(took: float, seconds: float) -> None:
    assert ticks_to_resync(took) * TICK == seconds
