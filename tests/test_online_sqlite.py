"""The embedded store keeps the contract, shares its file with other processes, and says what is wrong with it."""

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online import sqlite as module
from materialize.online.sqlite import SqliteStore
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, content, make_batch, play_calls
from materialize.testing.contract import HISTORIES

WRITER = """
import sys
from materialize.online.sqlite import SqliteStore
from materialize.testing import AT, FOREVER, Row, make_batch
store, writer = SqliteStore(sys.argv[1]), int(sys.argv[2])
for turn in range(int(sys.argv[3])):
    rows = [Row(b"%d" % key, turn, writer, AT + turn, b"%d %d" % (turn, writer)) for key in range(200)]
    store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
    print(turn, flush=True)
"""
MAKER = """
import sys
from materialize.online.sqlite import SqliteStore
from materialize.testing import FOREVER, Row, make_batch
batch = make_batch([Row(sys.argv[2].encode())])
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    with SqliteStore(f"{sys.argv[1]}/{number}.db") as store:
        store.merge("view", batch, tie_wins=True, retention=FOREVER)
"""
#: Deliberate bugs, each as (statement, text in it, what a careless hand would write). Not among them: a tombstone over a
#: newer tombstone, which no call can bring about (a tombstone's version is its floor).
PLANTED = {
    "merge ignores the floor": ("merge", "incoming.version > held.floor", "1"),
    "merge lets the floor itself in": ("merge", "incoming.version > held.floor", "incoming.version >= held.floor"),
    "merge forgets the floor": ("merge", "ELSE 0 END, held.floor", "ELSE 0 END, incoming.floor"),
    "a backfill wins a tie": ("merge", ":tie_wins AND ", ""),
    "a tie never wins": ("merge", ":tie_wins AND ", "0 AND "),
    "an equal version wins a tie": ("merge", "incoming.version > held.version", "incoming.version >= held.version"),
    "merge lets an equal order in": ("merge", ") > (held.event_us", ") >= (held.event_us"),
    "merge ignores the created time": ("merge", "(held.event_us, held.created_us)", "(held.event_us, 9)"),
    "an older snapshot replaces": ("replace", "WHEN :at < held.floor THEN 0", ""),
    "the same version does not replace": ("replace", "held.version <= :at", "held.version < :at"),
    "replace ignores a newer row": ("replace", "held.version <= :at", "1"),
    "replace lowers the version": ("replace", "max(held.version, :at)", ":at"),
    "replace lets an equal order in": ("replace", ") > (held.event_us", ") >= (held.event_us"),
    "replace ignores the created time": ("replace", "(held.event_us, held.created_us)", "(held.event_us, 9)"),
    "replace leaves the floor": ("raise", "outcome = 4", "outcome = 9"),
    "replace stores no greater order": ("store", "IN (1, 3)", "IN (1)"),
    "the flags stay": ("store", " lead = excluded.lead,", ""),
    "another view's record is compared": ("merge", "held.view = :view AND ", ""),
}


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/online.db"


def writer(url, number, turns):
    return subprocess.Popen([sys.executable, "-c", WRITER, url, str(number), str(turns)], stdout=subprocess.PIPE)


@contextmanager
def locked(url):
    """Another connection in the middle of a write."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def ordinary_user():
    """This process without root's right to write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def _play_300(store):
    for seed in range(300):
        play_calls(store, seed, f"view{seed}")


