"""The files of a table, in a folder or in a bucket: names in, bytes out. Independent of how Delta readers reach them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Bucket", "Folder", "Storage"]

#: HTTP: not found.
MISSING = 404


class Storage(Protocol):
    """Where one table is. ``uri`` and ``options`` are what deltalake and the feature view are given."""

    uri: str
    options: dict[str, str]

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None: ...

    def remove(self, name: str) -> None: ...

    def has(self, name: str) -> bool: ...

    def names(self, folder: str) -> list[str]: ...

    def wipe(self) -> None: ...


@dataclass(slots=True)
class Folder:
    """A local folder."""

    uri: str
    options: dict[str, str] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        return (Path(self.uri) / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (Path(self.uri) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(self.uri) / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (Path(self.uri) / name).unlink()

    def has(self, name: str) -> bool:
        return (Path(self.uri) / name).is_file()

    def names(self, folder: str) -> list[str]:
        return sorted(path.name for path in (Path(self.uri) / folder).glob("*"))

    def wipe(self) -> None:
        shutil.rmtree(self.uri, ignore_errors=True)


@dataclass(slots=True)
class Bucket:
    """A prefix of a bucket. ``client``: of boto3."""

    client: Any
    bucket: str
    prefix: str
    options: dict[str, str]

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def read(self, name: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"].read())

    def write(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")

    def has(self, name: str) -> bool:
        try:
            self.client.head_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != MISSING:
                raise
            return False
        return True

    def names(self, folder: str) -> list[str]:
        return sorted(found.rpartition("/")[2] for found in self._keys(f"{folder}/"))

    def wipe(self) -> None:
        for found in list(self._keys("")):
            self.remove(found.removeprefix(f"{self.prefix}/"))

    def _keys(self, prefix: str) -> Iterator[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.prefix}/{prefix}"
        )
        return (item["Key"] for page in pages for item in page.get("Contents", ()))
