"""YAML text in, plain values out: YAML 1.2 as its core schema reads scalars, so that ``on`` is a text and ``010`` is ten.

PyYAML reads it, with libyaml where the wheel has it: 200 feature views in 30 ms, which Airflow reads again and again.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import MarkedYAMLError, YAMLError
from yaml.constructor import ConstructorError

__all__ = ["MarkedYAMLError", "YAMLError", "parse"]

#: Which plain scalars are what (YAML 1.2.2, 10.3.2), and dates, by the characters that they begin with.
SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("timestamp", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "0123456789"),
    ("merge", r"<<", "<"),
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Of keys that appear twice in one mapping takes the first, and keeps the others with their lines, to report all of them."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - as the class above has it

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, Any]] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - overridden
        seen, values = set(), []
        for key_node, value in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "a list or a mapping as a key", key_node.start_mark)
            if key in seen:
                self.duplicates.append((key_node.start_mark.line + 1, key))
            else:
                values.append((key_node, value))
            seen.add(key)
        node.value = values
        return super().construct_mapping(node, deep=deep)

    def integer(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
for kind, pattern, first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)


def parse(text: str) -> tuple[Any, list[tuple[int, Any]]]:
    """The one document in *text*, and the keys that appear twice in a mapping with their lines.

    Raises YAMLError, ValueError or RecursionError for what is no YAML, or has values that it cannot have.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.duplicates
    finally:
        loader.dispose()
