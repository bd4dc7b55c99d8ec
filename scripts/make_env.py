"""Fresh secrets for docker-compose.yaml: a file in, the same file with one line per secret out, readable only by its owner.

    python scripts/make_env.py [--force] [FILE]

A file that is there is left as it is. It needs nothing but Python's own library, and no secret is ever printed.
"""

from __future__ import annotations

import argparse
import base64
import os
import secrets
import sys
from pathlib import Path

#: Bytes of a secret. A Fernet key has 32, and the JWT secret is for HMAC-SHA512, whose key should have 64.
KEY_BYTES, JWT_BYTES, UI_BYTES = 32, 64, 18
#: Letters and digits only, apart from the Fernet key: passwords go into URLs as they are.
SECRETS = {
    "POSTGRES_PASSWORD": lambda: secrets.token_hex(KEY_BYTES),
    "VALKEY_PASSWORD": lambda: secrets.token_hex(KEY_BYTES),
    "BROKER_PASSWORD": lambda: secrets.token_hex(KEY_BYTES),
    "MATERIALIZE_SERVE_TOKENS": lambda: secrets.token_hex(KEY_BYTES),
    "AIRFLOW_FERNET_KEY": lambda: base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode(),
    "AIRFLOW_API_SECRET_KEY": lambda: secrets.token_hex(KEY_BYTES),
    "AIRFLOW_JWT_SECRET": lambda: secrets.token_hex(JWT_BYTES),
    "AIRFLOW_UI_PASSWORD": lambda: secrets.token_hex(UI_BYTES),
}
HEADER = "# Made by `make env` for docker-compose.yaml. Keep it out of version control; docs/docker.md says how to change it.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write fresh secrets for docker-compose.yaml.")
    parser.add_argument("file", nargs="?", type=Path, default=Path(".env"))
    parser.add_argument("--force", action="store_true", help="write new secrets over a file that is there")
    options = parser.parse_args()
    look = f"grep AIRFLOW_UI_PASSWORD {options.file}"
    if options.file.exists() and not options.force:
        missing = sorted(SECRETS.keys() - names(options.file))
        if missing:
            sys.exit(f"{options.file} was left as it is, but lacks {', '.join(missing)}. See docs/docker.md.")
        print(f"{options.file} is there and was left as it is. The password of the UI: {look}")
        return
    write(options.file)
    print(f"wrote {options.file} (only you can read it): {', '.join(SECRETS)}. The password of the UI: {look}")


def names(file: Path) -> set[str]:
    """The names that have a value in *file*."""
    pairs = (line.partition("=") for line in file.read_text(encoding="utf-8").splitlines())
    return {name.strip() for name, _, value in pairs if value.strip()}


def write(file: Path) -> None:
    """Put fresh secrets into *file* at once: a reader sees the old file or the new one, and nobody else either of them."""
    fresh = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
        out.write(HEADER + "".join(f"{name}={make()}\n" for name, make in SECRETS.items()))
    fresh.replace(file)


if __name__ == "__main__":
    main()
