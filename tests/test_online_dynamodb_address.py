"""URLs of a DynamoDB store: every option, every mistake in one, and no secret in what is said about either."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ParamValidationError

from materialize.config import resolve, store_url
from materialize.errors import ConfigError, MaterializeError, OnlineStoreError, UnavailableError
from materialize.model import OnlineStoreConfig
from materialize.online import open_store
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.address import CHECKS, Address
from tests.dynamodb_stub import answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from botocore.awsrequest import AWSPreparedRequest, AWSResponse

SECRET = "hunter2"
URL = "dynamodb://eu-west-1/fs"
ROLE = "arn:aws:iam::123456789012:role/writer"
#: Every option with a value in the URL, and the field that holds it then.
OPTIONS: dict[str, tuple[str, str, Any]] = {
    "table": ("shared", "shared", True),
    "share": ("0.25", "share", 0.25),
    "write_units": ("3000", "write_units", 3000.0),
    "requests": ("32", "requests", 32),
    "consistent": ("true", "consistent", True),
    "timeout": ("0.5", "timeout", 0.5),
    "endpoint_url": ("http://localhost:8000", "endpoint_url", "http://localhost:8000"),
    "role_arn": (ROLE, "role_arn", ROLE),
    "aws_session_token": ("t%2Fo%2Bken", "session_token", "t/o+ken"),
}


def refused(url: str) -> str:
    """What a wrong URL is answered with, here and in another process."""
    with pytest.raises(ConfigError) as caught:
        Address.parse(url)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------------------------


def test_smallest_url_gets_the_documented_defaults() -> None:
    assert Address.parse("dynamodb://eu-west-1") == Address(
        region="eu-west-1",
        prefix="fs",
        shared=False,
        share=0.5,
        write_units=None,
        requests=8,
        consistent=False,
        timeout=5.0,
        endpoint_url=None,
        role_arn=None,
        key=None,
        secret=None,
        session_token=None,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_option_reaches_its_field_and_no_other(name: str) -> None:
    text, field, value = OPTIONS[name]

    address = Address.parse(f"dynamodb://key:secret@eu-west-1/fs?{name}={text}")

    different = {
        other
        for other in Address.__slots__
        if getattr(address, other) != getattr(Address("eu-west-1", key="key", secret="secret"), other)
    }
    assert (getattr(address, field), different) == (value, {field})


def test_all_options_together_reach_their_fields() -> None:
    chosen = {name: option for name, option in OPTIONS.items() if name != "write_units"}  # it goes without share
    query = "&".join(f"{name}={text}" for name, (text, _, _) in chosen.items())

    address = Address.parse(f"dynamodb://key:secret@eu-west-1/fs?{query}")

    assert {field: getattr(address, field) for _, field, _ in chosen.values()} == {
        field: value for _, field, value in chosen.values()
    }


def test_no_option_is_untested() -> None:
    assert OPTIONS.keys() == CHECKS.keys()


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("table=per_view", "shared", False),
        ("share=1", "share", 1.0),
        ("share=1.0", "share", 1.0),
        ("share=.05", "share", 0.05),
        ("share=0.001", "share", 0.001),
        ("write_units=1", "write_units", 1.0),
        ("write_units=999999999", "write_units", 999_999_999.0),
        ("requests=1", "requests", 1),
        ("requests=999", "requests", 999),
        ("consistent=false", "consistent", False),
        ("timeout=60", "timeout", 60.0),
        ("timeout=0.05", "timeout", 0.05),
        ("endpoint_url=https%3A%2F%2Fvpce.example.com%2Fx", "endpoint_url", "https://vpce.example.com/x"),
        ("role_arn=arn%3Aaws-cn%3Aiam%3A%3A1%3Arole%2Fa", "role_arn", "arn:aws-cn:iam::1:role/a"),
    ],
)
def test_edges_of_an_option_are_taken(option: str, field: str, value: object) -> None:
    assert getattr(Address.parse(f"{URL}?{option}"), field) == value


@pytest.mark.parametrize(
    ("url", "region", "prefix"),
    [
        ("dynamodb://eu-west-1", "eu-west-1", "fs"),
        ("dynamodb://eu-west-1/", "eu-west-1", "fs"),
        ("dynamodb://us-gov-east-1/features", "us-gov-east-1", "features"),
        ("dynamodb://eu-west-1/team-prod_2-x/", "eu-west-1", "team-prod_2-x"),
        ("dynamodb://key:pw@eu-west-1/" + "p" * 100, "eu-west-1", "p" * 100),
    ],
)
def test_region_and_prefix(url: str, region: str, prefix: str) -> None:
    address = Address.parse(url)

    assert (address.region, address.prefix) == (region, prefix)


def test_each_view_has_its_table_or_all_share_one() -> None:
    per_view, shared = (
        Address.parse("dynamodb://eu-west-1/team"),
        Address.parse("dynamodb://eu-west-1/team?table=shared"),
    )

    assert [per_view.table(view) for view in ("spending", "risk")] == ["team.spending", "team.risk"]
    assert [shared.table(view) for view in ("spending", "risk")] == ["team-features", "team-features"]


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        *((f"table={text}", "table: expected per_view or shared") for text in ("both", "", "Shared")),
        *(
            (f"share={text}", "share: expected over 0 to 1, such as 0.5")
            for text in ("0", "0.0", "1.1", "2", "-0.5", "50%25", "half", "", "nan", "1e-3", "0.5%0A")
        ),
        *(
            (f"write_units={text}", "write_units: expected a whole number of write units a second, from 1")
            for text in ("0", "-5", "1.5", "1k", "", "inf", "1000000000")
        ),
        *(
            (f"requests={text}", "requests: expected 1 to 999 requests at once")
            for text in ("0", "1000", "-1", "8.0", "many", "")
        ),
        *(
            (f"consistent={text}", "consistent: expected true or false")
            for text in ("yes", "1", "True", "")
        ),
        *(
            (f"timeout={text}", "timeout: expected seconds above 0 such as 5 or 0.5")
            for text in ("0", "0.00", "-1", "5s", "inf", "", "1e3")
        ),
        *(
            (f"endpoint_url={text}", "endpoint_url: expected the address of a server such as http://localhost:8000, without an account")
            for text in ("localhost:8000", "http://", "ftp://localhost", "", "http://h:port", "http://a%20b")
        ),
        *((f"role_arn={text}", "role_arn: expected the ARN of a role") for text in ("writer", "arn:", "")),
        ("aws_session_token=", "aws_session_token: expected a token"),
    ],
)  # fmt: skip
def test_wrong_option_is_refused_with_what_is_expected(option: str, expected: str) -> None:
    message = refused(f"{URL}?{option}")

    assert message == f"online store {URL}: {expected}, found something else"


@pytest.mark.parametrize("name", CHECKS)
def test_expectation_of_every_option_is_told(name: str) -> None:
    assert CHECKS[name][1] in refused(f"{URL}?{name}=")


def test_unknown_options_are_named_at_once_beside_the_known_ones() -> None:
    message = refused(f"{URL}?tabel=shared&share=0.5&Requests=4&ttl=1d")

    assert message == f"online store {URL}: found unknown options: tabel, ttl, expected {', '.join(CHECKS)}"


def test_all_wrong_options_are_told_at_once() -> None:
    message = refused(f"{URL}?share=2&requests=0&timeout=soon")

    assert all(f"{name}: expected {CHECKS[name][1]}" in message for name in ("share", "requests", "timeout"))


@pytest.mark.parametrize("options", ["share=0.5&share=0.1", "share=0.5&write_units=7"])
def test_options_that_contradict_each_other_are_refused(options: str) -> None:
    assert "expected each option once, and one of share and write_units" in refused(f"{URL}?{options}")


@pytest.mark.parametrize(
    "url",
    [
        "dynamodb://",
        "dynamodb:///fs",
        "dynamodb://EU-WEST-1/fs",
        "dynamodb://eu_west_1/fs",
        "dynamodb://localhost:8000/fs",
        "dynamodb://eu-west-1/a/b",
        "dynamodb://eu-west-1/a.b",
        "dynamodb://eu-west-1/a#?table=shared",
        "dynamodb://eu-west-1/my features",
        "dynamodb://eu-west-1/naïve",
        "dynamodb://eu-west-1/" + "p" * 101,
    ],
)
def test_wrong_region_or_prefix_is_refused_with_an_example(url: str) -> None:
    assert refused(url) == (
        f"online store {url.partition('?')[0]}: found another form than expected, which is dynamodb://[KEY:SECRET@]REGION/PREFIX "
        "such as dynamodb://eu-central-1/fs, the prefix of letters, digits, '_' and '-', special characters of key and secret percent-encoded"
    )


# --- credentials -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("account", "key", "secret"),
    [
        ("AKIA1:plain", "AKIA1", "plain"),
        ("AKIA1:a%2Fb%2Bc%3D", "AKIA1", "a/b+c="),
        ("AKIA1:a+b", "AKIA1", "a+b"),
        ("AKIA1:a%20b%3Ac%40d%3Fe%23f%25", "AKIA1", "a b:c@d?e#f%"),
        ("AKIA%2F1:a:b", "AKIA/1", "a:b"),
    ],
)
def test_credentials_are_percent_decoded(account: str, key: str, secret: str) -> None:
    address = Address.parse(f"dynamodb://{account}@eu-west-1/fs")

    assert (address.key, address.secret, address.region) == (key, secret, "eu-west-1")


def test_no_secret_is_in_the_repr_or_in_the_location_of_a_store() -> None:
    url = f"dynamodb://AKIA1:{SECRET}@eu-west-1/fs?aws_session_token={SECRET}&endpoint_url=http://localhost"
    store = open_store(OnlineStoreConfig("default", url))

    with store:
        assert isinstance(store, DynamoDbStore)
        assert (store.address.secret, store.address.session_token) == (SECRET, SECRET)
        assert store.location == "dynamodb://eu-west-1/fs at http://localhost"
        for shown in (store.location, repr(Address.parse("dynamodb://AKIA1:hunter2@eu-west-1")), repr(store)):
            assert SECRET not in shown
            assert "AKIA1" not in shown


def test_endpoint_has_no_account() -> None:
    message = refused(f"{URL}?endpoint_url=http://u:{SECRET}@localhost")

    assert "without an account" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "url",
    [
        f"dynamodb://AKIA1:{SECRET}@eu-west-1/fs?share=2",
        f"dynamodb://AKIA1:{SECRET}@eu-west-1/fs?tabel=shared",
        f"dynamodb://AKIA1:{SECRET}@EU/fs",
        f"dynamodb://AKIA1:{SECRET}@/fs",
        f"dynamodb://AKIA1:{SECRET}@",
        f"dynamodb://AKIA1:x/{SECRET}@eu-west-1/fs",
        f"dynamodb://AKIA1:{SECRET}/x@eu-west-1/fs",
        f"dynamodb://AKIA1:{SECRET}#x@eu-west-1/fs",
        f"dynamodb://AKIA1:x#{SECRET}@eu-west-1/fs",
        f"dynamodb://AKIA1:{SECRET}?x@eu-west-1/fs",
        f"dynamodb://AKIA1:{SECRET}@x@EU/fs",
        f"dynamodb://AKIA1:x@{SECRET}@EU/fs",
        f"dynamodb://{SECRET}@EU/fs",
        f"{URL}?aws_session_token={SECRET}&share=2",
        f"{URL}?share=2&aws_session_token={SECRET}",
        f"{URL}?session_token={SECRET}",
        f"{URL}?aws_secret_access_key={SECRET}",
        f"{URL}?share=2&endpoint_url=http://u:{SECRET}@localhost",
    ],
)
def test_no_secret_is_in_what_a_wrong_url_is_answered_with(url: str) -> None:
    assert SECRET not in refused(url)


def test_secret_with_an_unescaped_question_mark_is_not_shown() -> None:
    assert SECRET not in refused(f"dynamodb://AKIA1:x?{SECRET}@eu-west-1/fs")


def test_brackets_of_a_secret_need_no_escape() -> None:
    assert Address.parse(f"dynamodb://AKIA1:[{SECRET}]@eu-west-1/fs").secret == f"[{SECRET}]"


def test_credentials_of_an_encoded_endpoint_are_not_shown() -> None:
    assert SECRET not in refused(f"{URL}?share=2&endpoint_url=http%3A%2F%2Fu%3A{SECRET}%40localhost")


@pytest.fixture
def store() -> Iterator[DynamoDbStore]:
    """A store that no request has been sent to."""
    url = f"dynamodb://AKIA1:{SECRET}@eu-west-1/fs?aws_session_token={SECRET}"
    with DynamoDbStore(url) as store:
        yield store


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "GetItem"), OnlineStoreError),
        (ClientError({"Error": {"Code": "ExpiredTokenException", "Message": "old"}}, "GetItem"), OnlineStoreError),
        (ClientError({"Error": {"Code": "ResourceNotFoundException", "Message": "no"}}, "GetItem"), OnlineStoreError),
        (ClientError({"Error": {"Code": "ThrottlingException", "Message": "slow"}}, "GetItem"), UnavailableError),
        (ClientError({"Error": {"Code": "ValidationException"}}, "GetItem"), OnlineStoreError),
        (NoCredentialsError(), OnlineStoreError),
        (EndpointConnectionError(endpoint_url="https://dynamodb.eu-west-1.amazonaws.com"), UnavailableError),
        (ParamValidationError(report="wrong"), OnlineStoreError),
    ],
    ids=lambda value: value.response["Error"]["Code"] if isinstance(value, ClientError) else None,
)
def test_errors_survive_pickling_and_hold_no_secret(store: DynamoDbStore, error: Exception, kind: type) -> None:
    with pytest.raises(kind) as caught, store.client.translated("read 7 entities of spending from", "spending"):
        raise error

    told = pickle.loads(pickle.dumps(caught.value))
    assert type(told) is kind
    assert str(told) == str(caught.value)
    assert str(told).startswith("could not read 7 entities of spending from dynamodb://eu-west-1/fs: ")
    assert SECRET not in f"{told} {told!r} {caught.value.__cause__}"
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("given", ["AKIA1@eu-west-1/fs", ":pw@eu-west-1/fs", "eu-west-1/fs?aws_session_token=t"])
def test_half_of_an_account_is_told(given: str) -> None:
    def read() -> bytes | None:
        with DynamoDbStore(f"dynamodb://{given}") as store:
            store.client.api.meta.events.register("before-send.dynamodb", nothing_found)
            return store.read_cell("spending", "watermark")

    with pytest.raises(MaterializeError):
        read()


def nothing_found(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
    return answer(request, 200, {})


def test_credentials_session_token_and_region_reach_the_driver(store: DynamoDbStore) -> None:
    credentials = store.client._session().get_credentials()
    assert credentials is not None

    assert tuple(credentials.get_frozen_credentials())[:3] == ("AKIA1", SECRET, SECRET)
    assert store.client.api.meta.region_name == "eu-west-1"


# --- Airflow connections ---------------------------------------------------------------------------------------------------

EXTRA = {
    "region_name": "eu-west-1",
    "aws_session_token": "t/o+k=en",
    "role_arn": ROLE,
    "endpoint_url": "http://localhost:8000",
}
FROM_AIRFLOW = Address(
    "eu-west-1",
    endpoint_url="http://localhost:8000",
    role_arn=ROLE,
    key="AKIA/1",
    secret="p@ss/w+rd%?#[]",
    session_token="t/o+k=en",
)


@pytest.mark.parametrize(
    "connection",
    [
        pytest.param(
            json.dumps({"conn_type": "aws", "login": "AKIA/1", "password": "p@ss/w+rd%?#[]", "extra": EXTRA}), id="json"
        ),
        pytest.param(
            json.dumps({"conn_type": "aws", "extra": {"aws_access_key_id": "AKIA/1", "aws_secret_access_key": "p@ss/w+rd%?#[]"} | EXTRA}),
            id="json with all in its extra",
        ),
        pytest.param(
            "aws://AKIA%2F1:p%40ss%2Fw%2Brd%25%3F%23%5B%5D@/?region_name=eu-west-1&aws_session_token=t%2Fo%2Bk%3Den"
            "&role_arn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fwriter&endpoint_url=http%3A%2F%2Flocalhost%3A8000",
            id="uri",
        ),
        pytest.param(
            SimpleNamespace(
                conn_type="aws", host=None, port=None, schema=None, login="AKIA/1", password="p@ss/w+rd%?#[]", extra=json.dumps(EXTRA)
            ),
            id="object",
        ),
    ],
)  # fmt: skip
def test_airflow_connection_gives_an_address_with_all_that_it_says(connection: Any) -> None:
    assert Address.parse(store_url(connection)) == FROM_AIRFLOW


@pytest.mark.parametrize("name", ["aws_session_token", "role_arn", "endpoint_url"])
def test_airflow_connection_may_lack_what_aws_does_not_need(name: str) -> None:
    extra = {key: value for key, value in EXTRA.items() if key not in {name, "aws_session_token"}}

    address = Address.parse(store_url(json.dumps({"conn_type": "aws", "extra": extra})))

    assert getattr(address, name.removeprefix("aws_")) is None
    assert (address.region, address.key, address.secret) == ("eu-west-1", None, None)


def test_airflow_endpoint_of_dynamodb_goes_before_the_general_one() -> None:
    extra = {"region_name": "eu-west-1", "service_config": {"dynamodb": {"endpoint_url": "http://only-dynamodb:8000"}}}

    address = Address.parse(store_url(json.dumps({"conn_type": "aws", "extra": extra})))

    assert address.endpoint_url == "http://only-dynamodb:8000"


def test_airflow_connection_without_a_region_is_refused_when_the_store_is_opened() -> None:
    store = OnlineStoreConfig("default", connection="cache")

    with pytest.raises(ConfigError, match=r"dynamodb://\[KEY:SECRET@\]REGION/PREFIX") as caught:
        open_store(resolve(store, lambda _: f"aws://AKIA1:{SECRET}@/"))

    assert SECRET not in str(caught.value)


def test_airflow_connection_may_say_prefix_and_options() -> None:
    extra = {"region_name": "eu-west-1", "prefix": "team", "table": "shared", "write_units": 700}

    address = Address.parse(store_url(json.dumps({"conn_type": "aws", "extra": extra})))

    assert address == Address("eu-west-1", "team", shared=True, write_units=700.0)


def test_airflow_connection_may_be_a_url_of_ours_with_prefix_and_options() -> None:
    url = "dynamodb://AKIA1:p%40ss@eu-west-1/team?table=shared"

    assert Address.parse(store_url(url)) == Address("eu-west-1", "team", shared=True, key="AKIA1", secret="p@ss")
