"""What the unit tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Both judge by the clock: by how busy the machine is, and by whether hypothesis has its tables of characters yet.
settings.register_profile("ctrport", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ctrport")
