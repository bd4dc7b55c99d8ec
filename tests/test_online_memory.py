"""The reference store keeps the contract of every online store."""

import pytest

from materialize.online.memory import MemoryStore
from materialize.testing import OnlineStoreContract, Row


class TestMemoryStore(OnlineStoreContract):
    purges = True

    @pytest.fixture
    def store(self):
        with MemoryStore() as store:
            yield store

    def test_opens_of_one_name_share_their_content(self, store):
        self.merge(MemoryStore("memory://shared"), Row(b"k"))

        assert MemoryStore("memory://shared").read("view", [b"k"]) != [None]
        assert store.read("view", [b"k"]) == [None]
