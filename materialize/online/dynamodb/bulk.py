"""Rows in, files on S3 out, which DynamoDB reads by itself: ImportTable makes the table, StartBulkPutItems fills one. For first loads.

Files are lines of DynamoDB's JSON in zstd (docs/dynamodb.md). Neither operation has been run against AWS by this project; no row
depends on them, because the run that follows reads each row back.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from materialize.errors import ConfigError, OnlineStoreError
from materialize.online.base import BulkStore
from materialize.online.dynamodb import tables
from materialize.online.dynamodb.items import EXPIRES, KEY, ORDER, RECORD, cell_key, columns, json_lines
from materialize.order import WRITTEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mypy_boto3_dynamodb import DynamoDBClient

    from materialize.model import Retention, TableSettings
    from materialize.online.base import EncodedBatch, Outcomes
    from materialize.online.dynamodb.store import DynamoDbStore

__all__ = ["BulkFiles", "Operation"]

log = logging.getLogger(__name__)

#: The names of a bucket and of what is below it, as S3 and both operations take them.
LOCATION = r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{2,62})(?:/(?P<prefix>[A-Za-z0-9_./=-]{0,500}))?"
#: Seconds between two looks at an operation; a small one takes minutes.
LOOK_EVERY = 10.0
#: StartBulkPutItems takes no lower rate, in write units a second.
LOWEST_RATE = 1_024
#: Where both operations end well, and where the rows that were not taken are left to the run that follows.
ENDED = ("COMPLETED", "COMPLETED_WITH_ERRORS")
UNDER_WAY = ("IN_PROGRESS", "CANCELLING")


class Operation:
    """What DynamoDB does with files: started, looked at until it ends, and told.

    Raises OnlineStoreError when it fails; the message has what AWS says and where the files are.
    """

    def __init__(self, api: DynamoDBClient, table: str, bucket: str, prefix: str, token: str) -> None:
        self.api, self.table, self.bucket, self.prefix, self.token = api, table, bucket, prefix, token

    def import_table(self, keys: Sequence[str], settings: TableSettings) -> Iterator[dict[str, Any]]:
        """Make the table from the files: no write units, and nobody else writes to it before it is there."""
        made: Any = tables.definition(self.table, keys, settings)
        found: Any = self.api.import_table(
            ClientToken=self.token,
            S3BucketSource={"S3Bucket": self.bucket, "S3KeyPrefix": f"{self.prefix}/items"},
            InputFormat="DYNAMODB_JSON",
            InputCompressionType="ZSTD",
            TableCreationParameters=made,
        )
        while True:
            told = found["ImportTableDescription"]
            yield _look("ImportTable", told, told["ImportStatus"], "ImportedItemCount", "ErrorCount")
            found = self.api.describe_import(ImportArn=told["ImportArn"])

    def put_items(self, rate: float) -> Iterator[dict[str, Any]]:
        """Put the items that are not in the table, at most *rate* write units a second."""
        found: Any = self.api.start_bulk_put_items(
            ClientToken=self.token,
            InputS3Configuration={
                "S3Bucket": self.bucket,
                "S3KeyPrefix": f"{self.prefix}/items",
                "InputFormat": "DYNAMODB_JSON",
                "InputCompressionType": "ZSTD",
            },
            OutputS3Configuration={
                "S3Bucket": self.bucket,
                "S3KeyPrefix": f"{self.prefix}/report",
                "OutputType": ["ERROR", "CONDITION_CHECK_FAILURE"],
            },
            TableName=self.table,
            MaxWriteRequestUnits=max(int(rate), LOWEST_RATE),
        )
        while True:
            told = found["BulkOperationDescription"]
            yield _look("StartBulkPutItems", told, told["BulkOperationStatus"], "ProcessedItemCount", "FailedItemCount")
            found = self.api.describe_bulk_operation(BulkOperationArn=told["BulkOperationArn"])


class BulkFiles(BulkStore):
    """Files for the first load of one view. The cells of a table that is not there yet are kept here, and go into the files too."""

    def __init__(self, store: DynamoDbStore, view: str, location: str) -> None:
        found = re.fullmatch(LOCATION, location.rstrip("/"))
        if found is None:
            raise ConfigError(
                f"feature view {view!r}: could not load it by files: found another location than expected, which is s3://BUCKET/PREFIX. "
                "Nothing was written."
            )
        self.store, self.client, self.view, self.table = store, store.client, view, store.address.table(view)
        self.location, self.max_key_bytes, self.max_value_bytes = (
            store.location,
            store.max_key_bytes,
            store.max_value_bytes,
        )
        self.parallel_writes = store.parallel_writes
        token = uuid.uuid4().hex
        self.bucket, self.prefix = found["bucket"], "/".join(filter(None, (found["prefix"], self.table, token)))
        self.operation = Operation(self.client.api, self.table, self.bucket, self.prefix, token)
        self.s3 = self.client.s3()
        with self.client.translated(f"look for the table {self.table} in", view):
            self.makes_table = not store.address.shared and not tables.exists(self.client.api, self.table)
        self.rows = self.files = 0
        self.cells: dict[str, bytes] = {}
        self.counting = threading.Lock()

    @property
    def folder(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:  # noqa: ARG002 - in the records
        of = columns(batch, view, retention)
        attributes = [*self.store.keys, RECORD, *ORDER, *([EXPIRES] if EXPIRES in of else [])]
        condition = None if self.makes_table else f"attribute_not_exists({KEY})"
        self._put(json_lines(of, attributes, condition=condition), len(batch.keys))
        return np.full(len(batch.keys), WRITTEN, dtype=np.uint8)

    def load(self) -> str:
        if self.makes_table:
            self._put(b"".join(_cell_line(name, content) for name, content in self.cells.items()), len(self.cells))
            looks = self.operation.import_table(self.store.keys, self.store.settings)
        else:
            looks = self.operation.put_items(self.store.pace(self.table).full)
        with self.client.translated(f"load the files in {self.folder} into the table {self.table} of", self.view):
            told = self._ended(looks)
        if self.makes_table:
            self.store.setup(self.view)
        self._forget_files()
        return (
            f"{told['operation']} of {self.files:,} files with {self.rows:,} items: {told['items']:,} processed, {told['failed']:,} failed; "
            "then each row was read back"
        )

    def _ended(self, looks: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The last look. Raises OnlineStoreError where the operation gave up."""
        for told in looks:
            log.info("bulk load view=%s files=%s rows=%s %s", self.view, self.files, self.rows, told)
            if told["status"] not in UNDER_WAY:
                break
            self.store.sleep(LOOK_EVERY)
        if told["status"] not in ENDED:
            raise OnlineStoreError(
                f"feature view {self.view!r}: could not load {self.rows:,} items into {self.location}: {told['operation']} ended as {told['status']}: "
                f"{told['why']}. Any part of them may be in the table {self.table}; the files are left in {self.folder}. "
                f"Delete the table if it was made by this, and do it again; or run: materialize setup {self.view}, materialize incremental {self.view}"
            )
        return told

    def _put(self, lines: bytes, rows: int) -> None:
        with self.counting:
            number = self.files = self.files + 1
            self.rows += rows
        with self.client.translated(f"write files of feature view {self.view!r} to {self.folder} for", self.view):
            body = pa.Codec("zstd").compress(lines, asbytes=True)
            self.s3.put_object(Bucket=self.bucket, Key=f"{self.prefix}/items/{number:06}.json.zst", Body=body)

    def _forget_files(self) -> None:
        """The files hold features, of entities that may have to be erased some day."""
        with self.client.translated(f"delete the files in {self.folder} of", self.view):
            for number in range(1, self.files + 1):
                self.s3.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/items/{number:06}.json.zst")

    # --- what is there: what the store has, and nothing while there is no table ---

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self.store.merge(view, batch, tie_wins=tie_wins, retention=retention)  # no first load does

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return [None] * len(keys) if self.makes_table else self.store.read(view, keys)

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        return iter(()) if self.makes_table else self.store.scan(view, start=start)

    def read_cell(self, view: str, name: str) -> bytes | None:
        return self.cells.get(name) if self.makes_table else self.store.read_cell(view, name)

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        if not self.makes_table:
            return self.store.compare_and_set_cell(view, name, expected, new)
        if self.cells.get(name) != expected:
            return False
        self.cells[name] = new
        return True

    def purge(self, view: str, now_us: int) -> None:
        self.store.purge(view, now_us)

    def describe(self) -> dict[str, str]:
        return self.store.describe() | {"files": self.folder}

    def close(self) -> None:
        self.s3.close()


def _look(operation: str, told: Mapping[str, Any], status: str, items: str, failed: str) -> dict[str, Any]:
    why = " ".join(told[name] for name in ("FailureCode", "FailureMessage") if name in told)
    counts = {"items": told.get(items, 0), "failed": told.get(failed, 0)}
    return {"operation": operation, "status": status, **counts, "why": why}


def _cell_line(name: str, content: bytes) -> bytes:
    item = {KEY: {"S": cell_key(name)}, RECORD: {"B": base64.b64encode(content).decode()}}
    return json.dumps({"Item": item}).encode() + b"\n"
