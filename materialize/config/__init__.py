"""YAML files in, feature views and online stores out; every problem of every file in one error. The only room that knows YAML.

Loading touches neither the network nor Airflow: connections are read when `Config.online_store` or `Config.feature_view` is called.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from materialize.config.connections import (
    STORE_SCHEMES,
    checked_url,
    environment_connection,
    storage_options,
    store_url,
)
from materialize.config.document import Document, one_of, read
from materialize.config.limits import file_problem, secrets_of, variable_problem
from materialize.config.schema import stores_of, view_of
from materialize.config.services import services_of
from materialize.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.config.connections import Connections
    from materialize.feature_service import FeatureService
    from materialize.model import FeatureView, FeatureViewName, OnlineStoreConfig

__all__ = [
    "STORE_SCHEMES",
    "Config",
    "environment_connection",
    "load",
    "resolve",
    "resolve_source",
    "storage_options",
    "store_url",
]

Named = TypeVar("Named")


@dataclass(frozen=True, slots=True)
class Config:
    """What the YAML says. ``root`` is the parent of the config folder; relative paths start there."""

    root: Path
    feature_views: dict[FeatureViewName, FeatureView]
    online_stores: dict[str, OnlineStoreConfig]
    feature_services: dict[str, FeatureService] = field(default_factory=dict)
    connections: Connections = field(default=environment_connection, repr=False, compare=False)

    def feature_view(self, name: FeatureViewName) -> FeatureView:
        """The feature view with the credentials of its source. Raises `ConfigError` that lists the known ones."""
        return resolve_source(known(self.feature_views, name, "feature view"), self.connections)

    def online_store(self, name: str) -> OnlineStoreConfig:
        """The online store with its URL, and the views that it keeps as hashes. Raises `ConfigError` that lists the known ones."""
        store = resolve(known(self.online_stores, name, "online store"), self.connections)
        hashed = frozenset(view.name for view in self.feature_views.values() if view.layout == "hash")
        return replace(store, hashed=hashed) if hashed else store


def load(config_dir: str | Path, *, connections: Connections | None = None) -> Config:
    """Read ``feature_views/*.yaml``, ``online_stores.yaml`` and, where there is one, ``feature_services.yaml`` in *config_dir*.

    *connections* gives the Airflow connection of an id, as an object or as the text of an ``AIRFLOW_CONN_`` variable; without
    it these variables are read. It is first called when a store or view is asked for. Raises `ConfigError` with all problems.
    """
    folder = Path(config_dir)
    root = Path(os.path.abspath(folder)).parent  # noqa: PTH100 - resolve() would follow a linked folder to another parent
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: 1 problem\n  expected a folder with feature_views/*.yaml and online_stores.yaml, found "
            f"{'a file' if folder.exists() else 'nothing'}. Name the folder with --config DIR or MATERIALIZE_CONFIG"
        )
    stores_file = read(folder / "online_stores.yaml", secret=True)
    stores = stores_of(stores_file, root)
    names = list(stores_file.data) if stores_file.usable else None
    listing, paths = Document(folder / "feature_views"), []
    for path in sorted(listing.path.glob("[!.]*")):
        if path.suffix == ".yaml" and (expected := file_problem(path, folder, root)):
            listing.problems.append(f"{path.name}: expected {expected}, found a link to another place")
        elif path.suffix == ".yaml":
            paths.append(path)
        elif path.suffix == ".yml":
            listing.problems.append(f"{path.name}: expected the ending .yaml, found .yml")
    if not paths and not listing.problems:
        listing.problems.append("expected a file VIEW.yaml for each feature view, found none")
    barred = partial(variable_problem, secrets=secrets_of(stores_file))
    documents = [read(path, barred=barred) for path in paths]
    views = [view_of(document, root, names) for document in documents]
    known_views = {view.name: view for view in views if view}
    services_file = Document(folder / "feature_services.yaml")
    if services_file.path.exists() and (expected := file_problem(services_file.path, folder, root)):
        services_file.problems.append(f"expected {expected}, found a link to another place")
    elif services_file.path.exists() and len(known_views) == len(
        documents
    ):  # else the problems of the views come first
        services_file = read(services_file.path, barred=barred)
    services = services_of(services_file, known_views)
    if broken := [document for document in (listing, *documents, services_file, stores_file) if document.problems]:
        raise ConfigError("\n".join(document.report() for document in broken))
    return Config(root, known_views, stores, services, connections or environment_connection)


def resolve(store: OnlineStoreConfig, connections: Connections) -> OnlineStoreConfig:
    """*store* with the URL that its Airflow connection stands for. Raises `ConfigError` when the connection does not serve."""
    if store.connection is None:
        return store
    subject = f"online store {store.name!r}, Airflow connection {store.connection!r}"
    try:
        return replace(store, url=checked_url(store_url(connections(store.connection))))
    except ValueError as error:
        raise ConfigError(f"could not tell the URL of {subject}: {error}. Nothing was read or written.") from None


def resolve_source(view: FeatureView, connections: Connections) -> FeatureView:
    """*view* with the storage options that its Airflow connection stands for. Raises `ConfigError` as `resolve` does."""
    if view.source_connection is None:
        return view
    subject = f"feature view {view.name!r}, Airflow connection {view.source_connection!r}"
    try:
        return replace(view, storage_options=storage_options(connections(view.source_connection)))
    except ValueError as error:
        raise ConfigError(
            f"could not tell the credentials of the source of {subject}: {error}. Nothing was read or written."
        ) from None


def known(named: Mapping[str, Named], name: str, kind: str) -> Named:
    if name in named:
        return named[name]
    raise ConfigError(
        f"could not find the {kind} {name!r}: expected {one_of(named, name)}. Nothing was read or written."
    )
