"""In front of TensorFlow Serving, which runs no Python: entity keys in, features read, one predict request, predictions out.

    .venv/bin/python examples/tf_serving_client.py http://localhost:8501/v1/models/ranking config spending a b

The model's input is a matrix of the features in the order named here (``row`` format of the predict API).
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np

from materialize.serving import OnlineFeatures

if TYPE_CHECKING:
    from collections.abc import Sequence


def predict(
    features: OnlineFeatures, model: str, view: str, keys: Sequence[Any], names: Sequence[str], fill: float = 0.0
) -> list[Any]:
    """The predictions for the entities *keys*, in their order. *model*: the URL up to the model's name or version.

    *fill* stands for values that are not there: the request is JSON, which has no NaN.
    """
    values = features.batch_read(view, keys, names).to_numpy().values
    instances = np.where(np.isfinite(values), values, fill).tolist()
    body = json.dumps({"signature_name": "serving_default", "instances": instances}, allow_nan=False).encode()
    request = urllib.request.Request(f"{model}:predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=1.0) as answer:
        predictions: list[Any] = json.load(answer)["predictions"]
    return predictions


if __name__ == "__main__":
    url, config, view, *keys = sys.argv[1:]
    with OnlineFeatures.connect(config) as features:
        names = list(features.core.schemas[view].view.features)
        for key, prediction in zip(keys, predict(features, url, view, keys, names), strict=True):
            print(key, prediction)
