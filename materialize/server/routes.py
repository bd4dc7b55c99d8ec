"""The routes of ``materialize serve``: requests in, what `AsyncOnlineFeatures` reads out."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

from fastapi import Query, Request
from starlette.responses import Response

from materialize.entity_key import parse_key
from materialize.errors import ConfigError
from materialize.server import answers
from materialize.server.bodies import FeaturesRequest, MaxAge, ServiceRequest
from materialize.server.problems import Problem
from materialize.server.readiness import Readiness
from materialize.serving import Lookup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from materialize.metrics.served import Served
    from materialize.server.settings import Limits
    from materialize.serving import AsyncOnlineFeatures

__all__ = ["Routes"]

ARROW = "application/vnd.apache.arrow.stream"
JSON = "application/json"
#: A view of the store has this cell from its first run on; reading it costs the store next to nothing.
PROBED = "watermark"
UNREACHABLE = "The online store did not answer in time. Nothing is lost; try again."
Names = Annotated[str | None, Query(description="Feature names, separated by commas; all of the view without.")]
Age = Annotated[MaxAge | None, Query(description="Seconds; an older vector is expired.")]


class Routes:
    """What is answered to each request that passed the `Guard`."""

    def __init__(self, features: AsyncOnlineFeatures, limits: Limits, metrics: Served, store_deadline: float) -> None:
        self.reader, self.limits, self.metrics = features, limits, metrics
        probed = next(iter(features.core.schemas))
        self.ready = Readiness(lambda: features.reader.read_cell(probed, PROBED), store_deadline)

    async def features(self, body: FeaturesRequest, request: Request) -> Response:
        """Features of entities of one or more views, in one round trip to each server of the store.

        An Arrow stream has one schema: it is given for one lookup. For more views at once ask a feature service.
        """
        self._bounded(sum(len(lookup.entity_keys) for lookup in body.lookups))
        as_arrow = ARROW in request.headers.get("accept", "")
        if as_arrow and len(body.lookups) > 1:
            raise Problem(
                422,
                f"found {len(body.lookups)} lookups, expected 1 for an Arrow stream, which has one schema. Ask for JSON, or a feature service.",
            )
        lookups = [Lookup(one.view, one.entity_keys, one.feature_names, _age(one.max_age)) for one in body.lookups]
        with asked():
            batches = await self.reader.lookup(lookups)
        counts: Counter[str] = Counter()
        if as_arrow:
            return self._answer(await answers.arrow(batches[0], counts), ARROW, counts)
        results = [
            b'{"view":%b,"vectors":[%b]}'
            % (answers.written(lookup.view), b",".join(await answers.vectors(batch, counts)))
            for lookup, batch in zip(lookups, batches, strict=True)
        ]
        return self._answer(b'{"results":[%b]}' % b",".join(results), JSON, counts)

    async def entity(self, view: str, entity_key: str, feature_names: Names = None, max_age: Age = None) -> Response:
        """All or some features of one entity. *entity_key*: parts joined by "|"; a "|" in a value is written %7C, in a URL %257C."""
        names = None if feature_names is None else feature_names.split(",")
        with asked():
            found = self.reader.core.selection(view, names).schemas.view
            key = parse_key(entity_key, found.join_keys)
            batch = await self.reader.batch_read(view, [key], names, max_age=_age(max_age))
        counts: Counter[str] = Counter()
        return self._answer((await answers.vectors(batch, counts))[0], JSON, counts)

    async def service(self, name: str, body: ServiceRequest, request: Request) -> Response:
        """The features of a feature service for some sets of entities, in one round trip to each server of the store."""
        self._bounded(len(body.entities))
        with asked():
            batch = await self.reader.batch_read_service(name, body.entities)
        counts: Counter[str] = Counter()
        if ARROW in request.headers.get("accept", ""):
            return self._answer(await answers.arrow(batch, counts), ARROW, counts)
        vectors = b",".join(await answers.service_vectors(batch, counts))
        return self._answer(b'{"service":%b,"vectors":[%b]}' % (answers.written(name), vectors), JSON, counts)

    async def views(self) -> Response:
        """What can be asked for: views with their features, types and join keys, and feature services."""
        core = self.reader.core
        found = {name: schemas.view for name, schemas in core.schemas.items()}
        views = [
            {
                "name": view.name,
                "description": view.description,
                "join_keys": view.join_keys,
                "features": {name: str(kind) for name, kind in view.features.items()},
                "ttl_seconds": None if view.ttl is None else view.ttl.total_seconds(),
            }
            for view in found.values()
        ]
        services = [
            {
                "name": service.name,
                "description": service.description,
                "join_keys": list(dict.fromkeys(key for view in service.features for key in found[view].join_keys)),
                "features": {
                    told: {"view": view, "feature": name, "type": str(found[view].features[name])}
                    for view, names in service.features.items()
                    for name, told in names.items()
                },
            }
            for service in core.services.values()
            if all(view in found for view in service.features)
        ]
        return Response(answers.written({"views": views, "services": services}), media_type=JSON)

    async def healthz(self) -> Response:
        """The process lives."""
        return Response('{"status":"ok"}', media_type=JSON)

    async def readyz(self) -> Response:
        """The online store answers."""
        if not await self.ready():
            raise Problem(503, UNREACHABLE, "unavailable")
        return Response('{"status":"ready"}', media_type=JSON)

    async def told_metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    def _bounded(self, entities: int) -> None:
        if entities > self.limits.entities:
            raise Problem(
                413,
                f"found {entities:,} entities, expected at most {self.limits.entities:,} in a request. Ask in parts.",
            )

    def _answer(self, content: bytes, media_type: str, counts: Counter[str]) -> Response:
        self.metrics.values(counts)
        return Response(content, media_type=media_type)


def _age(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


@contextmanager
def asked() -> Iterator[None]:
    """What reading says about the question, as answers."""
    try:
        yield
    except ConfigError as error:
        raise Problem(404, str(error)) from None
    except ValueError as error:
        raise Problem(422, str(error)) from None
