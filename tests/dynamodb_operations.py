"""ImportTable and StartBulkPutItems in place of AWS, which alone has them: files on S3 in, items in DynamoDB Local out.

Requests are checked by botocore's own model of the API. Shares no code with the product.
"""

# ruff: noqa: N802, N803 - the names of the API

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import boto3
import pyarrow as pa
from botocore.exceptions import ClientError
from botocore.validate import validate_parameters

from tests.dynamodb_local import REGION
from tests.dynamodb_stub import answer

if TYPE_CHECKING:
    from botocore.awsrequest import AWSPreparedRequest, AWSResponse
    from botocore.client import BaseClient
    from mypy_boto3_dynamodb import DynamoDBClient

__all__ = ["Operations"]

OPERATIONS = ("ImportTable", "DescribeImport", "StartBulkPutItems", "DescribeBulkOperation")
IMPORT, BULK = (
    "arn:aws:dynamodb:eu-central-1:1:table/t/import/1",
    "arn:aws:dynamodb:eu-central-1:1:table/t/bulk-operation/1",
)


@dataclass(slots=True)
class Operations:
    """``lose``: every so-manieth item is not taken, and counted as failed. ``ends``: as what it ends. ``asked``: names of requests that came.

    ``lines``: what files had, in order.
    """

    local: DynamoDBClient
    s3: Any
    lose: int = 0
    ends: str = "COMPLETED"
    asked: list[str] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0
    rate: int = 0

    def serve(self, client: BaseClient) -> None:
        """Answer these requests of *client* from now on."""
        for name in OPERATIONS:
            client.meta.events.register(f"before-send.dynamodb.{name}", self._answer)

    def _answer(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        name = request.headers["X-Amz-Target"].decode().rpartition(".")[2]
        given = json.loads(request.body)
        model = boto3.client("dynamodb", region_name=REGION).meta.service_model.operation_model(name)
        validate_parameters(given, model.input_shape)
        self.asked.append(name)
        return answer(request, 200, getattr(self, f"_{name}")(**given))

    # --- the four, as they are called there ---

    def _ImportTable(
        self, S3BucketSource: Any, InputFormat: str, InputCompressionType: str, TableCreationParameters: Any, **_: Any
    ) -> Any:
        assert (InputFormat, InputCompressionType) == ("DYNAMODB_JSON", "ZSTD")
        self.local.create_table(**TableCreationParameters)
        self._take(TableCreationParameters["TableName"], S3BucketSource)
        return self._import("IN_PROGRESS")

    def _DescribeImport(self, ImportArn: str) -> Any:
        assert ImportArn == IMPORT
        return self._import(self.ends if self.asked.count("DescribeImport") > 1 else "IN_PROGRESS")

    def _import(self, status: str) -> Any:
        told = {"ImportArn": IMPORT, "ImportStatus": status, "ErrorCount": self.failed}
        if status == "FAILED":
            told |= {"FailureCode": "S3AccessDenied", "FailureMessage": "no right to read"}
        return {"ImportTableDescription": told | {"ImportedItemCount": len(self.lines) - self.failed}}

    def _StartBulkPutItems(
        self, InputS3Configuration: Any, OutputS3Configuration: Any, TableName: str, MaxWriteRequestUnits: int, **_: Any
    ) -> Any:
        assert (InputS3Configuration.pop("InputFormat"), InputS3Configuration.pop("InputCompressionType")) == (
            "DYNAMODB_JSON",
            "ZSTD",
        )
        assert OutputS3Configuration["S3KeyPrefix"] != InputS3Configuration["S3KeyPrefix"]
        assert MaxWriteRequestUnits >= 1024
        self.rate = MaxWriteRequestUnits
        self._take(TableName, InputS3Configuration)
        return self._bulk("IN_PROGRESS")

    def _DescribeBulkOperation(self, BulkOperationArn: str) -> Any:
        assert BulkOperationArn == BULK
        return self._bulk(self.ends)

    def _bulk(self, status: str) -> Any:
        told = {"BulkOperationArn": BULK, "BulkOperationStatus": status, "FailedItemCount": self.failed}
        return {"BulkOperationDescription": told | {"ProcessedItemCount": len(self.lines)}}

    # --- what they do ---

    def _take(self, table: str, source: Any) -> None:
        for found in self.s3.list_objects_v2(Bucket=source["S3Bucket"], Prefix=source["S3KeyPrefix"])["Contents"]:
            packed = self.s3.get_object(Bucket=source["S3Bucket"], Key=found["Key"])["Body"].read()
            text = pa.CompressedInputStream(io.BytesIO(packed), "zstd").read()
            assert text.endswith(b"\n")
            for line in map(json.loads, text.splitlines()):
                self.lines.append(line)
                self._put(table, **line)

    def _put(self, table: str, Item: Any, **condition: Any) -> None:
        if self.lose and len(self.lines) % self.lose == 0 and "e" in Item:
            self.failed += 1
            return
        item = {
            name: {kind: base64.b64decode(v) if kind == "B" else v for kind, v in value.items()}
            for name, value in Item.items()
        }
        try:
            self.local.put_item(TableName=table, Item=item, **condition)
        except ClientError as error:
            if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                raise
