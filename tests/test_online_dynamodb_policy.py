"""What a role may do on AWS is what the store asks for in that role, request by request, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from materialize import pipeline, watermark
from materialize.model import Interval, TableSettings
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.address import Address
from materialize.online.dynamodb.policy import ROLES, policy
from tests.dynamodb_local import REGION
from tests.dynamodb_operations import Operations
from tests.dynamodb_stub import Time, answer, before_sending
from tests.object_store import BUCKET
from tests.stepping import incremental, plan_of, run, served, vectors
from tests.tables import NOW, T0, Table, at, row

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse
    from botocore.client import BaseClient

    from tests.dynamodb_local import DynamoDbLocal
    from tests.object_store import ObjectStore

PER_VIEW, SHARED = (
    Address.parse("dynamodb://eu-central-1/team"),
    Address.parse("dynamodb://eu-central-1/team?table=shared"),
)
ADDRESSES = pytest.mark.parametrize("address", [PER_VIEW, SHARED], ids=["per_view", "shared"])
KEY_CONDITION = {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["{*}"]}}
#: What changes entities, and what changes tables.
WRITES = {"BatchWriteItem", "DeleteItem", "PartiQLDelete", "PartiQLInsert", "PartiQLUpdate", "PutItem", "UpdateItem"}
MAKES = {"CreateTable", "DeleteTable", "UpdateTable", "ImportTable", "UpdateTimeToLive", "UpdateContinuousBackups"}
#: What AWS does in the name of who asks for an import or a bulk operation; no request of the store shows it.
BY_AWS_ITSELF = {
    *("s3:GetObject", "s3:ListBucket"),
    *("logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogGroups", "logs:DescribeLogStreams"),
    *("logs:PutLogEvents", "logs:PutRetentionPolicy"),
}


# --- IAM, as far as the policies need it -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that was asked for: what IAM calls it, on which resource, and the partition keys of the items."""

    action: str
    resource: str
    leading: frozenset[str] = field(default_factory=frozenset)


def allows(document: dict[str, Any], request: Request) -> bool:
    """Whether a statement of *document* allows *request*: action, resource, and all partition keys."""
    return any(
        request.action in statement["Action"]
        and any(fnmatchcase(request.resource, pattern) for pattern in listed(statement["Resource"]))
        and all(
            any(fnmatchcase(key, pattern) for pattern in condition["dynamodb:LeadingKeys"])
            for condition in statement.get("Condition", {}).values()
            for key in request.leading
        )
        for statement in document["Statement"]
    )


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def actions(document: dict[str, Any]) -> set[str]:
    return {action for statement in document["Statement"] for action in statement["Action"]}


def table_arn(name: str, region: str = REGION) -> str:
    return f"arn:aws:dynamodb:{region}:123456789012:table/{name}"


def on(action: str, table: str, *leading: str, region: str = REGION) -> Request:
    return Request(f"dynamodb:{action}", table_arn(table, region), frozenset(leading))


# --- the documents ---------------------------------------------------------------------------------------------------------


def test_writer_of_a_table_per_view_may_do_exactly_this() -> None:
    tables = "arn:aws:dynamodb:eu-central-1:*:table/team.*"

    assert policy(PER_VIEW, "writer") == {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Sid": "Tables",
                "Effect": "Allow",
                "Action": [
                    "dynamodb:BatchGetItem",
                    "dynamodb:DescribeTable",
                    "dynamodb:PartiQLInsert",
                    "dynamodb:PartiQLUpdate",
                    "dynamodb:Scan",
                ],
                "Resource": tables,
            },
            {
                "Sid": "Cells",
                "Effect": "Allow",
                "Action": ["dynamodb:GetItem", "dynamodb:PutItem"],
                "Resource": tables,
                "Condition": KEY_CONDITION,
            },
            {"Sid": "Doctor", "Effect": "Allow", "Action": ["dynamodb:ListTables"], "Resource": "*"},
        ],
    }


def test_reader_of_a_shared_table_may_do_exactly_this() -> None:
    table = "arn:aws:dynamodb:eu-central-1:*:table/team-features"

    assert policy(SHARED, "reader") == {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "Tables", "Effect": "Allow", "Action": ["dynamodb:BatchGetItem"], "Resource": table},
            {
                "Sid": "Cells",
                "Effect": "Allow",
                "Action": ["dynamodb:GetItem"],
                "Resource": table,
                "Condition": KEY_CONDITION,
            },
        ],
    }


