"""What a read costs a model server: beside redis-py's own GET and MGET, quiet and while the store is loaded, and beside Feast's SDK."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import feast_materialize
import lake
import render
import servers
import serving
from measure import Missing, Sample, Setting, Suite, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ONE, MANY, MATRIX = (
    "read_features",
    f"batch_read of {serving.BATCH}, to_dicts",
    f"batch_read of {serving.BATCH}, to_numpy",
)
GET, MGET = "redis-py GET", f"redis-py MGET of {serving.BATCH}"
FEAST = f"Feast {feast_materialize.FEAST}, get_online_features"
#: What -> its limit; of the others there is none.
LIMITS = {GET: GET, ONE: GET, MGET: MGET, MANY: MGET, MATRIX: MGET}


@dataclass(frozen=True, slots=True)
class Point:
    """``loaded``: entities of the load beside the reads; ``feast``: entities that Feast reads from, 0 for not at all."""

    kind: str
    entities: int
    features: int
    reads: int
    loaded: int
    feast: int


POINTS = {
    "tiny": (Point("valkey", 1_000, 10, 100, 0, 0),),
    "bench": (Point("redis", 50_000, 50, 5_000, 200_000, 2_000), Point("valkey", 50_000, 50, 2_000, 0, 0)),
    "large": tuple(
        Point(kind, 1_000_000, features, 20_000, 1_000_000, 20_000 if (kind, features) == ("redis", 50) else 0)
        for kind in servers.KINDS
        for features in (10, 50, 200)
    ),
}


def sample(
    case: str, what: str, waits: list[float], *, rows: int, ours: str | None = None, limit: str | None = None
) -> Sample:
    p50, p99, p999 = serving.quantiles(waits)
    more = {"reads": len(waits), "p50": p50 / 1e3, "p99": p99 / 1e3, "p99.9": p999 / 1e3}
    return Sample(case, what, 1, rows, p50 / 1e3, limit, ours, more=more)


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    for point in POINTS[setting.scale]:
        try:
            servers.server_binary(point.kind)
        except SystemExit as missing:
            yield Missing(point.kind, str(missing))
            continue
        yield from measure_point(point, setting)


def measure_point(point: Point, setting: Setting) -> Iterator[Sample | Missing]:
    name = f"{point.kind}, {point.entities:,} entities x {point.features} float64"
    sizes = {"rows_per_entity": 1, "features": point.features, "kind": "float64", "seed": setting.seed}
    cases = [(f"{name}, quiet", point.entities, False)]
    if point.loaded:
        cases.append(
            (
                f"{point.kind}, {point.loaded:,} entities x {point.features} float64, while a paced rebuild writes them",
                point.loaded,
                True,
            )
        )
    else:
        yield Missing(f"{name}, while it is loaded", f"not at the size {setting.scale!r}")
    tables = {entities: lake.generated(setting.work, entities=entities, **sizes) for _, entities, _ in cases}
    for case, entities, loaded in cases:
        found = serving.ours(tables[entities], point.kind, point.reads, loaded=loaded)
        for what, waits in found.waits.items():
            rows = serving.BATCH if str(serving.BATCH) in what else 1
            yield sample(case, what, waits, rows=rows, limit=LIMITS.get(what))
        told = (
            ""
            if found.load is None
            else f"; the load took {found.load['seconds']:.1f} s, held back {found.load['held_back']:.1f} s"
        )
        progress(f"{case}: {found.bytes_per_entity:.0f} bytes per entity{told}")
    if not point.feast:
        yield Missing(f"{name}: {FEAST}", "not at this size or with this store")
        return
    try:
        with servers.running_server(point.kind) as server:
            servers.apart(server)
            of = {"entities": point.feast, "rows_per_entity": 1, "features": point.features}
            waits = feast_materialize.measure(server, of, reads=point.reads)["waits"]
    except (OSError, subprocess.CalledProcessError) as error:
        yield Missing(f"{name}: {FEAST}", f"Feast's environment could not be made: {error}")
        return
    case = cases[0][0]
    yield sample(case, f"{FEAST} of 1", waits["1"], rows=1, limit=GET, ours=ONE)
    yield sample(
        case, f"{FEAST} of {serving.BATCH}", waits[str(serving.BATCH)], rows=serving.BATCH, limit=MGET, ours=MANY
    )


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    lines = []
    for case in dict.fromkeys(each.case for each in samples):
        some = [each for each in samples if each.case == case]
        for what, limit in ((ONE, GET), (MANY, MGET), (MATRIX, MGET)):
            found = render.ratios(some, what, limit, cost=True)
            lines.append((f"{what}, p50 of {limit} ({case})", render.spread(found, render.times), "-"))
        peers = {f"{FEAST} of 1": ONE, f"{FEAST} of {serving.BATCH}": MANY}
        ratios = {peer: render.ratios(some, what, peer) for peer, what in peers.items()}
        lines += [
            (f"p50, times faster than {peer}", render.spread(found, render.times), "-")
            for peer, found in ratios.items()
            if found
        ]
    return lines


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    some = [each for each in samples if each.case == samples[0].case]
    return [
        (
            f"p50 in milliseconds: {samples[0].case}",
            partial(render.bars, {each.what: 1e3 * each.seconds for each in some}, xlabel="ms", log=True),
        )
    ]


SUITE = Suite(
    name="reads",
    title="Reads",
    about="""\
One process reads entities by chance, each kind of read in turn, a hundred at a time: redis-py's GET and MGET of the same keys, to bytes, and
`OnlineFeatures` to dicts and to a matrix. Where there are two cores the server has one for itself, and reader and load share the other, the load at
nice 10. Feast reads as many entities of the same width from a server of its own. Sampled values are compared with the stored bytes first.""",
    columns=("rows", "p50", "p99", "p99.9", "cost", "ours"),
    seconds={"tiny": 240, "bench": 300, "large": 3600},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
