"""boto3's client of one address, and requests whose bodies are ready: botocore signs, sends, retries and reads them.

The first attempt at what runs write takes a shorter way (`materialize.online.dynamodb.attempt`).
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import boto3
import botocore
from botocore import exceptions as driver
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.session import get_session

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.dynamodb.attempt import DONE, Attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client

    from materialize.online.dynamodb.address import Address
    from materialize.online.reading import ReadTerms

__all__ = ["SERVER_ERROR", "THROTTLES", "Client"]

#: What says "too fast", of a statement and of a request, without the ending Exception
#: (https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Programming.Errors.html).
THROTTLES = frozenset(("ThrottlingError", "Throttling", "ProvisionedThroughputExceeded", "RequestLimitExceeded"))
#: Of botocore, for one request: lost connections and errors of the server pass by themselves.
ATTEMPTS = 4
#: Requests of a model server at once: one for each thread that reads; more wait.
READERS = 256
#: HTTP statuses from here on are the server's own errors.
SERVER_ERROR = 500
EXPIRED = frozenset(("ExpiredToken", "RequestExpired"))
#: What botocore wants to be given before it makes a request.
NOTHING: dict[str, dict[str, Any]] = {
    "batch_execute_statement": {"Statements": []},
    "batch_get_item": {"RequestItems": {}},
}
#: HTTP statuses below this one are answers.
REFUSED = 300
#: What runs make by the million: its first attempt takes the shorter way.
OFTEN = "batch_execute_statement"


class Ready(NamedTuple):
    """How botocore asks for an operation: its model and the request without a body. ``first``: how its first attempt is made, if in another way."""

    model: Any
    request: dict[str, Any]
    first: Attempt | None


class Client:
    """One boto3 client, made at its first use, for all threads. ``call`` sends a body that is ready."""

    def __init__(self, address: Address, terms: ReadTerms | None = None) -> None:
        self.address, self.terms = address, terms
        self._lock = threading.RLock()
        self._made: DynamoDBClient | None = None
        self.attempts = ATTEMPTS if terms is None else 1
        self.requests = address.requests if terms is None else max(address.requests, READERS)
        self._under_way = threading.BoundedSemaphore(self.requests)
        self._ready: dict[str, Ready] = {}
        self._came = threading.local()

    @property
    def api(self) -> DynamoDBClient:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def call(self, operation: str, body: bytes) -> dict[str, Any]:
        """The answer to *operation* (as boto3 names it) with *body*, which is DynamoDB's JSON. Raises what botocore raises.

        botocore makes the request once, and then again and again only signs it with another body, sends, retries and reads it: that
        is two thirds of its time for a request of 25 statements. Of `OFTEN` even that is left to it only where the first attempt brings
        no answer: it then takes what came for its own, so that it waits, counts, retries and tells as ever.
        """
        ready = self._ready.get(operation) or self._prepared(operation)
        own = {"headers": dict(ready.request["headers"]), "context": dict(ready.request["context"]), "body": body}
        endpoint: Any = self.api._endpoint  # type: ignore[attr-defined]  # noqa: SLF001
        http: Any
        answer: Any
        with self._under_way:
            http, answer = self._at_once(ready, body) or endpoint.make_request(ready.model, ready.request | own)
        # each answer gives back what retries took of botocore's quota for them; without, it makes no more after some 35
        told = {"http_response": http, "parsed": answer, "model": ready.model, "context": own["context"]}
        self.api.meta.events.emit(f"after-call.dynamodb.{ready.model.name}", **told)
        if http.status_code >= REFUSED:
            raise driver.ClientError(answer, operation)
        found: dict[str, Any] = answer
        return found

    def _at_once(self, ready: Ready, body: bytes) -> tuple[AWSResponse, dict[str, Any]] | None:
        """The answer to the first attempt; None, and botocore is given what came of it, if that is something else."""
        if ready.first is None or (request := ready.first.request(body)) is None:
            return None
        try:
            http = ready.first.send(request)
        except driver.BotoCoreError as error:
            self._came.first = error
            return None
        if http.status_code != DONE:
            self._came.first = http
            return None
        return http, ready.first.answer(http)

    def _give(self, request: AWSPreparedRequest, **_: object) -> AWSResponse | None:  # noqa: ARG002 - botocore names it
        """What came of the first attempt, once, where botocore is about to make it."""
        came: AWSResponse | Exception | None = getattr(self._came, "first", None)
        self._came.first = None
        if isinstance(came, Exception):
            raise came
        return came

    def _prepared(self, operation: str) -> Ready:
        """*operation*, without a body. Sends nothing."""
        found: list[tuple[Any, dict[str, Any]]] = []

        def keep(model: Any, params: dict[str, Any], **_: object) -> tuple[Any, dict[str, Any]]:
            found.append((model, params))
            return SimpleNamespace(status_code=200), {}

        with self._lock:
            events: Any = self.api.meta.events
            events.register_first("before-call.dynamodb", keep)
            try:
                getattr(self.api, operation)(**NOTHING[operation])
            finally:
                events.unregister("before-call.dynamodb", keep)
            model, request = found[0]
            first = Attempt(self.api, model, request) if operation == OFTEN else None
            self._ready[operation] = Ready(model, request, first)
            return self._ready[operation]

    def close(self) -> None:
        with self._lock:
            self._ready.clear()
            if self._made is not None:
                self._made.close()
                self._made = None

    def s3(self) -> S3Client:
        """A client of S3 with the same credentials; the caller closes it."""
        return self._session().client("s3", config=self._config(parameter_validation=True))

    def _make(self) -> DynamoDBClient:
        # its DEBUG lines have whole requests: tokens, keys of entities and values
        logging.getLogger("botocore").setLevel(logging.INFO)
        config = self._config(parameter_validation=False)
        made = self._session().client("dynamodb", endpoint_url=self.address.endpoint_url, config=config)
        events: Any = made.meta.events
        events.register("before-send.dynamodb.BatchExecuteStatement", self._give)
        return made

    def _session(self) -> boto3.Session:
        address = self.address
        session = boto3.Session(address.key, address.secret, address.session_token, address.region)
        return session if address.role_arn is None else _in_role(session, address.role_arn)

    def _config(self, *, parameter_validation: bool) -> Config:
        connect = read = self.address.timeout
        if self.terms is not None:
            connect, read = min(self.terms.connect, self.terms.deadline), self.terms.read
        return Config(
            parameter_validation=parameter_validation,
            connect_timeout=connect,
            read_timeout=read,
            max_pool_connections=self.requests + 2,
            retries={"mode": "standard", "total_max_attempts": self.attempts},
            # a whole one: botocore else composes its own, twice for each request, in 5 % of the request's time
            user_agent=f"Boto3/{boto3.__version__} Botocore/{botocore.__version__} materialize",
        )

    @contextmanager
    def translated(self, doing: str, view: str) -> Iterator[None]:
        """Turn the driver's errors into ours, once, naming what was done and where."""
        what = f"could not {doing} {self.address.location}"
        try:
            yield
        except driver.ClientError as error:
            raise _translated(error, what, self.address.table(view), view) from None
        except (driver.NoCredentialsError, driver.PartialCredentialsError, driver.CredentialRetrievalError) as error:
            raise OnlineStoreError(
                f"{what}: {error}. Nothing was written. Give credentials by boto3's own means (environment, profile, role), or an Airflow connection."
            ) from None
        except (driver.HTTPClientError, driver.ConnectionError) as error:
            waited = f"{ATTEMPTS} attempts of at most {self.address.timeout:g} s each"
            if self.terms is not None:
                waited = f"waited at most {self.terms.deadline:g} s"
            raise UnavailableError(f"{what}: {error} ({waited})") from None
        except driver.BotoCoreError as error:
            raise OnlineStoreError(f"{what}: {error}. Running again is harmless.") from None


