"""Entity keys in, feature vectors out, for model servers. No read depends on the state of any run."""

from materialize.online.reading import ReadTerms
from materialize.serving.aio import AsyncOnlineFeatures
from materialize.serving.cache import CacheSettings, CacheStats
from materialize.serving.client import OnlineFeatures
from materialize.serving.decoding import FeatureBatch, ServiceBatch
from materialize.serving.request import Lookup
from materialize.serving.vectors import STATUSES, FeatureMatrix, FeatureVector, ServiceVector, Status

__all__ = [
    "STATUSES",
    "AsyncOnlineFeatures",
    "CacheSettings",
    "CacheStats",
    "FeatureBatch",
    "FeatureMatrix",
    "FeatureVector",
    "Lookup",
    "OnlineFeatures",
    "ReadTerms",
    "ServiceBatch",
    "ServiceVector",
    "Status",
]
