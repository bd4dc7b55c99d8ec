"""A first load by files: DynamoDB Local holds what an ordinary run would have brought, whatever the operation did with the files.

ImportTable and StartBulkPutItems are AWS's alone; `Operations` stands in for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.stub import Stubber

from materialize import pipeline
from materialize.errors import ConfigError, OnlineStoreError
from materialize.model import TableSettings
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.bulk import Operation
from materialize.online.memory import MemoryStore
from tests.dynamodb_local import REGION
from tests.dynamodb_operations import Operations
from tests.dynamodb_stub import Time
from tests.object_store import BUCKET
from tests.stepping import amounts, expected_amounts, incremental, plan_of, position, records, run
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from tests.dynamodb_local import DynamoDbLocal
    from tests.object_store import ObjectStore

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("dynamodb")]

PLACE = f"s3://{BUCKET}/first"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """300 entities with three rows each."""
    table = Table(tmp_path / "t")
    for turn in range(3):
        table.append(*(row(f'user "{number}"', turn, float(turn * 1000 + number)) for number in range(300)))
    return table


@pytest.fixture
def store(
    dynamodb_local: DynamoDbLocal, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DynamoDbStore]:
    """An empty store without a table; its own time passes by sleeping."""
    dynamodb_local.drop_tables()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.options["AWS_ENDPOINT_URL"])
    url, time = f"dynamodb://key:s3cret@{REGION}/fs?endpoint_url={dynamodb_local.endpoint}&write_units=5000", Time()
    with DynamoDbStore(url, clock=time.clock, sleep=time.sleep) as store:
        yield store


@pytest.fixture
def aws(dynamodb_local: DynamoDbLocal, object_store: ObjectStore, store: DynamoDbStore) -> Operations:
    operations = Operations(dynamodb_local.client, object_store.client)
    operations.serve(store.client.api)
    return operations


def files(object_store: ObjectStore) -> list[str]:
    found = object_store.client.list_objects_v2(Bucket=BUCKET, Prefix="first/").get("Contents", [])
    return [item["Key"] for item in found]


def begun_and_written(table: Table, store: OnlineStore) -> None:
    """A first run, up to the point where the watermark would move."""
    plan = pipeline.begin(table.view, store, plan_of(table, store, run_id="killed"))
    pipeline.write_piece(table.view, store, plan, 0, now=NOW)


def load(table: Table, store: DynamoDbStore) -> Any:
    return pipeline.bulk_load(table.view, store, run("bulk"), PLACE)


def test_import_makes_the_table_and_every_row_is_read_back(
    table: Table, store: DynamoDbStore, aws: Operations, object_store: ObjectStore, dynamodb_local: DynamoDbLocal
) -> None:
    report = load(table, store)

    assert aws.asked == ["ImportTable", "DescribeImport", "DescribeImport"]
    assert (report.written, report.unchanged, report.entities) == (0, 300, 300)
    assert "ImportTable of 2 files with 302 items: 302 processed, 0 failed" in report.reason
    assert amounts(table, store) == expected_amounts(table)
    assert position(table, store) == (1, table.version)
    expiry = dynamodb_local.client.describe_time_to_live(TableName="fs.spending")["TimeToLiveDescription"]
    assert expiry["AttributeName"] == "x"
    assert files(object_store) == []


def test_after_a_bulk_load_runs_are_incremental(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    load(table, store)
    table.append(row('user "7"', 9, 9.0), row("new", 9, 9.5))

    report = incremental(table, store)

    assert (report.from_version, report.written) == (2, 2)
    assert amounts(table, store) == expected_amounts(table)


def test_same_bytes_are_online_as_after_an_ordinary_run(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    load(table, store)

    with MemoryStore() as memory:
        incremental(table, memory)
        assert records(table.view, store) == records(table.view, memory)


@pytest.mark.parametrize("makes_table", [True, False])
def test_rows_that_the_operation_lost_are_written_by_the_run_that_follows(
    table: Table, store: DynamoDbStore, aws: Operations, *, makes_table: bool
) -> None:
    if not makes_table:
        store.setup("spending")
    aws.lose = 7
    if not makes_table:
        aws.ends = "COMPLETED_WITH_ERRORS"

    report = load(table, store)

    assert report.written == aws.failed > 0
    assert amounts(table, store) == expected_amounts(table)


def test_table_that_is_there_gets_the_items_that_it_lacks(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    """As after an ordinary first run that was killed, and whose rows are older than the table's now."""
    store.setup("spending")
    begun_and_written(table, store)
    table.append(row('user "5"', 50, 50.0), *(row(f"new {number}", 50, 1.0) for number in range(50)))

    report = load(table, store)

    assert aws.asked == ["StartBulkPutItems", "DescribeBulkOperation"]
    assert aws.rate == 5000
    assert (report.written, report.unchanged) == (300, 50)  # what was there is written again, as of the newer version
    assert amounts(table, store) == expected_amounts(table)
    assert position(table, store) == (1, table.version)


