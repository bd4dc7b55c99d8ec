"""Deletion vectors: which rows of a file are gone, in every way in which the log describes them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest

from materialize.errors import OfflineStoreError
from materialize.offline import open_table, read_features
from materialize.offline.deletion_vector import Selection, deleted_rows, positions, vector_id, vector_path
from tests.offline import (
    changed,
    difference,
    live_rows,
    path_in_log,
    removal,
    snapshot,
    users,
)
from tests.tables import T0, UTC_TIME, Table, deletion_vector_file, inline_deletion_vector, row

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = UUID("d2c639aa-8816-431a-aaf6-d3fe2512ff61")
ROWS = [0, 3, 65_535, 65_536, 200_000, 2**31]


def reader(files: dict[str, bytes]) -> Callable[[str, int, int], bytes]:
    return lambda path, offset, length: files[path][offset : offset + length]


def never(*_: Any) -> bytes:
    pytest.fail("nothing is to be read")


# --- some rows of a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[], [0], [4, 1], [0, 1, 2, 3, 4]])
def test_selection_has_the_named_rows_or_all_others(given: list[int]) -> None:
    named = np.array(given, dtype=np.uint64)

    assert np.flatnonzero(Selection(named, only=True).mask(5)).tolist() == sorted(given)
    assert np.flatnonzero(Selection(named).mask(5)).tolist() == [row for row in range(5) if row not in given]


def test_selection_of_a_row_that_the_file_does_not_have_is_an_error() -> None:
    with pytest.raises(IndexError):
        Selection(np.array([5], dtype=np.uint64)).mask(5)


# --- descriptors -----------------------------------------------------------------------------------------------------


def test_inline_vector_is_read_from_the_log_itself() -> None:
    vector = inline_deletion_vector(ROWS)

    assert positions(deleted_rows(vector, never)).tolist() == ROWS
    assert vector_path(vector) is None


def test_vector_as_spark_writes_it_is_read() -> None:
    text = "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"
    vector = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": 44, "cardinality": 6}

    assert list(deleted_rows(vector, never)) == [3, 4, 7, 11, 18, 29]
    assert inline_deletion_vector([3, 4, 7, 11, 18, 29]) == vector


def test_paths_of_the_protocol_are_found() -> None:
    text = "ab^-aqEH.-t@S}K{vb[*k^"

    assert vector_path({"storageType": "u", "pathOrInlineDv": text}) == f"ab/deletion_vector_{NAME}.bin"
    assert vector_path({"storageType": "u", "pathOrInlineDv": text[2:]}) == f"deletion_vector_{NAME}.bin"
    assert vector_path({"storageType": "p", "pathOrInlineDv": "s3://x/y.bin"}) == "s3://x/y.bin"


@pytest.mark.parametrize("prefix", ["", "ab", "a-b"])
@pytest.mark.parametrize("behind", [[], [1], list(range(5_000))], ids=["first", "second", "far"])
def test_vector_in_a_file_is_read_at_its_prefix_and_offset(prefix: str, behind: list[int]) -> None:
    path, content, vector = deletion_vector_file(NAME, ROWS, prefix=prefix, behind=behind)

    found = deleted_rows(vector, reader({path: content + b"more"}))

    assert positions(found).tolist() == ROWS
    assert positions(found).dtype == np.uint64


def test_vector_at_an_absolute_path_is_read() -> None:
    _, content, vector = deletion_vector_file(NAME, ROWS)
    absolute = vector | {"storageType": "p", "pathOrInlineDv": "file:/x/y%20z.bin"}

    assert list(deleted_rows(absolute, reader({"file:/x/y%20z.bin": content}))) == ROWS


def test_vector_without_an_offset_begins_where_the_file_does() -> None:
    path, content, vector = deletion_vector_file(NAME, ROWS)
    del vector["offset"]

    assert list(deleted_rows(vector, reader({path: content[1:]}))) == ROWS


def test_no_vector_deletes_no_row() -> None:
    assert list(deleted_rows(None, never)) == []
    assert vector_id(None) is None


def test_vectors_are_told_apart_by_place_and_offset() -> None:
    _, _, vector = deletion_vector_file(NAME, ROWS)

    assert vector_id(vector) == vector_id(dict(vector))
    others = [{"offset": 2}, {"pathOrInlineDv": "x" + vector["pathOrInlineDv"]}, {"storageType": "p"}]
    assert len({vector_id(vector), *(vector_id(vector | other) for other in others)}) == 4


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_of_every_density_are_read(seed: int) -> None:
    rng = random.Random(seed)
    rows = sorted(rng.sample(range(rng.choice([4_096, 200_000, 2**32])), rng.randint(1, 4_000)))

    assert list(deleted_rows(inline_deletion_vector(rows), never)) == rows


# --- what is wrong with a vector -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "found a damaged deletion vector in"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "found a damaged deletion vector in"),
        (lambda data: data[:4] + b"\1" + data[5:], "found a damaged deletion vector in"),
        (lambda data: data[:-9], "found a damaged deletion vector in"),
        (lambda data: data[:1], "found a damaged deletion vector in"),
    ],
    ids=["bit", "checksum", "size", "cut", "empty"],
)
def test_damaged_file_is_told(damage: Callable[[bytes], bytes], message: str) -> None:
    path, content, vector = deletion_vector_file(NAME, ROWS)

    with pytest.raises(ValueError, match=message) as caught:
        deleted_rows(vector, reader({path: damage(content)}))

    assert path in str(caught.value)


@pytest.mark.parametrize("rows", [5, 7, 0])
def test_other_number_of_rows_than_the_log_says_is_told(rows: int) -> None:
    with pytest.raises(ValueError, match=f"found a deletion vector of 6 rows, expected {rows}"):
        deleted_rows(inline_deletion_vector(ROWS) | {"cardinality": rows}, never)


@pytest.mark.parametrize(
    "text", ["0" * 50, "wi5b=000010000siXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"], ids=["zeros", "native"]
)
def test_other_format_than_the_portable_one_is_told(text: str) -> None:
    vector = {"storageType": "i", "pathOrInlineDv": text, "sizeInBytes": 40, "cardinality": 6}

    with pytest.raises(ValueError, match="expected a portable RoaringBitmapArray"):
        deleted_rows(vector, never)


def test_unknown_storage_type_is_told() -> None:
    with pytest.raises(ValueError, match="found a deletion vector of the storage type 'x', expected u, i or p"):
        deleted_rows(inline_deletion_vector(ROWS) | {"storageType": "x"}, never)


@pytest.mark.parametrize("change", [{"storageType": "x"}, {"cardinality": 2}, {"pathOrInlineDv": "0" * 20}])
def test_vector_that_cannot_be_read_stops_the_run(table: Table, change: dict[str, Any]) -> None:
    table.append(row("a", 1), row("b", 2))
    add = next(action["add"] for action in table.actions(0) if "add" in action)
    table.delete_rows(add["path"], [0])
    vector = inline_deletion_vector([1]) | change
    deleted = next(action["add"] for action in table.actions(1) if "add" in action)
    table.commit(removal({"add": deleted}), {"add": add | {"deletionVector": vector}})

    with pytest.raises(OfflineStoreError, match="could not read Delta table"):
        changed(table, 1)


# --- rows of a snapshot ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["table", "a b ü"])
def test_deletion_vectors_hide_rows_of_a_snapshot(tmp_path: Path, folder: str) -> None:
    table = Table(tmp_path / folder)
    table.create(partition_by=["country"])
    rows = table.arrow([row(f"u{index}", index) for index in range(10)])
    action = table.add_file("country=%25/f.parquet", rows, partition={"country": "%"}, row_group_size=3)
    action["add"]["path"] = "country=%2525/f.parquet"
    table.commit(action)
    table.append(*(row(f"v{index}", index, country="a b") for index in range(3)))

    table.delete_rows("country=%2525/f.parquet", [0, 4, 9])
    table.delete_rows(path_in_log(table, 2), [1])

    assert users(snapshot(table)) == ["u1", "u2", "u3", "u5", "u6", "u7", "u8", "v0", "v2"]


def test_deletion_vector_over_large_positions_and_a_second_one_on_the_same_file(table: Table) -> None:
    rows = 140_000
    moments = pa.array([T0] * rows, UTC_TIME)
    table.append_table(
        pa.table(
            {
                "user_id": [f"u{index}" for index in range(rows)],
                "event_timestamp": moments,
                "created": moments,
                "amount": [float(index) for index in range(rows)],
                "count": pa.array([1] * rows, pa.int64()),
                "country": ["DE"] * rows,
            }
        )
    )
    path, gone = path_in_log(table, 0), {0, 65_535, 65_536, 131_072, 139_999}
    table.delete_rows(path, gone - {0})
    table.delete_rows(path, gone)

    assert difference(table, 1) == ([], ["u0"])
    opened = open_table(table.view)
    found = live_rows(opened)
    features = [block for _, block in read_features(opened, found, found.frame["position"])]

    assert found.counts.tolist() == [rows]
    kept = [index for index in range(rows) if index not in gone]
    assert found.frame["position"].to_list() == kept
    assert [value for block in features for value in block["amount"].to_list()] == [float(index) for index in kept]


def test_file_with_every_row_deleted_gives_none(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.delete_rows(path_in_log(table, 0), [0, 1])

    assert snapshot(table) == []


# --- rows that a commit deleted or brought back ----------------------------------------------------------------------


def test_first_vector_of_a_file_tells_the_entities_that_lost_a_row(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abcd"))
    table.delete_rows(path_in_log(table, 0), [1, 3])

    assert changed(table, 0) == ([], ["b", "d"])
    assert users(snapshot(table)) == ["a", "c"]


def test_second_vector_of_a_file_tells_only_the_rows_that_it_deletes_anew(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abcd"))
    table.delete_rows(path_in_log(table, 0), [1])
    table.delete_rows(path_in_log(table, 0), [1, 3])

    assert changed(table, 1) == ([], ["d"])
    assert changed(table, 0) == ([], ["b", "d"])


def test_smaller_vector_brings_rows_back(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abcd"))
    table.delete_rows(path_in_log(table, 0), [0, 1, 3])
    table.delete_rows(path_in_log(table, 0), [2, 1])

    rows, lost = difference(table, 1)

    assert [(one["user_id"], one["version"], one["amount"]) for one in rows] == [("a", 2, 0.0), ("d", 2, 0.0)]
    assert lost == ["c"]


def test_file_that_loses_its_vector_brings_every_row_back(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abc"))
    add = next(action["add"] for action in table.actions(0) if "add" in action)
    table.delete_rows(add["path"], [0, 2])
    deleted = next(action["add"] for action in table.actions(1) if "add" in action)
    table.commit(removal({"add": deleted}), {"add": add})

    assert changed(table, 1) == ([("a", 0.0), ("c", 0.0)], [])
    assert changed(table, 0) == ([("a", 0.0), ("c", 0.0)], ["a", "c"])
    assert users(snapshot(table)) == ["a", "b", "c"]


def test_vector_and_rewritten_file_in_one_commit_are_compared_together(table: Table) -> None:
    table.append(*(row(user, 1, 1.0) for user in "abc"))
    table.append(*(row(user, 1, 1.0) for user in "xyz"))
    kept, gone = ({"add": next(a["add"] for a in table.actions(v) if "add" in a)} for v in (0, 1))
    listed = ["deletionVectors"]
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": listed, "writerFeatures": listed}
    new = table.add_file(
        "new.parquet", table.arrow([row("b", 1, 1.0), row("c", 1, 2.0), row("x", 1, 1.0), row("y", 1, 3.0)])
    )
    table.commit(
        {"protocol": protocol},
        removal(kept),
        removal(gone),
        {"add": kept["add"] | {"deletionVector": inline_deletion_vector([1, 2])}},
        new,
    )

    assert changed(table, 1) == ([("c", 2.0), ("y", 3.0)], ["c", "y", "z"])
    assert users(snapshot(table)) == ["a", "b", "c", "x", "y"]


def test_file_with_a_vector_that_is_removed_or_rewritten_loses_only_its_live_rows(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abc"))
    table.delete_rows(path_in_log(table, 0), [0])
    deleted = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    table.commit(removal(deleted), table.add_file("new.parquet", table.arrow([row("b", 1)])))

    assert changed(table, 1) == ([], ["c"])


def test_vector_that_is_compacted_away_is_no_change(table: Table) -> None:
    table.append(*(row(user, 1) for user in "abc"))
    table.delete_rows(path_in_log(table, 0), [0])
    deleted = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    purged = table.add_file("purged.parquet", table.arrow([row("b", 1), row("c", 1)]))
    purged["add"]["dataChange"] = False
    table.commit(removal(deleted, dataChange=False), purged)

    assert changed(table, 1) == ([], [])
    assert changed(table, 0) == ([], ["a"])
    assert users(snapshot(table)) == ["b", "c"]


def test_file_that_is_added_with_a_vector_brings_its_other_rows(table: Table) -> None:
    table.append(row("x", 1))
    table.delete_rows(path_in_log(table, 0), [0])
    action = table.add_file("new.parquet", table.arrow([row(user, 2) for user in "abc"]))
    action["add"]["deletionVector"] = inline_deletion_vector([1])
    table.commit(action)

    assert changed(table, 1) == ([("a", 0.0), ("c", 0.0)], [])


def test_same_vector_with_other_statistics_is_no_change(table: Table) -> None:
    table.append(row("a", 1), row("b", 1))
    table.delete_rows(path_in_log(table, 0), [0])
    deleted = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    table.commit(removal(deleted), {"add": deleted["add"] | {"stats": '{"numRecords": 2, "tightBounds": false}'}})

    assert changed(table, 1) == ([], [])


@pytest.mark.parametrize("prefix", ["", "a b"])
def test_vector_in_a_file_of_the_table_is_read_by_both_paths(tmp_path: Path, prefix: str) -> None:
    table = Table(tmp_path / "t ü")
    table.append(*(row(user, 1) for user in "abc"))
    add = next(action["add"] for action in table.actions(0) if "add" in action)
    table.delete_rows(add["path"], [2])
    deleted = {"add": next(action["add"] for action in table.actions(1) if "add" in action)}
    path, content, vector = deletion_vector_file(NAME, [0, 2], prefix=prefix, behind=[1])
    (table.path / path).parent.mkdir(exist_ok=True)
    (table.path / path).write_bytes(content)
    table.commit(removal(deleted), {"add": add | {"deletionVector": vector}})

    assert changed(table, 1) == ([], ["a"])
    assert users(snapshot(table)) == ["b"]
