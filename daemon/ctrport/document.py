"""A YAML text as plain values, with the way back to line and column, and everything that is wrong with it as YAML.

Every scalar stays the text that was written: the usual loading turns an unquoted ``22:22`` into 1342, ``on`` into true,
and lets the last of two equal keys win in silence. What a value means is not decided here.
"""

from __future__ import annotations

import re

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from .ports import quoted

#: Where in the content: keys and indices from the top.
Location = tuple[int | str, ...]

#: The schema needs 6 levels; more would only exhaust the stack.
_DEPTH_MAX = 32

#: How many nodes the aliases of a file may stand for, beside those that are written out: ten lines can make billions.
_ALIASED_MAX = 10_000

_SYNTAX_MAX = 200


class Absent:
    """What stands in the content in the place of a value; not an Enum, whose text pydantic would take for it."""


#: A null: nothing was written, or YAML's word for nothing.
NOTHING = Absent()

#: Something that was reported when it was read.
REPORTED = Absent()


class _Loader(yaml.SafeLoader):
    """A composer that keeps the stack shallow and notes the tags, which a node no longer tells from implied ones."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: list[tuple[yaml.Mark, str]] = []
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.tags.append((event.start_mark, tag))
        self._depth += 1
        if self._depth > _DEPTH_MAX:
            raise ComposerError(None, None, f"nested more than {_DEPTH_MAX} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class Document:
    """A YAML text as dictionaries, lists and the text of its scalars, with the way back to line and column.

    ``content`` is `NOTHING` where the text holds nothing; ``faults`` begins with what is wrong with the YAML.
    """

    def __init__(self, text: str) -> None:
        self.faults: list[tuple[int, int, str]] = []
        self._seen: set[int] = set()
        self._open: set[int] = set()
        self._aliased = 0
        self._pairs: dict[int, dict[str, tuple[yaml.Node, yaml.Node]]] = {}  # of mappings, by the id of their node
        self._root = self._compose(text)
        self.content: object = NOTHING if self._root is None else self._plain(self._root, 1)

    def fault(self, position: tuple[int, int], message: str) -> None:
        """Note what is wrong at ``position``, a line and a column."""
        self.faults.append((*position, message))

    def position(self, location: Location, key: bool = False) -> tuple[int, int]:
        """Return line and column of the node at ``location``, or of the key that it belongs to."""
        node = self._root
        mark = None if node is None else node.start_mark
        for step in location:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                mark = node.start_mark
            elif isinstance(node, yaml.MappingNode):
                name, node = self._pair(node, str(step))
                mark = name.start_mark if key else node.start_mark
        return _position(mark)

    def _pair(self, mapping: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node]:
        """Return a key and its value; of equal keys the first. Ten thousand are not each looked for among all."""
        pairs = self._pairs.get(id(mapping))
        if pairs is None:
            scalars = [pair for pair in mapping.value if isinstance(pair[0], yaml.ScalarNode)]
            pairs = self._pairs[id(mapping)] = {pair[0].value: pair for pair in reversed(scalars)}
        return pairs[key]

    def _compose(self, text: str) -> yaml.Node | None:
        try:
            loader = _Loader(text)
        except ReaderError as error:
            lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text[: error.position])
            character = f"the character U+{error.character:04X} cannot stand in YAML; expected printable text"
            self.fault((len(lines), len(lines[-1]) + 1), character)
            return None
        root = None
        try:
            root = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            self.fault(_position(error.problem_mark), _syntax(error))
        except (ValueError, OverflowError):
            # PyYAML hands \\U00110000 to chr() and the digits of %YAML to int().
            self.fault(_position(loader.get_mark()), "this is not YAML: a number is out of range")
        finally:
            loader.dispose()
        for mark, tag in loader.tags:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            self.fault(_position(mark), f"the tag {quoted(tag)} is not taken here; expected the value without a tag")
        return root

    def _plain(self, node: yaml.Node, depth: int) -> object:
        position = _position(node.start_mark)
        if id(node) in self._open:
            self.fault(position, "an alias brings this into itself; expected it to end somewhere")
            return REPORTED
        if depth > _DEPTH_MAX:
            self.fault(position, f"aliases nest this more than {_DEPTH_MAX} levels deep")
            return REPORTED
        if id(node) in self._seen:
            self._aliased += 1
            if self._aliased == _ALIASED_MAX:
                self.fault(position, f"the aliases of this file stand for more than {_ALIASED_MAX} values")
            if self._aliased >= _ALIASED_MAX:
                return REPORTED
        self._seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self._open.add(id(node))
        plain: object
        if isinstance(node, yaml.SequenceNode):
            plain = [self._plain(item, depth + 1) for item in node.value]
        else:
            plain = self._mapping(node.value, depth)
        self._open.discard(id(node))
        return plain

    def _scalar(self, node: yaml.ScalarNode) -> object:
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self.fault(_position(node.start_mark), "half of a surrogate pair is no character; expected text")
            return REPORTED
        return NOTHING if node.tag == "tag:yaml.org,2002:null" else node.value

    def _mapping(self, pairs: list[tuple[yaml.Node, yaml.Node]], depth: int) -> dict[str, object]:
        plain: dict[str, object] = {}
        first: dict[str, int] = {}
        for key, value in pairs:
            position = _position(key.start_mark)
            content = self._plain(value, depth + 1)
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                self.fault(position, f"a key is a {kind}; expected text")
            elif key.tag == "tag:yaml.org,2002:merge":
                self.fault(position, "merging with '<<' is not taken here; expected the keys written out")
            elif key.value in first:
                again = f"the key {quoted(key.value)} stands on line {first[key.value]} already; expected each once"
                self.fault(position, again)
            elif self._scalar(key) is not REPORTED:
                first[key.value] = position[0]
                plain[key.value] = content
        return plain


def _position(mark: yaml.Mark | None) -> tuple[int, int]:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem, context = error.problem or "", error.context or ""
    if problem == "but found another document":
        return "a second document begins here; expected one alone"
    if problem.startswith("found character '\\t'"):
        return "a tab cannot indent or begin a value in YAML; expected spaces"
    if context.startswith("found duplicate anchor"):
        return f"{problem} of an anchor; expected each to be defined once"
    begun = ""
    if error.context_mark is not None and error.problem_mark is not None:
        begun = f" that begins on line {error.context_mark.line + 1}" if context.startswith("while ") else ""
    return f"this is not YAML: {' '.join(filter(None, (problem, context)))[:_SYNTAX_MAX]}{begun}"
