"""The tasks of the backfill form: the filled form goes in, its runs' plans, pieces and commits come out.

Mapped tasks pass on by their position: `begin` and `commit` of a store are mapped over the same targets. A target is one
feature view in one store. Each fails alone: what one of them lacks is said by its own `commit`, and holds back no other.
"""

from __future__ import annotations

from datetime import datetime
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import structlog
from airflow.sdk import AssetAlias, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from materialize.airflow import tasks, verification
from materialize.config import load
from materialize.errors import UnavailableError
from materialize.model import Interval, VerifySettings
from materialize.stop import stop_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.plan import Plan

__all__ = [
    "APPROVE",
    "BACKFILLED",
    "EVERY_STORE",
    "FORM_FIELDS",
    "MODES",
    "PARALLEL",
    "REPORTS",
    "batches",
    "begin",
    "check_form",
    "commit",
    "judge",
    "plan",
    "summary",
    "targets",
    "verify",
    "write",
]

log = structlog.get_logger(__name__)

#: The choice that stands for every online store of a view.
EVERY_STORE = "every store of the view"
#: What the form can do, by the names that it shows.
MODES = {
    "interval backfill": "backfill",
    "rebuild": "rebuild",
    "verify": "verify",
    "verify and repair": "repair",
}
#: Those that compare every entity with the table instead of loading.
COMPARISONS = ("verify", "repair")
#: The fields of the form.
FORM_FIELDS = ("views", "mode", "start", "end", "store", "dry_run", "parallel", "force")
#: Tasks that write to one store at once: at least, by default, at most. Airflow maps at most 1,024.
PARALLEL = (1, 4, 64)
#: Views and stores of one form; Airflow maps at most 1,024 tasks.
MAX_TARGETS = 1_000
#: The form's events reach the assets of its views through this alias.
BACKFILLED = AssetAlias("materialize_backfill")
#: The task that waits for a person.
APPROVE = "approve"
#: The XCom key of what `write` did, which is kept although a piece of another view fails.
REPORTS = "reports"
#: Rows a second that one task brings online where the store says nothing better: about two thirds of what README's table has for Redis.
ROWS_PER_SECOND = 100_000
#: Bytes that a store keeps beside each key (Redis).
KEY_OVERHEAD = 100


# The form --------------------------------------------------------------------------------------------------------------


def check_form() -> list[dict[str, Any]]:
    """Refuse a form that cannot be carried out, naming every problem. Returns one target for each view and store."""
    context = get_current_context()
    fields, problems = context["params"], []
    unknown = sorted(set(context["dag_run"].conf or {}) - set(FORM_FIELDS))
    if unknown:
        problems.append(f"unknown fields {', '.join(map(repr, unknown))}; the form has {', '.join(FORM_FIELDS)}")
    mode = MODES[fields["mode"]]
    start, end = (tasks.moment(name, fields[name], mode, problems) for name in ("start", "end"))
    if start and end and end <= start:
        problems.append(f"end: expected a time after the start {start.isoformat()}, found {end.isoformat()}")
    pairs = chosen(fields["views"], fields["store"], problems)
    if len(pairs) > MAX_TARGETS:
        problems.append(f"views: expected at most {MAX_TARGETS:,} views and stores at once, found {len(pairs):,}")
    if problems:
        raise AirflowFailException(
            f"could not start the backfill: {len(problems)} problem{'s' * (len(problems) > 1)}; nothing was read or written. "
            "Trigger the DAG again with the form corrected.\n  " + "\n  ".join(problems)
        )
    ends = [start.isoformat(), end.isoformat()] if start and end else None
    wanted = {"mode": mode, "interval": ends, "force": fields["force"]}
    return [{"view": view, "store": store, **wanted} for view, store in pairs]


def chosen(views: list[str], store: str, problems: list[str]) -> list[tuple[str, str]]:
    """Each chosen view with each store to write to; adds to *problems* what the configuration does not have."""
    known = load(tasks.current_config_dir()).feature_views
    if not views:
        problems.append(f"views: expected at least one of {', '.join(sorted(known))}, found none")
    pairs = []
    for view in dict.fromkeys(views):
        if view not in known:
            problems.append(f"views: expected some of {', '.join(sorted(known))}, found {view!r}")
        elif store == EVERY_STORE:
            pairs += [(view, name) for name in known[view].online_stores]
        elif store not in known[view].online_stores:
            has = ", ".join(known[view].online_stores)
            problems.append(f"store: feature view {view!r} is served from {has}, found {store!r}")
        else:
            pairs.append((view, store))
    return pairs


