"""Bugs planted on purpose, one at a time, in a copy of the package: each must be caught by random histories or by a named test.

``python -m tests.mutants [WORDS OF A NAME]`` prints each bug, what caught it and after how long; exit code 1 if one survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MUTANTS", "Caught", "Mutant", "copied", "played", "tried"]

PROJECT = Path(__file__).parents[1]
#: Histories that a bug may survive at most, and seconds until it counts as survived.
HISTORIES, SECONDS = 200, 600
#: Errors of the planted text or of the histories themselves, which prove nothing.
NOT_CAUGHT = re.compile(r"seed \d+: (Name|Type|Attribute|Import|Syntax|Unbound\w+|Index|ColumnNotFound|Lake)Error")


@dataclass(frozen=True, slots=True)
class Mutant:
    """A bug: in *file* of the package, *planted* instead of what is *there*. ``test``: what catches it; histories when empty."""

    name: str
    file: str
    there: str
    planted: str
    test: str = ""


@dataclass(frozen=True, slots=True)
class Caught:
    """What became of a mutant. ``by``: the seed or the test that caught it; None when it survived. ``told``: what was seen."""

    by: str | None
    told: str
    seconds: float


#: The watermark moved before the write.
MOVED_EARLY = (
    "pipeline.py",
    "    if not plan.snapshot:\n        return replace(plan, schema_id=schema_id, positions",
    (
        "    if not plan.snapshot:\n"
        "        if plan.mode == 'incremental' and plan.watermark and plan.from_version != plan.to_version:\n"
        "            early = Watermark.from_json(plan.watermark)\n"
        "            early = replace(early, version=plan.to_version, run_id=plan.run_id, schema=view.schema_text)\n"
        "            with_retry(partial(watermark.move, store, view.name, plan.watermark, early))\n"
        "        return replace(plan, schema_id=schema_id, positions"
    ),
)

MUTANTS = (
    # --- what changed ---
    Mutant(
        "event-time window instead of versions",
        "piece.py",
        "        yield Wanted(rows, _merge(work), work.shares)\n        return\n",
        "        late = f'SELECT * FROM self WHERE event_us > {watermark.event_us or 0}'\n"
        "        yield Wanted(replace(rows, keep=lambda some: some.sql(late)), _merge(work), work.shares)\n        return\n",
    ),
    Mutant("last commit left out", "offline/log.py", "range(first, last + 1)", "range(first, last)"),
    Mutant("commits beyond the pinned head read", "piece.py", "open_table(view, plan.to_version)", "open_table(view)"),
    Mutant(
        "adds of a compaction read",
        "offline/changes.py",
        "for add in _changed(commit.adds)}",
        "for add in commit.adds}",
    ),
    Mutant(
        "removed rows ignored",
        "offline/changes.py",
        'removes = {remove["path"]: remove for remove in _changed(commit.removes)}\n    adds',
        "removes = {}\n    adds",
    ),
    Mutant(
        "rows that came and went in one window cancel out",
        "offline/changes.py",
        "    _check_files(table, changes, commits, after)\n    return changes",
        "    _check_files(table, changes, commits, after)\n"
        "    came = {(add['path'], _vector(add)) for change in changes for add in change.adds}\n"
        "    went = {(remove['path'], _vector(remove)) for change in changes for remove in change.removes}\n"
        "    kept = lambda actions: tuple(a for a in actions if (a['path'], _vector(a)) not in came & went)\n"
        "    return [Change(change.version, kept(change.removes), kept(change.adds)) for change in changes]",
    ),
    Mutant(
        "missing commit not noticed",
        "offline/changes.py",
        "table.log.commits(after + 1, table.version)",
        "table.log.commits_left(table.version, first=after + 1)",
    ),
    Mutant("vacuumed file not noticed", "offline/changes.py", "    if gone:\n", "    if False:\n"),
    Mutant(
        "new table not noticed",
        "offline/changes.py",
        "if watermark.table_id != table.table_id:",
        "if watermark.table_id == '':",
    ),
    Mutant(
        "rebuild asked for without need",
        "offline/changes.py",
        "    if removes:\n        yield",
        "    if removes and adds:\n        raise RebuildNeeded('rows were changed')\n    if removes:\n        yield",
    ),
    # --- which rows of a commit are new, which are gone ---
    Mutant(
        "row difference compares times but not features",
        "offline/difference.py",
        "[_bits(features).hash_rows()",
        "[_bits(features).hash_rows() * 0",
    ),
    Mutant(
        "-0.0 equals 0.0 in the row difference",
        "offline/difference.py",
        "[_bits(features).hash_rows()",
        "[features.hash_rows()",
    ),
    Mutant(
        "null equals 0 in the row difference",
        "offline/difference.py",
        "[_bits(features).hash_rows()",
        "[_bits(features).fill_null(0).hash_rows()",
    ),
    Mutant(
        "entity that only lost a feature's value is not looked at",
        "offline/difference.py",
        'more.filter(pl.col("sign") < 0).select(keys)',
        'more.filter(pl.col("sign") < -1).select(keys)',
    ),
    Mutant(
        "deletion vector inverted",
        "offline/deletion_vector.py",
        "mask = np.full(rows, not self.only, dtype=np.bool_)\n        mask[self.positions] = self.only",
        "mask = np.full(rows, self.only, dtype=np.bool_)\n        mask[self.positions] = not self.only",
    ),
    Mutant(
        "deletion vector of a file read from its begin",
        "offline/deletion_vector.py",
        'vector.get("offset") or 0',
        "1",
    ),
    Mutant(
        "partition value from the path",
        "offline/table.py",
        'values, uri = action.get("partition") or {}, self.log.uri(action["path"])',
        'uri = self.log.uri(action["path"])\n'
        '        values = dict(part.split("=", 1) for part in action["path"].split("/")[:-1])',
    ),
    Mutant(
        "partition value of the log taken for another file's",
        "offline/rows.py",
        "[file.partition_values.get(name) for file in files]",
        "[file.partition_values.get(name) for file in files[::-1]]",
    ),
    # --- which row is the latest ---
    Mutant(
        "tie broken the wrong way",
        "latest.py",
        '.sort("event_us", "created_us", "version", "position")',
        '.sort("event_us", "created_us", "version", "position", descending=[False, False, True, False])',
    ),
    Mutant(
        "created time ignored",
        "latest.py",
        '.sort("event_us", "created_us", "version", "position")',
        '.sort("event_us", "version", "position")',
    ),
    Mutant(
        "rows without an event time are stored",
        "latest.py",
        '"null event timestamp": event.is_null()',
        '"null event timestamp": pl.lit(value=False)',
    ),
    Mutant("no older row for an unstorable one", "winners.py", "if len(rejected) > 1:", "if False:"),
    Mutant(
        "commits of a snapshot's rows not looked up",
        "piece.py",
        "if latest.have_ties(left.frame, keys):",
        "if False:",
    ),
    # --- in how many shares it is looked for ---
    Mutant(
        "memory: a share of the entities left out",
        "piece.py",
        "for share in range(self.plan.shares)]",
        "for share in range(self.plan.shares - (self.plan.shares > 1))]",
        "tests/properties/test_shares.py",
    ),
    Mutant(
        "memory: an entity is in another share in another part of the files",
        "latest.py",
        "hashed = rows.select(join_keys).hash_rows(seed=0)",
        "hashed = rows.select(join_keys).hash_rows(seed=rows.height % 2)",
        "tests/properties/test_shares.py",
    ),
    Mutant(
        "memory: rows of a share counted from the first row of their part",
        "winners.py",
        "share.of(source.keep(part.frame), keys), base)",
        "share.of(source.keep(part.frame), keys), 0)",
        "tests/properties/test_shares.py",
    ),
    Mutant(
        "memory: every row of a piece held at once",
        "plan.py",
        "return max(1, -(-self.rows // (max(1, self.pieces) * self.rows_held)))",
        "return 1",
        "tests/properties/test_shares.py",
    ),
    Mutant(
        "memory: a share of a rewritten commit not compared",
        "latest.py",
        "part=part, parts=parts) for part in range(parts)]",
        "part=part, parts=parts) for part in range(max(1, parts - 1))]",
        "tests/properties/test_shares.py",
    ),
    # --- which record stays ---
    Mutant("floor ignored", "order.py", "new.version > stored.floor and newer", "newer"),
    Mutant(
        ">= for > in the order rule",
        "order.py",
        "> (other.event_us, other.created_us)",
        ">= (other.event_us, other.created_us)",
    ),
    Mutant(
        "older snapshot replaces a newer one",
        "order.py",
        "    if at <= stored.floor:",
        "    if at < stored.floor - 2**39:",
    ),
    Mutant("later commit does not win a tie", "piece.py", "tie_wins=changes", "tie_wins=False"),
    Mutant(
        "rows taken for stored whose keys were there",
        "online/redis/store.py",
        'outcomes[low:high] = ord("1") * done',
        'outcomes[low:high] = ord("1")',
        "tests/test_online_redis.py",
    ),
    Mutant("backfill wins a tie", "piece.py", "tie_wins=changes", "tie_wins=True", "tests/test_pipeline.py"),
    Mutant(
        "entity that is not online gets no tombstone",
        "removal.py",
        "        held = with_retry(partial(store.read, view.name, keys))\n",
        "        held = with_retry(partial(store.read, view.name, keys))\n"
        "        keys = [key for key, record in zip(keys, held, strict=True) if record is not None]\n"
        "        if not keys:\n            continue\n"
        "        held = [record for record in held if record is not None]\n",
    ),
    Mutant(
        "zombie after a rebuild brings a deleted entity back",
        "piece.py",
        "if plan.fenced is not None and plan.fenced < plan.to_version:",
        "if False:",
        "tests/test_pipeline_changes.py",
    ),
    Mutant("deleted entities stay after a rebuild", "pipeline.py", "if plan.sweep else 0", "if False else 0"),
    # --- where a run stands ---
    Mutant(
        "watermark moved before the write",
        *MOVED_EARLY,
    ),
    Mutant(
        "unfinished rebuild not remembered",
        "pipeline.py",
        "    text = with_retry(partial(watermark.move, store, view.name, plan.watermark, claim))\n",
        "    text = plan.watermark\n",
    ),
    Mutant(
        "overtaken run moves the watermark",
        "watermark.py",
        "if _oldest(store, view, copies) == expected and store",
        "if store",
    ),
    Mutant("new feature only for new rows", "plan.py", "    if changed is not None:\n", "    if False:\n"),
    Mutant(
        "planning makes the schema known",
        "pipeline.py",
        "    table = open_table(view)\n    found =",
        "    table = open_table(view)\n    watermark.register_schema(store, view)\n    found =",
    ),
    # --- what is told and stored ---
    Mutant(
        "expired rows not counted as entities",
        "piece.py",
        "report.unchanged + report.expired",
        "report.unchanged",
    ),
    Mutant("null bitmap the wrong way round", "codec.py", 'bitorder="little"', 'bitorder="big"'),
    # --- verify ---
    *(
        Mutant(f"verify: {name}", "verify.py", there, planted, "tests/test_verify.py")
        for name, there, planted in (
            ("bytes not compared", '("event_us", "created_us", "flags", "body")', '("event_us", "created_us")'),
            ("nulls not compared", '("event_us", "created_us", "flags", "body")', '("event_us", "created_us", "body")'),
            ("newer records compared", '.then(pl.lit("newer"))', ".then(pl.lit(None))"),
            ("any tied row accepted", "MAY_BE_LATEST = NEWEST |", "MAY_BE_LATEST = ~NEWEST | NEWEST |"),
            ("tied rows not looked at", "if suspects.is_empty():", "if True:"),
            (
                "repair in the old generation",
                'if bad.filter(pl.col("floor") >= stamp(plan.generation, plan.to_version)).is_empty():',
                "if True:",
            ),
            ("repair of every entity", 'bad.filter(pl.col("problem") != "extra")["key"])', 'found["key"])'),
            ("expired rows are seen", "due_held + view.ttl_us > now_us", "due_held + view.ttl_us > 0"),
            (
                "a sample of the table alone",
                "batches if sample is None else _first(batches, sample)",
                "batches if sample is None else []",
            ),
        )
    ),
    # --- what the store lost ---
    *(
        Mutant(f"store: {name}", file, there, planted, test)
        for name, file, there, planted, test in (
            (
                "lost tail of a run taken for survived",
                "evidence.py",
                "if one.replid2 == replid and offset < one.second_offset:",
                "if one.replid2 == replid:",
                "tests/proofs/test_failover.py::test_a_lost_tail_is_always_noticed_and_repaired",
            ),
            (
                "watermark after a lost tail believed",
                "evidence.py",
                "if then.offset > survived:",
                "if False:",
                "tests/test_evidence.py",
            ),
            (
                "every failover taken for a loss",
                "evidence.py",
                "if one.replid2 == replid and offset < one.second_offset:",
                "if False:",
                "tests/proofs/test_failover.py::test_what_loses_nothing_repairs_nothing",
            ),
            (
                "not checked before the watermark",
                "pipeline.py",
                "facts, told = after_writes(view, store, plan, positions, lost)",
                "facts, told = with_retry(store.evidence), ''",
                "tests/test_store_check.py",
            ),
            (
                "evictions in a run not counted",
                "evidence.py",
                "    verdicts = [_eviction(before, after) for before, after in _paired(then, now)]\n    verdicts += ",
                "    verdicts = ",
                "tests/test_store_check.py",
            ),
            (
                "remembered entities not missed",
                "store_check.py",
                "if plan.reads_changes and (found.lost or gone):",
                "if plan.reads_changes and found.lost:",
                "tests/test_store_check.py",
            ),
            (
                "one row of a batch remembered",
                "writer.py",
                "min(len(rows), DRAWN)",
                "min(len(rows), 1)",
                "tests/test_store_check.py",
            ),
            (
                "expired entities missed",
                "readback.py",
                "if held[key] is None and _stays(view, us, now)]",
                "if held[key] is None]",
                "tests/test_store_check.py",
            ),
            (
                "evicting server not refused",
                "store_check.py",
                "        _refuse_eviction(view, store, facts)\n",
                "",
                "tests/test_store_check.py",
            ),
            (
                "preflight left out",
                "store_check.py",
                "check_memory(view, store, plan, facts)",
                "pass",
                "tests/test_preflight.py",
            ),
            ("force changes nothing", "store_check.py", "if not plan.force:", "if True:", "tests/test_preflight.py"),
            (
                "full server not waited for",
                "retry.py",
                "state.idle_for + state.upcoming_sleep > error.patience",
                "True",
                "tests/proofs/test_full.py",
            ),
            (
                "replicas asked for and not awaited",
                "online/redis/shared.py",
                "if have < wanted:",
                "if wanted < have:",
                "tests/proofs/test_failover.py::test_with_replicas_asked_for_a_run_does_not_claim_what_only_the_primary_has",
            ),
        )
    ),
    # --- real processes and a bad network ---
    Mutant(
        "watermark moved before the write, seen by kills",
        *MOVED_EARLY,
        "tests/proofs/test_kills.py",
    ),
    Mutant(
        "watermark moved before the write, seen by failpoints",
        *MOVED_EARLY,
        "tests/proofs/test_failpoints.py",
    ),
    Mutant(
        "unfinished rebuild not remembered, seen by failpoints",
        "pipeline.py",
        "    text = with_retry(partial(watermark.move, store, view.name, plan.watermark, claim))\n",
        "    text = plan.watermark\n",
        "tests/proofs/test_failpoints.py",
    ),
    Mutant(
        "Redis: floor ignored",
        "online/redis/lua/rule.lua",
        "if version > old_floor and (newer",
        "if (newer",
        "tests/proofs/test_batches.py",
    ),
    Mutant(
        "row of a lost reply counted as written",
        "piece.py",
        "    report.stale, report.written, report.unchanged = writer.outcomes.tolist()\n",
        "    report.stale, report.written, report.unchanged = writer.outcomes.tolist()\n"
        "    report.written, report.unchanged = report.written + report.unchanged, 0\n",
        "tests/proofs/test_faults.py::test_rows_of_a_lost_reply_count_as_unchanged_and_removals_not_at_all",
    ),
    Mutant(
        "connection given back to the pool after an error",
        "online/redis/shared.py",
        "        connection.disconnect()  # type: ignore[no-untyped-call]\n        raise",
        "        raise",
        "tests/proofs/test_faults.py::test_replies_behind_an_error_never_answer_a_later_request",
    ),
    # --- DynamoDB ---
    Mutant(
        "DynamoDB: floor not in the condition",
        "online/dynamodb/load.py",
        'f"f<{{n}} AND (e<{{e}}',
        'f"(e<{{e}}',
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: floor raised over a row that has changed meanwhile",
        "online/dynamodb/load.py",
        'f"{name}={{was_{name}}}" for name in ORDER',
        'f"{name}={{was_{name}}}" for name in (EVENT, CREATED)',
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: throttled statement taken for done",
        "online/dynamodb/load.py",
        "                self._waiting.append(attempt._replace(again",
        "                self._settle(attempt.row, attempt.outcome) or str(attempt._replace(again",
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: row of a lost answer taken for unchanged",
        "online/dynamodb/load.py",
        "elif again and record_of(item)",
        "elif not again and record_of(item)",
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: live row keeps a tombstone's expiry",
        "online/dynamodb/load.py",
        "() if expires else (EXPIRES,)\n",
        "()\n",
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: unprocessed keys taken for absent",
        "online/dynamodb/store.py",
        'left = answer.get("UnprocessedKeys") or {}',
        "left = {}",
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: cells read as entities",
        "online/dynamodb/store.py",
        'if not item[KEY]["S"].startswith(CELL)',
        "if item",
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: end of the record cut off",
        "online/dynamodb/items.py",
        'fill = pa.array([b"", b"\\0", b"\\0\\0"], pa.binary())',
        'fill = pa.array([b"", b"", b""], pa.binary())',
        "tests/test_online_dynamodb.py",
    ),
    Mutant(
        "DynamoDB: files overwrite what is there",
        "online/dynamodb/bulk.py",
        'None if self.makes_table else f"attribute_not_exists({KEY})"',
        "None",
        "tests/test_online_dynamodb_bulk.py",
    ),
    Mutant(
        "DynamoDB: failed first attempt not counted by botocore",
        "online/dynamodb/client.py",
        "        return came\n",
        "        return None\n",
        "tests/test_online_dynamodb_attempt.py",
    ),
    Mutant(
        "DynamoDB: credentials of the first request used for ever",
        "online/dynamodb/attempt.py",
        "        auth = self._signer.get_auth_instance(*self._scope)",
        '        auth = self.__dict__.setdefault("auth", self._signer.get_auth_instance(*self._scope))',
        "tests/test_online_dynamodb_attempt.py",
    ),
    # --- rows that cannot be stored, and sources that shrink ---
    Mutant(
        "quarantine: rows of another piece than the first not kept",
        "piece.py",
        "told_rows(work.table, work.sieve.refused, store=plan.store, run_id=plan.run_id, now=now)",
        "told_rows(work.table, work.sieve.refused * (piece == 0), store=plan.store, run_id=plan.run_id, now=now)",
    ),
    Mutant(
        "quarantine: a row that is met again kept again",
        "offline/quarantine.py",
        '.join(self.before, on=SAME, how="anti")',
        "",
    ),
    Mutant(
        "quarantine: rows of an erased entity kept",
        "piece.py",
        'gone = erased(self.store, self.plan.view, told["entity"].drop_nulls().unique().to_list())',
        "gone = []",
        "tests/test_release.py",
    ),
    Mutant(
        "quarantine: rows marked as released before they are written",
        "release.py",
        "    still, written = (tried, 0) if",
        '    mark_released(view, run.store_name, tried["id"], run_id=run.run_id, now=run.now())\n'
        "    still, written = (tried, 0) if",
        "tests/test_release.py",
    ),
    Mutant(
        "quarantine: a release does not get past the floor of a rebuild",
        "release.py",
        "if any(at <= online[entity].floor < ERASED for entity in free if entity in online):",
        "if False:",
        "tests/test_release.py",
    ),
    Mutant(
        "guard: a source that shrank is not noticed",
        "guard.py",
        "rows > SHRUNKEN * before",
        "rows > 0",
        "tests/test_guard.py",
    ),
    Mutant(
        "guard: a rebuild that did not finish forgets the live rows",
        "pipeline.py",
        "rows=None if before is None else before.rows,",
        "rows=None,",
        "tests/test_guard.py",
    ),
    Mutant(
        "guard: entities removed before max_quarantined is asked",
        "piece.py",
        "        check_quarantined(view, plan, report, rows=max(report.rows_read, plan.rows * (plan.pieces > 1)))\n",
        "",
        "tests/test_guard.py",
    ),
    # --- one run at a time, and erased entities ---
    Mutant(
        "table pinned before the watermark is read",
        "pipeline.py",
        "    text = with_retry(partial(watermark.read_text, store, view.name))\n    table = open_table(view)\n",
        "    table = open_table(view)\n    text = with_retry(partial(watermark.read_text, store, view.name))\n",
        test="tests/test_lease.py",
    ),
    Mutant(
        "watermark moved whatever it says",
        "watermark.py",
        "if _oldest(store, view, copies) == expected and store",
        "if store",
        test="tests/proofs/test_zombie.py",
    ),
    Mutant(
        "process that lives counts as over",
        "process.py",
        'OVER = ("Z", "X")',
        'OVER = ("Z", "X", "R", "S")',
        test="tests/test_lease.py::test_lease_of_a_dead_process_of_this_host_is_free_at_once",
    ),
    Mutant(
        "lease taken without comparing",
        "lease.py",
        "if found is None or found.token == wanted.token or found.ended(now_us):",
        "if True:",
        test="tests/test_lease.py::test_second_run_is_told_who_is_at_it_and_writes_nothing",
    ),
    Mutant(
        "run that lost its lease goes on",
        "lease.py",
        "        if self.lost:\n            raise BusyError(",
        "        if self.lost == 'never':\n            raise BusyError(",
        test="tests/test_lease.py::test_run_whose_lease_was_taken_over_stops_before_its_next_write",
    ),
    Mutant(
        "erased for as long as a deleted entity",
        "forget.py",
        "keep_until_us=253_402_300_799_000_000",
        "keep_until_us=4_000_000_000_000_000",
        test="tests/test_forget.py::test_it_stays_when_what_is_due_is_purged",
    ),
    Mutant(
        "erased at the version of its record only",
        "forget.py",
        "codec.tombstones([key], ERASED), at=ERASED,",
        "codec.tombstones([key], 1), at=1,",
        test="tests/test_forget.py",
    ),
    # --- rows that applications push ---
    Mutant(
        "push: records carry the version before their commit",
        "push.py",
        "at=stamp(mark.generation, report.version)",
        "at=stamp(mark.generation, report.version - 1)",
        test="tests/test_push.py",
    ),
    Mutant(
        "push: a generation that began meanwhile is not looked for",
        "push.py",
        "if found.generation == standing.mark.generation:",
        "if True:",
        test="tests/test_push.py::test_rows_are_written_again_in_a_generation_that_began_meanwhile",
    ),
    Mutant(
        "push: a view that lost a feature counts as the same",
        "push.py",
        "if mark.schema != view.schema_text else None",
        "if len(mark.schema) < len(view.schema_text) else None",
        test="tests/test_push.py::test_a_view_that_was_loaded_differently_is_refused_before_the_commit",
    ),
    Mutant(
        "push: entities that were erased are committed",
        "push.py",
        "    _check_erased(view, store, given)\n    return",
        "    return",
        test="tests/test_push.py::test_rows_of_an_erased_entity_are_refused_and_not_committed",
    ),
    Mutant(
        "push: a table that was made anew is written as the old one",
        "offline/append.py",
        "same = self.mark is not None and held.log.mark(self.opened) == self.mark",
        "same = True",
        test="tests/test_offline_append.py::test_a_table_that_was_made_anew_is_opened_anew",
    ),
    Mutant(
        "push: an id that another writer committed meanwhile is not found",
        "offline/append.py",
        "        found = mine or other\n",
        "        found = mine\n",
        test="tests/test_offline_append.py::test_the_same_id_at_the_same_time_is_committed_once",
    ),
    Mutant(
        "push: the head counts as the own commit",
        "offline/append.py",
        "if table.log.info(version).get(TOKEN) == token:",
        "if (version := table.log.newest(base)):",
        test="tests/test_offline_append.py::test_each_of_many_writers_knows_the_version_of_its_commit",
    ),
    Mutant(
        "push: values are cast as they come",
        "offline/given.py",
        "return made, made.cast(column.dtype, strict=False).ne_missing(column)",
        "return made, made.is_null() & column.is_not_null()",
        test="tests/test_offline_append.py",
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the package and its tests in *folder*, that runs there as the original does here."""
    for name in ("materialize", "tests", "scripts"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in PROJECT.iterdir():
        if path.name in {"pyproject.toml", "docs", "config", "dags", "demo", "benchmarks", "examples", "README.md"}:
            (folder / path.name).symlink_to(path)
    return folder


def played(folder: Path, count: int, *, first: int = 0, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Random histories with the copy of the package in *folder*, until one fails."""
    command = [sys.executable, "-m", "tests.properties.histories", "memory://", str(first), str(count)]
    return _ended(command, folder, seconds)


def tried(mutant: Mutant, *, histories: int = HISTORIES) -> Caught:
    """Plant *mutant* in a copy of the package and see whether it is caught."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = copied(Path(name))
        source = folder / "materialize" / mutant.file
        text = source.read_text()
        if text.count(mutant.there) == 0:
            return Caught(None, f"{mutant.file} has changed: plant this bug anew", 0.0)
        source.write_text(text.replace(mutant.there, mutant.planted))
        if mutant.test:
            by, told = _by_test(mutant, folder)
        else:
            by, told = _by_histories(folder, histories)
    return Caught(by, told, time.monotonic() - started)


def _by_histories(folder: Path, histories: int) -> tuple[str | None, str]:
    ended = played(folder, histories)
    found = re.search(r"Divergence: (seed \d+): (.*)", ended.stderr)
    if ended.returncode == 0 or found is None:
        return None, f"survived {histories} histories" if ended.returncode == 0 else ended.stderr[-300:]
    if NOT_CAUGHT.search(found[0]):
        return None, f"the planted text is wrong: {found[2]}"
    return found[1], found[2]


def _by_test(mutant: Mutant, folder: Path) -> tuple[str | None, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutant.test]
    ended = _ended(command, folder, SECONDS)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)(.*)", ended.stdout, re.MULTILINE)
    if ended.returncode != 1 or failed is None:
        return None, "survived" if ended.returncode == 0 else (ended.stdout + ended.stderr)[-300:]
    return failed[1].rpartition("::")[2], failed[2]


def _ended(command: list[str], folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["MATERIALIZE_DYNAMODB"] = "require"  # a test that is skipped catches nothing
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 0, "", f"not caught in {seconds:.0f} s")


def main(words: list[str]) -> int:
    """Try every mutant that has all *words* in its name, two at a time."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    survived = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, caught in zip(chosen, pool.map(tried, chosen), strict=True):
            survived += caught.by is None
            print(
                f"{mutant.name:62} {caught.by or 'SURVIVED':24} {caught.seconds:5.0f} s  {caught.told[:80]}", flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} planted bugs were caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
