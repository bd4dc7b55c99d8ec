"""The freshness page of the Airflow UI: the configuration in, a web page and its JSON out; it reads only, and has no table of its own."""

from __future__ import annotations
