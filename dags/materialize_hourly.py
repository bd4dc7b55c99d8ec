"""The DAG of the hourly feature views; everything is in materialize.airflow.dags."""

from __future__ import annotations

from pathlib import Path

from materialize.airflow.dags import materialize_dag

dag = materialize_dag("hourly", Path(__file__).parent)
