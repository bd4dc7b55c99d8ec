"""A config folder with views and a feature service over one store, its records, and `materialize serve` in front of it."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import polars as pl

from materialize import codec, watermark
from materialize.config import load
from materialize.model import to_us
from materialize.online import open_store
from materialize.online.reading import AsyncReader
from materialize.order import stamp
from materialize.server.app import create
from materialize.server.settings import Limits, Settings, Tokens
from materialize.serving import AsyncOnlineFeatures, ReadTerms
from materialize.serving.core import Core
from materialize.testing import FOREVER
from tests import servers
from tests.processes import end
from tests.projects import Project
from tests.stepping import PATIENT

if TYPE_CHECKING:
    import subprocess
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from materialize.server.guard import Guard

__all__ = ["EVENT", "TOKEN", "TYPES", "GatedReader", "HttpProject", "Served", "lookup", "told"]

TOKEN = "tokenmark-0123456789abcdef"
EVENT = datetime(2025, 1, 1, tzinfo=timezone.utc)
#: Every type: its column, a value, and what JSON has for it.
TYPES: dict[str, tuple[str, Any, Any, Any]] = {
    "b": ("bool", pl.Boolean, True, True),
    "i": ("int64", pl.Int64, 2**53 + 1, "9007199254740993"),
    "j": ("int64", pl.Int64, 5, "5"),
    "u": ("uint64", pl.UInt64, 2**64 - 1, "18446744073709551615"),
    "w": ("int32", pl.Int32, -7, -7),
    "f": ("float64", pl.Float64, 0.1, 0.1),
    "n": ("float64", pl.Float64, float("-inf"), "-Infinity"),
    "h": ("float32", pl.Float32, 0.5, 0.5),
    "s": ("string", pl.String, 'ä"\u2028', 'ä"\u2028'),
    "r": ("binary", pl.Binary, b"\0\xff", "00ff"),
    "d": ("date", pl.Date, EVENT.date(), "2025-01-01"),
    "t": ("timestamp", pl.Datetime("us", "UTC"), EVENT, "2025-01-01T00:00:00+00:00"),
    "m": ("decimal(38,10)", pl.Decimal(38, 10), Decimal("0.0000000001"), "0.0000000001"),
    "l": ("list<float32>", pl.List(pl.Float32), [0.5, float("nan")], [0.5, "NaN"]),
    "e": ("list<int64,2>", pl.List(pl.Int64), [2**62, -1], ["4611686018427387904", "-1"]),
}
COLUMNS = {"float64": pl.Float64, "int64": pl.Int64, "string": pl.String}
VIEW = (
    "source: lake/{name}\njoin_keys: [{keys}]\nevent_timestamp: ts\nfeatures:\n{features}\nonline_stores: [default]\n"
)


class GatedReader(AsyncReader):
    """A store that has nothing and answers once ``gate`` is open; ``error`` is raised instead where there is one."""

    location = "gated://"

    def __init__(self, error: Exception | None = None) -> None:
        self.gate, self.error, self.asked = asyncio.Event(), error, 0
        self.arrived = asyncio.Semaphore(0)
        if error is not None:
            self.gate.set()

    async def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        self.asked += 1
        self.arrived.release()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {view: [None] * len(some) for view, some in keys.items()}

    async def read_cell(self, view: str, name: str) -> bytes | None:
        await self.read_views({view: [name.encode()]})
        return None

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class Served:
    """A running `materialize serve`."""

    port: int
    process: subprocess.Popen[str]

    def get(self, path: str, *, token: str = TOKEN) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=20)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self) -> tuple[int, str]:
        """Ask it to end. Returns its exit code and all that it wrote."""
        self.process.terminate()
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out + err


@dataclass(slots=True)
class HttpProject:
    """Views ``spending`` (user_id), ``shop`` (user_id, shop_id) and ``types``, and the feature service ``ranking``."""

    folder: Path
    url: str
    project: Project = field(init=False)

    def __post_init__(self) -> None:
        self.project = Project(self.folder, self.url)
        self.view("spending", "user_id", amount="float64", count="int64", country="string")
        self.view("shop", "user_id, shop_id", score="float64")
        self.view("types", "k", **{name: kind for name, (kind, _, _, _) in TYPES.items()})
        (self.project.config / "feature_services.yaml").write_text(
            "ranking: {features: {spending: [amount, count], shop: [{score: shop_score}]}}\n"
        )

    def view(self, name: str, keys: str, **features: str) -> None:
        lines = "\n".join(f"  {feature}: {kind}" for feature, kind in features.items())
        text = VIEW.format(name=name, keys=keys, features=lines)
        (self.project.config / "feature_views" / f"{name}.yaml").write_text(text)

    def put(self, name: str, key: str, *values: Any, event: datetime = EVENT) -> None:
        """Store the features of an entity, all of the view in its order."""
        config = load(self.project.config)
        view = config.feature_views[name]
        columns = {
            feature: TYPES[feature][1] if name == "types" else COLUMNS[kind.kind]
            for feature, kind in view.features.items()
        }
        frame = pl.DataFrame(
            {
                feature: pl.Series([value], dtype=columns[feature])
                for feature, value in zip(columns, values, strict=True)
            }
        )
        order = pl.DataFrame({"event_us": [to_us(event)], "created_us": [0], "version": [stamp(1, 7)]})
        with open_store(config.online_store("default")) as store:
            schema_id = watermark.register_schema(store, view)
            batch = codec.encode(pl.Series([key.encode()]), order, frame, view, schema_id=schema_id)
            store.merge(name, batch, tie_wins=True, retention=FOREVER)

    # --- the application in this process ---

    @asynccontextmanager
    async def client(
        self,
        *,
        reader: AsyncReader | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        tokens: Sequence[str] = (),
        terms: ReadTerms = PATIENT,
        **settings: Any,
    ) -> AsyncIterator[tuple[httpx.AsyncClient, Guard]]:
        """A client of the application, over the real store or *reader*."""
        config = load(self.project.config)
        if reader is None:
            features = AsyncOnlineFeatures.connect(self.project.config, terms=terms)
        else:
            features = AsyncOnlineFeatures(Core.of(config, "default", reader.location), reader)
        app = create(features, Settings(str(self.project.config), limits=limits, **settings), Tokens(tokens))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with features, httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, app

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One answer; *options*: of `client`, else of httpx."""
        mine = {name: options.pop(name) for name in ("reader", "limits", "tokens", "open_metrics") if name in options}

        async def asked(client: httpx.AsyncClient, _: Guard) -> httpx.Response:
            return await client.request(method, path, **options)

        return self.run(asked, **mine)

    def run(self, work: Callable[[httpx.AsyncClient, Guard], Awaitable[Any]], **options: Any) -> Any:
        """What *work* gives."""

        async def all_of_it() -> Any:
            async with self.client(**options) as (client, app):
                return await work(client, app)

        return asyncio.run(all_of_it())

    # --- the command in a process of its own ---

    @contextmanager
    def serving(self, *options: str, tokens: str = TOKEN) -> Iterator[Served]:
        port = servers.free_port()
        environment = {"MATERIALIZE_SERVE_TOKENS": tokens} if tokens else {}
        process = self.project.start("serve", "--port", str(port), *options, env=environment)
        try:
            deadline = time.monotonic() + 30
            served = Served(port, process)
            while True:
                try:
                    served.get("/healthz", token="")
                    break
                except httpx.TransportError:
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield served
        finally:
            end(process)  # type: ignore[arg-type]
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def lookup(view: str, *keys: Any, **more: Any) -> dict[str, Any]:
    """The body of a request for one view."""
    return {"lookups": [{"view": view, "entity_keys": list(keys), **more}]}


def told(response: httpx.Response) -> Any:
    """The JSON of a good answer."""
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=_not_json)


def _not_json(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")
