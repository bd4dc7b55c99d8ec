"""What a feature view's file may read of the environment: a variable in, the reason why it may not out.

Who writes a feature view is trusted less than who writes ``online_stores.yaml`` and sets the environment, which may narrow it further:
``MATERIALIZE_VIEW_VARIABLES`` lists the names that a feature view may read, joined by commas.
"""

from __future__ import annotations

import os
from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING

from materialize.model import mask_credentials

if TYPE_CHECKING:
    from materialize.config.document import Document

__all__ = ["secrets_of", "variable_problem"]

#: What a part of a variable's name says when it holds a secret.
SECRETS = frozenset(
    {
        *("AUTH", "CONN", "CREDENTIAL", "CREDENTIALS", "CREDS", "DSN", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD"),
        *("PASSWORD", "PRIVATE", "PW", "PWD", "SAS", "SECRET", "SECRETS", "TOKEN"),
    }
)
VARIABLES = "MATERIALIZE_VIEW_VARIABLES"


def _listed() -> list[str] | None:
    """The variables that the setting lists; None when it is not set."""
    text = os.environ.get(VARIABLES)
    return None if text is None else [item.strip() for item in text.split(",") if item.strip()]


def secrets_of(stores: Document) -> frozenset[str]:
    """The variables whose text `mask_credentials` hides in the file of the online stores."""
    hidden = set()
    for loc, names in stores.variables.items():
        masked = mask_credentials(str(reduce(getitem, loc, stores.data)))
        hidden |= {name for name in names if os.environ.get(name, "") not in masked}
    return frozenset(hidden)


def variable_problem(name: str, value: str, secrets: frozenset[str]) -> str | None:
    """Why a feature view may not read the variable *name*, which would appear in messages and names of columns; None when it may."""
    allowed = _listed()
    if allowed is not None:
        return None if name in allowed else f"which {VARIABLES} does not list"
    if SECRETS & set(name.upper().split("_")):
        return "which is named like a secret"
    if name in secrets or mask_credentials(value) != value:
        return "which holds credentials"
    return None