def name_in_ui(*words: str) -> None:
    """What this mapped task is called in the UI, instead of its number."""
    context: Any = get_current_context()
    context[tasks.PIECE] = ", ".join(words)


def interval(target: dict[str, Any]) -> Interval | None:
    ends = target["interval"]
    return ends and Interval(*map(datetime.fromisoformat, ends))


# The plan and what it costs --------------------------------------------------------------------------------------------


def plan(target: dict[str, Any]) -> dict[str, Any]:
    """What the form would do to one view and store, and an estimate of what it takes. Writes nothing."""
    from materialize.online.base import typical_bytes
    from materialize.pipeline import make_plan
    from materialize.preflight import field_bytes
    from materialize.verify import plan_comparison

    view, store, mode = (target[name] for name in ("view", "store", "mode"))
    name_in_ui(view, store)
    with tasks.opened(view, store) as (feature_view, online):
        names = {"store_name": store, "run_id": tasks.run_id()}
        if mode in COMPARISONS:
            made = plan_comparison(feature_view, online, **names)
            costs = online.estimate(feature_view, made.rows, "verify", first=False)
        else:
            made = make_plan(feature_view, online, mode=mode, interval=interval(target), force=target["force"], **names)
            costs = online.estimate(feature_view, made.rows, mode, first=made.watermark is None)
        fields = field_bytes(feature_view, variable_bytes=0) if online.layout(view) == "hash" else 0
    tasks.log_plan(made)
    told = {name: getattr(made, name) for name in ("view", "store", "rows", "pieces", "to_version", "reason")}
    told["mode"] = mode
    estimate = {"minutes": minutes(made, get_current_context()["params"]["parallel"])} | costs
    entity = typical_bytes(feature_view) + len(view) + KEY_OVERHEAD + fields
    return told | estimate | {"gigabytes": round(entity * made.rows / 1e9, 3), "costs": costs}


def minutes(made: Plan, parallel: int) -> float:
    """How long the writing takes at `ROWS_PER_SECOND`, with the pieces of this plan alone."""
    return round(made.rows / ROWS_PER_SECOND / max(1, min(parallel, made.pieces)) / 60, 1)


