"""What the tests of the DynamoDB store stand on: a server for this machine alone, that answers as DynamoDB does, and ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import boto3
import pytest

from tests import dynamodb_local as dynamodb
from tests.dynamodb_local import SCRIPT, DynamoDbLocal
from tests.processes import GRACE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("dynamodb")]

TABLE = "fs.spending"


@pytest.fixture
def local(dynamodb_local: DynamoDbLocal) -> DynamoDbLocal:
    """One empty table, by the key ``k``."""
    dynamodb_local.drop_tables()
    dynamodb_local.client.create_table(
        TableName=TABLE,
        KeySchema=[{"AttributeName": "k", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "k", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    return dynamodb_local


def test_items_are_read_as_they_were_put_over_many_pages(local: DynamoDbLocal) -> None:
    put = {str(number): bytes([number]) * 300_000 for number in range(8)}  # a page has 1 MB
    for key, value in put.items():
        local.client.put_item(TableName=TABLE, Item={"k": {"S": key}, "v": {"B": value}})

    items = local.items(TABLE)

    assert {item["k"]["S"]: item["v"]["B"] for item in items} == put
    assert len(items) == len(put)


def test_every_account_and_region_sees_the_same_tables_until_they_are_dropped(local: DynamoDbLocal) -> None:
    other = boto3.client(
        "dynamodb",
        endpoint_url=local.endpoint,
        aws_access_key_id="other",
        aws_secret_access_key="other",
        region_name="us-east-1",
    )

    before = other.list_tables()["TableNames"]
    local.drop_tables()
    after = other.list_tables()["TableNames"]
    other.close()

    assert (before, after) == ([TABLE], [])


def test_update_whose_condition_fails_returns_the_item(local: DynamoDbLocal) -> None:
    item = {"k": {"S": "a"}, "v": {"N": "6"}}
    local.client.put_item(TableName=TABLE, Item=item)

    answer = local.client.batch_execute_statement(
        Statements=[
            {
                "Statement": f'UPDATE "{TABLE}" SET v=? WHERE k=? AND v<?',
                "Parameters": [{"N": "5"}, {"S": "a"}, {"N": "5"}],
                "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
            }
        ]
    )

    (error,) = [response["Error"] for response in answer["Responses"]]
    assert (error["Code"], error["Item"]) == ("ConditionalCheckFailed", item)
    assert local.items(TABLE) == [item]


def test_only_this_machine_is_answered(local: DynamoDbLocal) -> None:
    with socket.socket() as probe:
        probe.settimeout(1)
        found = probe.connect_ex(("127.0.0.2", local.port))  # who listens on every interface answers here, too

    assert found != 0


@pytest.mark.usefixtures("dynamodb_local")
def test_no_process_and_no_port_are_left_behind() -> None:
    with dynamodb.running() as local:
        local.client.list_tables()

    with pytest.raises(ProcessLookupError):
        os.kill(local.process.pid, 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", local.port))


@pytest.mark.usefixtures("dynamodb_local")
def test_server_ends_with_the_process_that_started_it() -> None:
    with dynamodb.running() as local:
        assert local.process.stdin is not None

        local.process.stdin.close()  # as the system does when a process ends, by whatever signal

        assert local.process.wait(GRACE) == 0


def test_missing_program_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert done.stderr.startswith("could not start DynamoDB Local: found no java on PATH, expected a JDK, 17 or newer")
