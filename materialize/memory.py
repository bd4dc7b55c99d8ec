"""A feature view's memory limit and the types of its join keys in, how many rows a run holds at a time out. Pure: measures nothing.

The limit is for the resident memory of the process that writes one piece. Most of it is spent whatever the table has: on the
interpreter and libraries, on the rows that are being decoded, and on the batches that are being sent. What is left is for the keys and
order of rows, of which the latest are picked (docs/memory.md has the measurements).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["SMALLEST", "rows_compared", "rows_held", "shares_compared"]

#: Bytes that a process takes beside the rows below: 210 MB of them are libraries, the others what is decoded and sent at a time.
FIXED = 450_000_000
#: The least that a view may be given: below it, little more than nothing is left for rows.
SMALLEST = 600_000_000
#: Bytes of a row while latest rows are picked: times, version and position, and the copies that ranking makes of them; of a join key
#: of fixed size; of one that is text, of about 30 characters.
ROW_BYTES, KEY_BYTES, TEXT_BYTES = 100, 24, 72
#: What a row that a commit took away or brought takes, in the place of rows that are held: while its share is compared, and from then on
#: where the commit brought it.
COMPARED, BROUGHT = 2.0, 0.2
#: Shares that a commit's rows are compared in at most: each reads all columns of its files again.
MOST_SHARES = 8


def rows_held(limit: int, join_key_types: Iterable[str]) -> int:
    """How many rows' keys and order may be in memory at a time. *limit*: bytes; *join_key_types*: as Delta writes them."""
    keys = sum(TEXT_BYTES if kind == "string" else KEY_BYTES for kind in join_key_types)
    return max(1, (limit - FIXED) // (ROW_BYTES + keys))


def rows_compared(held: int) -> int:
    """How many rows of one commit, those that it took away and those that it brought, may be compared in the place of *held* rows."""
    return max(1, int(held / (COMPARED / MOST_SHARES + BROUGHT)))


def shares_compared(rows: int, held: int) -> int:
    """In how many shares *rows* of one commit are compared in the place of *held* rows."""
    fitting = (shares for shares in range(1, MOST_SHARES) if rows * (COMPARED / shares + BROUGHT) <= held)
    return next(fitting, MOST_SHARES)
