"""YAML without surprises: safe, each key once, no text that means another number, no bomb of aliases."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_LARGEST_FILE = 2**20
_MOST_NODES = 10_000
# YAML 1.1 reads 010 as 8 and 1:30 as 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9_]+(:[0-9_.]+)+)")


class Unreadable(ValueError):
    """Not the YAML that is wanted; the message says why, `line` where (from 1, if known)."""

    def __init__(self, reason: str, line: int | None = None):
        self.line = line
        super().__init__(reason)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses what it would otherwise settle in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Of keys that stand once; merged ones (`<<`) may be given again."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = key.tag, str(key.value)
            if isinstance(key, yaml.ScalarNode) and name in seen:
                raise Unreadable(f"the key {key.value!r} stands twice in one section", key.start_mark.line + 1)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> Any:
        """As YAML 1.1 does, but for numbers of other bases."""
        if _OTHER_BASE.fullmatch(node.value):
            wrong = f"{node.value} is another number in YAML than it looks; quote it or write it without 0 or :"
            raise Unreadable(wrong, node.start_mark.line + 1)
        is_float = node.tag.endswith(":float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_plain_number)


def read_yaml(path: Path) -> Any:
    """The one document of a file.

    Raises:
        Unreadable: it cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise Unreadable("is longer than 1 MiB")
        raw = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8", raw[: error.start].count(b"\n") + 1) from None
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """One document's value; None of an empty one.

    Raises:
        Unreadable: not valid YAML, or what this project does not take for it.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise Unreadable(f"not valid YAML ({error.problem})", mark.line + 1 if mark else None) from None
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable("nested too deeply") from None
    # PyYAML lets errors of Python's own conversions through, as of the date 2000-13-01.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise Unreadable(f"not valid YAML ({str(error).splitlines()[0] if str(error) else 'no value'})") from None
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below and with `node`, an alias counted as often as it stands."""
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_NODES + 1  # of one that holds itself
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    if sizes[id(node)] > _MOST_NODES:
        raise Unreadable(f"holds more than {_MOST_NODES} values", node.start_mark.line + 1)
    return sizes[id(node)]