class TestSqliteStore(OnlineStoreContract):
    histories = 10 * HISTORIES  # 1.1 ms each
    purges = True

    @pytest.fixture
    def store(self, url):
        with SqliteStore(url) as store:
            yield store

    def test_opening_does_not_touch_the_disk(self, tmp_path):
        SqliteStore(f"sqlite:///{tmp_path}/untouched.db")

        assert list(tmp_path.iterdir()) == []

    def test_the_file_is_readable_with_the_sqlite_shell(self, store, url):
        self.merge(store, Row(b"k", 5, 3))

        with sqlite3.connect(url.removeprefix("sqlite:///")) as shell:
            rows = shell.execute("SELECT view, entity_key, event_us, created_us, version FROM records").fetchall()
        shell.close()

        assert rows == [("view", b"k", 5, 3, AT)]

    def test_purge_removes_what_has_expired(self, store):
        self.test_purge_and_expiry_follow_the_retention(store)

        assert set(content(store)) == {b"floor", b"gone"}
        store.purge("view", 4_000_000_000_000_000 + 10_000_000)
        assert content(store) == {}

    def test_two_processes_may_write_at_once(self, url, store):
        writers = [writer(url, number, 20) for number in (1, 2)]

        assert [process.wait(60) for process in writers] == [0, 0]
        for process in writers:
            process.stdout.close()

        assert {record[36:] for record in content(store).values()} == {b"19 2"}

    def test_a_cell_has_one_winner_among_several_opens_of_the_file(self, url, store):
        def count(turns):
            with SqliteStore(url) as mine:
                while turns:
                    held = mine.read_cell("view", "count")
                    turns -= mine.compare_and_set_cell("view", "count", held, b"%d" % (int(held or 0) + 1))

        counters = [threading.Thread(target=count, args=(100,)) for _ in range(4)]
        for counter in counters:
            counter.start()
        for counter in counters:
            counter.join()

        assert store.read_cell("view", "count") == b"400"

    def test_a_killed_writer_leaves_whole_batches(self, url, store):
        process = writer(url, 1, 10_000)
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()

        assert len({record[36:] for record in content(store).values()}) == 1
        assert self.merge(store, Row(b"7", 10_001)) == [1]

    def test_processes_that_make_the_same_file_wait_for_each_other(self, tmp_path):
        url, files = f"sqlite:///{tmp_path}", 50
        makers = [
            subprocess.Popen(
                [sys.executable, "-c", MAKER, url, str(number), str(files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for number in range(4)
        ]
        for maker in makers:
            maker.stdout.readline()

        for maker in makers:
            maker.stdin.write(b"go\n")
            maker.stdin.flush()

        assert [maker.wait(60) for maker in makers] == [0] * 4
        for maker in makers:
            maker.stdin.close()
            maker.stdout.close()
        for number in range(files):
            with SqliteStore(f"{url}/{number}.db") as store:
                assert set(content(store)) == {b"0", b"1", b"2", b"3"}

    def test_making_a_file_waits_for_another_process_that_makes_it(self, url, store):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("CREATE TABLE t (c)")  # so it is a file, and not in WAL mode yet
        outcomes = []
        with locked(url):
            waiting = threading.Thread(target=lambda: outcomes.extend(self.merge(store, Row(b"k"))))
            waiting.start()
            time.sleep(0.2)
        waiting.join()

        assert outcomes == [1]
        assert store.describe()["journal_mode"] == "wal"

    @pytest.mark.parametrize("name", PLANTED)
    def test_a_planted_bug_in_the_sql_is_caught_by_random_calls(self, store, monkeypatch, name):
        statement, before, after = PLANTED[name]
        assert before in module.STATEMENTS[statement]
        monkeypatch.setitem(module.STATEMENTS, statement, module.STATEMENTS[statement].replace(before, after))

        with pytest.raises(AssertionError, match="seed"):
            _play_300(store)

    def test_a_locked_file_is_an_unavailable_store(self, url):
        with SqliteStore(url, busy_timeout=0.1) as store:
            store.describe()

            with locked(url), pytest.raises(UnavailableError, match=r"another process holds the file.*Nothing is lost"):
                self.merge(store, Row(b"k"))

            assert self.merge(store, Row(b"k")) == [1]

    def test_reads_do_not_wait_for_a_write_that_waits(self, store, url):
        self.merge(store, Row(b"k", payload=b"held"))
        with locked(url):
            waiting = threading.Thread(target=self.merge, args=(store, Row(b"k", 2)))
            waiting.start()
            while not store.writer.lock.locked():
                time.sleep(0.001)

            assert self.payload(store, b"k") == b"held"
            assert set(content(store)) == {b"k"}
            assert store.read_cell("view", "watermark") is None
            assert waiting.is_alive()
        waiting.join()

        assert self.payload(store, b"k") == b"payload"

    def test_a_full_disk_is_told_and_harmless(self, store):
        self.merge(store, Row(b"k"))
        pages = store.writer.connection.execute("PRAGMA page_count").fetchone()[0]
        store.writer.connection.execute(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(
            OnlineStoreError, match=r"could not write 1 rows .* full\. This call wrote nothing.*disk space"
        ):
            self.merge(store, Row(b"l", payload=bytes(100_000)))

        assert set(content(store)) == {b"k"}
        store.writer.connection.execute(f"PRAGMA max_page_count = {pages + 100}")
        assert self.merge(store, Row(b"l", payload=bytes(100_000))) == [1]

    @pytest.mark.parametrize(("name", "found"), [("new.db", "unable to open"), ("old.db", "readonly")])
    def test_a_read_only_folder_is_told(self, name, found):
        with tempfile.TemporaryDirectory() as folder:
            with SqliteStore(f"sqlite:///{folder}/old.db") as store:
                self.merge(store, Row(b"k"))
            Path(folder).chmod(0o555)

            with (
                ordinary_user(),
                SqliteStore(f"sqlite:///{folder}/{name}") as store,
                pytest.raises(
                    OnlineStoreError, match=rf"{found}.*Let this user write to the file and its folder"
                ) as error,
            ):
                self.merge(store, Row(b"l"))
            Path(folder).chmod(0o755)

        assert type(error.value) is OnlineStoreError

    def test_a_missing_folder_is_named(self, tmp_path):
        store = SqliteStore(f"sqlite:///{tmp_path}/nowhere/online.db")

        with pytest.raises(OnlineStoreError, match=r"found no folder .*nowhere.*Create it"):
            self.merge(store, Row(b"k"))

    def test_a_file_that_is_something_else_is_refused(self, tmp_path):
        (tmp_path / "online.db").write_bytes(b"no database at all, but long enough to be one" * 50)
        store = SqliteStore(f"sqlite:///{tmp_path}/online.db")

        with pytest.raises(OnlineStoreError, match=r"file is not a database.*change the URL"):
            store.merge("view", make_batch([Row(b"k")]), tie_wins=True, retention=FOREVER)

    def test_a_file_that_cannot_be_written_is_refused(self, tmp_path):
        (tmp_path / "online.db").mkdir()
        store = SqliteStore(f"sqlite:///{tmp_path}/online.db")

        with pytest.raises(OnlineStoreError, match="unable to open database file"):
            self.merge(store, Row(b"k"))

    def test_a_damaged_file_is_told(self, url):
        with SqliteStore(url) as store:
            self.merge(store, *(Row(b"%d" % number, payload=bytes(500)) for number in range(1000)))
        path = Path(url.removeprefix("sqlite:///"))
        path.write_bytes(path.read_bytes()[:8192] + b"\xff" * (path.stat().st_size - 8192))

        with SqliteStore(url) as store, pytest.raises(OnlineStoreError, match=r"malformed.*materialize rebuild"):
            content(store)


PUBLIC_ERRORS = [kind for kind in vars(sqlite3).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", PUBLIC_ERRORS, ids=lambda kind: kind.__name__)
def test_every_public_error_of_the_driver_is_translated(kind, url):
    if kind is sqlite3.Warning:
        return  # raised by no call since Python 3.9

    with (
        SqliteStore(url) as store,
        pytest.raises(OnlineStoreError, match=r"could not purge .* in sqlite:///.*: sudden") as error,
        store._connection(store.writer, "purge feature view 'v' in"),
    ):
        raise kind("sudden")

    assert type(error.value) is OnlineStoreError
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
