"""A DynamoDB that does nothing: requests in, the fitting success out at once, on a free loopback port until its standard input ends.

    python benchmarks/null_dynamodb.py

It keeps connections open and reads of a request no more than its length, its operation and how many statements it has. So what a
client costs can be measured with hardly any server beside it. Nothing is stored, and every table is there.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import zlib

#: What one statement of a request begins with; the list of statements has another name.
STATEMENT = b'"Statement":'
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
OPERATION = re.compile(rb"\r\nx-amz-target: *DynamoDB_\d+\.(\w+)", re.IGNORECASE)
END_OF_HEAD = b"\r\n\r\n"
#: As DynamoDB's own answers have them: botocore reads the headers, and checks the sum in its older mode of retries.
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.0\r\nx-amzn-RequestId: 00000000-0000-0000-0000-000000000000\r\n"
    b"x-amz-crc32: %d\r\nContent-Length: %d\r\n\r\n%b"
)
#: An active on-demand table with the key that the product's tables have; the other clients do not look at it.
TABLE = {
    "TableName": "null",
    "TableStatus": "ACTIVE",
    "TableArn": "arn:aws:dynamodb:eu-central-1:000000000000:table/null",
    "KeySchema": [{"AttributeName": "k", "KeyType": "HASH"}],
    "AttributeDefinitions": [{"AttributeName": "k", "AttributeType": "S"}],
    "BillingModeSummary": {"BillingMode": "PAY_PER_REQUEST"},
    "ProvisionedThroughput": {"ReadCapacityUnits": 0, "WriteCapacityUnits": 0},
}
#: Answers by operation; any other gets an empty object.
ANSWERS = {
    "BatchGetItem": {"Responses": {}, "UnprocessedKeys": {}},
    "BatchWriteItem": {"UnprocessedItems": {}},
    "CreateTable": {"TableDescription": TABLE},
    "DeleteTable": {"TableDescription": TABLE},
    "DescribeTable": {"Table": TABLE},
    "DescribeTimeToLive": {"TimeToLiveDescription": {"TimeToLiveStatus": "ENABLED", "AttributeName": "x"}},
    "ListTables": {"TableNames": []},
    "ListTagsOfResource": {"Tags": []},
    "Query": {"Items": [], "Count": 0, "ScannedCount": 0},
    "Scan": {"Items": [], "Count": 0, "ScannedCount": 0},
}


def framed(body: bytes) -> bytes:
    """A whole HTTP answer."""
    return HEAD % (zlib.crc32(body), len(body), body)


READY = {operation.encode(): framed(json.dumps(answer).encode()) for operation, answer in ANSWERS.items()}
EMPTY = framed(b"{}")


def answer(operation: bytes, body: bytes) -> bytes:
    """The answer to one request; each statement of a batch has been taken."""
    if operation == b"BatchExecuteStatement":
        return framed(b'{"Responses":[%b]}' % b",".join([b"{}"] * body.count(STATEMENT)))
    return READY.get(operation, EMPTY)


class Connection(asyncio.Protocol):
    """One connection: requests one after the other, as many as come."""

    def __init__(self) -> None:
        self.received = b""
        self.body_at = self.whole = 0
        self.operation = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while self._has_head() and len(self.received) >= self.whole:
            body, self.received = self.received[self.body_at : self.whole], self.received[self.whole :]
            self.whole = 0
            self.transport.write(answer(self.operation, body))

    def _has_head(self) -> bool:
        """Whether the head of the next request has come; it is read once."""
        if self.whole:
            return True
        end = self.received.find(END_OF_HEAD)
        if end < 0:
            return False
        head = self.received[:end]
        length, operation = LENGTH.search(head), OPERATION.search(head)
        self.operation = operation[1] if operation else b""
        self.body_at = end + len(END_OF_HEAD)
        self.whole = self.body_at + (int(length[1]) if length else 0)
        return True


async def serve() -> None:
    """Answer until the standard input ends, as it does when the process at its other end does."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0)
    print(
        f"a DynamoDB that does nothing answers on http://127.0.0.1:{server.sockets[0].getsockname()[1]} now", flush=True
    )
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
