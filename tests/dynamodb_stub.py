"""A table that refuses: answers in place of DynamoDB, inside botocore's client, some of them throttles. Seeded, so repeatable.

It knows the two statements of a first load and of newer rows, and BatchGetItem; what it holds is plain Python.
"""

from __future__ import annotations

import base64
import json
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import AWSResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from botocore.awsrequest import AWSPreparedRequest
    from botocore.client import BaseClient

__all__ = ["Stub", "Time", "answer", "before_sending", "payload"]

STATEMENTS, KEYS = 25, 100


@dataclass(slots=True)
class Stub:
    """``share``: of statements that are refused, ``unread``: of keys, ``whole``: of requests. ``requests``: of statements, that came."""

    seed: int
    share: float = 0.5
    unread: float = 0.5
    whole: float = 0.0
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: int = 0
    whole_throttles: int = 0
    statements: int = 0
    rng: random.Random = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def serve(self, client: BaseClient) -> None:
        """Answer all requests of *client* from now on."""
        before_sending(client, self._write, "BatchExecuteStatement")
        before_sending(client, self._read, "BatchGetItem")

    def _write(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        with self.lock:
            return self._written(request)

    def _written(self, request: AWSPreparedRequest) -> AWSResponse:
        statements = json.loads(request.body)["Statements"]
        assert 0 < len(statements) <= STATEMENTS
        self.requests += 1
        if self.rng.random() < self.whole:
            self.whole_throttles += 1
            return answer(request, 400, {"__type": "com.amazonaws#ProvisionedThroughputExceededException"})
        self.statements += len(statements)
        return answer(request, 200, {"Responses": [self._statement(**statement) for statement in statements]})

    def _statement(self, Statement: str, Parameters: list[Any], **_: Any) -> dict[str, Any]:  # noqa: N803
        if self.rng.random() < self.share:
            return error(self.rng.choice(["ThrottlingError", "ProvisionedThroughputExceeded", "InternalServerError"]))
        if Statement.startswith("INSERT"):
            names = [part.split("'")[1] for part in Statement.split(",")]
            item = dict(zip(names, Parameters, strict=True))
            if item["k"]["S"] in self.items:
                return error("DuplicateItem")
            self.items[item["k"]["S"]] = item
            return {}
        names = [word[:-2] for word in Statement.split(" WHERE ", maxsplit=1)[0].split() if word.endswith("=?")]
        changes, key = dict(zip(names, Parameters, strict=False)), Parameters[len(names)]["S"]
        if key not in self.items:
            return error("ConditionalCheckFailed")
        if int(changes["e"]["N"]) <= int(self.items[key]["e"]["N"]):
            return error("ConditionalCheckFailed", self.items[key])
        self.items[key] |= changes
        return {}

    def _read(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse:
        responses: dict[str, Any] = {}
        left: dict[str, Any] = {}
        for table, wanted in json.loads(request.body)["RequestItems"].items():
            keys = wanted["Keys"]
            assert len(keys) <= KEYS
            refused = [key for key in keys if self.rng.random() < self.unread]
            found = [self.items[key["k"]["S"]] for key in keys if key not in refused and key["k"]["S"] in self.items]
            responses[table] = found
            if refused:
                left[table] = wanted | {"Keys": refused}
        return answer(request, 200, {"Responses": responses, "UnprocessedKeys": left})


def error(code: str, item: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"Error": {"Code": code, "Message": code} | ({} if item is None else {"Item": item})}


def before_sending(client: BaseClient, hear: Callable[..., AWSResponse | None], operation: str = "") -> None:
    """*hear* gets each request of *client* before it is sent, first attempts and others, and may answer it: as by botocore's event
    before-send, which is not emitted for the product's own first attempts.
    """
    session: Any = client._endpoint.http_session  # type: ignore[attr-defined]
    send = session.send

    def heard(request: AWSPreparedRequest) -> AWSResponse:
        target: str | bytes = request.headers.get("X-Amz-Target", "")
        name = (target.decode() if isinstance(target, bytes) else target).rpartition(".")[2]
        found = hear(request=request, event_name=f"before-send.dynamodb.{name}") if operation in {"", name} else None
        return send(request) if found is None else found

    session.send = heard


class Raw:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def stream(self) -> list[bytes]:
        return [self.content]


def answer(request: AWSPreparedRequest, status: int, content: dict[str, Any]) -> AWSResponse:
    headers = {"content-type": "application/x-amz-json-1.0"}
    return AWSResponse(request.url, status, headers, Raw(json.dumps(content).encode()))


def payload(item: dict[str, Any]) -> bytes:
    """What an item's record holds behind its first four bytes."""
    return base64.b64decode(item["r"]["B"])[4:]


class Time:
    """A clock that only sleeping moves, for all threads."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.lock = threading.Lock()

    def clock(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.seconds += seconds
