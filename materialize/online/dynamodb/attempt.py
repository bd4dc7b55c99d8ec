"""The first attempt at a request: a ready body in, the HTTP response out, in little more than half of the CPU of botocore's own way.

Of that way it leaves out what says the same for every request of one operation: headers are prepared once, nothing listens to events,
and there is no id that would join the attempts. Credentials (also their refresh), keys and signatures, connections, TLS, timeouts and
proxies are botocore's, by the objects of the client itself. Further attempts are `client.call`'s to ask botocore for.
"""

from __future__ import annotations

import json
import time
from hashlib import sha256
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.auth import SIGV4_TIMESTAMP, SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.parsers import ResponseParserFactory
from botocore.utils import normalize_url_path

if TYPE_CHECKING:
    from botocore.awsrequest import AWSResponse
    from mypy_boto3_dynamodb import DynamoDBClient

__all__ = ["Attempt"]

DONE = 200
#: Without this text in it, an answer of BatchExecuteStatement has nothing that its JSON does not say as it is.
REFUSAL = b'"Error"'


class Attempt:
    """One operation of *client*: *model* and *request* are botocore's, the request without a body. For all threads."""

    def __init__(self, client: DynamoDBClient, model: Any, request: dict[str, Any]) -> None:
        of: Any = client
        self._signer, self._session = of._request_signer, of._endpoint.http_session  # noqa: SLF001
        self._model, self._url, self._headers = model, request["url"], request["headers"]
        signing = request["context"].get("signing") or {}
        name, region = signing.get("signing_name"), signing.get("region")
        self._scope = (name or self._signer.signing_name, region or client.meta.region_name)
        nobody: Any = None
        signed = SigV4Auth(nobody, *self._scope).headers_to_sign(AWSRequest("POST", self._url, self._headers))
        self._signed = dict(signed.items())
        self._path = normalize_url_path(urlsplit(self._url).path)
        self._parser = ResponseParserFactory().create_parser(model.service_model.resolved_protocol)

    def request(self, body: bytes) -> AWSPreparedRequest | None:
        """Signed, for now; None where that takes more than a key and its secret, or there are none."""
        auth = self._signer.get_auth_instance(*self._scope)
        if type(auth) is not SigV4Auth or auth.credentials is None:
            return None
        at = time.strftime(SIGV4_TIMESTAMP, time.gmtime())
        own = {"X-Amz-Date": at}
        if auth.credentials.token:
            own["X-Amz-Security-Token"] = auth.credentials.token
        signed = sorted((self._signed | {name.lower(): value for name, value in own.items()}).items())
        names = ";".join(name for name, _ in signed)
        lines = "".join(f"{name}:{value}\n" for name, value in signed)
        canonical = f"POST\n{self._path}\n\n{lines}\n{names}\n{sha256(body).hexdigest()}"
        when: Any = SimpleNamespace(context={"timestamp": at})
        signature = auth.signature(auth.string_to_sign(when, canonical), when)
        own["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={auth.scope(when)}, SignedHeaders={names}, Signature={signature}"
        )
        return AWSPreparedRequest("POST", self._url, self._headers | own, body, stream_output=False)

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        """Raises what botocore's own way gets: its errors of connections and timeouts."""
        response: AWSResponse = self._session.send(request)
        return response

    def answer(self, response: AWSResponse) -> dict[str, Any]:
        """What a response with the status `DONE` says, as boto3 gives it: nothing, if it is no JSON."""
        content = response.content
        if REFUSAL not in content:
            try:
                found: dict[str, Any] = json.loads(content)
            except ValueError:
                pass  # as botocore has it
            else:
                return found | {"ResponseMetadata": {"HTTPStatusCode": DONE, "RetryAttempts": 0}}
        told = {
            "status_code": DONE,
            "headers": response.headers,
            "body": content,
            "context": {"operation_name": self._model.name},
        }
        parsed: dict[str, Any] = self._parser.parse(told, self._model.output_shape)
        parsed["ResponseMetadata"]["RetryAttempts"] = 0
        return parsed
