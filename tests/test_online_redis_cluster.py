"""A cluster keeps the contract, also while slots move, servers fail and a batch meets what passes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from materialize.online.redis import RedisClusterStore
from materialize.testing import OnlineStoreContract

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster import Cluster

pytestmark = pytest.mark.server


class TestRedisClusterStore(OnlineStoreContract):
    @pytest.fixture
    def store(self, cluster: Cluster) -> Iterator[RedisClusterStore]:
        with RedisClusterStore(cluster.url) as store:
            yield store
