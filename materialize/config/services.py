"""The file of feature services in, what each of them names out, after adding what is wrong with it to the file's problems."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import Field

from materialize.config.document import one_of
from materialize.config.schema import FEATURE_NAME, NAME, NAME_RULE, NAMES, Keys, checked_keys
from materialize.feature_service import FeatureService

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.config.document import Document, Loc
    from materialize.model import FeatureView

__all__ = ["services_of"]


class ServiceKeys(Keys):
    description: str = Field("", description="text")
    features: dict[str, list[Any]] = Field(
        description="a mapping of feature views to lists of their features such as {user_spending: [total_spend]}",
        min_length=1,
    )


def services_of(document: Document, views: Mapping[str, FeatureView]) -> dict[str, FeatureService]:
    """The feature services of one file, after adding what is wrong with them. *views*: those that they may name."""
    services = {}
    for name, data in document.data.items() if document.usable else ():
        if not re.fullmatch(NAME, str(name)):
            document.add((name,), f"expected {NAME_RULE}, found {name!r}")
        keys: ServiceKeys | None = checked_keys(document, ServiceKeys, data, (name,))
        if keys is not None:
            features = {
                view: _features(document, (name, "features", view), listed, views)
                for view, listed in keys.features.items()
            }
            _check(document, name, features, views)
            services[name] = FeatureService(name, features, keys.description)
    return services


def _features(document: Document, loc: Loc, listed: list[Any], views: Mapping[str, FeatureView]) -> dict[str, str]:
    """Feature -> its name in the vector, of one view's list."""
    view, found = loc[-1], dict[str, str]()
    if view not in views:
        document.add(loc, f"expected {one_of(views, view)}, found {view!r}")
        return found
    if not listed:
        document.expected(loc, "at least one feature", listed)
    for place, item in enumerate(listed):
        renamed = item if isinstance(item, dict) else {item: item}
        for feature, name in renamed.items():
            if not isinstance(name, str) or not re.fullmatch(FEATURE_NAME, name):
                document.expected((*loc, place), f"a feature, or {{feature: NAME}} with {NAMES['features']}", item)
            elif feature not in views[view].features:
                document.expected((*loc, place), one_of(views[view].features, feature), feature)
            elif feature in found:
                document.twice((*loc, place), feature)
            else:
                found[feature] = name
    return found


def _check(
    document: Document, service: str, features: Mapping[str, Mapping[str, str]], views: Mapping[str, FeatureView]
) -> None:
    """Each name is there once, and one store has all views."""
    names: dict[str, str] = {}
    for view, some in features.items():
        for feature, name in some.items():
            if name in names:
                document.add(
                    (service, "features", view),
                    f"expected each name once, found {name!r}, which {names[name]} has. Give it another one: {{{feature}: {view}_{feature}}}",
                )
            names.setdefault(name, view)
    stores = [set(views[view].online_stores) for view in features if view in views]
    if stores and not set.intersection(*stores):
        document.add(
            (service, "features"), "expected views that share an online store, found none that has all of them"
        )
