"""Hypothesis strategies that damage what was good: trees of JSON or YAML, and bytes."""

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")

fuzz = settings(
    max_examples=int(_EXAMPLES or 30),
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""Always the same few examples; with FUZZ_EXAMPLES=2000 in the environment so many, others each time."""

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", ".", "..", "/", "~", "-1", "1e-5", "nan", "auto", "true", "null", "0x1f", "a/b", "*", "&a", "!!x", "%s", "{}"]
)
_numbers = st.integers(-3, 5) | st.integers(-(2**70), 2**70) | st.floats()
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | _numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    # Of long lists, such as vocabularies, a few will do.
    return [path, *(place for key, value in list(items)[:40] for place in _places(value, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, tree: Any, most: int = 3) -> Any:
    """The tree with up to `most` of its values replaced, taken away, or given a neighbour."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(_places(tree)))
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if not path:
            tree = draw(values) if how == "replace" and draw(st.integers(0, 9)) == 0 else tree
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        if how == "remove":
            del parent[path[-1]]
        elif how == "replace":
            parent[path[-1]] = draw(values)
        elif isinstance(parent, dict):
            parent[draw(texts)] = draw(values)
        else:
            parent.insert(path[-1], draw(values))
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """The content with up to `most` cuts, changed bytes and insertions."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(changed)))
        how = draw(st.sampled_from(["cut", "change", "change", "insert", "remove"]))
        if how == "cut":
            del changed[at:]
        elif how == "remove":
            del changed[at : at + draw(st.integers(1, 64))]
        elif how == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif at < len(changed):
            changed[at] = draw(st.integers(0, 255))
    return bytes(changed)
