"""Adds the freshness page to Airflow's UI; everything is in materialize.airflow.page, which only the API server loads."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

log = logging.getLogger(__name__)


class MaterializePlugin(AirflowPlugin):
    """Every Airflow process imports this file, and only the API server asks for ``fastapi_apps``."""

    name = "materialize"
    #: An entry of the navigation; the page is framed. Relative to the base of Airflow's UI, so that it works below any path.
    external_views: ClassVar[list[dict[str, str]]] = [
        {
            "name": "Freshness",
            "href": "materialize/freshness",
            "destination": "nav",
            "url_route": "materialize-freshness",
        }
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:
        """The page; none, with the reason in the log, where it cannot be made: Airflow starts all the same."""
        try:
            from pathlib import Path

            from airflow import settings

            from materialize.airflow.page.app import create_app
            from materialize.airflow.tasks import config_dir

            app = create_app(config_dir(Path(settings.DAGS_FOLDER)))
        except Exception:
            log.exception("the freshness page could not be made")
            return []
        return [{"name": self.name, "app": app, "url_prefix": "/materialize"}]
