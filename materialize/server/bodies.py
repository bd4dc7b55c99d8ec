"""The JSON that requests and answers are made of, as OpenAPI describes it. Requests are checked by it; answers are written by `answers`."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

__all__ = [
    "FeaturesAnswer",
    "FeaturesRequest",
    "MaxAge",
    "ProblemAnswer",
    "ServiceAnswer",
    "ServiceRequest",
    "VectorAnswer",
    "ViewsAnswer",
    "parsed",
]

#: Lookups in one request, which share a round trip.
MOST_LOOKUPS = 100
KeyValue = StrictBool | StrictInt | StrictStr
Entity = Annotated[dict[str, KeyValue], Field(description="Join key -> value.")]
EntityKey = Annotated[
    KeyValue | list[KeyValue] | Entity,
    Field(
        description="A value where the view has one join key, else values in the order of the join keys, or by name."
    ),
]
#: Seconds; a century is more than any feature's age.
MaxAge = Annotated[float, Field(ge=0, le=3.2e9, allow_inf_nan=False, description="Seconds; older vectors are expired.")]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LookupRequest(Request):
    view: StrictStr
    entity_keys: list[EntityKey]
    feature_names: (
        Annotated[list[StrictStr], Field(description="In the order wanted; all of the view without.")] | None
    ) = None
    max_age: Annotated[MaxAge, Field(strict=True)] | None = None


class FeaturesRequest(Request):
    lookups: Annotated[list[LookupRequest], Field(min_length=1, max_length=MOST_LOOKUPS)]


class ServiceRequest(Request):
    entities: Annotated[list[Entity], Field(description="Of each set of entities the join keys of all views.")]


Model = TypeVar("Model", bound=Request)


def parsed(model: type[Model], content: bytes) -> Model:
    """*content*, which is JSON, as a *model*. Raises RequestValidationError, without what was found."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found])


Status = Literal["present", "null", "missing", "expired", "default"]
Value = bool | float | str | list[Any] | None


class AboutVector(BaseModel):
    status: Status
    event_timestamp: str | None = Field(description="ISO 8601, UTC; null where there is no vector.")
    age_seconds: float | None
    table_version: int | None


class Features(BaseModel):
    features: dict[str, Value] = Field(
        description="64-bit integers and decimals are text, so are NaN, Infinity and -Infinity; bytes are hexadecimal, times ISO 8601."
    )
    statuses: dict[str, Status] = Field(description="Of each value that is not present: why.")


class VectorAnswer(AboutVector, Features):
    pass


class LookupAnswer(BaseModel):
    view: str
    vectors: list[VectorAnswer]


class FeaturesAnswer(BaseModel):
    results: list[LookupAnswer]


class ServiceVectorAnswer(Features):
    views: dict[str, AboutVector]


class ServiceAnswer(BaseModel):
    service: str
    vectors: list[ServiceVectorAnswer]


class ViewAnswer(BaseModel):
    name: str
    description: str
    join_keys: list[str]
    features: dict[str, str]
    ttl_seconds: float | None


class ServiceFeature(BaseModel):
    view: str
    feature: str
    type: str


class ServiceListing(BaseModel):
    name: str
    description: str
    join_keys: list[str]
    features: dict[str, ServiceFeature]


class ViewsAnswer(BaseModel):
    views: list[ViewAnswer]
    services: list[ServiceListing]


class FieldProblem(BaseModel):
    field: str
    message: str


class ProblemAnswer(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | None = None
