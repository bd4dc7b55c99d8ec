"""The application: settings in, routes behind their guard out, for any ASGI server."""

from __future__ import annotations

import asyncio
import gc
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from materialize import __version__
from materialize.errors import OnlineStoreError, UnavailableError
from materialize.metrics.served import Served
from materialize.server.bodies import FeaturesAnswer, ProblemAnswer, ServiceAnswer, VectorAnswer, ViewsAnswer
from materialize.server.body_route import BodyRoute
from materialize.server.error_log import ErrorLog
from materialize.server.guard import BROKEN, Guard
from materialize.server.problems import MEDIA_TYPE, Problem, problem
from materialize.server.routes import ARROW, UNREACHABLE, Routes
from materialize.server.settings import Settings, Tokens, tokens_of
from materialize.serving import AsyncOnlineFeatures
from materialize.serving.caching import counted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.responses import Response

__all__ = ["create", "from_environment"]

REFUSED = "The online store refused, or holds what this server cannot decode. The server's log says more."
DESCRIPTION = "Feature vectors of entities, from the online store. Every error is a problem of RFC 9457."
#: Seconds after which the other processes of a server can tell what one counted.
LOOK = 1.0
NOT_JSON = "The body is not JSON in UTF-8."
#: What a route that reads may answer besides its result; and what each may that has no body.
PROBLEMS = {
    400: NOT_JSON,
    401: "No token, or an unknown one.",
    404: "There is no such view or service.",
    408: "The body came too slowly.",
    413: "Too many bytes, or too many entities.",
    422: "Names, keys or types that do not fit.",
    500: "The store refused, or the server failed.",
    503: "The server is busy, or the store does not answer. Try again.",
}
WITHOUT_BODY = (401, 404, 413, 422, 500, 503)
#: Feature views and services are found, not made: nothing else is asked.
PLAIN = (401, 500, 503)


def from_environment() -> Guard:
    """The application of one process, by `Settings.to_environment` of the process that started it."""
    settings = Settings.from_environment()
    features = AsyncOnlineFeatures.connect(settings.config, settings.store, terms=settings.terms, cache=settings.cache)
    return create(features, settings, tokens_of(os.environ))


def create(features: AsyncOnlineFeatures, settings: Settings, tokens: Tokens) -> Guard:
    """The application that reads *features*, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # What is loaded by now stays to the end: looking through it for garbage takes some 100 ms, in which nobody is answered.
        gc.collect()
        gc.freeze()
        looking = asyncio.create_task(_look(metrics))
        yield
        looking.cancel()
        await features.close()
        metrics.end()

    metrics, errors = Served(), ErrorLog()
    if (cache := features.cache) is not None:
        metrics.follow(lambda: counted(cache, settings.store))
    # The pages that show the schema to people load scripts from another host, therefore there are none.
    app = FastAPI(
        title="materialize serve",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _add_routes(app, Routes(features, settings.limits, metrics, settings.store_deadline))
    _add_handlers(app, metrics, errors)
    return Guard(
        app,
        limits=settings.limits,
        tokens=tokens,
        metrics=metrics,
        errors=errors,
        open_metrics=settings.open_metrics,
    )


async def _look(metrics: Served) -> None:
    """Have the processes of one server tell of themselves, whichever of them is asked."""
    while metrics.shared:
        metrics.look()
        await asyncio.sleep(LOOK)


def _add_routes(app: FastAPI, routes: Routes) -> None:
    arrow = {"content": {ARROW: {"schema": {"type": "string", "format": "binary"}}}}
    plain = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    found: list[tuple[str, str, Any, dict[str, Any], Any]] = [
        ("POST", "/v1/features", routes.features, {"model": FeaturesAnswer, **arrow}, PROBLEMS),
        ("POST", "/v1/services/{name}", routes.service, {"model": ServiceAnswer, **arrow}, PROBLEMS),
        ("GET", "/v1/features/{view}/{entity_key:path}", routes.entity, {"model": VectorAnswer}, WITHOUT_BODY),
        ("GET", "/v1/views", routes.views, {"model": ViewsAnswer}, PLAIN),
        ("GET", "/healthz", routes.healthz, {}, ()),
        ("GET", "/readyz", routes.readyz, {}, (503,)),
        ("GET", "/metrics", routes.told_metrics, plain, (401,)),
    ]
    for method, path, endpoint, answer, problems in found:
        told: dict[int | str, dict[str, Any]] = {
            status: {"description": PROBLEMS[status], "model": ProblemAnswer} for status in problems
        }
        app.router.add_api_route(
            path,
            endpoint,
            methods=[method],
            responses={200: answer, **told},
            response_model=None,
            route_class_override=BodyRoute if method == "POST" else None,
        )
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema: problems have a media type of their own, and a token is asked for wherever it is."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path not in {"/healthz", "/readyz"}:
                    operation["security"] = [{"token": []}]
                for status, response in operation["responses"].items():
                    if not status.startswith("2"):
                        response["content"] = {MEDIA_TYPE: next(iter(response["content"].values()))}
        app.openapi_schema = schema
    return app.openapi_schema


def _add_handlers(app: FastAPI, metrics: Served, errors: ErrorLog) -> None:
    async def told(_: Request, error: Any) -> Response:
        if error.reason:
            metrics.refused(error.reason)
        return problem(error.status, error.detail)

    async def unavailable(_: Request, error: Exception) -> Response:
        errors.add(error)
        metrics.refused("unavailable")
        return problem(503, UNREACHABLE)

    async def refused(_: Request, error: Exception) -> Response:
        errors.add(error)
        return problem(500, REFUSED)

    async def failed(_: Request, __: Exception) -> Response:
        return problem(500, BROKEN)  # the guard sees the error next, and logs it

    async def unknown(_: Request, error: Any) -> Response:
        return problem(error.status_code, str(error.detail), headers=error.headers)

    app.add_exception_handler(Problem, told)
    app.add_exception_handler(UnavailableError, unavailable)
    app.add_exception_handler(OnlineStoreError, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(RequestValidationError, _unfit)
    app.add_exception_handler(Exception, failed)


async def _unfit(_: Request, error: Any) -> Response:
    """What does not fit in a body, by field; never what was found there."""
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        return problem(400, NOT_JSON)
    told = [{"field": _field(one["loc"]), "message": one["msg"]} for one in found[:20]]
    return problem(422, f"{len(found)} field(s) of the request do not fit; see errors.", errors=told)


#: What a message may name of a request: fields of ours. Anything else was written by the client.
FIELDS = ("body", "query", "path", "lookups", "view", "entity_keys", "feature_names", "max_age", "entities")


def _field(location: tuple[str | int, ...]) -> str:
    known = [str(part) for part in location if isinstance(part, int) or part in FIELDS]
    return ".".join(known)
