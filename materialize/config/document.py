"""A YAML file in, its content with the environment filled in out, with everything that is wrong with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from materialize.config.yaml import MarkedYAMLError, YAMLError, parse
from materialize.model import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

__all__ = ["Document", "Loc", "one_of", "read", "shown"]

#: ``${NAME}`` or ``${NAME:-default}``; without group 1 it is a mistake.
VARIABLE = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-([^{}]*))?\})?")
#: Characters of a value that a message quotes.
QUOTED = 80

#: Where a value is in a file: the keys and positions that lead to it.
Loc = tuple[Any, ...]


@dataclass(slots=True)
class Document:
    """One YAML file: its content with the environment filled in, and what is wrong with it so far."""

    path: Path
    data: Any = None
    problems: list[str] = field(default_factory=list)
    #: The values that came from the environment, with the names of the variables; they are never shown.
    variables: dict[Loc, list[str]] = field(default_factory=dict)
    #: The values that are already reported.
    reported: set[Loc] = field(default_factory=set)
    #: Whether text may be a secret, so that no message quotes it.
    secret: bool = False
    #: Why this file may not read a variable, given its name and value; None: it may.
    barred: Callable[[str, str], str | None] = lambda _name, _value: None

    @property
    def usable(self) -> bool:
        """Whether the file holds a mapping, so that single keys can be checked."""
        return isinstance(self.data, dict) and bool(self.data)

    def add(self, loc: Loc, text: str) -> None:
        if loc not in self.reported:
            self.problems.append(f"{_dotted(loc)}: {text}")

    def expected(self, loc: Loc, what: str, value: Any) -> None:
        """Add that *what* was expected at *loc*, showing *value* unless it may be a secret."""
        self.add(loc, f"expected {what}, found {self.show(loc, value)}")

    def twice(self, loc: Loc, value: Any) -> None:
        """Add that *value*, which is at *loc*, was there before."""
        self.add(loc, f"expected each name once, found {self.show(loc, value)} again")

    def show(self, loc: Loc, value: Any) -> str:
        """*value*, which is at *loc*, as messages quote it: never what the environment holds or what may be a secret."""
        if names := self.variables.get(loc):
            return "the value of " + ", ".join(f"${{{name}}}" for name in names)
        return "other text" if self.secret and value and isinstance(value, str) else shown(value)

    def fill(self, value: Any, loc: Loc = ()) -> Any:
        """*value* with ``${NAME}`` and ``${NAME:-default}`` replaced in every text below it."""
        if isinstance(value, dict):
            return {key: self.fill(item, (*loc, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item, (*loc, position)) for position, item in enumerate(value)]
        return VARIABLE.sub(lambda match: self._variable(match, loc), value) if isinstance(value, str) else value

    def _variable(self, match: re.Match[str], loc: Loc) -> str:
        name, optional, default = match[1], match[2], match[3]
        found = os.environ.get(name) if name else None
        if optional and not found:
            found = default
        if found is not None and (why := self.barred(name, found)):
            self.add(loc, f"expected a variable that a feature view may read, found ${{{name}}}, {why}")
        elif found is not None:
            self.variables.setdefault(loc, []).append(name)
            return found
        elif name:
            self.add(
                loc, f"expected the environment variable {name}, found it unset. Set it, or write ${{{name}:-default}}"
            )
        else:
            self.add(loc, "expected ${NAME} or ${NAME:-default}, found something else after ${")
        self.reported.add(loc)
        return match[0]

    def report(self) -> str:
        count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        lines = [f"{self.path}: {count}", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(map(_on_one_line, lines))


def read(
    path: Path, *, secret: bool = False, barred: Callable[[str, str], str | None] = lambda _name, _value: None
) -> Document:
    """The content of *path*, or the reason why it has none that can be used. *barred*: as `Document` has it."""
    document = Document(path, secret=secret, barred=barred)
    try:
        data, duplicates = parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        document.problems.append(
            "expected a file, found none. It belongs to the folder given with --config DIR or MATERIALIZE_CONFIG"
        )
    except OSError as error:
        document.problems.append(f"expected a file that can be read, found: {error.strerror}")
    except UnicodeDecodeError as error:
        document.problems.append(f"expected UTF-8 text, found another byte at position {error.start}")
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        document.problems.append(f"{line}expected YAML, found an error in it: {error.problem}")
    except (YAMLError, ValueError, RecursionError):
        document.problems.append(
            "expected YAML with text, lists and mappings, found a character or a value that cannot be read"
        )
    else:
        document.problems += [f"line {line}: {key!r} appears twice" for line, key in duplicates]
        if isinstance(data, dict) and data:
            document.data = document.fill(data)
        else:
            found = "an empty file" if data is None else document.show((), data)
            document.problems.append(
                f"expected a mapping such as '{'default' if secret else 'source'}: ...', found {found}"
            )
    return document


def shown(value: Any) -> str:
    """*value* as messages quote it: short, on one line, and without the credentials of a URL."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict)):
        return (
            f"{'a list' if isinstance(value, list) else 'a mapping'}"
            if value
            else f"an empty {'list' if value == [] else 'mapping'}"
        )
    text = repr(mask_credentials(value) if isinstance(value, str) else value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def _on_one_line(text: str) -> str:
    """*text* with what cannot be printed escaped: a key or a file's name may hold a line end."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _dotted(loc: Loc) -> str:
    """``("join_keys", 0)`` as ``join_keys[0]``, ``("features", "x")`` as ``features.x``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def one_of(names: Collection[Any], given: Any) -> str:
    """The known names, and the one that was probably meant."""
    close = get_close_matches(str(given), [str(name) for name in names], n=1)
    return f"one of {', '.join(map(str, names))}" + (f" (did you mean {close[0]!r}?)" if close else "")
