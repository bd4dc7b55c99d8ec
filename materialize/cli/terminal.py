"""Standard output and standard error: text, tables and tracebacks in, what a person or a program reads out.

rich is loaded for what plain text is not: colours, tables, a line that moves. A run by a scheduler shows none of them.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console
    from rich.table import Table

__all__ = ["Stream", "output", "talk"]


class Stream:
    """Standard output, or with *stderr* standard error, as it is when something is printed."""

    def __init__(self, *, stderr: bool) -> None:
        self.stderr = stderr

    @property
    def file(self) -> TextIO:
        return sys.stderr if self.stderr else sys.stdout

    @property
    def is_terminal(self) -> bool:
        return self.file.isatty()

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(stderr=self.stderr, highlight=False, soft_wrap=True)

    def print(self, what: str | Table, *, style: str | None = None, markup: bool = False) -> None:
        """Print text as it is, in a *style* where somebody sees it; with *markup*, and tables, as rich shows them."""
        if isinstance(what, str) and not markup and not (style and self.is_terminal):
            print(what, file=self.file)
        else:
            self.console.print(what, style=style, markup=markup)


output, talk = Stream(stderr=False), Stream(stderr=True)
