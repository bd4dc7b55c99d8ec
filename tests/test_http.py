"""`materialize serve`: exact JSON and Arrow, problems that tell no secret, limits that hold, and a process that ends well."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import httpx
import pyarrow as pa
import pytest

from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.server.error_log import ErrorLog, Seldom
from materialize.server.settings import Limits, Tokens, check_address, tokens_of
from materialize.serving import OnlineFeatures, ReadTerms
from tests.http_load import Question, flood, request
from tests.http_project import EVENT, TOKEN, TYPES, GatedReader, HttpProject, lookup, told
from tests.stepping import PATIENT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from materialize.server.guard import Guard
    from tests import servers

pytestmark = pytest.mark.server

ARROW = {"Accept": "application/vnd.apache.arrow.stream"}
OTHER = "othertoken-0123456789abcdef"


@pytest.fixture
def project(tmp_path: Path, valkey: servers.Server) -> HttpProject:
    return HttpProject(tmp_path, valkey.url)


@pytest.fixture
def filled(project: HttpProject) -> HttpProject:
    project.put("spending", "a", 1.5, 2, None)
    project.put("spending", "b", 2.5, 3, "DE")
    project.put("shop", "a|9", 0.25)
    return project


# --- what is answered ---


def test_every_type_is_exact_in_json_whatever_reads_it(project: HttpProject) -> None:
    project.put("types", "x", *(value for _, _, value, _ in TYPES.values()))

    (vector,) = told(project.ask("POST", "/v1/features", json=lookup("types", "x")))["results"][0]["vectors"]

    assert vector["features"] == {name: expected for name, (_, _, _, expected) in TYPES.items()}
    assert [type(vector["features"][name]) for name in TYPES] == [
        type(expected) for _, _, _, expected in TYPES.values()
    ]
    assert vector["statuses"] == {}


def test_each_value_that_is_not_present_says_why_and_each_vector_how_old_it_is(filled: HttpProject) -> None:
    body = {
        "lookups": [
            {"view": "spending", "entity_keys": ["a", "nobody"], "feature_names": ["country", "amount"]},
            {"view": "spending", "entity_keys": ["b"], "feature_names": ["amount"], "max_age": 60},
        ]
    }
    before = datetime.now(timezone.utc)

    first, second = told(filled.ask("POST", "/v1/features", json=body))["results"]

    there, missing = first["vectors"]
    assert (first["view"], list(there["features"].items())) == ("spending", [("country", None), ("amount", 1.5)])
    assert (there["status"], there["statuses"], there["table_version"]) == ("present", {"country": "null"}, 7)
    assert datetime.fromisoformat(there["event_timestamp"]) == EVENT
    assert 0 <= there["age_seconds"] - (before - EVENT).total_seconds() < 60
    assert missing == {
        "status": "missing",
        "event_timestamp": None,
        "age_seconds": None,
        "table_version": None,
        "features": {"country": None, "amount": None},
        "statuses": {"country": "missing", "amount": "missing"},
    }
    (expired,) = second["vectors"]
    assert (expired["status"], expired["features"], expired["statuses"]) == (
        "expired",
        {"amount": None},
        {"amount": "expired"},
    )
    assert datetime.fromisoformat(expired["event_timestamp"]) == EVENT


@pytest.mark.parametrize(
    "key", [["a", "9"], ["a", 9], {"shop_id": 9, "user_id": "a"}], ids=["texts", "number", "names"]
)
def test_keys_come_as_values_in_order_or_by_name(filled: HttpProject, key: Any) -> None:
    (vector,) = told(filled.ask("POST", "/v1/features", json=lookup("shop", key)))["results"][0]["vectors"]

    assert vector["features"] == {"score": 0.25}


def test_a_feature_service_answers_one_vector_of_its_views(filled: HttpProject) -> None:
    entities = [{"user_id": "a", "shop_id": 9}, {"user_id": "b", "shop_id": 9}]

    answer = told(filled.ask("POST", "/v1/services/ranking", json={"entities": entities}))

    first, second = answer["vectors"]
    assert answer["service"] == "ranking"
    assert (first["features"], first["statuses"]) == ({"amount": 1.5, "count": "2", "shop_score": 0.25}, {})
    assert first["views"]["shop"]["event_timestamp"] == EVENT.isoformat()
    assert (second["features"]["amount"], second["statuses"]) == (2.5, {"shop_score": "missing"})
    assert [second["views"][view]["status"] for view in ("spending", "shop")] == ["present", "missing"]


@pytest.mark.parametrize("size", [2, 120], ids=["few", "many"])
def test_an_arrow_stream_is_what_the_client_gives(project: HttpProject, size: int) -> None:
    project.put("types", "x", *(value for _, _, value, _ in TYPES.values()))
    keys = ["x", *(f"none{place}" for place in range(size - 1))]

    answer = project.ask("POST", "/v1/features", json=lookup("types", *keys), headers=ARROW)

    assert answer.headers["content-type"] == ARROW["Accept"]
    with OnlineFeatures.connect(project.project.config, terms=PATIENT) as features:
        expected = features.batch_read("types", keys).to_arrow()
    found = pa.ipc.open_stream(answer.content).read_all().combine_chunks().to_batches()[0]
    assert found.schema == expected.schema
    assert repr(found.to_pylist()) == repr(expected.to_pylist())  # NaN is not equal to itself


def test_a_feature_service_answers_as_arrow_too(filled: HttpProject) -> None:
    body = {"entities": [{"user_id": "a", "shop_id": 9}]}

    table = pa.ipc.open_stream(filled.ask("POST", "/v1/services/ranking", json=body, headers=ARROW).content).read_all()

    assert table.select(["amount", "count", "shop_score"]).to_pylist() == [
        {"amount": 1.5, "count": 2, "shop_score": 0.25}
    ]


def test_many_vectors_come_in_the_order_asked_for(project: HttpProject) -> None:
    for place in range(0, 120, 7):
        project.put("spending", str(place), float(place), place, "x")

    vectors = told(project.ask("POST", "/v1/features", json=lookup("spending", *range(120))))["results"][0]["vectors"]

    assert [one["features"]["amount"] for one in vectors] == [None if place % 7 else place for place in range(120)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/features/spending/a", {"amount": 1.5, "count": "2", "country": None}),
        ("/v1/features/spending/a?feature_names=count,amount&max_age=3200000000", {"count": "2", "amount": 1.5}),
        ("/v1/features/shop/a|9", {"score": 0.25}),
        ("/v1/features/shop/a%7C9", {"score": 0.25}),
        ("/v1/features/spending/x/y%257Cz?feature_names=amount", {"amount": 4.5}),
    ],
)
def test_a_person_reads_one_entity_by_its_url(filled: HttpProject, path: str, expected: dict[str, Any]) -> None:
    filled.put("spending", "x/y%7Cz", 4.5, 1, None)

    assert list(told(filled.ask("GET", path))["features"].items()) == list(expected.items())


def test_views_and_services_are_listed_with_types_and_join_keys(project: HttpProject) -> None:
    listed = told(project.ask("GET", "/v1/views"))

    views = {view["name"]: view for view in listed["views"]}
    assert list(views) == ["shop", "spending", "types"]
    assert views["shop"]["join_keys"] == ["user_id", "shop_id"]
    assert views["types"]["features"] == {name: kind for name, (kind, _, _, _) in TYPES.items()}
    assert [(one["name"], one["join_keys"]) for one in listed["services"]] == [("ranking", ["user_id", "shop_id"])]
    assert listed["services"][0]["features"]["shop_score"] == {"view": "shop", "feature": "score", "type": "float64"}


# --- what is refused ---

PROBLEMS = {
    "no JSON": ("POST", "/v1/features", {"content": b"{"}, 400, "not JSON"),
    "no field": ("POST", "/v1/features", {"json": {}}, 422, "body.lookups"),
    "another field": ("POST", "/v1/features", {"json": lookup("spending", "a", maxage=1)}, 422, "body.lookups.0"),
    "a number that is no key": ("POST", "/v1/features", {"json": lookup("spending", 1.5)}, 422, "entity_keys"),
    "half a pair": ("POST", "/v1/features", {"content": rb'{"lookups":[{"view":"spending","entity_keys":["\ud800"]}]}'}, 400, "not JSON in UTF-8"),
    "a body of another type": ("POST", "/v1/features", {"content": b'{"lookups":[]}', "headers": {"Content-Type": "text/plain"}}, 422, "application/json"),
    "an age that is none": ("POST", "/v1/features", {"content": b'{"lookups":[{"view":"spending","entity_keys":[1],"max_age":NaN}]}'}, 422, "max_age"),
    "no such view": ("POST", "/v1/features", {"json": lookup("spend", "a")}, 404, "spending"),
    "no such feature": ("POST", "/v1/features", {"json": lookup("spending", "a", feature_names=["amout"])}, 422, "amount, count, country"),
    "a feature twice": ("POST", "/v1/features", {"json": lookup("spending", "a", feature_names=["count", "count"])}, 422, "twice"),
    "too few join keys": ("POST", "/v1/features", {"json": lookup("shop", "a")}, 422, "user_id, shop_id"),
    "a join key without a name": ("POST", "/v1/features", {"json": lookup("shop", {"user_id": 1})}, 422, "'shop_id'"),
    "two lookups as Arrow": ("POST", "/v1/features", {"json": {"lookups": lookup("spending", "a")["lookups"] * 2}, "headers": ARROW}, 422, "one schema"),
    "no such service": ("POST", "/v1/services/rank", {"json": {"entities": []}}, 404, "ranking"),
    "an entity without a key": ("POST", "/v1/services/ranking", {"json": {"entities": [{"user_id": 1}]}}, 422, "'shop_id'"),
    "a URL without a view": ("GET", "/v1/features/spend/a", {}, 404, "spending"),
    "a URL with half a key": ("GET", "/v1/features/shop/a", {}, 422, "2 part(s)"),
    "a URL with a wrong age": ("GET", "/v1/features/spending/a?max_age=soon", {}, 422, "query.max_age"),
    "no such path": ("GET", "/v2", {}, 404, "Not Found"),
    "another method": ("PUT", "/v1/features", {}, 405, "Method Not Allowed"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_fit_is_a_problem_that_says_what_is_expected(project: HttpProject, name: str) -> None:
    method, path, options, status, text = PROBLEMS[name]
    options = {"headers": {"Content-Type": "application/json"}, **options}

    answer = project.ask(method, path, **options)

    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "detail"} <= problem.keys()
    assert text in answer.text
    assert "maxage" not in answer.text


def test_a_request_is_bounded_in_entities_and_bytes(project: HttpProject) -> None:
    limits = Limits(entities=3, body=300)

    async def chunks() -> Any:
        for _ in range(4):
            yield b" " * 100

    async def never() -> Any:
        raise AssertionError("the head says that it is too large")
        yield b""

    async def asked(client: httpx.AsyncClient, _: Guard) -> list[httpx.Response]:
        three = [lookup("spending", 1, 2)["lookups"][0], lookup("shop", [1, 2])["lookups"][0]]
        many = [*three, lookup("shop", [1, 2])["lookups"][0]]
        return [
            await client.post("/v1/features", json={"lookups": three}),
            await client.post("/v1/features", json={"lookups": many}),
            await client.post("/v1/services/ranking", json={"entities": [{}] * 4}),
            await client.post("/v1/features", content=never(), headers={"Content-Length": "301"}),
            await client.post("/v1/features", content=chunks()),
        ]

    fits, entities, sets, large, chunked = project.run(asked, limits=limits)

    assert fits.status_code == 200
    assert [one.status_code for one in (entities, sets, large, chunked)] == [413] * 4
    assert "found 4 entities, expected at most 3" in entities.json()["detail"]
    assert "larger than 300 bytes" in large.json()["detail"]
    assert chunked.headers["connection"] == "close"


# --- who may ask ---


@pytest.mark.parametrize("path", ["/v1/views", "/v1/features/spending/a", "/openapi.json", "/metrics", "/nowhere"])
def test_only_a_token_opens_and_each_of_several_does(project: HttpProject, path: str) -> None:
    given = [
        "",
        "Bearer",
        "Bearer x",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN}",
        f"bearer {OTHER}",
    ]

    async def asked(client: httpx.AsyncClient, _: Guard) -> list[int]:
        return [(await client.get(path, headers={"Authorization": one} if one else {})).status_code for one in given]

    statuses = project.run(asked, tokens=[TOKEN, OTHER])

    assert statuses[:6] == [401] * 6
    assert statuses[6] == statuses[7] == (404 if path == "/nowhere" else 200)


def test_health_needs_no_token_and_metrics_only_where_that_is_said(project: HttpProject) -> None:
    for path, open_metrics, expected in [
        ("/healthz", False, 200),
        ("/readyz", False, 200),
        ("/metrics", True, 200),
        ("/metrics", False, 401),
        ("/healthz/..", False, 401),
    ]:
        answer = project.ask("GET", path, tokens=[TOKEN], open_metrics=open_metrics)
        assert answer.status_code == expected, path
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_without_a_token_only_this_machine_is_listened_to(host: str) -> None:
    with pytest.raises(ConfigError, match="MATERIALIZE_SERVE_TOKENS"):
        check_address(host, Tokens())

    check_address(host, Tokens([TOKEN]))
    for loopback in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_address(loopback, Tokens())


def test_tokens_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{OTHER}\n")

    for environment in ({"MATERIALIZE_SERVE_TOKENS": f"{TOKEN},{OTHER}"}, {"MATERIALIZE_SERVE_TOKENS_FILE": str(file)}):
        tokens = tokens_of(environment)
        assert len(tokens) == 2
        assert tokens.admit(f"Bearer {OTHER}".encode())
        assert TOKEN not in repr(vars(tokens))
    assert len(tokens_of({})) == 0


@pytest.mark.parametrize("text", ["", " ", "short", f"{TOKEN},short", f"{TOKEN}ä"])
def test_a_token_that_anybody_could_guess_is_refused_and_not_told(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        tokens_of({"MATERIALIZE_SERVE_TOKENS": text})

    assert TOKEN not in str(raised.value)
    assert "'short'" not in str(raised.value)


# --- what is bounded ---


def test_requests_beyond_the_limit_are_refused_at_once_and_the_next_finds_room(project: HttpProject) -> None:
    reader = GatedReader()

    async def asked(client: httpx.AsyncClient, app: Guard) -> tuple[Any, ...]:
        first = [asyncio.create_task(client.get("/v1/features/spending/a")) for _ in range(2)]
        for _ in first:
            await reader.arrived.acquire()
        refused = await asyncio.gather(*(client.get("/v1/features/spending/a") for _ in range(5)))
        watched = [(await client.get(path)).status_code for path in ("/healthz", "/metrics")]
        peak = app.in_flight
        reader.gate.set()
        answered = await asyncio.gather(*first)
        later, metrics = await client.get("/v1/features/spending/a"), await client.get("/metrics")
        return refused, watched, peak, answered, later, metrics.text, app

    refused, watched, peak, answered, later, metrics, app = project.run(
        asked, reader=reader, limits=Limits(in_flight=2, deadline=20)
    )

    assert [(one.status_code, one.headers["retry-after"]) for one in refused] == [(503, "1")] * 5
    assert (watched, peak) == ([200, 200], 2)
    assert [one.status_code for one in (*answered, later)] == [200] * 3
    assert (app.in_flight, app.peak, reader.asked) == (0, 2, 3)
    for line in (
        'materialize_http_refused_total{reason="busy"} 5.0',
        "materialize_http_in_flight 0.0",
        "materialize_http_in_flight_peak 2.0",
        'materialize_http_requests_total{route="/v1/features/{view}/{entity_key}",status="200"} 3.0',
        'materialize_http_requests_total{route="other",status="503"} 5.0',
        'materialize_http_values_total{status="missing"} 9.0',
        'materialize_http_request_duration_seconds_count{route="/healthz"} 1.0',
    ):
        assert line in metrics.splitlines()


def test_a_store_that_never_answers_costs_a_request_its_deadline_and_no_room(project: HttpProject) -> None:
    async def asked(client: httpx.AsyncClient, app: Guard) -> tuple[httpx.Response, httpx.Response, int]:
        late = await client.get("/v1/features/spending/a")
        return late, await client.get("/v1/views"), app.in_flight

    late, next_one, in_flight = project.run(asked, reader=GatedReader(), limits=Limits(in_flight=1, deadline=0.05))

    assert (late.status_code, late.headers["retry-after"], "deadline" in late.json()["detail"]) == (503, "1", True)
    assert (next_one.status_code, in_flight) == (200, 0)


def test_a_body_that_never_ends_is_given_up(project: HttpProject) -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(20)
        yield b"}"

    answer = project.ask("POST", "/v1/features", content=slow(), limits=Limits(deadline=0.05))

    assert (answer.status_code, answer.headers["connection"]) == (408, "close")


# --- when the store fails ---


def test_a_server_without_its_store_lives_and_is_not_ready(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project = HttpProject(tmp_path, "redis://:pass-mark@127.0.0.1:1/0?timeout=0.2&deadline=0.2")

    async def asked(client: httpx.AsyncClient, _: Guard) -> list[httpx.Response]:
        paths = ("/healthz", "/readyz", "/v1/features/spending/keymark", "/v1/features/spending/keymark")
        return [await client.get(path) for path in paths]

    alive, ready, first, second = project.run(asked, terms=ReadTerms())

    assert [one.status_code for one in (alive, ready, first, second)] == [200, 503, 503, 503]
    assert first.headers["retry-after"] == "1"
    assert "127.0.0.1" not in first.text
    lines = [one.getMessage() for one in caplog.records if one.name == "materialize.server.error_log"]
    assert len(lines) == 1  # for both
    assert "127.0.0.1:1" in lines[0]
    assert not [one for one in caplog.records if "mark" in one.getMessage()]


def test_readiness_asks_the_store_once_for_all_that_wait(project: HttpProject) -> None:
    reader = GatedReader()

    async def asked(client: httpx.AsyncClient, _: Guard) -> list[int]:
        waiting = [asyncio.create_task(client.get("/readyz")) for _ in range(5)]
        await reader.arrived.acquire()
        reader.gate.set()
        return [(await one).status_code for one in waiting]

    assert project.run(asked, reader=reader) == [200] * 5
    assert reader.asked == 1
    assert project.ask("GET", "/readyz", reader=GatedReader()).status_code == 503  # after the store's deadline


@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [
        (UnavailableError("could not read from redis://cache"), 503, "redis://cache"),
        (OnlineStoreError("refused by redis://cache"), 500, "redis://cache"),
        (RuntimeError("valuemark"), 500, "http_project.py:"),
    ],
    ids=["down", "refused", "bug"],
)
def test_an_error_is_told_to_the_log_and_not_to_the_client(
    project: HttpProject, caplog: pytest.LogCaptureFixture, error: Exception, status: int, logged: str
) -> None:
    answer = project.ask("POST", "/v1/features", json=lookup("spending", "keymark"), reader=GatedReader(error))

    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert "cache" not in answer.text
    messages = [one.getMessage() for one in caplog.records]
    assert logged in "".join(messages)
    for text in (answer.text, *messages):
        assert "mark" not in text
        assert "Traceback" not in text


def test_many_errors_alike_are_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    errors = ErrorLog(lambda: now[0])

    for step in range(10):
        now[0] = 100.0 + step
        errors.add(UnavailableError("down"))
    errors.add(OnlineStoreError("refused"))

    assert [one.getMessage().partition(" (")[2] for one in caplog.records] == [
        "0 more since the last line)",
        "4 more since the last line)",
        "0 more since the last line)",
    ]


def test_what_uvicorn_says_of_every_connection_is_said_now_and_then() -> None:
    now = [100.0]
    seldom = Seldom(lambda: now[0])
    busy = logging.makeLogRecord(
        {"name": "uvicorn.error", "levelno": logging.WARNING, "msg": "Exceeded concurrency limit."}
    )
    other = logging.makeLogRecord({"name": "materialize.server", "levelno": logging.ERROR, "msg": "request failed"})

    passed = []
    for step in range(7):
        now[0] = 100.0 + step
        passed.append((seldom.filter(busy), seldom.filter(other)))

    assert passed == [(step in {0, 5}, True) for step in range(7)]


def test_nothing_that_is_logged_or_refused_holds_a_key_a_value_or_a_token(
    filled: HttpProject, valkey: servers.Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    filled.put("spending", "keymark", 918273645.0, 1, "valuemark")
    valkey.client.set("fs:spending:{damagedmark}", b"valuemark is no record, but it is long enough for one")
    tokens = {"tokens": [TOKEN]}
    good = {"Authorization": f"Bearer {TOKEN}"}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/v1/features/spending/keymark", {}),
        ("GET", "/v1/features/spending/keymark", {"headers": good | {"Authorization": "Bearer wrongmark-0123456789"}}),
        ("GET", "/v1/features/spending/keymark?max_age=valuemark", {"headers": good}),
        ("GET", "/v1/features/spending/damagedmark", {"headers": good}),
        ("GET", "/v1/features/shop/keymark", {"headers": good}),
        ("POST", "/v1/features", {"json": lookup("shop", "keymark"), "headers": good}),
        ("POST", "/v1/features", {"json": lookup("shop", {"keymark": "valuemark"}), "headers": good}),
        ("POST", "/v1/features", {"json": lookup("spending", ["keymark", 1.5]), "headers": good}),
        ("POST", "/v1/services/ranking", {"json": {"entities": [{"user_id": "keymark"}]}, "headers": good}),
        ("POST", "/v1/services/ranking", {"json": {"entities": [{"keymark": 1.5}]}, "headers": good}),
        ("POST", "/v1/features", {"content": b'{"keymark', "headers": good | {"Content-Type": "application/json"}}),
    ]

    answers = [filled.ask(method, path, **options, **tokens) for method, path, options in requests]
    there = filled.ask("GET", "/v1/features/spending/keymark", headers=good, **tokens)

    assert [one.status_code for one in answers] == [401, 401, 422, 500, 422, 422, 422, 422, 422, 422, 400]
    assert there.json()["features"]["country"] == "valuemark"
    ours = [
        one for one in caplog.records if not one.name.startswith("httpx")
    ]  # the client of this test, which logs what it asks
    for text in (*(one.text for one in answers), *(one.getMessage() for one in ours)):
        assert "mark" not in text
        assert "918273645" not in text


# --- a process ---


def test_a_process_is_started_answers_under_its_token_and_ends_with_what_is_under_way(
    filled: HttpProject, valkey: servers.Server
) -> None:
    with filled.serving("--read-timeout", "9", "--store-deadline", "9", "--deadline", "9") as served:
        assert told(served.get("/v1/features/spending/a"))["features"]["amount"] == 1.5
        assert served.get("/v1/features/spending/a", token=OTHER).status_code == 401
        assert served.get("/readyz", token="").status_code == 200
        valkey.client.execute_command("CLIENT", "PAUSE", 1_000, "ALL")
        answer = asyncio.run(_asked_while_it_ends(served))
        code, output = served.stop()

    assert answer.status_code == 200
    assert answer.json()["features"]["amount"] == 1.5
    assert code == 0
    assert "Finished server process" in output
    for secret in (TOKEN, OTHER, "spending", "1.5"):
        assert secret not in output


async def _asked_while_it_ends(served: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", headers=headers, timeout=20) as client:
        asked = asyncio.create_task(client.get("/v1/features/spending/a"))
        while "materialize_http_in_flight 1.0" not in (await client.get("/metrics")).text:
            assert not asked.done()
        served.process.terminate()
        return await asked


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        (("--host", "0.0.0.0"), "", "MATERIALIZE_SERVE_TOKENS"),
        (("--host", "127.0.0.1"), "tooshort", "at least 16 characters"),
        (("--store", "other"), "", "online store 'other'"),
    ],
    ids=["open to all without a token", "short token", "no such store"],
)
def test_a_server_that_would_be_wrong_does_not_start(
    project: HttpProject, options: Sequence[str], tokens: str, expected: str
) -> None:
    ended = project.project.run("serve", *options, env={"MATERIALIZE_SERVE_TOKENS": tokens} if tokens else {})

    assert ended.returncode == 1
    assert expected in ended.stderr
    assert "tooshort" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_several_processes_share_a_port_and_their_metrics(filled: HttpProject) -> None:
    with filled.serving("--workers", "2") as served:
        for _ in range(20):
            assert served.get("/v1/features/spending/a").status_code == 200

        assert served.metric("materialize_http_requests_total") >= 20
        assert served.metric("materialize_http_values_total") == 60
        assert served.stop()[0] == 0


def test_an_overload_gives_right_answers_or_503_and_leaves_nothing_behind(project: HttpProject) -> None:
    questions = []
    for place in range(20):
        project.put("spending", str(place), place + 0.25, place, "x")
        body = json.dumps(lookup("spending", place)).encode()
        expected = f'"features":{{"amount":{place}.25,"count":"{place}","country":"x"}}'.encode()
        questions.append(Question(request("/v1/features", body, TOKEN), expected))
    over = time.monotonic() + 60.0  # so that a server without a limit fails the test instead of holding it
    limits = ("--max-in-flight", "4", "--read-timeout", "5", "--store-deadline", "5", "--deadline", "9")
    with project.serving(*limits) as served:
        asyncio.run(flood(served.port, questions, 4, lambda seen: len(seen.seconds) >= 100))
        before = served.metric("process_resident_memory_bytes")

        seen = asyncio.run(
            flood(
                served.port,
                questions,
                80,
                lambda seen: (len(seen.seconds) >= 300 and seen.statuses[503] >= 300) or time.monotonic() > over,
            )
        )

        assert seen.statuses.keys() == {200, 503}
        assert (seen.wrong, seen.broken, seen.without_retry) == (0, 0, 0)
        assert 1 <= served.metric("materialize_http_in_flight_peak") <= 4
        assert served.metric("materialize_http_in_flight") == 0
        assert served.metric("materialize_http_refused_total") == seen.statuses[503]
        assert served.metric("process_resident_memory_bytes") - before < 64 * 2**20
        again = asyncio.run(flood(served.port, questions, 4, lambda seen: len(seen.seconds) >= 50))
        assert again.statuses.keys() == {200}
