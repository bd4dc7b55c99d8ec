"""The DAG that compares the online stores with the tables; everything is in materialize.airflow.verification."""

from __future__ import annotations

from pathlib import Path

from materialize.airflow.verification import verify_dag

dag = verify_dag(Path(__file__).parent)
