"""A metadata database of its own for these tests; set up before Airflow is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.airflow.project import Project

HERE = Path(__file__).parent
HOME = Path(tempfile.mkdtemp(prefix="materialize-airflow-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
# Airflow reads these when it is first imported, so a fixture would be too late.
os.environ.update(
    AIRFLOW_HOME=str(HOME),
    AIRFLOW__CORE__DAGS_FOLDER=str(HERE.parents[1] / "dags"),
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{HOME}/airflow.db",
)
with warnings.catch_warnings():
    # Airflow and what it needs warn about each other on import.
    warnings.simplefilter("ignore")
    from tests.airflow import runs  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Airflow's own warnings are not errors; ours are."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.airflow)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::materialize"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A fresh project that the DAG files read their configuration from."""
    monkeypatch.setenv("MATERIALIZE_CONFIG", str(tmp_path / "project" / "config"))
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def metadata_database() -> None:
    """The tables of Airflow's metadata database."""
    from airflow.utils.db import initdb

    initdb()
