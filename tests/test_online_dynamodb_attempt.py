"""The first attempt at a request is signed, sent, answered, retried and told as botocore's own way would do it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.client import OFTEN
from materialize.order import WRITTEN
from materialize.testing import FOREVER, Row, make_batch
from tests.certificates import Authority
from tests.scripted_http import CUT, RESET, SILENCE, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.scripted_http import Scripted

BODY = b'{"Statements":[{"Statement":"INSERT INTO \\"fs.view\\" VALUE {\'k\': ?}","Parameters":[{"S":"a"}]}]}'
DONE = (200, {"Responses": [{"TableName": "fs.view"}]})
HELD = {"k": {"S": "a"}, "e": {"N": "-1"}, "r": {"B": "AAEC/w=="}}
ITEM = {"Code": "ConditionalCheckFailed", "Message": "The conditional request failed", "Item": HELD}
THROTTLED = {"__type": "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException", "message": "slower"}
DENIED = {"__type": "com.amazon.coral.service#AccessDeniedException", "Message": "no"}
EXPIRED = {"__type": "com.amazon.coral.service#ExpiredTokenException", "message": "old"}
#: What comes, in order, the last one for ever; and how many requests botocore makes of it.
SCRIPTS: dict[str, tuple[list[Any], int]] = {
    "done": ([DONE], 1),
    "refused with what is there": ([(200, {"Responses": [{"TableName": "fs.view", "Error": ITEM}]})], 1),
    "statement throttled": ([(200, {"Responses": [{"Error": {"Code": "ThrottlingError"}}]})], 1),
    "500, then done": ([(500, {"__type": "InternalServerError"}), DONE], 2),
    "500 without a body, then done": ([(500, b""), DONE], 2),
    "503 of a proxy, then done": ([(503, b"<html>away</html>"), DONE], 2),
    "throttled whole, then done": ([(400, THROTTLED), DONE], 2),
    "reset, then done": ([RESET, DONE], 2),
    "reset twice, then refused": ([RESET, RESET, (400, DENIED)], 3),
    "silence, then done": ([SILENCE, DONE], 2),
    "500 for ever": ([(500, {"__type": "InternalServerError", "message": "told"})], 4),
    "reset for ever": ([RESET], 4),
    "denied": ([(400, DENIED)], 1),
    "expired": ([(400, EXPIRED)], 1),
    "moved": ([(301, b"")], 1),
    "no JSON": ([(200, b"<html>welcome</html>")], 1),
    "half of a JSON": ([(200, b'{"Responses":[{"Error":')], 1),
    "cut": ([CUT], 1),
    "no content": ([(200, b"")], 1),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's own: no configuration, credentials or proxies."""
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving() as scripted:
        yield scripted


def opened(endpoint: str, options: str = "&timeout=5", account: str = "key:s3cret@") -> DynamoDbStore:
    url = f"dynamodb://{account}eu-central-1/fs?endpoint_url={endpoint}&write_units=1000000{options}"
    return DynamoDbStore(url)


def at(server: Scripted) -> str:
    return f"http://127.0.0.1:{server.port}"


def told(store: DynamoDbStore) -> dict[str, Any]:
    """All that a call says: its answer, or its error."""
    try:
        answer = store.client.call(OFTEN, BODY)
    except ClientError as error:
        response = {name: value for name, value in error.response.items() if name != "ResponseMetadata"}
        met = error.response["ResponseMetadata"]
        return {"error": str(error), "kind": type(error), "response": response, "retries": met["RetryAttempts"]}
    except BotoCoreError as error:
        return {"error": re.sub(r"0x\w+", "", str(error)), "kind": type(error)}
    met = answer.pop("ResponseMetadata")
    return {"answer": answer, "retries": met["RetryAttempts"], "status": met["HTTPStatusCode"]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_comes_is_told_as_botocore_alone_tells_it_after_as_many_requests(server: Scripted, name: str) -> None:
    script, requests = SCRIPTS[name]

    def all_of_it(store: DynamoDbStore) -> tuple[dict[str, Any], int]:
        server.script = list(script)
        server.came.clear()
        return told(store), len(server.came)

    options = f"&timeout={0.5 if SILENCE in script else 5}"
    with opened(at(server), options) as store, opened(at(server), options) as other:
        other.client._ready[OFTEN] = other.client._prepared(OFTEN)._replace(first=None)

        assert all_of_it(store) == all_of_it(other)

        assert len(server.came) == requests


def test_first_attempt_counts_as_one_of_botocores(server: Scripted) -> None:
    server.script = [RESET, (500, {"__type": "InternalServerError"}), DONE]

    with opened(at(server)) as store:
        store.client.call(OFTEN, BODY)

    assert [came.body for came in server.came] == [BODY] * 3
    said = [came.headers.get("amz-sdk-request", "") for came in server.came]
    assert [re.findall(r"attempt=\d; max=\d", each) for each in said] == [
        [],
        ["attempt=2; max=4"],
        ["attempt=3; max=4"],
    ]


def test_lost_connections_are_retried_however_many_a_client_has_had(server: Scripted) -> None:
    with opened(at(server)) as store:
        for _ in range(45):  # botocore's quota is 500, of which a retry takes 14
            server.script = [RESET, DONE]
            assert store.client.call(OFTEN, BODY)["ResponseMetadata"]["RetryAttempts"] == 1


@pytest.mark.parametrize("fault", [RESET, (500, b""), (400, THROTTLED), (503, b"away"), SILENCE], ids=str)
def test_load_through_a_fault_writes_every_row(server: Scripted, fault: Any) -> None:
    server.script = [(200, {"Responses": {}}), fault, (200, {"Responses": [{"TableName": "fs.view"}] * 3})]
    with opened(at(server), f"&timeout={0.5 if fault == SILENCE else 5}") as store:
        outcomes = store.merge("view", make_batch([Row(b"a"), Row(b"b"), Row(b"c")]), tie_wins=True, retention=FOREVER)

    assert outcomes.tolist() == [WRITTEN] * 3
    assert server.came[1].body == server.came[2].body


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ((200, {"Responses": [{}]}), "found 1 answers to 3 statements, expected one each"),
        ((200, {}), "found 0 answers to 3 statements, expected one each"),
        ((200, b"<html>welcome</html>"), "found 0 answers to 3 statements"),
        (CUT, "found 0 answers to 3 statements"),
        ((400, DENIED), "AccessDeniedException.*materialize iam-policy"),
        ((400, EXPIRED), "ExpiredTokenException.*Give fresh credentials"),
    ],
    ids=str,
)
def test_load_that_is_answered_by_something_else_ends_and_says_so(server: Scripted, wrong: Any, text: str) -> None:
    server.script = [(200, {"Responses": {}}), wrong]
    rows = make_batch([Row(b"a"), Row(b"b"), Row(b"c")])

    with (
        opened(at(server)) as store,
        pytest.raises(OnlineStoreError, match=f"(?s)feature view 'view'.*{text}") as failed,
    ):
        store.merge("view", rows, tie_wins=True, retention=FOREVER)

    assert "s3cret" not in str(failed.value)


