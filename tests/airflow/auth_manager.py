"""Airflow's simple auth manager with a user who may see no DAG, and one who may see the daily DAG only."""

from __future__ import annotations

from typing import Any

from airflow.api_fastapi.auth.managers.simple.simple_auth_manager import SimpleAuthManager

__all__ = ["DAILY", "STRANGER", "SomeMayNot"]

STRANGER, DAILY = "stranger", "daily"


class SomeMayNot(SimpleAuthManager):
    def is_authorized_dag(self, *, user: Any, details: Any = None, **asked: Any) -> bool:
        if user.username == STRANGER:
            return False
        if user.username == DAILY and (details is None or details.id != "materialize_daily"):
            return False
        return super().is_authorized_dag(user=user, details=details, **asked)
