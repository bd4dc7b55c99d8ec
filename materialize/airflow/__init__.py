"""Runs the pipeline from Airflow: thin tasks and the DAGs built from the configuration. The only package that imports airflow."""

from __future__ import annotations