# --- signatures and credentials ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "t/o+k=en"])
@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:8000",
        "https://LocalHost:8443/behind/./a//proxy/",
        "http://db:80",
        "https://db:443/",
        "http://[::1]:8000",
        "https://dynamodb.eu-central-1.amazonaws.com",
    ],
)
def test_signature_is_the_one_that_botocore_makes(endpoint: str, token: str) -> None:
    options = f"&aws_session_token={token.replace('+', '%2B')}" if token else ""
    with opened(endpoint, options) as store:
        first = store.client._prepared(OFTEN).first
        assert first is not None
        signed = first.request(BODY)
        assert signed is not None

    given: dict[str, str] = dict(signed.headers)
    ours = given.pop("Authorization")
    request = AWSRequest("POST", signed.url, given, BODY)
    request.context["timestamp"] = given["X-Amz-Date"]
    auth = SigV4Auth(Credentials("key", "s3cret", token or None), "dynamodb", "eu-central-1")
    signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    auth._inject_signature_to_request(request, signature)
    assert ours == request.headers["Authorization"]
    assert given.get("X-Amz-Security-Token", "") == token


def test_credentials_are_asked_for_anew_when_they_expire(server: Scripted, tmp_path: Path) -> None:
    given = tmp_path / "given"
    soon = "date -u -d '+3 minutes' +%Y-%m-%dT%H:%M:%SZ"
    script = tmp_path / "give"
    script.write_text(
        f'#!/bin/sh\nprintf x >> {given}\nprintf \'{{"Version":1,"AccessKeyId":"K%s","SecretAccessKey":"s","Expiration":"%s"}}\' '
        f'"$(wc -c < {given} | tr -d " ")" "$({soon})"\n'
    )
    script.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\n")

    with opened(at(server), account="") as store:
        for _ in range(3):
            store.client.call(OFTEN, BODY)

    keys = [re.findall(r"Credential=K(\d+)/", came.headers["authorization"])[0] for came in server.came]
    assert len(set(keys)) == 3
    assert sorted(keys, key=int) == keys


def test_lack_of_credentials_is_told(server: Scripted) -> None:
    with opened(at(server), account="") as store:
        with pytest.raises(NoCredentialsError):
            store.client.call(OFTEN, BODY)
        with pytest.raises(OnlineStoreError, match="Unable to locate credentials"):
            store.merge("view", make_batch([Row(b"a")]), tie_wins=True, retention=FOREVER)

    assert server.came == []


# --- the way there ---------------------------------------------------------------------------------------------------------


def test_requests_go_through_the_proxy_of_the_environment(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")

    with opened("http://db.invalid:8000") as store:
        store.client.call(OFTEN, BODY)

    assert server.came[0].path == "http://db.invalid:8000/"
    assert server.came[0].headers["host"] == "db.invalid:8000"


def test_only_a_server_with_a_certificate_that_is_trusted_is_talked_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    rows = make_batch([Row(b"a")])
    with serving(authority.certificate("server")) as server:
        endpoint = f"https://127.0.0.1:{server.port}"
        with opened(endpoint) as store:
            with pytest.raises(BotoCoreError, match="CERTIFICATE_VERIFY_FAILED"):
                store.client.call(OFTEN, BODY)
            with pytest.raises(UnavailableError, match=r"could not write 1 rows.*CERTIFICATE_VERIFY_FAILED"):
                store.merge("view", rows, tie_wins=True, retention=FOREVER)
        assert server.came == []

        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
        with opened(endpoint) as store:
            assert store.merge("view", rows, tie_wins=True, retention=FOREVER).tolist() == [WRITTEN]
