"""The DAG with the backfill form; everything is in materialize.airflow.form."""

from __future__ import annotations

from pathlib import Path

from materialize.airflow.form import backfill_dag

dag = backfill_dag(Path(__file__).parent)
