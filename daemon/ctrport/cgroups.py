"""In which cgroup the processes of a container are: by what containerd has stored, and by what the kernel says.

Pure. runc puts a container's first process there before the container starts, and no container that is kept from
writing to cgroups can move one of its own into another's. So the two together tell whose a process is.
"""

from __future__ import annotations

import json
from typing import Any


def cgroup_of(spec: bytes) -> str:
    """Return the cgroup that an OCI spec names, in runc's words; empty where it names none that could be told again."""
    try:
        found: Any = json.loads(spec)["linux"]["cgroupsPath"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def is_in(cgroup: str, shown: str) -> bool:
    """Whether the process that has ``shown`` in its /proc/PID/cgroup is in a cgroup itself, and not in one below it.

    runc's words for it are a path or, where systemd makes it, ``slice:prefix:name``.
    """
    paths = [line.split(":", 2)[2] for line in shown.split("\n") if line.count(":") >= 2]
    if cgroup.startswith("/") and len(cgroup) > 1:
        # To a reader in a cgroup namespace of its own (the daemon as a container), others' are above and aside.
        return any(path == cgroup or (path.startswith("/../") and path.endswith(cgroup)) for path in paths)
    slice_, colon, rest = cgroup.partition(":")
    prefix, second_colon, name = rest.partition(":")
    if not (slice_ and colon and second_colon and name) or "/" in cgroup or ":" in name:
        return False
    scope = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    return any(path.endswith(f"/{scope}") for path in paths)