def summary(targets: list[dict[str, Any]], plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole plan for people: a table in the log and as ``markdown``, sums, and what a person has to approve (``approval``)."""
    found = {(one["view"], one["store"]): one for one in plans[:]}
    lacking = [f"{one['view']} in {one['store']}" for one in targets if (one["view"], one["store"]) not in found]
    stores = load(tasks.current_config_dir()).online_stores
    rows: dict[str, int] = {}
    for one in found.values():
        if one["mode"] not in COMPARISONS:
            rows[one["store"]] = rows.get(one["store"], 0) + one["rows"]
    approval = [
        f"{store}: {count:,} rows, more than approve_above_rows: {stores[store].approve_above_rows:,}"
        for store, count in rows.items()
        if count > stores[store].approve_above_rows
    ]
    total = totals(list(found.values()))
    markdown = "\n".join(
        [*table(list(found.values()), total), *(f"\nNo plan, see the task `plan`: {one}" for one in lacking)]
    )
    for line in markdown.splitlines():
        log.info(line)
    return total | {"planned": [list(pair) for pair in found], "approval": approval, "markdown": markdown}


def totals(plans: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all plans; for the minutes, those of the store that takes longest."""
    minutes: dict[str, float] = {}
    for one in plans:
        minutes[one["store"]] = minutes.get(one["store"], 0) + one["minutes"]
    sums = {name: sum(one[name] for one in plans) for name in ("rows", "pieces", "gigabytes")}
    return sums | {"gigabytes": round(sums["gigabytes"], 3), "minutes": round(max(minutes.values(), default=0), 1)}


def table(plans: list[dict[str, Any]], total: dict[str, Any]) -> list[str]:
    """Lines of Markdown: one row for each plan, their sums, and what the figures mean."""
    names = ("view", "store", "mode", "version", "rows", "pieces", "minutes", "GB", "costs")
    lines = [f"| {' | '.join(names)} |", f"|{'|'.join('---' for _ in names)}|"]
    for one in plans:
        costs = "; ".join(f"{name} {cost}" for name, cost in one["costs"].items() if name != "minutes")
        lines.append(
            f"| {one['view']} | {one['store']} | {one['mode']} | {one['to_version']} | {one['rows']:,} | {one['pieces']} "
            f"| {one['minutes']} | {one['gigabytes']} | {costs or '-'} |"
        )
    lines.append(f"| all | | | | {total['rows']:,} | {total['pieces']} | {total['minutes']} | {total['gigabytes']} | |")
    legend = (
        f"Rows are what is read, so at most so many are written. Minutes: as the store says, else at {ROWS_PER_SECOND:,} rows a second "
        "for each task, one view after another. GB: online, if every row is another entity, roughly, from the widths of the features."
    )
    return [*lines, "", legend]


# The work --------------------------------------------------------------------------------------------------------------


def targets(
    store: str, targets: list[dict[str, Any]], summed: dict[str, Any], *, compare: bool
) -> list[dict[str, Any]]:
    """The chosen views to load into *store*, or to *compare* with it. Skipped with a sentence in a dry run, and when there are none."""
    if get_current_context()["params"]["dry_run"]:
        raise AirflowSkipException(
            "dry run: nothing was written. The plan is in the log of summary; trigger the DAG again without the dry run to do it."
        )
    own = [
        one | {"planned": [one["view"], store] in summed["planned"]}
        for one in targets
        if one["store"] == store and (one["mode"] in COMPARISONS) == compare
    ]
    if not own:
        raise AirflowSkipException(
            f"nothing to do: no chosen feature view is {'compared with' if compare else 'loaded into'} online store {store!r} in this run."
        )
    return own


def begin(target: dict[str, Any]) -> dict[str, Any]:
    """Plan again, for table and watermark go on while a person thinks, and begin the run. Returns the plan.

    Raises `AirflowFailException` for a target that `plan` could not plan: nobody has seen what it would do.
    """
    from materialize import pipeline

    view, store = target["view"], target["store"]
    name_in_ui(view)
    must_be_planned(target, "begin")
    with tasks.opened(view, store) as (known, online), tasks.leased(online, view, tasks.run_id(), target["mode"]):
        names = {"store_name": store, "run_id": tasks.run_id(), "mode": target["mode"]}
        made = pipeline.make_plan(known, online, interval=interval(target), force=target["force"], **names)
        tasks.log_plan(made)
        return pipeline.begin(known, online, made, now=tasks.utcnow()).to_dict()


def must_be_planned(target: dict[str, Any], doing: str) -> None:
    if not target["planned"]:
        raise AirflowFailException(
            f"could not {doing} feature view {target['view']!r} in online store {target['store']!r}: found no plan, expected the one of the task plan, "
            "whose log says what is wrong. Nothing was written. Put it right and clear that task with its downstream."
        )


def batches(plans: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The pieces of all *plans* of a store, cut into as many batches as the form's ``parallel`` says; each has plans and their pieces.

    At least one batch, which may be empty: where `write` is skipped, `commit` would be too.
    """
    from materialize.plan import cut

    pieces = [(one, piece) for one in plans[:] for piece in range(one["pieces"])]
    sizes = [1 + one["rows"] // one["pieces"] for one, _ in pieces]
    parts = cut(pieces, sizes, min(get_current_context()["params"]["parallel"], max(1, len(pieces))))
    return [batch(part) for part in parts if part] or [[]]


def batch(pieces: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    """Neighbours of the same plan together."""
    works: list[dict[str, Any]] = []
    for one, piece in pieces:
        if not works or works[-1]["plan"] is not one:
            works.append({"plan": one, "pieces": []})
        works[-1]["pieces"].append(piece)
    return works


def write(batch: list[dict[str, Any]]) -> None:
    """Write the pieces of one batch, one after another. What was written is the XCom `REPORTS`, also when the task fails.

    A piece that fails ends its view in this batch and no other; a store that does not answer ends the task, to be tried again.
    """
    from materialize.plan import Plan

    context: Any = get_current_context()
    tried_again = context["ti"].try_number > 1
    works = [(Plan.from_dict(work["plan"]), work["pieces"]) for work in batch]
    name_in_ui(*(label(planned, pieces) for planned, pieces in works))
    reports: list[dict[str, Any]] = []
    try:
        failed = [error for planned, pieces in works if (error := write_pieces(planned, pieces, reports))]
    finally:
        context["ti"].xcom_push(key=REPORTS, value=[report | {"tried_again": tried_again} for report in reports])
    if failed:
        raise failed[0]


def label(planned: Plan, pieces: list[int]) -> str:
    parts = str(pieces[0] + 1) if len(pieces) == 1 else f"{pieces[0] + 1}-{pieces[-1] + 1}"
    return f"{planned.view} in {planned.store}: part {parts} of {planned.pieces}"


def write_pieces(planned: Plan, pieces: list[int], reports: list[dict[str, Any]]) -> Exception | None:
    """Write *pieces* in order, adding what each did to *reports* once it is done. Returns what ended it early, if the other views may go on."""
    from materialize.pipeline import write_piece

    try:
        with (
            tasks.opened(planned.view, planned.store) as (feature_view, online),
            stop_on(SIGTERM) as count,
            tasks.leased(online, planned.view, planned.run_id, planned.mode, count) as progress,
        ):
            for piece in pieces:
                done = write_piece(feature_view, online, planned, piece, now=tasks.utcnow(), progress=progress)
                log.info("wrote", view=planned.view, store=planned.store, piece=piece + 1, pieces=planned.pieces)
                reports.append({"view": planned.view, "piece": piece, "report": done.to_dict()})
    except UnavailableError:
        raise
    except Exception as error:
        log.exception("failed", view=planned.view, store=planned.store)
        return error
    return None


def commit(target: dict[str, Any], written: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Check that the store holds what the pieces of one view wrote, and finish its run. Returns the run report.

    Emits an asset event when readers see something new, or may (`tasks.told`). Raises `AirflowFailException` when not every piece is written.
    """
    from materialize import pipeline
    from materialize.plan import Plan

    context: Any = get_current_context()
    view, store, ti = target["view"], target["store"], context["ti"]
    name_in_ui(view)
    begun = ti.xcom_pull(task_ids=f"{ti.task_id.rpartition('.')[0]}.begin", map_indexes=ti.map_index)
    if begun is None:
        raise AirflowFailException(
            f"could not commit feature view {view!r} in online store {store!r}: its run was not begun, the log of begin for it says why. "
            "The watermark stays. Put it right and clear that task with its downstream."
        )
    planned = Plan.from_dict(begun)
    own = {one["piece"]: one for reports in written[:] for one in reports if one["view"] == view}
    if len(own) < planned.pieces:
        raise AirflowFailException(
            f"could not commit feature view {view!r} in online store {store!r}: found {len(own)} written pieces, expected {planned.pieces}; "
            "the logs of write say why. What is written does no harm and the watermark does not move. "
            "Put it right and clear the failed tasks with their downstream."
        )
    reports = [pipeline.PieceReport.from_dict(own[piece]["report"]) for piece in range(planned.pieces)]
    tried_again = any(one["tried_again"] for one in own.values())
    with tasks.opened(view, store) as (feature_view, online):
        with tasks.leased(online, view, planned.run_id, planned.mode, last=True):
            done = pipeline.commit(feature_view, online, planned, reports, now=tasks.utcnow())
        report = tasks.told(done, online, tried_again=tried_again)
    tasks.mirror(report)
    if report["news"]:
        context["outlet_events"][BACKFILLED].add(tasks.asset(view, store), extra=tasks.event_extra(report))
    return report


# The comparison --------------------------------------------------------------------------------------------------------


def verify(target: dict[str, Any]) -> dict[str, Any]:
    """Compare every entity of one view in one store, and repair it if the form says so. Returns the report."""
    view, store = target["view"], target["store"]
    name_in_ui(view)
    must_be_planned(target, "compare")
    settings = VerifySettings("full", repair=target["mode"] == "repair")
    report = verification.verify_view(view, store, settings)
    get_current_context()["outlet_events"][BACKFILLED].add(verification.verified(view, store), extra=report)
    return report


def judge(targets: list[dict[str, Any]], reports: Sequence[dict[str, Any]]) -> None:
    """Fail when a view differs by more than it tolerates, or could not be compared."""
    found = reports[:]
    verification.judge(found)
    if lacking := {one["view"] for one in targets} - {report["view"] for report in found}:
        raise AirflowFailException(
            f"could not compare {', '.join(sorted(lacking))}: found no report, the logs of verify say why. Nothing was written to these. "
            "Put it right and clear the failed tasks with their downstream."
        )
