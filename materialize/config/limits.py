"""What a feature view's file may reach: a variable, a path or a connection in, the reason why it may not out.

Who writes a feature view is trusted less than who writes ``online_stores.yaml`` and sets the environment. The
environment may narrow it: ``MATERIALIZE_ROOTS`` (absolute folders and URIs that sources and SQLite files lie below, joined by ``|``),
``MATERIALIZE_VIEW_VARIABLES`` and ``MATERIALIZE_VIEW_CONNECTIONS`` (names, joined by commas).
"""

from __future__ import annotations

import os
import re
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING

from materialize.model import mask_credentials

if TYPE_CHECKING:
    from materialize.config.document import Document

__all__ = ["connection_problem", "file_problem", "path_problem", "secrets_of", "source_problem", "variable_problem"]

#: What a part of a variable's name says when it holds a secret.
SECRETS = frozenset(
    {
        *("AUTH", "CONN", "CREDENTIAL", "CREDENTIALS", "CREDS", "DSN", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD"),
        *("PASSWORD", "PRIVATE", "PW", "PWD", "SAS", "SECRET", "SECRETS", "TOKEN"),
    }
)
ROOTS, VARIABLES, CONNECTIONS = "MATERIALIZE_ROOTS", "MATERIALIZE_VIEW_VARIABLES", "MATERIALIZE_VIEW_CONNECTIONS"
#: A URI that every reader takes for the same: others read ``%2e%2e`` and ``\\..\\`` as a step up, and leave tabs out (WHATWG URL, 4.4).
PLAIN_URI = re.compile(r"[^\s%?#\\]+")


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
    if _inside(str(path), folder, root):
        return None
    return f"a file, or a link to one, below the parent of the config folder or a folder of {ROOTS}"


def path_problem(path: str, root: Path) -> str | None:
    """What is expected instead of *path* as it is written; None when configuration may name it.

    A relative path stays below *root* or a listed folder, also through links. An absolute one is free, unless ``MATERIALIZE_ROOTS`` is set.
    """
    listed = _listed(ROOTS, "|") is not None
    # Normalized first, as the path that is opened is: ``link/../x`` is ``x`` there, not what is beside the link's target.
    if _inside(os.path.normpath(root / path), root) or (Path(path).is_absolute() and not listed):
        return None
    return f"a path below the parent of the config folder or a folder of {ROOTS}" + ", or an absolute one" * (
        not listed
    )


def source_problem(source: str, root: Path) -> str | None:
    """What is expected instead of *source*, a path or URI; None when a feature view may read it. URIs are free as absolute paths are.

    With ``MATERIALIZE_ROOTS`` a URI is below one of them as it is written, and has no character that a reader of URIs takes for another.
    """
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return path_problem(source, root)
    roots = _listed(ROOTS, "|")
    if roots is None:
        return None
    if PLAIN_URI.fullmatch(source) and not {".", ".."} & set(source.split("/")):
        if any(f"{source}/".startswith(one.rstrip("/") + "/") for one in roots if "://" in one):
            return None
        if source.startswith("file:///") and _inside(source.removeprefix("file://"), root):
            return None
    return f"a URI below one of {ROOTS}, without '..', '%', '?', '#', '\\' and spaces"


def _inside(path: str, *folders: Path) -> bool:
    """Whether *path* is, behind all links, one of *folders* or of the listed ones, or below one."""
    listed = [Path(one) for one in _listed(ROOTS, "|") or () if one.startswith("/")]
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(one)) for one in (*folders, *listed))
