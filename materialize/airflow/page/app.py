"""Requests in, answers out: who may see what of the page, and what a browser is told when something goes wrong.

Importing this costs seconds that the API server has paid for already, so no other process does.
"""

# No postponed annotations here: FastAPI would look for the types of the routes' arguments among this module's globals.

import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.api_fastapi.core_api.security import get_user
from airflow.models.dag import DagModel
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from materialize.airflow import tasks
from materialize.airflow.page import cards, render
from materialize.airflow.page.board import BACKFILL, SCHEDULES, Board, Reader

__all__ = ["create_app"]

log = logging.getLogger(__name__)

#: What a browser is told instead of the page.
TITLES = {401: "Not signed in", 403: "Not for you", 404: "Nothing here", 500: "Something went wrong"}
SENTENCES = {
    401: "Sign in to Airflow to see how fresh the features are.",
    403: "You may see none of the DAGs that load features. Whoever manages the users of Airflow can change that.",
    404: "This address leads nowhere.",
}

User = Annotated[BaseUser, Depends(get_user)]


def create_app(folder: Path) -> FastAPI:
    """The page about the configuration in *folder*, for Airflow to mount. Reads nothing yet.

    Each route answers 401 to whoever is not signed in, and 403 to users who may read none of the DAGs that are shown.
    """
    app = FastAPI(title="materialize", docs_url=None, redoc_url=None, openapi_url=None)
    reader = Reader(folder, create_session)

    @app.get("/freshness")
    def show(request: Request, user: User) -> HTMLResponse:
        board = look(reader, user)
        backfill = BACKFILL in board.paused and may(user, [BACKFILL], "POST", DagAccessEntity.RUN)
        return HTMLResponse(
            render.page(
                **seen(user, board),
                root=request.base_url.path,
                backfill_paused=board.paused.get(BACKFILL),
                may_backfill=bool(backfill),
            )
        )

    @app.get("/freshness.json")
    def tell(user: User) -> JSONResponse:
        return JSONResponse(cards.facts(seen(user, look(reader, user))))

    app.add_exception_handler(AnyHTTPException, refuse)
    app.middleware("http")(guard)
    return app


def look(reader: Reader, user: BaseUser) -> Board:
    """The board. Raises 403 before anything is read for a user who may see none of it."""
    if not may(user, SCHEDULES.values()):
        raise HTTPException(403)
    return reader.board()


def seen(user: BaseUser, board: Board) -> dict[str, Any]:
    """What *user* may see of *board*. Raises 403 when that is nothing."""
    now = tasks.utcnow()
    shown = cards.cards(board, now, may(user, cards.dag_ids(board)))
    if board.standings and not shown:
        raise HTTPException(403)
    return {"now": now, "read_at": board.at, "problem": board.problem, "views": shown}


def may(user: BaseUser, dag_ids: Iterable[str], method: Any = "GET", entity: DagAccessEntity | None = None) -> set[str]:
    """Those of the DAGs that *user* may read, or whatever else *method* and *entity* are."""
    asked = list(dag_ids)
    teams, manager = DagModel.get_dag_id_to_team_name_mapping(asked), get_auth_manager()
    return {
        dag_id
        for dag_id in asked
        if manager.is_authorized_dag(
            method=method,
            access_entity=entity,
            details=DagDetails(id=dag_id, team_name=teams.get(dag_id)),
            user=user,
        )
    }


def refuse(request: Request, error: Exception) -> Response:
    """The answer to what is refused, by Airflow's authentication or by us."""
    status = error.status_code if isinstance(error, AnyHTTPException) else 500
    return message(request, status, SENTENCES.get(status, "Airflow refused this request."))


async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Whatever happens, a browser gets our headers and no traceback."""
    try:
        response = await answer(request)
    except Exception:  # the outermost frame of a request
        number = uuid4().hex[:12]
        log.exception("request %s of the freshness page failed", number)
        response = message(request, 500, f"The log of the API server says more; look there for {number}.")
    response.headers.update(render.HEADERS)
    return response


def message(request: Request, status: int, sentence: str) -> Response:
    if request.url.path.endswith(".json"):
        return JSONResponse({"detail": sentence}, status)
    title = TITLES.get(status, "Not possible")
    return HTMLResponse(render.short_message(title, sentence, root=request.base_url.path), status)
