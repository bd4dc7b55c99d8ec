"""DynamoDB keeps the contract, in tables of their own and in a shared one; refuses are handled, and told where they cannot be."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace as altered
from itertools import product
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import numpy as np
import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, Prices, Retention, TableSettings
from materialize.online.dynamodb import DynamoDbStore, load
from materialize.online.dynamodb.items import Statement, columns, values_of
from materialize.order import NO_FLOOR, STALE, UNCHANGED, WRITTEN, Record
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, content, make_batch
from tests.dynamodb_stub import Stub, Time, answer, before_sending, payload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse

    from materialize.online.base import OnlineStore
    from tests.dynamodb_local import DynamoDbLocal

#: Account of the URL: not looked at by anything here.
ACCOUNT = "key:s3cret-p4ss"
VIEWS = ("view", "view_2", "vie", "vi", "other")
#: How a row meets what is stored, by name.
RULES = {
    "merge": load.Rule(tie_wins=False),
    "merge that wins ties": load.Rule(tie_wins=True),
    "replace": load.Rule(at=AT + 1),
}
#: Deliberate bugs in the conditions that DynamoDB checks, each as (rule, text of its condition, what a careless hand would write).
PLANTED = {
    "merge ignores the floor": ("merge", "f<{n} AND (", "("),
    "merge lets the floor itself in": ("merge", "f<{n} AND (", "f<={n} AND ("),
    "merge lets an equal order in": ("merge", "c<{c})", "c<={c})"),
    "merge ignores the created time": ("merge", "(e={e} AND c<{c})", "(e={e})"),
    "merge ignores the event time": ("merge", "e<{e} OR", "e<={e} OR"),
    "a tie is refused": ("merge that wins ties", " OR (e={e} AND c={c} AND n<{n})", ""),
    "an equal version wins a tie": ("merge that wins ties", "n<{n})", "n<={n})"),
    "an older version wins a tie": ("merge that wins ties", " AND n<{n})", ")"),
    "an older snapshot replaces": ("replace", "f<{n} AND n<={n}", "n<={n}"),
    "the same snapshot replaces again": ("replace", "f<{n} AND", "f<={n} AND"),
    "replace ignores a newer row": ("replace", "f<{n} AND n<={n}", "f<{n}"),
    "replace refuses its own version": ("replace", "n<={n}", "n<{n}"),
}


def url(local: DynamoDbLocal, options: str = "") -> str:
    return f"dynamodb://{ACCOUNT}@eu-central-1/fs?endpoint_url={local.endpoint}&write_units=1000000{options}"


@pytest.fixture
def local(dynamodb_local: DynamoDbLocal) -> DynamoDbLocal:
    dynamodb_local.drop_tables()
    return dynamodb_local


@pytest.fixture
def store(local: DynamoDbLocal) -> Iterator[DynamoDbStore]:
    """A table of its own for one view."""
    with DynamoDbStore(url(local)) as store:
        store.setup("view")
        yield store


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
class TestSharedTable(OnlineStoreContract):
    histories = 50

    @pytest.fixture
    def store(self, local: DynamoDbLocal) -> Iterator[OnlineStore]:
        with DynamoDbStore(url(local, "&table=shared")) as store:
            assert store.setup("view") == ["created, on demand", "time to live by x"]
            yield store


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
class TestTablePerView(OnlineStoreContract):
    histories = 10

    @pytest.fixture
    def store(self, local: DynamoDbLocal) -> Iterator[OnlineStore]:
        with DynamoDbStore(url(local)) as store:
            for view in (*VIEWS, *(f"view{number}" for number in range(self.histories))):
                store.setup(view)
            yield store


pytestmark = [pytest.mark.server, pytest.mark.xdist_group("dynamodb")]


# --- the order rule as a condition ---------------------------------------------------------------------------------------


def disagreements(local: DynamoDbLocal, store: DynamoDbStore, rule: load.Rule, condition: str) -> int:
    """How many pairs of a stored and a new record an UPDATE under *condition* treats in another way than the rule in Python."""
    stored = [
        Record(event, created, AT + version, AT + floor if floor else NO_FLOOR)
        for event, created, version, floor in product((None, 1, 2), (0, 1), (0, 1, 2), (0, 1, 2))
        if event is not None or not created
    ]
    versions = (AT, AT + 1, AT + 2) if rule.at is None else (rule.at,)
    pairs = list(product(stored, (Record(*order, NO_FLOOR, b"new") for order in product((1, 2), (0, 1), versions))))
    for low in range(0, len(pairs), 25):
        items = [
            {"k": {"S": str(low + number)}} | values_of(held, None)
            for number, (held, _) in enumerate(pairs[low : low + 25])
        ]
        local.client.batch_write_item(RequestItems={"fs.view": [{"PutRequest": {"Item": item}} for item in items]})
    rows = [Row(b"%d" % number, new.event_us, new.created_us, new.version) for number, (_, new) in enumerate(pairs)]
    update = Statement.update("fs.view", ("k",), rule.sets, (), condition).frames(
        columns(make_batch(rows), "view", FOREVER)
    )
    wrong = 0
    for low in range(0, len(pairs), 25):
        numbers = range(low, min(low + 25, len(pairs)))
        body = b'{"Statements":[%b]}' % b",".join(update[number] for number in numbers)
        for number, told in zip(numbers, store.client.call("batch_execute_statement", body)["Responses"], strict=True):
            held, new = pairs[number]
            _, after = rule.decide(held, new)
            wrong += ("Error" not in told) != (after == altered(new, floor=held.floor if rule.at is None else rule.at))
    return wrong


@pytest.mark.parametrize("name", RULES)
def test_condition_of_an_update_says_what_the_rule_says(local: DynamoDbLocal, store: DynamoDbStore, name: str) -> None:
    assert disagreements(local, store, RULES[name], RULES[name].condition) == 0


@pytest.mark.parametrize("planted", PLANTED)
def test_careless_condition_is_noticed(local: DynamoDbLocal, store: DynamoDbStore, planted: str) -> None:
    name, there, wrong = PLANTED[planted]
    assert there in RULES[name].condition

    assert disagreements(local, store, RULES[name], RULES[name].condition.replace(there, wrong)) > 0


# --- what is stored --------------------------------------------------------------------------------------------------


def test_an_item_is_what_the_format_says(store: DynamoDbStore, local: DynamoDbLocal) -> None:
    retention = Retention(ttl_us=5_000_001, keep_until_us=7)
    store.merge(
        "view", make_batch([Row(b'a"\\|', 9_000_000, -5, AT, b"content")], floor=0), tie_wins=True, retention=retention
    )
    tombstone = make_batch([Row(b"gone", None, payload=b"")], floor=AT)
    store.replace("view", tombstone, at=AT, retention=Retention(ttl_us=None, keep_until_us=3_000_001))

    live, gone = sorted(local.items("fs.view"), key=lambda item: item["k"]["S"])

    numbers = {"e": "9000000", "c": "-5", "n": str(AT), "f": "0", "x": "15"}
    assert live == {"k": {"S": 'a"\\|'}, "r": {"B": b"\x01\x00\x07\x00content"}} | {
        name: {"N": number} for name, number in numbers.items()
    }
    numbers = {"e": str(-(2**53) - 1), "c": "0", "n": str(AT), "f": str(AT), "x": "4"}
    assert gone == {"k": {"S": "gone"}, "r": {"B": b"\x01\x01\x07\x00"}} | {
        name: {"N": number} for name, number in numbers.items()
    }


def test_expiry_goes_when_a_live_row_without_one_follows(store: DynamoDbStore, local: DynamoDbLocal) -> None:
    tombstone = make_batch([Row(b"k", None, payload=b"")], floor=AT)
    store.replace("view", tombstone, at=AT, retention=Retention(ttl_us=None, keep_until_us=1))
    store.merge("view", make_batch([Row(b"k", 1, version=AT + 1)]), tie_wins=True, retention=FOREVER)

    (item,) = local.items("fs.view")

    assert "x" not in item


def test_floor_of_a_stored_row_is_raised_together_with_its_expiry(store: DynamoDbStore, local: DynamoDbLocal) -> None:
    retention = Retention(ttl_us=1_000_000, keep_until_us=50_000_000)
    store.merge("view", make_batch([Row(b"k", 5, version=AT + 5)]), tie_wins=True, retention=retention)
    later = Retention(ttl_us=1_000_000, keep_until_us=90_000_000)
    older = make_batch([Row(b"k", 4, version=AT + 2, payload=b"older")], floor=AT + 2)

    assert store.replace("view", older, at=AT + 2, retention=later).tolist() == [STALE]

    (item,) = local.items("fs.view")
    assert (item["f"]["N"], item["x"]["N"], item["r"]["B"][4:]) == (str(AT + 2), "90", b"payload")


def test_floor_is_raised_of_what_is_stored_then_and_not_of_what_was_seen(
    store: DynamoDbStore, local: DynamoDbLocal
) -> None:
    """Between the look at the store, which holds a newer row, and the statement that raises its floor, a later commit comes in."""
    store.merge("view", make_batch([Row(b"k", 5, version=AT + 5)]), tie_wins=True, retention=FOREVER)
    statements: list[bytes] = []

    def come_in_between(request: AWSPreparedRequest, **_: Any) -> None:
        if b"UPDATE" in request.body:
            statements.append(request.body)
        if len(statements) == 1:
            with DynamoDbStore(url(local)) as other:
                later = make_batch([Row(b"k", 5, version=AT + 6, payload=b"later")])
                other.merge("view", later, tie_wins=True, retention=FOREVER)

    before_sending(store.client.api, come_in_between)
    older = make_batch([Row(b"k", 4, version=AT + 2, payload=b"older")], floor=AT + 2)

    assert store.replace("view", older, at=AT + 2, retention=FOREVER).tolist() == [STALE]

    assert len(statements) == 2
    expected = make_batch([Row(b"k", 5, version=AT + 6, payload=b"later")], floor=AT + 2)
    assert store.read("view", [b"k"]) == expected.values.to_pylist()


def test_longest_record_and_key_fit(store: DynamoDbStore) -> None:
    row = Row(b"\xc3\xa4" * (store.max_key_bytes // 2), payload=b"x" * (store.max_value_bytes - 36))
    tombstones = Retention(ttl_us=2**52, keep_until_us=2**52)

    assert store.merge("view", make_batch([row]), tie_wins=True, retention=tombstones).tolist() == [WRITTEN]
    assert store.read("view", [row.key]) == make_batch([row]).values.to_pylist()


def test_tables_are_made_by_setup_alone_and_only_once(local: DynamoDbLocal) -> None:
    settings = TableSettings(write_units=7, read_units=3)
    with DynamoDbStore(url(local), settings) as store:
        with pytest.raises(OnlineStoreError, match=r"found no table fs.view, expected one.*materialize setup view"):
            store.merge("view", make_batch([Row(b"k")]), tie_wins=True, retention=FOREVER)
        with pytest.raises(OnlineStoreError, match="materialize setup view"):
            store.read_cell("view", "watermark")
        assert store.setup("view") == ["created, provisioned", "time to live by x"]
        assert store.setup("view") == []
    table = local.client.describe_table(TableName="fs.view")["Table"]
    assert table["ProvisionedThroughput"]["WriteCapacityUnits"] == 7
    with DynamoDbStore(url(local, "&table=shared")) as shared:
        local.client.create_table(
            TableName="fs-features",
            KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        with pytest.raises(
            OnlineStoreError, match=r"found a table with the keys k \(S\), expected k \(S\), v \(S\).*left alone"
        ):
            shared.setup("view")


# --- which way rows go, and what they cost ------------------------------------------------------------------------------


def requests_of(store: DynamoDbStore) -> dict[str, int]:
    """What is sent from now on, by operation and kind of statement."""
    counts: dict[str, int] = {}

    def count(request: AWSPreparedRequest, event_name: str, **_: Any) -> None:
        kinds = {b"INSERT": b'"INSERT', b"UPDATE": b'"UPDATE'}
        for kind, text in kinds.items():
            counts[kind.decode()] = counts.get(kind.decode(), 0) + request.body.count(text)
        operation = event_name.rpartition(".")[2]
        counts[operation] = counts.get(operation, 0) + 1

    before_sending(store.client.api, count)
    return counts


def test_first_load_inserts_and_a_second_updates_after_one_read(store: DynamoDbStore) -> None:
    counts = requests_of(store)
    rows = [Row(b"%d" % number) for number in range(5_000)]

    store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
    assert (counts["INSERT"], counts["UPDATE"], counts["BatchGetItem"]) == (5_000, 0, 1)
    counts.clear()
    store.merge("view", make_batch([row._replace(event_us=2) for row in rows]), tie_wins=True, retention=FOREVER)
    assert (counts["INSERT"], counts["UPDATE"], counts["BatchGetItem"]) == (0, 5_000, 1)


def test_backfill_of_older_rows_reads_and_writes_nothing(store: DynamoDbStore) -> None:
    rows = [Row(b"%d" % number, 5) for number in range(2_000)]
    store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
    counts = requests_of(store)

    older = make_batch([row._replace(event_us=4 + number % 2) for number, row in enumerate(rows)])
    outcomes = store.merge("view", older, tie_wins=False, retention=FOREVER)

    assert np.bincount(outcomes, minlength=3).tolist() == [1_000, 0, 1_000]
    assert counts == {"INSERT": 0, "UPDATE": 0, "BatchGetItem": 20}


def test_plan_says_the_way_the_units_the_minutes_and_the_price(local: DynamoDbLocal) -> None:
    from datetime import date

    features = {f"f{number}": FeatureType("float64") for number in range(150)}
    view = FeatureView("view", "t", ("id",), "event", features, ("default",))
    settings, prices = TableSettings(write_units=1000, read_units=1), Prices(date(2026, 11, 1), "USD", 0.5, 0.1, 0.15)
    plain = f"dynamodb://{ACCOUNT}@eu-central-1/fs?endpoint_url={local.endpoint}"
    with DynamoDbStore(plain, settings, prices) as store:
        store.setup("view")
        facts = store.estimate(view, 3_000_000, "backfill", first=False)
        instead = store.estimate(view, 3_000_000, "incremental", first=True)["instead"]

    assert facts == {
        "way": "reads, conditional updates of what is older",
        "write_units": 6_000_000,  # 150 x 8 bytes are more than one unit
        "read_units": 3_000_000,
        "minutes": 200.0,  # at half of 1,000 units a second
        "write_units_a_second": 500.0,
        "cost": "3.30 USD by the prices of 2026-11-01",
    }
    # 1,200 bytes of features, 36 of a header, 16 of a key, 64 of names and numbers; each read back
    assert instead == (
        "materialize bulk-load view s3://BUCKET/PREFIX, 3.95 GB of items, 0.89 USD by the prices of 2026-11-01"
    )


# --- storms and errors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere() -> Iterator[DynamoDbStore]:
    """A store whose server is the stub that a test gives it, and whose time passes by sleeping."""
    time = Time()
    url = f"dynamodb://{ACCOUNT}@eu-central-1/fs?write_units=1000000"
    with DynamoDbStore(url, clock=time.clock, sleep=time.sleep) as store:
        yield store


@pytest.mark.parametrize("seed", range(100))
def test_no_row_is_lost_in_a_storm_of_throttles_and_requests_stay_full(anywhere: DynamoDbStore, seed: int) -> None:
    rng = random.Random(seed)
    stub = Stub(seed, share=rng.uniform(0.0, 0.5), unread=rng.uniform(0.0, 0.5))
    stub.serve(anywhere.client.api)
    rows = [Row(b"%d" % number, 1, payload=b"first") for number in range(rng.randint(1_000, 2_000))]

    first = anywhere.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
    newer = make_batch([row._replace(event_us=2, payload=b"second") for row in rows])
    second = anywhere.merge("view", newer, tie_wins=True, retention=FOREVER)

    assert set(first.tolist()) == set(second.tolist()) == {WRITTEN}
    assert {key: payload(item) for key, item in stub.items.items()} == {row.key.decode(): b"second" for row in rows}
    ideal = 2 * len(rows) / (1 - stub.share) / 25
    assert stub.requests <= 1.3 * ideal


def test_requests_that_are_throttled_whole_are_sent_again(anywhere: DynamoDbStore) -> None:
    stub = Stub(1, share=0.2, whole=0.2)
    stub.serve(anywhere.client.api)
    rows = [Row(b"%d" % number) for number in range(200)]

    assert set(anywhere.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER).tolist()) == {WRITTEN}
    assert len(stub.items) == 200
    assert stub.whole_throttles > 0


def test_keys_that_are_not_processed_are_asked_for_again(anywhere: DynamoDbStore) -> None:
    stub = Stub(2, unread=0.5)
    stub.serve(anywhere.client.api)
    rows = [Row(b"%d" % number, payload=b"%d" % number) for number in range(250)]
    anywhere.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)

    found = anywhere.read("view", [row.key for row in rows])

    assert found == make_batch(rows).values.to_pylist()


def test_reads_that_are_never_processed_are_an_error_and_no_nulls(anywhere: DynamoDbStore) -> None:
    Stub(3, unread=1.0).serve(anywhere.client.api)

    with pytest.raises(UnavailableError, match="keys were left unprocessed for 60 s"):
        anywhere.read("view", [b"k"])


def test_writes_that_are_never_taken_end_with_what_refused_them(anywhere: DynamoDbStore) -> None:
    Stub(4, share=1.0, unread=0.0).serve(anywhere.client.api)

    with pytest.raises(UnavailableError, match=r"could not write 3 rows of feature view 'view'.*ThrottlingError"):
        anywhere.merge("view", make_batch([Row(b"a"), Row(b"b"), Row(b"c")]), tie_wins=True, retention=FOREVER)


def test_row_whose_answer_was_lost_counts_as_written(store: DynamoDbStore) -> None:
    """botocore sends a request again when its answer is an error of the server; it may have been done all the same."""
    sent: list[bytes] = []

    def lose_the_first_answer(request: AWSPreparedRequest, **_: Any) -> AWSResponse | None:
        sent.append(request.body)
        if len(sent) > 1:
            return None
        headers = {name: value if isinstance(value, str) else value.decode() for name, value in request.headers.items()}
        with urlopen(Request(request.url, request.body, headers)) as done:
            assert json.load(done) == {"Responses": [{"TableName": "fs.view"}] * 2}
        return answer(request, 500, {"__type": "com.amazonaws#InternalServerError"})

    before_sending(store.client.api, lose_the_first_answer, "BatchExecuteStatement")
    rows = make_batch([Row(b"a"), Row(b"b")])
    outcomes = store.merge("view", rows, tie_wins=True, retention=FOREVER)

    assert outcomes.tolist() == [WRITTEN, WRITTEN]
    assert len(sent) == 3  # the third one asks what is there
    assert sent[0] == sent[1]
    assert store.merge("view", rows, tie_wins=True, retention=FOREVER).tolist() == [UNCHANGED, UNCHANGED]


@pytest.mark.parametrize(
    ("code", "status", "kind", "text"),
    [
        ("AccessDeniedException", 400, OnlineStoreError, "materialize iam-policy"),
        ("ExpiredTokenException", 400, OnlineStoreError, "Give fresh credentials and run again"),
        ("ValidationException", 400, OnlineStoreError, "ValidationException"),
        ("InternalServerError", 500, UnavailableError, "InternalServerError"),
    ],
)
def test_errors_are_told_without_secrets(
    anywhere: DynamoDbStore, code: str, status: int, kind: type[Exception], text: str
) -> None:
    fail = lambda request, **_: answer(request, status, {"__type": f"com.amazonaws#{code}", "message": "told"})  # noqa: E731
    anywhere.client.api.meta.events.register("before-send.dynamodb", fail)

    with pytest.raises(kind, match=f"feature view 'view'.*dynamodb://eu-central-1/fs.*{text}") as failed:
        anywhere.read_cell("view", "watermark")

    assert "s3cret" not in f"{failed.value} {anywhere.address!r}"


def test_server_that_is_not_there_is_unavailable(local: DynamoDbLocal) -> None:
    with (
        DynamoDbStore(f"dynamodb://{ACCOUNT}@eu-central-1/fs?endpoint_url=http://127.0.0.1:1&timeout=0.2") as store,
        pytest.raises(UnavailableError, match="could not read the watermark of feature view 'view'"),
    ):
        store.read_cell("view", "watermark")


def test_several_views_are_read_by_one_request(local: DynamoDbLocal) -> None:
    with DynamoDbStore(url(local)) as store:
        for view in ("view", "other"):
            store.setup(view)
            store.merge(view, make_batch([Row(b"k", payload=view.encode())]), tie_wins=True, retention=FOREVER)
        counts = requests_of(store)

        found = store.read_views({"view": [b"k", b"absent"], "other": [b"k"]})

    assert [record and record[36:] for records in found.values() for record in records] == [b"view", None, b"other"]
    assert counts["BatchGetItem"] == 1


def test_closed_store_opens_again_and_threads_share_it(store: DynamoDbStore) -> None:
    store.close()
    rows = [[Row(b"%d %d" % (thread, number)) for number in range(300)] for thread in range(4)]
    threads = [
        threading.Thread(
            target=lambda some=some: store.merge("view", make_batch(some), tie_wins=True, retention=FOREVER)
        )
        for some in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(content(store)) == 1_200
