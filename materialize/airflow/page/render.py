"""Cards in, HTML out. Everything that is shown goes through Jinja's autoescape; style and script are ours and named in the policy."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from materialize.airflow.form_tasks import MODES
from materialize.airflow.page.board import BACKFILL
from materialize.airflow.page.cards import run_path
from materialize.airflow.page.history import RUNS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from materialize.airflow.page.cards import Card
    from materialize.airflow.page.history import Run

__all__ = ["HEADERS", "bars", "duration", "page", "short_message"]

HERE = Path(__file__).parent
STYLE, SCRIPT = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
#: The chart in SVG units.
WIDTH, HEIGHT, GAP = 300.0, 44.0, 2.0
#: Runs in the table; the others are folded.
SHOWN = 5


def checksum(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


#: Nothing but our own style and script runs, nothing is loaded, and requests go to this Airflow alone, whose UI frames the page.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {checksum(STYLE)}; script-src {checksum(SCRIPT)}; connect-src 'self'; "
        "img-src data:; form-action 'none'; base-uri 'none'; frame-ancestors 'self'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def duration(value: timedelta | float) -> str:
    """A span in its two largest units: ``3 d 4 h``, ``12 min``, ``3.2 s``."""
    seconds = value if isinstance(value, int | float) else value.total_seconds()
    if seconds < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{seconds:.1f} s" if seconds < 10 and not float(seconds).is_integer() else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    units = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if count]
    return " ".join(units[:2])


def ago(moment: datetime, now: datetime) -> str:
    """How long ago *moment* is; event times may be in the future."""
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "just now"
    return f"{duration(round(seconds))} ago" if seconds > 0 else f"in {duration(round(-seconds))}"


def number(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:,}"


def utc(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def bars(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A bar for each of *runs*, of which the newest comes first; in the chart it is the last.

    As high as the rows that the run changed online, in proportion to the greatest; a run is never invisible.
    """
    changed = [run.written + run.deleted for run in runs]
    greatest, step = max(changed, default=0) or 1, WIDTH / RUNS
    found = []
    for place, (run, rows) in enumerate(zip(reversed(runs), reversed(changed), strict=True)):
        height = max(2.0, HEIGHT * rows / greatest)
        shape = {"x": place * step, "y": HEIGHT - height, "width": step - GAP, "height": height}
        found.append({name: round(value, 2) for name, value in shape.items()} | {"rows": rows, "run": run})
    return found


def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"duration": duration, "number": number, "utc": utc}
    found.globals |= {
        "style": Markup(STYLE),  # noqa: S704 - a file of this package
        "script": Markup(SCRIPT),  # noqa: S704 - a file of this package
        "ago": ago,
        "bars": bars,
        "run_path": run_path,
        "backfill_dag": BACKFILL,
        "modes": list(MODES),
        "chart_width": WIDTH,
        "chart_height": HEIGHT,
        "shown": SHOWN,
    }
    return found


ENVIRONMENT = environment()


def page(*, now: datetime, views: Sequence[Card], **values: Any) -> str:
    """The page; the names of *values* are those of the template. The form offers the last day, up to the hour."""
    end = now.replace(minute=0, second=0, microsecond=0)
    day = {"day_start": f"{end - timedelta(days=1):%Y-%m-%dT%H:%M}", "day_end": f"{end:%Y-%m-%dT%H:%M}"}
    sums = Counter((card.label, card.tone) for card in views)
    return ENVIRONMENT.get_template("page.html").render(now=now, views=views, sums=sums, **day, **values)


def short_message(title: str, sentence: str, *, root: str) -> str:
    """A page that says one thing; *root* leads to Airflow's first page."""
    return ENVIRONMENT.get_template("message.html").render(title=title, sentence=sentence, root=root)
