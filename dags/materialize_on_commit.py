"""The DAG of the feature views that are loaded seconds after a commit; everything is in materialize.airflow.on_commit."""

from __future__ import annotations

from pathlib import Path

from materialize.airflow.on_commit import on_commit_dag

dag = on_commit_dag(Path(__file__).parent)