@ADDRESSES
@pytest.mark.parametrize("role", ROLES)
def test_no_policy_has_a_wildcard_in_an_action_or_a_denial_in_disguise(address: Address, role: str) -> None:
    document = policy(address, role)

    assert json.loads(json.dumps(document)) == document
    assert all(statement["Effect"] == "Allow" for statement in document["Statement"])
    assert all("NotAction" not in statement and "NotResource" not in statement for statement in document["Statement"])
    assert not any("*" in action or "?" in action for action in actions(document))
    names = [statement["Sid"] for statement in document["Statement"]]
    assert all(name.isalnum() for name in names)  # IAM takes no other names
    assert len(set(names)) == len(names)


@ADDRESSES
@pytest.mark.parametrize("role", ROLES)
def test_every_table_of_the_prefix_and_no_other_is_meant(address: Address, role: str) -> None:
    document = policy(address, role)
    inside = ["team-features"] if address.shared else ["team.spending", "team.risk"]
    outside = ["teams.spending", "tea.spending", "team", "other", "team_spending", "x.team.spending"]
    outside += ["team.spending"] if address.shared else []

    for action in (action.removeprefix("dynamodb:") for action in actions(document) if action.startswith("dynamodb:")):
        if action == "ListTables":  # has no resource (the service authorization reference, as in the module)
            continue
        assert all(allows(document, on(action, name, "{cell}")) for name in inside)
        assert not any(allows(document, on(action, name, "{cell}")) for name in outside)
        assert not any(allows(document, on(action, name, "{cell}", region="us-east-1")) for name in inside)


@ADDRESSES
def test_a_reader_writes_nothing_and_lists_nothing(address: Address) -> None:
    may = {action.removeprefix("dynamodb:") for action in actions(policy(address, "reader"))}

    assert may == {"BatchGetItem", "GetItem"}
    assert not may & (WRITES | MAKES | {"Scan", "Query", "ListTables", "DescribeTable"})


@ADDRESSES
def test_a_writer_makes_and_deletes_nothing(address: Address) -> None:
    may = {action.removeprefix("dynamodb:") for action in actions(policy(address, "writer"))}

    assert not may & MAKES
    assert not may & {"DeleteItem", "PartiQLDelete", "BatchWriteItem", "UpdateItem"}


@ADDRESSES
def test_setup_touches_no_item_and_deletes_nothing(address: Address) -> None:
    may = {action.removeprefix("dynamodb:") for action in actions(policy(address, "setup"))}

    assert not may & WRITES
    assert not any(action.startswith("Delete") or "Item" in action for action in may)


@ADDRESSES
@pytest.mark.parametrize(("role", "action"), [("reader", "GetItem"), ("writer", "GetItem"), ("writer", "PutItem")])
def test_single_items_are_cells_only(address: Address, role: str, action: str) -> None:
    document, table = policy(address, role), address.table("spending")

    assert allows(document, on(action, table, "{watermark}"))
    assert not allows(document, on(action, table, "user 7"))
    assert not allows(document, on(action, table, "%7Bwatermark}"))  # an entity's braces are escaped
    assert not allows(document, on(action, table, "{watermark}", "user 7"))


def test_files_of_a_bulk_load_are_those_of_its_bucket() -> None:
    document = policy(PER_VIEW, "bulk", bucket="landing")

    assert allows(document, Request("s3:PutObject", "arn:aws:s3:::landing/first/items/000001.json.zst"))
    assert not allows(document, Request("s3:PutObject", "arn:aws:s3:::landing-2/first"))
    assert not allows(document, Request("s3:GetObject", "arn:aws:s3:::other/first"))
    assert allows(document, Request("dynamodb:DescribeImport", table_arn("team.spending/import/01")))
    assert allows(document, Request("dynamodb:DescribeBulkOperation", table_arn("team.spending/bulk-operation/01")))
    assert not allows(document, Request("dynamodb:DescribeImport", table_arn("other.spending/import/01")))


@pytest.mark.parametrize(("region", "partition"), [("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")])
def test_tables_of_china_and_of_the_us_government_are_in_their_own_partition(region: str, partition: str) -> None:
    document = policy(Address.parse(f"dynamodb://{region}/team"), "reader")

    assert {statement["Resource"] for statement in document["Statement"]} == {
        f"arn:{partition}:dynamodb:{region}:*:table/team.*"
    }


# --- what the store asks for -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recorder:
    """What clients ask for from now on, as IAM sees it."""

    requests: set[Request] = field(default_factory=set)

    def listen(self, client: BaseClient) -> None:
        client.meta.events.register("before-send", self._record)
        before_sending(client, self._record, "BatchExecuteStatement")

    @property
    def actions(self) -> set[str]:
        return {request.action for request in self.requests}

    def _record(self, request: AWSPreparedRequest, event_name: str, **_: Any) -> None:
        _, service, name = event_name.split(".")
        if service == "s3":  # the tests' own server has the bucket in the path
            self.requests.add(Request(f"s3:{name}", f"arn:aws:s3:::{urlsplit(request.url).path.lstrip('/')}"))
        else:
            self.requests.update(of_dynamodb(name, json.loads(request.body)))


