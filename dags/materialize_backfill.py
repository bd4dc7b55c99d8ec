"""The DAG with the backfill form; everything is in materialize.airflow.dags."""

from __future__ import annotations

from pathlib import Path

from materialize.airflow.dags import backfill_dag

dag = backfill_dag(Path(__file__).parent)
