"""`materialize serve` against its own OpenAPI schema: whatever requests schemathesis makes of it, the answers are as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi import checks

from tests.http_project import TOKEN, TYPES, HttpProject

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests import servers

#: In one process: what all of them asked is looked at in the end.
pytestmark = [pytest.mark.server, pytest.mark.xdist_group("http_schema")]

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
#: The same requests in every run; a slow machine is no finding.
BOUNDED = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
AS_SCHEMA = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]


@pytest.fixture(scope="module")
def api(valkey_server: servers.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    project = HttpProject(tmp_path_factory.mktemp("http"), valkey_server.url)
    with project.serving("--deadline", "20", "--store-deadline", "10", "--read-timeout", "10") as served:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json", headers=AUTHORIZED)
        good = [line for line in served.get("/metrics").text.splitlines() if 'status="200"' in line]
        assert all(any(route in line for line in good) for route in ("/v1/features", "/v1/services", "/{entity_key}"))


@pytest.fixture
def filled(valkey_server: servers.Server, tmp_path: Any) -> None:
    project = HttpProject(tmp_path, valkey_server.url)
    project.put("types", "0", *(value for _, _, value, _ in TYPES.values()))
    project.put("types", "", *[None] * len(TYPES))


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@BOUNDED
def test_every_answer_is_as_the_schema_says(case: Any) -> None:
    response = case.call(headers=AUTHORIZED)

    assert response.status_code < 500
    case.validate_response(response)


@schema.parametrize()
@BOUNDED
def test_every_answer_about_what_there_is_is_as_the_schema_says(case: Any, filled: None) -> None:
    about_what_there_is(case)

    response = case.call(headers=AUTHORIZED)

    assert response.status_code < 500
    case.validate_response(response, checks=AS_SCHEMA)


def about_what_there_is(case: Any) -> None:
    """Names that the config has, where the request is one: random ones are never there."""
    if "view" in case.path_parameters:
        case.path_parameters |= {"view": "types"}
        case.query.pop("feature_names", None)
    if "name" in case.path_parameters:
        case.path_parameters |= {"name": "ranking"}
    if not isinstance(case.body, dict):
        return
    if isinstance(case.body.get("lookups"), list):
        for lookup in case.body["lookups"]:
            if isinstance(lookup, dict):
                lookup["view"] = "types"
                lookup.pop("feature_names", None)
                lookup["entity_keys"] = ["0", ""]
    if isinstance(case.body.get("entities"), list):
        case.body["entities"] = [{"user_id": 1, "shop_id": "x"} for _ in case.body["entities"]]
