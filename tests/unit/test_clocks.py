"""No wall clock decides anything: it may be set while the daemon runs, by seconds or by years."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ctrport

PACKAGE = Path(ctrport.__file__).parent

#: What tells the time of day, or lets a wait depend on it.
WALL = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "mktime", "clock_gettime", "clock_settime"},
    "datetime": {"now", "utcnow", "today", "fromtimestamp"},
    "date": {"today", "fromtimestamp"},
}
#: Where it is asked, and what for: to be shown.
SHOWN = {
    ("account.py", "__init__"),
    ("account.py", "status"),
    ("chronicle.py", "_note"),
    ("events.py", "moment"),
    ("happened.py", "moment"),
    ("ps.py", "_age"),
    ("reload.py", "_count"),
}


def asked(source: str) -> Iterator[str]:
    """Return the functions of a module in which the wall clock is asked for the time."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
            for node in _own(function):
                if isinstance(node, ast.Attribute):
                    whose = ast.unparse(node.value).rpartition(".")[2]
                    if node.attr in WALL.get(whose, ()):
                        yield getattr(function, "name", "the module")
                elif isinstance(node, ast.ImportFrom) and node.module == "time":
                    yield from (f"import of {name.name}" for name in node.names if name.name in WALL["time"])


def _own(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _own(child)


def test_the_wall_clock_is_asked_only_for_what_is_shown() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "api"]
    found = {(path.name, function) for path in modules for function in asked(path.read_text())}
    assert found == SHOWN


def test_who_asks_is_found() -> None:
    source = (
        "import time, datetime\nfrom time import time_ns\nat = datetime.datetime.now()\n"
        "class A:\n    def due(self):\n        return time.monotonic() + time.time()\n"
    )
    assert sorted(asked(source)) == ["due", "import of time_ns", "the module"]