def test_newer_row_of_another_run_is_never_overwritten(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    """A run that began later and was faster: its rows stay, and its watermark."""
    store.setup("spending")
    other = store.bulk("spending", PLACE)
    begun_and_written(table, other)
    table.append(row('user "5"', 50, 50.0))
    incremental(table, store, "fast")

    with other:
        other.load()

    assert amounts(table, store) == expected_amounts(table)
    assert amounts(table, store)['user "5"'] == 50.0


def test_killed_after_the_import_the_next_run_reads_and_writes_nothing(
    table: Table, store: DynamoDbStore, aws: Operations
) -> None:
    with store.bulk("spending", PLACE) as bulk:
        begun_and_written(table, bulk)
        bulk.load()

    report = incremental(table, store)

    assert (report.written, report.unchanged) == (0, 300)
    assert position(table, store) == (1, table.version)


def test_operation_that_fails_leaves_the_files_and_the_watermark(
    table: Table, store: DynamoDbStore, aws: Operations, object_store: ObjectStore
) -> None:
    aws.ends = "FAILED"

    with pytest.raises(
        OnlineStoreError,
        match=r"spending.*ImportTable ended as FAILED: S3AccessDenied no right to read.*files are left in s3://",
    ) as failed:
        load(table, store)

    assert "s3cret" not in str(failed.value)
    assert len(files(object_store)) == 2
    for name in files(object_store):
        object_store.client.delete_object(Bucket=BUCKET, Key=name)


def test_view_that_is_online_is_left_to_incremental_runs(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    load(table, store)
    aws.asked.clear()

    with pytest.raises(OnlineStoreError, match=r"found it online at version 2.*materialize incremental spending"):
        load(table, store)

    assert aws.asked == []


def test_files_have_the_items_and_their_conditions(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    store.setup("spending")

    load(table, store)

    assert {frozenset(line) for line in aws.lines} == {frozenset(("Item", "ConditionExpression"))}
    assert {line["ConditionExpression"] for line in aws.lines} == {"attribute_not_exists(k)"}
    assert {line["Item"]["k"]["S"] for line in aws.lines} == {f'user "{number}"' for number in range(300)}
    assert all(set(line["Item"]) == {"k", "r", "e", "c", "n", "f"} for line in aws.lines)


@pytest.mark.parametrize("place", ["lake/first", "s3://", "s3://UPPER/x", "https://bucket/x", "s3://lake/ü"])
def test_wrong_places_are_refused(store: DynamoDbStore, place: str) -> None:
    with pytest.raises(ConfigError, match=r"feature view 'spending'.*s3://BUCKET/PREFIX.*Nothing was written"):
        store.bulk("spending", place)


def test_bucket_that_is_not_there_is_told(table: Table, store: DynamoDbStore, aws: Operations) -> None:
    with pytest.raises(
        OnlineStoreError, match=r"could not write files of feature view 'spending' to s3://nowhere/.*NoSuchBucket"
    ):
        pipeline.bulk_load(table.view, store, run(), "s3://nowhere/first")

    assert aws.asked == []


def test_other_stores_read_no_files() -> None:
    with (
        MemoryStore() as store,
        pytest.raises(OnlineStoreError, match=r"only DynamoDB reads files.*materialize incremental view"),
    ):
        store.bulk("view", PLACE)


# --- the requests, word by word -------------------------------------------------------------------------------------------


def test_import_is_asked_for_as_the_api_wants_it() -> None:
    api = boto3.client("dynamodb", region_name=REGION, aws_access_key_id="a", aws_secret_access_key="b")
    keys = {
        "AttributeDefinitions": [{"AttributeName": "k", "AttributeType": "S"}],
        "KeySchema": [{"AttributeName": "k", "KeyType": "HASH"}],
    }
    units = {"ProvisionedThroughput": {"ReadCapacityUnits": 3, "WriteCapacityUnits": 7}, "BillingMode": "PROVISIONED"}
    asked = {
        "ClientToken": "token",
        "S3BucketSource": {"S3Bucket": "bucket", "S3KeyPrefix": "p/items"},
        "InputFormat": "DYNAMODB_JSON",
        "InputCompressionType": "ZSTD",
        "TableCreationParameters": {"TableName": "fs.view", **keys, **units},
    }
    arn = "arn:aws:dynamodb:eu-central-1:123456789012:table/fs.view/import/01"
    with Stubber(api) as stubbed:
        stubbed.add_response(
            "import_table", {"ImportTableDescription": {"ImportArn": arn, "ImportStatus": "IN_PROGRESS"}}, asked
        )
        told = {"ImportArn": arn, "ImportStatus": "COMPLETED", "ImportedItemCount": 9, "ErrorCount": 1}
        stubbed.add_response("describe_import", {"ImportTableDescription": told}, {"ImportArn": arn})

        looks = Operation(api, "fs.view", "bucket", "p", "token").import_table(("k",), TableSettings(7, 3))
        first, last = next(looks), next(looks)

        stubbed.assert_no_pending_responses()
    assert first["status"] == "IN_PROGRESS"
    assert last == {"operation": "ImportTable", "status": "COMPLETED", "items": 9, "failed": 1, "why": ""}


def test_bulk_put_is_asked_for_as_the_api_wants_it() -> None:
    api = boto3.client("dynamodb", region_name=REGION, aws_access_key_id="a", aws_secret_access_key="b")
    place = {"S3Bucket": "bucket", "S3KeyPrefix": "p/items"}
    asked = {
        "ClientToken": "token",
        "InputS3Configuration": place | {"InputFormat": "DYNAMODB_JSON", "InputCompressionType": "ZSTD"},
        "OutputS3Configuration": {
            "S3Bucket": "bucket",
            "S3KeyPrefix": "p/report",
            "OutputType": ["ERROR", "CONDITION_CHECK_FAILURE"],
        },
        "TableName": "fs.view",
        "MaxWriteRequestUnits": 1024,
    }
    arn = "arn:aws:dynamodb:eu-central-1:123456789012:table/fs.view/bulk/01"
    started = {"BulkOperationArn": arn, "BulkOperationStatus": "IN_PROGRESS"}
    ended = {"BulkOperationArn": arn, "BulkOperationStatus": "FAILED", "FailureCode": "Code", "FailureMessage": "text"}
    with Stubber(api) as stubbed:
        stubbed.add_response("start_bulk_put_items", {"BulkOperationDescription": started}, asked)
        stubbed.add_response("describe_bulk_operation", {"BulkOperationDescription": ended}, {"BulkOperationArn": arn})

        looks = Operation(api, "fs.view", "bucket", "p", "token").put_items(12.0)
        next(looks)
        last = next(looks)

        stubbed.assert_no_pending_responses()
    assert last == {"operation": "StartBulkPutItems", "status": "FAILED", "items": 0, "failed": 0, "why": "Code text"}
