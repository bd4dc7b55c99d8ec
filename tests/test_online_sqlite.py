"""The embedded store keeps the contract, shares its file with other processes, and says what is wrong with it."""

import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.sqlite import SqliteStore
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, content, make_batch

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


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/online.db"


def writer(url, number, turns):
    return subprocess.Popen([sys.executable, "-c", WRITER, url, str(number), str(turns)], stdout=subprocess.PIPE)


class TestSqliteStore(OnlineStoreContract):
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

    def test_a_killed_writer_leaves_whole_batches(self, url, store):
        process = writer(url, 1, 10_000)
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()

        assert len({record[36:] for record in content(store).values()}) == 1
        assert self.merge(store, Row(b"7", 10_001)) == [1]

    def test_a_locked_file_is_an_unavailable_store(self, url):
        store = SqliteStore(url, busy_timeout=0.1)
        store.describe()
        other = sqlite3.connect(url.removeprefix("sqlite:///"))
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(UnavailableError, match="another process holds the file"):
            self.merge(store, Row(b"k"))
        other.close()

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