def _in_role(session: boto3.Session, role_arn: str) -> boto3.Session:
    """A session with the credentials of a role, that are fetched again before they expire."""
    core: Any = get_session()
    fetcher = AssumeRoleCredentialFetcher(session._session.create_client, session.get_credentials(), role_arn)  # noqa: SLF001 - as botocore's own profiles do
    core._credentials = DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")  # noqa: SLF001
    return boto3.Session(botocore_session=core, region_name=session.region_name)


def _translated(error: driver.ClientError, what: str, table: str, view: str) -> OnlineStoreError:
    told, text = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
    found, code = f"{what}: {told}: {text.partition(chr(10))[0].rstrip('.')}", told.removesuffix("Exception")
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in THROTTLES or status >= SERVER_ERROR:
        return UnavailableError(found)
    if code == "ResourceNotFound":
        return OnlineStoreError(
            f"{what}: found no table {table}, expected one. Nothing was written. Run: materialize setup {view}"
        )
    if code in EXPIRED:
        return OnlineStoreError(
            f"{found}. Part of the run may be written; the watermark stays. Give fresh credentials and run again."
        )
    if "AccessDenied" in code or "Unauthorized" in code:
        return OnlineStoreError(
            f"{found}. Nothing was written by this call. What is needed is printed by: materialize iam-policy"
        )
    return OnlineStoreError(f"{found}. Running again is harmless.")
