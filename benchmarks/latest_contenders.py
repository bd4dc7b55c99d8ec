"""One way to the latest row per entity: a table in; seconds, CPU, peak memory and a digest of the result out, as a JSON line.

`suites/latest.py` runs each way as a process of its own. What is measured begins after the imports (and after Spark has started) with
the list of data files and ends with the result in memory, every column of it. The digest is over the rows by entity and is taken
afterwards, so that two ways are equal when their digests are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Callable

KEY, EVENT, CREATED = "user_id", "event_timestamp", "created_timestamp"
ORDER = (EVENT, CREATED)


def files_of(table: Path) -> list[str]:
    """Every data file: the tables of this benchmark have no other than live ones."""
    return sorted(str(path) for path in table.rglob("*.parquet"))


def product(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    """The two passes of a run, through the functions that a run calls: keys and order of all rows, then the winners' features."""
    import polars as pl

    from materialize import latest
    from materialize.feature_type import FeatureType
    from materialize.model import FeatureView
    from materialize.offline import open_table, read_features, read_order

    kinds = dict.fromkeys(features, FeatureType("float64"))
    view = FeatureView("latest", str(table), (KEY,), EVENT, kinds, ("default",), created_timestamp=CREATED)

    def work() -> pa.Table:
        opened = open_table(view)
        rows = read_order(opened, opened.snapshot_files())
        winners = latest.newest(rows.frame, view.join_keys)
        parts = [part for _, part in read_features(opened, rows, winners["position"])]
        names = {"event_us": EVENT, "created_us": CREATED}
        order = winners.select(KEY, *names).rename(names)
        return pl.concat([order, pl.concat(parts)], how="horizontal").to_arrow()

    return work


def read_all(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    """Every row and column in memory, and nothing else: what one pass cannot do without."""
    import polars as pl

    def work() -> pa.Table:
        return (
            pl.scan_parquet(files_of(table), hive_partitioning=False)
            .select(KEY, *ORDER, *features)
            .collect()
            .to_arrow()
        )

    return work


def polars_sorted(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    import polars as pl

    def work() -> pa.Table:
        rows = pl.scan_parquet(files_of(table), hive_partitioning=False).select(KEY, *ORDER, *features)
        return rows.sort(*ORDER).unique(KEY, keep="last").collect().to_arrow()

    return work


def polars_max_by(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    """By event time alone: of two rows that are equal in it, any may win."""
    import polars as pl

    def work() -> pa.Table:
        rows = pl.scan_parquet(files_of(table), hive_partitioning=False).select(KEY, *ORDER, *features)
        return rows.group_by(KEY).agg(pl.col(*ORDER, *features).max_by(EVENT)).collect().to_arrow()

    return work


def duckdb_qualify(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    import duckdb

    names = ", ".join((KEY, *ORDER, *features))
    query = (
        f"SELECT {names} FROM read_parquet($files, hive_partitioning = false) "
        f"QUALIFY row_number() OVER (PARTITION BY {KEY} ORDER BY {EVENT} DESC, {CREATED} DESC) = 1"
    )

    def work() -> pa.Table:
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            return connection.execute(query, {"files": files_of(table)}).to_arrow_table()

    return work


def pandas_sorted(table: Path, features: list[str]) -> Callable[[], pa.Table]:
    import pandas as pd
    import pyarrow.parquet as pq

    names = [KEY, *ORDER, *features]

    def work() -> pa.Table:
        rows = pd.concat([pq.ParquetFile(file).read(names).to_pandas() for file in files_of(table)])
        latest = rows.sort_values(list(ORDER)).drop_duplicates(KEY, keep="last")
        return pa.Table.from_pandas(latest, preserve_index=False)

    return work


def spark_row_number(table: Path, features: list[str]) -> tuple[Callable[[], pa.Table], Callable[[], pa.Table]]:
    """The result cached in Spark's memory; how it comes here, by a file, is not measured."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import atexit

    from tests.spark.session import SparkSession

    folder = Path(tempfile.mkdtemp(prefix="spark-"))  # in the folder that the caller removes
    session = SparkSession(folder, jvm=SPARK_JVM, settings=SPARK_SETTINGS)
    session.start()
    atexit.register(session.end)
    names = ", ".join((KEY, *ORDER, *features))
    session.sql(f"CREATE TEMPORARY VIEW source AS SELECT {names} FROM parquet.`{table}/*/*/*.parquet`")
    ranked = f"row_number() OVER (PARTITION BY {KEY} ORDER BY {EVENT} DESC, {CREATED} DESC)"

    def cache(name: str, rows: str) -> None:
        session.sql(
            f"CACHE TABLE {name} AS SELECT {names} FROM (SELECT *, {ranked} AS place FROM {rows}) WHERE place = 1"
        )

    cache("warm", f"(SELECT * FROM source WHERE {KEY} < 1000)")  # classes are loaded, and what runs often is compiled

    def work() -> pa.Table:
        cache("latest", "source")
        return pa.table({})

    def result() -> pa.Table:
        import pyarrow.parquet as pq

        session.sql(f"CREATE TABLE brought USING parquet LOCATION '{folder / 'brought'}' AS SELECT * FROM latest")
        return pq.read_table(folder / "brought")

    return work, result


#: As a cluster would run it, but for two cores: both compilers, generated code, adaptive plans.
SPARK_JVM = ("-Xms1g", "-Xmx6g", "-Duser.timezone=UTC", "-XX:-UsePerfData")
SPARK_SETTINGS = {
    "spark.master": "local[2]",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.log.level": "WARN",
    "spark.ui.enabled": "false",
    "spark.sql.shuffle.partitions": "8",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.datetime.java8API.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
}
WAYS: dict[str, Any] = {
    "ours": product,
    "read": read_all,
    "polars_sorted": polars_sorted,
    "polars_max_by": polars_max_by,
    "duckdb": duckdb_qualify,
    "pandas": pandas_sorted,
    "spark": spark_row_number,
}


def digest(found: pa.Table, features: list[str]) -> str:
    """Of the rows by entity: key and times as integers, features bit for bit."""
    found = found.select([KEY, *ORDER, *features]).sort_by(KEY).combine_chunks()
    total = hashlib.sha256()
    for name in found.column_names:
        column = found[name]
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64())
        total.update(column.to_numpy().tobytes())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="One way to the latest row per entity.")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--features", type=int, required=True)
    given = parser.parse_args()
    features = [f"feature_{number:02d}" for number in range(given.features)]
    made = WAYS[given.way](given.table, features)
    work, result = made if isinstance(made, tuple) else (made, None)
    used, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = work()
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        "peak_bytes": after.ru_maxrss * 1024,
    }
    if result is not None:  # the work was done by another process
        found, told["cpu_seconds"], told["peak_bytes"] = result(), None, None
    told |= {"rows": found.num_rows, "digest": digest(found, features)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