def of_dynamodb(name: str, body: dict[str, Any]) -> Iterable[Request]:
    if name == "BatchExecuteStatement":
        for statement in body["Statements"]:
            words = statement["Statement"].split()
            kind = words[0].capitalize()
            table = words[2 if kind == "Insert" else 1].strip('"')
            yield on(f"PartiQL{kind}", table)
    elif name == "BatchGetItem":
        for table, wanted in body["RequestItems"].items():
            yield on(name, table, *(key["k"]["S"] for key in wanted["Keys"]))
    elif name in {"GetItem", "PutItem"}:
        yield on(name, body["TableName"], (body.get("Key") or body["Item"])["k"]["S"])
    elif name == "ListTables":
        yield Request("dynamodb:ListTables", "*")
    elif name == "ImportTable":
        yield on(name, body["TableCreationParameters"]["TableName"])
    else:
        arns = [body[key] for key in ("ResourceArn", "ImportArn", "BulkOperationArn") if key in body]
        yield on(name, arns[0].partition(":table/")[2] if arns else body["TableName"])


@dataclass(slots=True)
class Extras:
    """Backups and tags of one table, which DynamoDB Local does not have."""

    recovery: str = "DISABLED"
    tags: dict[str, str] = field(default_factory=dict)

    def serve(self, client: BaseClient) -> None:
        names = ("DescribeContinuousBackups", "UpdateContinuousBackups", "ListTagsOfResource", "TagResource")
        for name in names:
            client.meta.events.register(f"before-send.dynamodb.{name}", getattr(self, f"_{name}"))

    def _DescribeContinuousBackups(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:  # noqa: N802
        status = {"PointInTimeRecoveryDescription": {"PointInTimeRecoveryStatus": self.recovery}}
        return answer(request, 200, {"ContinuousBackupsDescription": {"ContinuousBackupsStatus": "ENABLED"} | status})

    def _UpdateContinuousBackups(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:  # noqa: N802
        wanted = json.loads(request.body)["PointInTimeRecoverySpecification"]
        self.recovery = "ENABLED" if wanted["PointInTimeRecoveryEnabled"] else "DISABLED"
        return answer(request, 200, {})

    def _ListTagsOfResource(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:  # noqa: N802
        return answer(request, 200, {"Tags": [{"Key": key, "Value": value} for key, value in self.tags.items()]})

    def _TagResource(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:  # noqa: N802
        self.tags |= {tag["Key"]: tag["Value"] for tag in json.loads(request.body)["Tags"]}
        return answer(request, 200, {})


def matches(recorder: Recorder, document: dict[str, Any]) -> None:
    """Every request is allowed by *document*, and everything that it allows was asked for."""
    assert recorder.requests
    assert [request for request in recorder.requests if not allows(document, request)] == []
    assert actions(document) - recorder.actions == set()


@pytest.fixture
def local(dynamodb_local: DynamoDbLocal) -> DynamoDbLocal:
    dynamodb_local.drop_tables()
    return dynamodb_local


@pytest.fixture(params=["per_view", "shared"])
def url(request: pytest.FixtureRequest, local: DynamoDbLocal) -> str:
    return f"dynamodb://key:pw@{REGION}/team?table={request.param}&share=1&endpoint_url={local.endpoint}"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    table = Table(tmp_path / "table")
    table.append(*(row(f"u{number}", number % 7, float(number)) for number in range(60)))
    return table


SETTINGS = TableSettings(point_in_time_recovery=True, tags={"team": "fraud", "cost centre": "7"})
LACKING = ["created, on demand", "time to live by x", "point-in-time recovery", "tags team, cost centre"]


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_setup_asks_for_what_its_policy_has(url: str) -> None:
    recorder = Recorder()
    with DynamoDbStore(url, SETTINGS) as store:
        Extras().serve(store.client.api)
        recorder.listen(store.client.api)

        done = store.setup("spending")
        again = store.setup("spending")

        assert (done, again) == (LACKING, [])
        matches(recorder, policy(store.address, "setup"))


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_setup_does_what_is_lacking_and_leaves_other_tags_alone(url: str) -> None:
    extras = Extras(recovery="ENABLED", tags={"team": "other", "owner": "me"})
    with DynamoDbStore(url, SETTINGS) as store:
        extras.serve(store.client.api)

        done = store.setup("spending")

    assert done == [*LACKING[:2], LACKING[3]]
    assert extras.tags == {"team": "fraud", "owner": "me", "cost centre": "7"}


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_runs_ask_for_what_the_policy_of_a_writer_has(url: str, table: Table) -> None:
    recorder = Recorder()
    with DynamoDbStore(url) as store:
        store.setup("spending")
        recorder.listen(store.client.api)

        incremental(table, store)
        table.append(*(row(f"u{number}", 9, 1.0) for number in range(30)), row("new", 9))
        incremental(table, store)
        table.delta.delete("user_id = 'u3'")
        incremental(table, store)
        pipeline.backfill(table.view, store, run("backfill"), Interval(T0, at(5)))
        pipeline.rebuild(table.view, store, run("rebuild"))
        plan_of(table, store)
        store.estimate(table.view, 1_000, "backfill", first=False)
        watermark.read(store, "spending")
        store.describe()

        assert "u3" not in served(table.view, store)
        assert len(served(table.view, store)) == 60
        matches(recorder, policy(store.address, "writer"))


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_readers_ask_for_what_the_policy_of_a_reader_has(url: str, table: Table) -> None:
    recorder = Recorder()
    with DynamoDbStore(url) as store:
        store.setup("spending")
        incremental(table, store)
    with DynamoDbStore(url) as store:
        recorder.listen(store.client.api)

        found = vectors(table.view, store, [b"u1", b"nobody"])
        several = store.read_views({"spending": [b"u1", b"u2"]})

        assert [vector.status for vector in found] == ["present", "missing"]
        assert len(several["spending"]) == 2
        matches(recorder, policy(store.address, "reader"))


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_nothing_that_runs_ask_for_is_allowed_to_a_reader_but_reading(url: str, table: Table) -> None:
    recorder = Recorder()
    with DynamoDbStore(url) as store:
        store.setup("spending")
        recorder.listen(store.client.api)
        incremental(table, store)

        reader = policy(store.address, "reader")

    allowed = {request.action for request in recorder.requests if allows(reader, request)}
    assert allowed == {"dynamodb:BatchGetItem", "dynamodb:GetItem"}


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
@pytest.mark.parametrize("makes_table", [True, False])
def test_bulk_load_asks_for_what_the_policies_of_bulk_writer_and_setup_have(
    local: DynamoDbLocal,
    object_store: ObjectStore,
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    *,
    makes_table: bool,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", object_store.options["AWS_ENDPOINT_URL"])
    url, time, recorder = f"dynamodb://key:pw@{REGION}/team?endpoint_url={local.endpoint}", Time(), Recorder()
    with DynamoDbStore(url, clock=time.clock, sleep=time.sleep) as store:
        if not makes_table:
            store.setup("spending")
        operations = Operations(local.client, object_store.client)
        operations.serve(store.client.api)
        recorder.listen(store.client.api)

        with store.bulk("spending", f"s3://{BUCKET}/policy") as files:
            recorder.listen(files.s3)  # type: ignore[attr-defined]
            plan = pipeline.begin(table.view, files, plan_of(table, files))
            pipeline.write_piece(table.view, files, plan, 0, now=NOW)
            files.load()

        together = {
            "Statement": [
                statement
                for role in ("bulk", "writer", "setup")
                for statement in policy(store.address, role, bucket=BUCKET)["Statement"]
            ]
        }
        asked_for = {  # the stand-in for AWS knows its operations by the table name t
            replace(request, resource=request.resource.replace(":table/t/", ":table/team.spending/"))
            for request in recorder.requests
        }
        assert [request for request in asked_for if not allows(together, request)] == []
        asked = {"ImportTable", "DescribeImport"} if makes_table else {"StartBulkPutItems", "DescribeBulkOperation"}
        expected = {f"dynamodb:{name}" for name in asked} | {"s3:PutObject", "s3:DeleteObject"}
        assert recorder.actions & actions(policy(store.address, "bulk")) == expected


def test_policy_of_a_bulk_load_has_what_the_two_ways_need_and_what_aws_needs_itself() -> None:
    ways = {"ImportTable", "DescribeImport", "StartBulkPutItems", "DescribeBulkOperation"}

    seen = {f"dynamodb:{name}" for name in ways} | {"s3:PutObject", "s3:DeleteObject"}

    assert actions(policy(PER_VIEW, "bulk")) == seen | BY_AWS_ITSELF


# --- what the documentation shows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_policies_in_the_documentation_are_those_of_the_command(role: str) -> None:
    shown = json.loads((Path(__file__).parents[1] / "docs" / "iam" / f"{role}.json").read_text())

    assert shown == policy(Address.parse("dynamodb://eu-central-1"), role)
