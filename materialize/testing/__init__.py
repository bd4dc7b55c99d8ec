"""For people who write an online store: the contract as a test class, random histories, and a store that dies on purpose.

class TestMyStore(OnlineStoreContract):
    @pytest.fixture
    def store(self):
        with MyStore("...") as store:
            yield store
"""

from materialize.testing.batches import AT, FOREVER, Row, content, make_batch
from materialize.testing.contract import OnlineStoreContract
from materialize.testing.crashing import CrashingStore
from materialize.testing.histories import play_calls, play_history

__all__ = [
    "AT",
    "FOREVER",
    "CrashingStore",
    "OnlineStoreContract",
    "Row",
    "content",
    "make_batch",
    "play_calls",
    "play_history",
]
