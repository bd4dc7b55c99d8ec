"""Random histories on every store, and on S3, end with each entity's latest row; planted bugs do not get past them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import materialize
from tests.dynamodb_local import REGION
from tests.mutants import MUTANTS, copied, played, tried
from tests.object_store import BUCKET
from tests.properties.histories import play
from tests.properties.storage import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests import servers
    from tests.dynamodb_local import DynamoDbLocal
    from tests.object_store import ObjectStore
    from tests.properties.storage import Storage

#: Incremental runs that are checked, over all stores; more with MATERIALIZE_DIFFERENTIAL=100000.
WINDOWS = int(os.environ.get("MATERIALIZE_DIFFERENTIAL", "1020"))
#: The first seed of the first part, to see a failure again; each store has seeds of its own by default.
SEED = os.environ.get("MATERIALIZE_SEED")
#: Parts per store, the seeds between the first ones of two parts, and of two stores.
PARTS, APART, STORES_APART = 4, 1_000_000, 100_000_000
#: Planted bugs that are tried in every run of the tests; `make mutants` tries all of them.
QUICK = ("removed rows ignored", "deletion vector inverted", "floor ignored", "watermark moved before the write")


def play_windows(
    url: str, *, store: int, part: int, windows: int, storage: Callable[[int], Storage | None] = lambda _seed: None
) -> None:
    """Play histories until so many incremental runs were checked."""
    seed = int(SEED or STORES_APART * store) + APART * part
    done = 0
    while done < windows:
        done += play(url, seed, storage(seed)).windows
        seed += 1


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("store", "url"), [(0, "memory://"), (1, "sqlite:///FOLDER/online.db")])
def test_random_histories_end_right(store: int, url: str, part: int) -> None:
    play_windows(url, store=store, part=part, windows=WINDOWS // 3 // PARTS)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_histories_end_right_on_valkey(valkey: servers.Server, part: int) -> None:
    play_windows(f"{valkey.url}?prefix=sSEED", store=2, part=part, windows=WINDOWS // 3 // PARTS)


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
@pytest.mark.parametrize("part", range(2))
def test_random_histories_end_right_on_dynamodb(dynamodb_local: DynamoDbLocal, part: int) -> None:
    """On one tenth of the windows: each takes several times as long as one on Valkey."""
    url = f"dynamodb://key:secret@{REGION}/sSEED?endpoint_url={dynamodb_local.endpoint}&write_units=1000000"
    play_windows(url, store=4, part=part, windows=WINDOWS // 10 // 2)


@pytest.mark.parametrize("part", range(2))
def test_random_histories_of_tables_on_s3_end_right(object_store: ObjectStore, part: int) -> None:
    """On one 25th of the windows: each takes twice the time of one in a folder."""

    def in_bucket(seed: int) -> Storage:
        return Bucket(object_store.client, BUCKET, f"history-{seed}", object_store.options)

    play_windows("memory://", store=3, part=part, windows=WINDOWS // 25 // 2, storage=in_bucket)


def test_every_planted_bug_has_its_place_in_the_code() -> None:
    package = Path(materialize.__file__).parent
    assert [mutant.name for mutant in MUTANTS if mutant.there not in (package / mutant.file).read_text()] == []


@pytest.mark.parametrize("name", QUICK)
def test_planted_bug_is_caught(name: str) -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)

    caught = tried(mutant, histories=30)

    assert caught.by is not None, caught.told


def test_unchanged_copy_of_the_package_passes(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    with (folder / "materialize" / "__init__.py").open("a") as source:
        source.write('\nprint("the copy")\n')

    ended = played(folder, 3)

    assert (ended.returncode, ended.stdout) == (0, "the copy\n"), ended.stderr
