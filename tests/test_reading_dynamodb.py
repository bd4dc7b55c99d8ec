"""A model server reads DynamoDB in one request of all views, and within its deadline whatever the table or the network do."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.model import OnlineStoreConfig
from materialize.online import open_async_reader, open_reader
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.reading import ReadTerms
from materialize.testing import FOREVER, Row, make_batch
from tests.dynamodb_local import KEY, REGION, SECRET, DynamoDbLocal
from tests.dynamodb_stub import Stub, answer
from tests.test_reading import LATE, takes_at_most
from tests.valve import Valve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("dynamodb")]

TERMS = ReadTerms(read=0.1, deadline=0.25)
PATIENT = ReadTerms(connect=5, read=5, deadline=10)
KEYS = [b"%d" % number for number in range(250)]
VIEWS = ("one", "two", "three")


def url(port: int, options: str = "") -> str:
    return f"dynamodb://{KEY}:{SECRET}@{REGION}/fs?endpoint_url=http://127.0.0.1:{port}{options}"


def opened(place: str, terms: ReadTerms) -> DynamoDbStore:
    store = open_reader(OnlineStoreConfig("default", place), terms)
    assert isinstance(store, DynamoDbStore)
    return store


def listen(store: DynamoDbStore, told: Callable[[dict[str, Any], AWSPreparedRequest], AWSResponse | None]) -> None:
    """Every BatchGetItem is told of first, with its body; what is returned is its answer, or None for the server's own."""

    def hear(request: AWSPreparedRequest, **_: Any) -> AWSResponse | None:
        return told(json.loads(request.body), request)

    store.client.api.meta.events.register("before-send.dynamodb.BatchGetItem", hear)


def heard(store: DynamoDbStore) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = []
    listen(store, lambda body, _: bodies.append(body))
    return bodies


@pytest.fixture(scope="module")
def filled(dynamodb_local: DynamoDbLocal) -> Iterator[DynamoDbLocal]:
    """Three views with the same entities, and a cell."""
    dynamodb_local.drop_tables()
    with DynamoDbStore(url(dynamodb_local.port)) as store:
        for view in VIEWS:
            store.setup(view)
            batch = make_batch([Row(key, payload=key + view.encode()) for key in KEYS])
            store.merge(view, batch, tie_wins=True, retention=FOREVER)
        store.compare_and_set_cell("one", "schemas", None, b"{}")
    yield dynamodb_local
    dynamodb_local.drop_tables()


def test_a_hundred_keys_of_several_views_are_one_request(filled: DynamoDbLocal) -> None:
    with opened(url(filled.port), PATIENT) as store:
        bodies = heard(store)

        found = store.read_views({"one": KEYS[:50], "two": KEYS[:25], "three": [*KEYS[:24], b"absent"]})
        assert len(bodies) == 1
        assert [
            None if one is None else one.endswith(key + b"three")
            for one, key in zip(found["three"], KEYS, strict=False)
        ] == [True] * 24 + [None]
        assert all(one is not None and one.endswith(key + b"one") for one, key in zip(found["one"], KEYS, strict=False))

        assert None not in store.read("two", KEYS)
        assert len(bodies) == 4


@pytest.mark.parametrize(
    ("options", "replicas", "consistent"),
    [("", False, False), ("&consistent=true", False, True), ("&consistent=true", True, False)],
)
def test_replicas_are_eventually_consistent_reads(
    filled: DynamoDbLocal, options: str, replicas: object, consistent: object
) -> None:
    with opened(url(filled.port, options), ReadTerms(5, 5, 10, replicas=bool(replicas))) as store:
        bodies = heard(store)
        store.read("one", KEYS[:1])

    assert bodies[0]["RequestItems"]["fs.one"]["ConsistentRead"] is consistent


def test_a_server_that_stands_still_is_told_within_the_deadline_and_used_again_at_once(filled: DynamoDbLocal) -> None:
    with Valve(filled.port) as valve, opened(url(valve.port), TERMS) as store:
        _ = store.client.api
        assert store.read_cell("one", "schemas") == b"{}"
        valve.answering.clear()
        for call in (
            lambda: store.read("one", KEYS[:1]),
            lambda: store.read("one", KEYS),
            lambda: store.read_cell("one", "schemas"),
        ):
            with (
                takes_at_most(TERMS.deadline),
                pytest.raises(UnavailableError, match=r"waited at most 0\.25 s|in time"),
            ):
                call()
        valve.answering.set()

        (found,) = store.read("one", KEYS[:1])
        assert found is not None
        assert found.endswith(b"0one")


def test_keys_that_stay_unprocessed_are_told_within_the_deadline() -> None:
    with opened(url(1), TERMS) as store:
        Stub(1, unread=1.0).serve(store.client.api)
        with takes_at_most(TERMS.deadline), pytest.raises(UnavailableError, match=r"left unprocessed for 0\.2\d? s"):
            store.read("one", KEYS[:10])


def test_what_passes_is_asked_again_and_what_does_not_is_told_at_once(filled: DynamoDbLocal) -> None:
    asked: list[object] = []

    def throttled(body: dict[str, Any], request: AWSPreparedRequest) -> AWSResponse | None:
        asked.append(body)
        return answer(request, 400, {"__type": "com.amazonaws#ThrottlingException"}) if len(asked) < 3 else None

    with opened(url(filled.port), ReadTerms(1, 1, 2)) as store:
        listen(store, throttled)
        assert None not in store.read("one", KEYS[:1])
        assert len(asked) == 3

        with pytest.raises(OnlineStoreError, match="materialize setup nothing"):
            store.read("nothing", KEYS[:1])
        assert len(asked) == 4


def test_tasks_read_dynamodb_in_threads(filled: DynamoDbLocal) -> None:
    async def main() -> None:
        reader = open_async_reader(OnlineStoreConfig("default", url(filled.port)), PATIENT)
        try:
            found = await asyncio.gather(*(reader.read_views({"one": [key]}) for key in KEYS[:40]))
            assert all(one["one"][0].endswith(key + b"one") for one, key in zip(found, KEYS, strict=False))
            assert await reader.read_cell("one", "schemas") == b"{}"
        finally:
            await reader.close()

    asyncio.run(main())


def test_no_address_is_told_within_the_deadline() -> None:
    with opened(url(1), TERMS) as store:
        _ = store.client.api
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="waited at most"):
            store.read("one", KEYS)
        assert time.monotonic() - began < TERMS.deadline + LATE
