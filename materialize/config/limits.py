"""What a feature view's file may reach: a variable, a path or a connection in, the reason why it may not out.

Who writes a feature view is trusted less than who writes ``online_stores.yaml`` and sets the environment. The
environment may narrow it: ``MATERIALIZE_ROOTS`` (folders and URIs that sources lie below, joined by ``|``), ``MATERIALIZE_VIEW_VARIABLES``
and ``MATERIALIZE_VIEW_CONNECTIONS`` (names, joined by commas).
"""

from __future__ import annotations

import os
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from materialize.model import mask_credentials

if TYPE_CHECKING:
    from materialize.config.document import Document

__all__ = ["connection_problem", "file_problem", "secrets_of", "source_problem", "variable_problem"]

#: What a part of a variable's name says when it holds a secret.
SECRETS = frozenset(
    {
        *("AUTH", "CONN", "CREDENTIAL", "CREDENTIALS", "CREDS", "DSN", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD"),
        *("PASSWORD", "PRIVATE", "PW", "PWD", "SAS", "SECRET", "SECRETS", "TOKEN"),
    }
)
ROOTS, VARIABLES, CONNECTIONS = "MATERIALIZE_ROOTS", "MATERIALIZE_VIEW_VARIABLES", "MATERIALIZE_VIEW_CONNECTIONS"


def _listed(name: str, separator: str = ",") -> list[str] | None:
    """The items of a setting; None when it is not set."""
    text = os.environ.get(name)
    return None if text is None else [item.strip() for item in text.split(separator) if item.strip()]


def secrets_of(stores: Document) -> frozenset[str]:
    """The variables whose text `mask_credentials` hides in the file of the online stores."""
    hidden = set()
    for loc, names in stores.variables.items():
        masked = mask_credentials(str(reduce(getitem, loc, stores.data)))
        hidden |= {name for name in names if os.environ.get(name, "") not in masked}
    return frozenset(hidden)


def variable_problem(name: str, value: str, secrets: frozenset[str]) -> str | None:
    """Why a feature view may not read the variable *name*, which would appear in messages and names of columns; None when it may."""
    allowed = _listed(VARIABLES)
    if allowed is not None:
        return None if name in allowed else f"which {VARIABLES} does not list"
    if SECRETS & set(name.upper().split("_")):
        return "which is named like a secret"
    if name in secrets or mask_credentials(value) != value:
        return "which holds credentials"
    return None


def connection_problem(connection: str | None) -> str | None:
    """What is expected instead of the Airflow connection of a source; None when a feature view may use it."""
    allowed = _listed(CONNECTIONS)
    if connection is None or allowed is None or connection in allowed:
        return None
    return f"an Airflow connection that {CONNECTIONS} lists"


def file_problem(path: Path, folder: Path, root: Path) -> str | None:
    """What is expected of the YAML file *path*, which may be a link; None when it is below *folder*, *root* or a listed folder."""
    real = os.path.realpath(path)
    allowed = [os.path.realpath(one) for one in (str(folder), str(root), *_folders())]
    if any(_below(real, one) for one in allowed):
        return None
    return f"a file, or a link to one, below the parent of the config folder or a folder of {ROOTS}"


def source_problem(source: str, root: Path) -> str | None:
    """What is expected instead of *source* as it is written; None when a feature view may read it.

    A relative path stays below *root*, also through links. An absolute one and a URI are free, unless ``MATERIALIZE_ROOTS`` is set.
    """
    remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source)
    if remote and not source.lower().startswith("file:"):
        return _uri_problem(source)
    path = unquote(urlsplit(source).path) if remote else source
    real, allowed = os.path.realpath(root / path), [os.path.realpath(one) for one in (str(root), *_folders())]
    listed = _listed(ROOTS, "|") is not None
    if any(_below(real, one) for one in allowed) or (Path(path).is_absolute() and not listed):
        return None
    if listed:
        return f"a path below the parent of the config folder or a folder of {ROOTS}"
    return "a path below the parent of the config folder, or an absolute one"


def _uri_problem(uri: str) -> str | None:
    allowed = _listed(ROOTS, "|")
    if allowed is None:
        return None
    steps = unquote(urlsplit(uri).path).split("/")
    if ".." not in steps and any(uri == root or uri.startswith(root.rstrip("/") + "/") for root in allowed):
        return None
    return f"a URI below one of {ROOTS}"


def _folders() -> list[str]:
    return [root for root in _listed(ROOTS, "|") or () if "://" not in root]


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
