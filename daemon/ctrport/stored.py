"""What containerd has stored of a container, as far as it is ours to read. Pure: bytes in, values out, and back.

Any of it may have been written by others, or be broken. An annotation that cannot be read says nothing; an extension
that bears our name and is not as we write it says so, of that one container.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Sequence
from typing import Any

from . import ports
from .declared import LONGEST, MOST, NAME
from .model import Live, Mapping, Role, Unread
from .ports import PortSpecError, quoted

#: The extension that holds what `ctrport publish` has a container publish, and the type of what is in there.
EXTENSION, TYPE = NAME, f"{NAME}.v1"
_REVISION = re.compile(r"[0-9a-f]{1,32}")

#: What the CRI plugin stores of a sandbox and of another container of a pod, as JSON, goes by these names among the
#: extensions of its container. Without them it takes neither for its own when it starts anew (restart.go there).
SANDBOX, IN_POD = "io.cri-containerd.sandbox.metadata", "io.cri-containerd.container.metadata"
#: The bytes that a spec, or that, may have to be read for annotations.
LONGEST_SPEC = 1 << 20


def role_of(extensions: Container[str]) -> Role | None:
    """Return what a container with these extensions is to a pod.

    Not by its labels, which say so, too: `ctr` and others take those of the image over, and an image can have any.
    """
    if SANDBOX in extensions:
        return Role.SANDBOX
    return Role.MEMBER if IN_POD in extensions else None


def annotation_of(spec: bytes, sandbox: bytes | None) -> str | None:
    """Return the ports that an annotation asks for: of a sandbox the pod's, of another container that of its spec.

    The CRI plugin keeps the pod's annotations in what it stores beside its sandbox, and no copy in the spec.
    """
    text, path = (spec, ("annotations",)) if sandbox is None else (sandbox, ("Metadata", "Config", "annotations"))
    if NAME.encode() not in text or len(text) > LONGEST_SPEC:  # a spec has thousands of bytes: few are to be read
        return None
    try:
        found: Any = json.loads(text)
        for step in (*path, NAME):
            found = found[step]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def live_of(kind: str, value: bytes) -> Live | None:
    """Return what is in our extension of a container, None where that is nothing. ``kind`` is the type it has there.

    containerd deletes no extension before its container: one that was to be deleted is there, empty and without a type.
    """
    if not kind and not value:
        return None
    try:
        specs, revision = _content(kind, value)
    except ValueError as error:
        text = quoted(value[:LONGEST].decode(errors="backslashreplace"))
        return Live((), unread=((Unread(text), f"the extension {EXTENSION} is not as ctrport writes it: {error}"),))
    mappings: list[Mapping] = []
    unread: list[tuple[Unread, str]] = []
    for spec in specs:
        try:
            mappings.append(ports.parse(spec))
        except PortSpecError as error:
            unread.append((Unread(quoted(spec)), str(error)))
    return Live(tuple(dict.fromkeys(mappings)), revision, tuple(dict.fromkeys(unread)))


def value_of(mappings: Sequence[Mapping], revision: str) -> bytes:
    """Return what our extension has to hold for these, under the type ``TYPE``.

    Raises ``ValueError`` where it would be more than ``live_of`` reads.
    """
    value = json.dumps({"ports": [*map(str, mappings)], "revision": revision}).encode()
    _content(TYPE, value)
    return value


def _content(kind: str, value: bytes) -> tuple[list[str], str]:
    """Return the mappings, still text, and the revision. Raises ``ValueError``, which says what is wrong."""
    if kind != TYPE:
        raise ValueError(f"it is of the type {quoted(kind)}; expected {TYPE}")
    if len(value) > LONGEST:
        raise ValueError(f"it has {len(value)} bytes; expected at most {LONGEST}")
    try:
        content: Any = json.loads(value)
        specs, revision = content["ports"], content["revision"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is no JSON with ports and revision") from None
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise ValueError("its ports are no list of mappings")
    if not isinstance(revision, str) or _REVISION.fullmatch(revision) is None:
        raise ValueError("its revision is none")
    if len(specs) > MOST:
        raise ValueError(f"it has {len(specs)} mappings; expected at most {MOST}")
    return specs, revision
