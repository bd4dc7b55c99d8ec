"""A project with three feature views in real Delta tables and an SQLite online store."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import polars as pl
from deltalake import write_deltalake

from materialize.config import load
from materialize.model import Watermark
from materialize.online import open_store
from materialize.pipeline import Run, incremental
from materialize.serving import FeatureVector, OnlineFeatures
from materialize.watermark import read as read_watermark
from tests.stepping import PATIENT

__all__ = ["START", "Project"]

#: The hour in which the story of each test begins; recent, because event times count for expiry.
START = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0) - timedelta(hours=12)

VIEW = """\
description: {name} of a user
source: {source}
join_keys: [user_id]
event_timestamp: event_timestamp
created_timestamp: created_timestamp
features:
  amount: float64
schedule: {schedule}
online_stores: [{store}]
"""


@dataclass
class Project:
    """A config folder, a Delta table per view and an SQLite online store. The views: spending, risk (hourly), profile (daily)."""

    root: Path

    def __post_init__(self) -> None:
        (self.root / "config" / "feature_views").mkdir(parents=True)
        self.set_stores(default=f"sqlite:///{self.root}/online.db")
        for name, schedule in (("spending", "hourly"), ("risk", "hourly"), ("profile", "daily")):
            self.set_view(name, schedule=schedule)
            self.add(name, 1, event=0, amount=1.0)

    def set_stores(self, **urls: str) -> None:
        lines = [f'{name}: {{url: "{url}"}}\n' for name, url in urls.items()]
        (self.root / "config" / "online_stores.yaml").write_text("".join(lines))

    def set_view(
        self,
        name: str,
        *,
        schedule: str = "hourly",
        source: str | None = None,
        store: str = "default",
        freshness: str | None = None,
    ) -> None:
        text = VIEW.format(name=name, source=source or self.root / name, schedule=schedule, store=store)
        text += f"freshness: {freshness}\n" if freshness else ""
        (self.root / "config" / "feature_views" / f"{name}.yaml").write_text(text)

    def say(self, view: str, line: str) -> None:
        """Add a line to the YAML of *view*."""
        path = self.root / "config" / "feature_views" / f"{view}.yaml"
        path.write_text(f"{path.read_text()}{line}\n")

    def lose(self, view: str, user: int) -> None:
        """Delete a record behind the pipeline's back."""
        with closing(sqlite3.connect(self.root / "online.db")) as connection, connection:
            statement = "DELETE FROM records WHERE view = ? AND entity_key = ?"
            assert connection.execute(statement, (view, str(user).encode())).rowcount == 1

    def load(self, view: str, store: str = "default") -> None:
        """Bring *view* to the head of its table, as the CLI does."""
        config = load(self.root / "config")
        with open_store(config.online_store(store)) as online:
            incremental(config.feature_view(view), online, Run(store, "by hand", lambda: datetime.now(timezone.utc)))

    def add(self, view: str, user: int, *, event: float, amount: float, created: float | None = None) -> None:
        """Commit one row to the table of *view*; times are hours after START."""
        times = {
            "event_timestamp": START + timedelta(hours=event),
            "created_timestamp": START + timedelta(hours=event if created is None else created),
        }
        row = pl.DataFrame({"user_id": [user], **{name: [time] for name, time in times.items()}, "amount": [amount]})
        write_deltalake(str(self.root / view), row.to_arrow(), mode="append")

    def vector(self, view: str, user: int, store: str = "default") -> FeatureVector:
        with OnlineFeatures.connect(self.root / "config", store, terms=PATIENT) as features:
            return features.read_features(view, user)

    def amount(self, view: str, user: int) -> float | None:
        """The served amount of a user, None when there is none."""
        return self.vector(view, user).features.get("amount")

    def watermark(self, view: str) -> Watermark | None:
        with open_store(load(self.root / "config").online_store("default")) as online:
            return read_watermark(online, view)
