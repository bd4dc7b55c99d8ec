"""A custom handler of TorchServe: entity keys in requests in, predictions out; the features come from the online store.

    torch-model-archiver --model-name ranking --version 1.0 --serialized-file model.pt \\
        --handler examples/torchserve_handler.py --config-file model-config.yaml

model-config.yaml, which TorchServe gives as ``context.model_yaml_config``::

    features: {config: /etc/materialize/config, store: default, view: spending, feature_names: [amount, score], fill: 0.0}

A request is ``{"entity_key": "a"}``. TorchServe gathers ``batchSize`` of them, and their features are one read. The file has one
class, as TorchServe wants it, and needs torch only for a model of torch: one of numpy (``weights.npz`` with ``weights`` and
``bias``) is loaded without.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from materialize.errors import UnavailableError
from materialize.serving import OnlineFeatures


class FeatureHandler:
    """Made once in each worker; a worker handles one batch at a time."""

    def initialize(self, context: Any) -> None:
        """Load the model and open the reader, which touches the network at the first request only."""
        settings = context.model_yaml_config["features"]
        self.view, self.names = settings["view"], settings["feature_names"]
        self.fill = float(settings.get("fill", 0.0))
        self.features = OnlineFeatures.connect(settings["config"], settings.get("store", "default"))
        properties = context.system_properties
        self.model = self._load(Path(properties["model_dir"]) / context.manifest["model"]["serializedFile"])
        self.initialized = True

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """One answer for each request, in their order. A request that is wrong costs the others of its batch nothing."""
        keys = [self._key(request) for request in data]
        good = [place for place, key in enumerate(keys) if key is not None]
        answers = [{"error": 'expected {"entity_key": KEY}'} for _ in data]
        for place in set(range(len(data))).difference(good):
            context.set_response_status(400, "Bad Request", place)
        if not good:
            return answers
        try:
            matrix = self.preprocess([keys[place] for place in good])
        except UnavailableError:
            context.set_all_response_status(503, "Service Unavailable")
            return [{"error": "the online store does not answer"} for _ in data]
        predictions = self.postprocess(self.inference(matrix.values), matrix)
        for place, answer in zip(good, predictions, strict=True):
            answers[place] = answer
        return answers

    def preprocess(self, keys: list[Any]) -> Any:
        """The features of all entities: a matrix of float64, NaN where there is no value."""
        return self.features.batch_read(self.view, keys, self.names).to_numpy()

    def inference(self, values: Any) -> Any:
        """The model's answers, shape (n,). What to put where there is no value is the model's affair; here a constant."""
        return self.model(np.where(np.isnan(values), self.fill, values).astype(np.float32))

    def postprocess(self, predictions: Any, matrix: Any) -> list[dict[str, Any]]:
        """The predictions, each with the features that were not there for it."""
        return [
            {
                "prediction": float(prediction),
                "missing": [name for name, gone in zip(self.names, row, strict=True) if gone],
            }
            for prediction, row in zip(predictions, matrix.mask.tolist(), strict=True)
        ]

    @staticmethod
    def _key(request: dict[str, Any]) -> Any:
        """The entity key of a request; None when it has none. TorchServe gives JSON as what it means, and other bodies as bytes."""
        body = request.get("data") or request.get("body")
        try:
            told = json.loads(body) if isinstance(body, (str, bytes, bytearray)) else body
            key = told["entity_key"]
        except (KeyError, TypeError, ValueError):
            return None
        return key if isinstance(key, (str, int, list)) else None

    @staticmethod
    def _load(path: Path) -> Any:
        if path.suffix == ".npz":
            stored = np.load(path)
            weights, bias = stored["weights"], stored["bias"]
            return lambda values: values @ weights + bias
        import torch

        model = torch.jit.load(str(path)).eval()

        def predict(values: Any) -> Any:
            with torch.inference_mode():
                return model(torch.from_numpy(values)).reshape(-1).numpy()

        return predict
