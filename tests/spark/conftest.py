"""Fixtures of the tests with Spark: one session for all of them, and a table in a folder of the test's own."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import pytest

from materialize.online.memory import MemoryStore
from tests.spark.session import SparkMissing, SparkSession
from tests.spark.table import SparkTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    """A session of Spark; starting it takes seconds, so there is one. MATERIALIZE_SPARK=require makes its absence a failure."""
    session = SparkSession(tmp_path_factory.mktemp("spark"))
    try:
        session.start()
    except SparkMissing as missing:
        if os.environ.get("MATERIALIZE_SPARK", "").lower() == "require":
            pytest.fail(f"Spark is required and cannot run: {missing}", pytrace=False)
        pytest.skip(f"NOT TESTED against Spark on {platform.node()}: {missing}")
    try:
        yield session
    finally:
        session.end()


@pytest.fixture
def table(spark: SparkSession, tmp_path: Path) -> Iterator[SparkTable]:
    """A table that is not there until it is created, with a view on it and an empty store."""
    with MemoryStore() as store:
        yield SparkTable(spark, tmp_path / "table", store)
