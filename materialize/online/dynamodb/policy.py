"""Least-privilege IAM policies for one store, by role: ``materialize iam-policy``.

Actions by operation: https://docs.aws.amazon.com/service-authorization/latest/reference/list_amazondynamodb.html.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from botocore.session import get_session

if TYPE_CHECKING:
    from materialize.online.dynamodb.address import Address

__all__ = ["ROLES", "policy"]

#: What a role does with tables, and with nothing but cells: a plain put or get of an entity's item is nobody's.
TABLES = {
    "reader": ("BatchGetItem",),
    "writer": ("BatchGetItem", "DescribeTable", "PartiQLInsert", "PartiQLUpdate", "Scan"),
    "setup": (
        "CreateTable",
        "DescribeContinuousBackups",
        "DescribeTable",
        "DescribeTimeToLive",
        "ListTagsOfResource",
        "TagResource",
        "UpdateContinuousBackups",
        "UpdateTimeToLive",
    ),
}
CELLS = {"reader": ("GetItem",), "writer": ("GetItem", "PutItem")}
#: What a bulk load does beside a writer and setup. ImportTable writes its log with the caller's rights
#: (https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/S3DataImport.Requesting.html).
BULK = ("DescribeBulkOperation", "DescribeImport", "ImportTable", "StartBulkPutItems")
FILES = ("DeleteObject", "GetObject", "PutObject")
LOGS = (
    "CreateLogGroup",
    "CreateLogStream",
    "DescribeLogGroups",
    "DescribeLogStreams",
    "PutLogEvents",
    "PutRetentionPolicy",
)
ROLES = (*TABLES, "bulk")


def policy(address: Address, role: str, *, bucket: str = "BUCKET") -> dict[str, Any]:
    """The policy document of *role*: ``reader`` (model servers), ``writer`` (runs), ``setup``, or ``bulk`` beside these two, with files in *bucket*."""
    aws = get_session().get_partition_for_region(address.region)
    pattern = f"{address.prefix}-features" if address.shared else f"{address.prefix}.*"
    tables = f"arn:{aws}:dynamodb:{address.region}:*:table/{pattern}"
    if role == "bulk":
        statements = [
            _allow("Operations", "dynamodb", BULK, [tables, f"{tables}/*"]),
            _allow("Files", "s3", FILES, f"arn:{aws}:s3:::{bucket}/*"),
            _allow("Bucket", "s3", ("ListBucket",), f"arn:{aws}:s3:::{bucket}"),
            _allow("Logs", "logs", LOGS, f"arn:{aws}:logs:{address.region}:*:log-group:/aws-dynamodb/*"),
        ]
    else:
        statements = [_allow("Tables", "dynamodb", TABLES[role], tables)]
    if role in CELLS:
        keys = {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["{*}"]}}
        statements.append(_allow("Cells", "dynamodb", CELLS[role], tables) | {"Condition": keys})
    if role == "writer":
        statements.append(_allow("Doctor", "dynamodb", ("ListTables",), "*"))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(name: str, service: str, actions: tuple[str, ...], resource: str | list[str]) -> dict[str, Any]:
    named = [f"{service}:{action}" for action in actions]
    return {"Sid": name, "Effect": "Allow", "Action": named, "Resource": resource}
