"""The tables of a store: made by ``materialize setup`` and never by a run; their write capacity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from materialize.errors import OnlineStoreError
from materialize.online.dynamodb.items import EXPIRES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mypy_boto3_dynamodb import DynamoDBClient

    from materialize.model import TableSettings

__all__ = ["definition", "exists", "make", "write_capacity"]

#: Write units a second that a new on-demand table takes at once
#: (https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/on-demand-capacity-mode.html).
ON_DEMAND_START = 4_000


def definition(table: str, keys: Sequence[str], settings: TableSettings) -> dict[str, Any]:
    """What CreateTable and ImportTable are told of a table with *keys*."""
    found: dict[str, Any] = {
        "TableName": table,
        "KeySchema": [
            {"AttributeName": key, "KeyType": kind} for key, kind in zip(keys, ("HASH", "RANGE"), strict=False)
        ],
        "AttributeDefinitions": [{"AttributeName": key, "AttributeType": "S"} for key in keys],
        "BillingMode": "PAY_PER_REQUEST",
    }
    if settings.write_units is not None:
        units = {"ReadCapacityUnits": settings.read_units, "WriteCapacityUnits": settings.write_units}
        found |= {"BillingMode": "PROVISIONED", "ProvisionedThroughput": units}
    return found


def exists(api: DynamoDBClient, table: str) -> bool:
    """Whether there is such a table, also one that is just being made."""
    try:
        api.describe_table(TableName=table)
    except api.exceptions.ResourceNotFoundException:
        return False
    return True


def make(api: DynamoDBClient, table: str, keys: Sequence[str], settings: TableSettings) -> list[str]:
    """Make *table* if it is not there, and switch on what it lacks. Returns: what was done; nothing, the second time.

    Of a table that is there neither capacity nor billing is changed, and nothing is switched off or taken away. Raises
    OnlineStoreError for a table with other keys.
    """
    wanted, done = definition(table, keys, settings), []
    try:
        api.create_table(**wanted)
        done.append("created, provisioned" if settings.write_units else "created, on demand")
    except api.exceptions.ResourceInUseException:
        pass
    api.get_waiter("table_exists").wait(TableName=table)
    there: Any = api.describe_table(TableName=table)["Table"]
    if _keys_of(there) != _keys_of(wanted):
        raise OnlineStoreError(
            f"could not set up table {table}: found a table with the keys {_keys_of(there)}, expected {_keys_of(wanted)}. "
            "It was left alone. It belongs to something else: give the store another prefix."
        )
    done += _time_to_live(api, table)
    if settings.point_in_time_recovery:
        done += _recovery(api, table)
    if settings.tags:
        done += _tags(api, there["TableArn"], settings)
    return done


def _keys_of(table: dict[str, Any]) -> str:
    kinds = {one["AttributeName"]: one["AttributeType"] for one in table["AttributeDefinitions"]}
    return ", ".join(f"{key['AttributeName']} ({kinds[key['AttributeName']]})" for key in table["KeySchema"])


def _time_to_live(api: DynamoDBClient, table: str) -> list[str]:
    found = api.describe_time_to_live(TableName=table)["TimeToLiveDescription"]
    if found.get("TimeToLiveStatus") in {"ENABLED", "ENABLING"} and found.get("AttributeName") == EXPIRES:
        return []
    api.update_time_to_live(TableName=table, TimeToLiveSpecification={"Enabled": True, "AttributeName": EXPIRES})
    return [f"time to live by {EXPIRES}"]


def _recovery(api: DynamoDBClient, table: str) -> list[str]:
    found = api.describe_continuous_backups(TableName=table)["ContinuousBackupsDescription"]
    if found.get("PointInTimeRecoveryDescription", {}).get("PointInTimeRecoveryStatus") == "ENABLED":
        return []
    api.update_continuous_backups(
        TableName=table, PointInTimeRecoverySpecification={"PointInTimeRecoveryEnabled": True}
    )
    return ["point-in-time recovery"]


def _tags(api: DynamoDBClient, arn: str, settings: TableSettings) -> list[str]:
    pages = api.get_paginator("list_tags_of_resource").paginate(ResourceArn=arn)
    found = {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}
    lacking = {key: value for key, value in settings.tags.items() if found.get(key) != value}
    if not lacking:
        return []
    api.tag_resource(ResourceArn=arn, Tags=[{"Key": key, "Value": value} for key, value in lacking.items()])
    return [f"tags {', '.join(lacking)}"]


def write_capacity(api: DynamoDBClient, table: str) -> float:
    """The write units a second that *table* takes now: as provisioned, or what an on-demand table is warm for, or limited to."""
    found: Any = api.describe_table(TableName=table)["Table"]
    provisioned = found.get("ProvisionedThroughput", {}).get("WriteCapacityUnits")
    if provisioned:
        return float(provisioned)
    warm = found.get("WarmThroughput", {}).get("WriteUnitsPerSecond") or ON_DEMAND_START
    limit = found.get("OnDemandThroughput", {}).get("MaxWriteRequestUnits", -1)
    return float(warm if limit <= 0 else min(warm, limit))
