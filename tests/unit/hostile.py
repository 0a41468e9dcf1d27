"""What strangers may write into names, labels and files: strategies for it, and how the tests look for more.

The tests draw the same values each time, so that a run says the same of the same code. With ``HOSTILE=30`` in the
environment they draw thirty times as many, other ones each time: what that finds goes into ``@example``, to stay.
"""

from __future__ import annotations

import os
import re

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.unit import strategies

TIMES = int(os.environ.get("HOSTILE", "0"))


def fuzz(examples: int) -> settings:
    """Return how a test looks for what breaks it: at so many examples, or many more at random where that is asked."""
    return settings(
        max_examples=examples * max(TIMES, 1),
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


#: Each begins, ends or smuggles in something for somebody: a shell, iptables, a terminal, a log, YAML, JSON.
PIECES = (
    *('"', "'", "\\", "\\\\", '\\"', "`", "$(x)", "${IFS}", ";", "; rm -rf /", "&&", "|", "\n", "\r\n", "\r", "\t"),
    *(
        "\0",
        "\x1b[2J",
        "\x1b]0;x\x07",
        "\x9b31m",
        "\x07",
        "\x08",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x1e",
        "\x7f",
        "\x85",
        "\xa0",
    ),
    *("\x85", "\xa0", "\u200b", "\u200e", "\u202e", "\u2028", "\u2029", "\u2066", "\u3000", "\ufeff", "\uffff"),
    *(
        "\U000e0001",
        "\ud800",
        "e\u0301",
        "\u0301" * 8,
        "\u4e2d\u6587",
        "\U0001f4a9",
        "\uff0d\uff0d",
        "\u017f",
        "\u0130",
        "\xff",
    ),
    *("-j ACCEPT", " -j ACCEPT ", "-A INPUT -j DROP", '--comment "x" -j DROP', '" -j DROP --comment "', "\nCOMMIT\n"),
    *("-", "--", "-F", "-X", "! ", "*nat", "*filter\n-F\nCOMMIT\n", ":DOCKER - [0:0]", "# ", "-P", "--help", "-t raw"),
    *("ctrport default/web 8080:80/tcp 0123456789ab", "ctrport chain 0123456789ab", " of any", "[red]x[/red]", "[/]"),
    *("../../etc", "/", ".", "..", "%s", "%n", "{0}", "{}", "*", "?", "[", "]", "~", "null", "true", "1e9", "0x10"),
    *("10:00:00 ERROR   forged", "<3>forged", "READY=1\nSTATUS=forged", "a" * 76, "a" * 300, " ", "", "web", "app"),
)

texts = st.one_of(
    st.sampled_from(PIECES),
    st.lists(st.sampled_from(PIECES) | st.characters(), max_size=6).map("".join),
    st.text(st.characters(), max_size=30),
)
#: Few, for they cost time: as long as a label of containerd may be, and longer than anything should be.
long_texts = st.builds(
    lambda piece, length: (piece * length)[:length],
    st.sampled_from([piece for piece in PIECES if piece]),
    st.sampled_from([4096, 100_000]),
)

#: What protobuf can carry: every text that is UTF-8.
carried = texts.filter(lambda text: not re.search("[\ud800-\udfff]", text))
carried_ids = carried | strategies.identifiers | strategies.long_identifiers

#: What the kernel takes for the name of a device (dev_valid_name), as Python reads it.
_NOT_IN_NAMES = set(b"\0/: \t\n\v\f\r\xa0")
device_names = (
    st.one_of(
        st.binary(min_size=1, max_size=15),
        texts.map(lambda text: text.encode(errors="replace")[:15]),
        st.from_regex(r"[a-z]{1,4}[0-9]{1,3}", fullmatch=True).map(str.encode),
    )
    .map(lambda name: bytes(byte for byte in name if byte not in _NOT_IN_NAMES))
    .filter(lambda name: name not in (b"", b".", b".."))
    .map(lambda name: name.decode(errors="replace"))
)
