"""What containerd has stored of a container, as far as it is ours to read. Pure: bytes in, values out.

All of it was written by others, and any of it may be broken: what cannot be read says nothing.
"""

from __future__ import annotations

import json
from typing import Any

from .declared import NAME

#: What the CRI plugin stores of a sandbox, as JSON, goes by this name among the extensions of its container.
SANDBOX = "io.cri-containerd.sandbox.metadata"
#: The bytes that a spec, or that, may have to be read for annotations.
LONGEST_SPEC = 1 << 20


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
