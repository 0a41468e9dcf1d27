"""The kernel's ``route_localnet`` switch of one device: whether 127.0.0.0/8 may be routed through it.

It is needed so that the host reaches a container at 127.0.0.1, and it is dangerous without the guard in the raw table
(CVE-2020-8558). It is only ever switched for one device, never for ``all`` or ``default``.
"""

from __future__ import annotations

from pathlib import Path

_CONF = Path("/proc/sys/net/ipv4/conf")
#: Where it is written instead, if it is there: in a container /proc/sys is read-only, and takes no mount either. A
#: mount of the same elsewhere shows each process its own network, too.
_WRITABLE = Path("/run/host/proc/sys/net/ipv4/conf")


def is_on(device: str) -> bool:
    """Whether it is on for ``device``; False where there is no such device."""
    return _state(device) == "1"


def is_off(device: str) -> bool:
    """Whether it is off for ``device``; False where there is no such device."""
    return _state(device) == "0"


def switch(device: str, on: bool) -> None:
    """Switch it for ``device``. A device that is gone took its switch along, which is no error."""
    try:
        path = _path(device)
        if _WRITABLE.is_dir():
            path = _WRITABLE / path.relative_to(_CONF)
        path.write_text("1" if on else "0")
    except FileNotFoundError:
        return


def _state(device: str) -> str:
    try:
        return _path(device).read_text().strip()
    except FileNotFoundError:
        return ""


def _path(device: str) -> Path:
    if device in ("all", "default", ".", "..") or "/" in device:
        raise ValueError(f"not one device: {device!r}")
    return _CONF / device / "route_localnet"
