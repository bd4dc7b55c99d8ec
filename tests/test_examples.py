"""The examples for model servers run: with a real store, and in front of them what the model server would be."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import threading
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from materialize.serving import OnlineFeatures
from tests.http_project import HttpProject
from tests.stepping import PATIENT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from tests import servers

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent
NAMES = ["amount", "score"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path, valkey: servers.Server) -> HttpProject:
    project = HttpProject(tmp_path, valkey.url)
    project.view("spending", "user_id", amount="float64", score="float64")
    (project.project.config / "feature_services.yaml").write_text(
        "ranking: {features: {spending: [amount], shop: [score]}}\n"
    )
    now = datetime.now(timezone.utc)
    project.put("spending", "a", 3.0, 0.25, event=now - timedelta(hours=1))
    project.put("spending", "b", 5.0, None, event=now - timedelta(hours=1))
    project.put("spending", "old", 7.0, 0.75, event=now - timedelta(days=2))
    return project


# --- TorchServe ---


class Context:
    """What TorchServe gives a handler (ts/context.py): the manifest, where the archive was unpacked, its YAML, and how to answer."""

    def __init__(self, model_dir: Path, features: dict[str, Any], serialized: str = "weights.npz") -> None:
        self.manifest = {"model": {"modelName": "ranking", "serializedFile": serialized}}
        self.system_properties = {"model_dir": str(model_dir), "gpu_id": None, "batch_size": 8}
        self.model_yaml_config = {"features": features}
        self.statuses: dict[int, tuple[int, str]] = {}
        self.all_statuses = (200, "")

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self.statuses[idx] = (code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        self.all_statuses = (code, phrase)


def torchserve(folder: Path, config: Path) -> tuple[Any, Context]:
    """A handler as TorchServe's model loader makes it: of the one class in its file, without arguments, then initialized."""
    module = example("torchserve_handler")
    classes = [one for _, one in inspect.getmembers(module, inspect.isclass) if one.__module__ == module.__name__]
    assert len(classes) == 1
    assert not hasattr(module, "handle")
    np.savez(folder / "weights.npz", weights=np.array([2.0, 4.0]), bias=np.array(1.0))
    context = Context(folder, {"config": str(config), "view": "spending", "feature_names": NAMES, "fill": 0.5})
    handler = classes[0]()
    handler.initialize(context)
    return handler, context


def test_torchserve_handler_answers_a_batch_by_one_read(project: HttpProject, valkey: servers.Server) -> None:
    handler, context = torchserve(project.folder, project.project.config)
    requests = [
        {"body": {"entity_key": "b"}},
        {"data": b'{"entity_key": "a"}'},
        {"body": b"{"},
        {"body": {"entity_key": ["nobody"]}},
        {"body": {"entity_key": 1.5}},
        {},
    ]
    handler.handle(requests, context)
    before = valkey.client.info("commandstats")

    answers = handler.handle(requests, context)

    after = valkey.client.info("commandstats")
    assert answers[:2] == [{"prediction": 13.0, "missing": ["score"]}, {"prediction": 8.0, "missing": []}]
    assert answers[3] == {"prediction": 4.0, "missing": NAMES}
    assert [answers[place].keys() for place in (2, 4, 5)] == [{"error"}] * 3
    assert context.statuses == dict.fromkeys((2, 4, 5), (400, "Bad Request"))
    reads = {name: one["calls"] - before.get(name, {"calls": 0})["calls"] for name, one in after.items()}
    # One read; what it lacks might be a hash, which MGET does not tell.
    assert {name: calls for name, calls in reads.items() if "get" in name and calls} == {
        "cmdstat_mget": 1,
        "cmdstat_hget": 1,
    }
    handler.features.close()


def test_torchserve_handler_without_a_store_answers_503(tmp_path: Path) -> None:
    project = HttpProject(tmp_path, "redis://127.0.0.1:1/0?timeout=0.2&deadline=0.2")
    project.view("spending", "user_id", amount="float64", score="float64")
    (project.project.config / "feature_services.yaml").unlink()
    handler, context = torchserve(tmp_path, project.project.config)

    answers = handler.handle([{"body": {"entity_key": "a"}}] * 2, context)

    assert context.all_statuses == (503, "Service Unavailable")
    assert len(answers) == 2
    handler.features.close()


# --- TensorFlow Serving ---


@pytest.fixture
def tf_serving() -> Iterator[str]:
    """A server with the predict API of TensorFlow Serving, in row format; its model is the sum of a row."""

    class Predict(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            good = self.path == "/v1/models/ranking:predict" and body["signature_name"] == "serving_default"
            content = json.dumps({"predictions": [[sum(row)] for row in body["instances"]]}).encode()
            self.send_response(200 if good else 400)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Predict) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/models/ranking"
        server.shutdown()
        thread.join()


def test_tf_serving_gets_a_matrix_in_the_order_of_the_names(project: HttpProject, tf_serving: str) -> None:
    predict = example("tf_serving_client").predict

    with OnlineFeatures.connect(project.project.config, terms=PATIENT) as features:
        found = predict(features, tf_serving, "spending", ["a", "nobody", "b"], NAMES, fill=100.0)

    assert found == [[3.25], [200.0], [105.0]]


# --- FastAPI ---


def test_fastapi_service_reads_in_its_own_process(project: HttpProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATERIALIZE_CONFIG", str(project.project.config))
    app = example("fastapi_service").app

    async def asked() -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://t") as client,
        ):
            return [(await client.get(f"/scores/{user}")).json() for user in ("a", "b", "old", "nobody")]

    there, null, old, nobody = asyncio.run(asked())

    assert (there["score"], there["missing"]) == (2.0, [])
    assert 3600 <= there["age_seconds"] < 3700
    assert (null["score"], null["missing"]) == (3.5, ["score"])
    assert (old["score"], old["missing"]) == (6.0, NAMES)
    assert nobody == {"score": 6.0, "age_seconds": None, "missing": NAMES}


# --- the page ---


def test_the_code_of_the_page_runs(
    project: HttpProject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project.folder)
    page = (ROOT / "docs" / "model-servers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)

    for block in blocks:
        exec(compile(block, "model-servers.md", "exec"), {})

    assert blocks
    assert "3.0" in capsys.readouterr().out
