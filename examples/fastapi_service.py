"""A model behind FastAPI that reads its features itself, in its own process: no second server, no second network round trip.

MATERIALIZE_CONFIG=config uvicorn --app-dir examples fastapi_service:app
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException

from materialize.errors import UnavailableError
from materialize.serving import AsyncOnlineFeatures

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

VIEW, NAMES = "spending", ["amount", "score"]
#: Of the model, which is so small to be read here.
WEIGHTS, MEANS = (0.5, 2.0), (10.0, 0.5)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One reader for the whole process: it holds the connections, and is safe for all requests of the event loop."""
    async with AsyncOnlineFeatures.connect(os.environ.get("MATERIALIZE_CONFIG", "config")) as features:
        app.state.features = features
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/scores/{user_id}")
async def score(user_id: str) -> dict[str, Any]:
    """The user's score. Features older than a day count as gone, and the mean stands for what is gone."""
    try:
        vector = await app.state.features.read_features(VIEW, user_id, NAMES, max_age=timedelta(days=1))
    except UnavailableError as error:
        raise HTTPException(503, "the feature store does not answer", {"Retry-After": "1"}) from error
    values = [mean if vector[name] is None else vector[name] for name, mean in zip(NAMES, MEANS, strict=True)]
    return {
        "score": sum(weight * value for weight, value in zip(WEIGHTS, values, strict=True)),
        "age_seconds": None if vector.age is None else vector.age.total_seconds(),
        "missing": [name for name, status in vector.statuses.items() if status != "present"],
    }
