"""The OpenAPI document is whole, and the node keeps to it whatever it is sent (schemathesis)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from starlette.testclient import TestClient

from modelops.serving.http.app import create_app
from modelops.serving.http.openapi import complete
from modelops.serving.node.node import InferenceNode
from modelops.serving.settings import NodeSettings
from modelops.serving.telemetry.metrics import CODES, OTHER

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
GENERATE = "/v1/images/generations"
OPERATIONS = (
    ("/livez", "GET"), ("/metrics", "GET"), ("/readyz", "GET"), ("/v1/models", "GET"),
    (GENERATE, "POST"),
)  # fmt: skip


@pytest.fixture(scope="module")
def app(tiny_release: Path) -> Iterator[Any]:
    node = InferenceNode(tiny_release, settings=NodeSettings(profile_s=0, queue_limit=16))
    node.start()
    assert node.readiness() == []
    yield create_app(node)
    node.close(drain=False, timeout_s=10)


def fuzz(app: Any, path: str, method: str, mode: str, examples: int) -> None:
    """Send generated requests; fail on a 5xx, or an answer that the document does not state."""
    from schemathesis import checks
    from schemathesis.generation import GenerationMode

    app.state.access.insecure = True  # what schemathesis sends names the host "testserver"
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    operation = document[path][method]
    names = [
        "not_a_server_error", "status_code_conformance", "content_type_conformance",
        "response_headers_conformance", "response_schema_conformance", "unsupported_method",
    ]  # fmt: skip
    if mode == "NEGATIVE":
        names.append("negative_data_rejection")
    wanted = checks.CHECKS.get_by_names(names)

    @seed(5)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
    def keeps_to_it(case: Any) -> None:
        if path == GENERATE and isinstance(case.body, dict):
            steps = case.body.get("steps")
            if isinstance(steps, int) and steps > 3:  # the same code, sooner
                case.body["steps"] = steps % 3 + 1 if steps <= 200 else steps
        case.call_and_validate(checks=wanted)

    keeps_to_it()


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_makes_it_fail_or_break_its_word(app: Any, mode: str) -> None:
    fuzz(app, GENERATE, "POST", mode, 40)


@pytest.mark.parametrize(("path", "method"), OPERATIONS[:-1])
def test_the_other_routes_keep_to_it(app: Any, path: str, method: str) -> None:
    fuzz(app, path, method, "POSITIVE", 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_of_very_many_makes_it_fail(app: Any, mode: str) -> None:
    fuzz(app, GENERATE, "POST", mode, 600)
    assert app.state.node.metrics.errors.labels("internal_error")._value.get() == 0


def test_every_route_of_the_app_is_in_the_document(app: Any) -> None:
    document = app.openapi()
    there = {
        (path, method.upper()) for path, entry in document["paths"].items() for method in entry
    }
    assert set(OPERATIONS) <= there
    for path, method in there:
        answers = document["paths"][path][method.lower()]["responses"]
        assert {"405", "500", "503"} <= set(answers)
        assert "422" not in answers, "FastAPI's own shape of an error is never sent"
    wanted = {"200", "400", "401", "403", "404", "405", "408", "413", "415", "421", "429", "500",
              "503"}  # fmt: skip
    generate = document["paths"][GENERATE]["post"]
    assert set(generate["responses"]) == wanted
    assert generate["security"] == [{"key": []}, {}]
    again = json.loads(json.dumps(document))
    complete(again)
    assert again == document, "completing it twice changes nothing"


def test_the_document_is_valid_openapi(app: Any) -> None:
    text = json.dumps(app.openapi())
    for name in set(json.loads(text)["components"]["schemas"]):
        jsonschema.Draft202012Validator.check_schema(app.openapi()["components"]["schemas"][name])
    for part in text.split('"$ref": "')[1:]:
        reference = part.split('"')[0]
        where: Any = app.openapi()
        for key in reference.removeprefix("#/").split("/"):
            assert key in where, reference
            where = where[key]


def test_every_error_code_is_counted_by_its_name(app: Any) -> None:
    """A code that the metrics do not know would be counted as `other`."""
    client = TestClient(app, raise_server_exceptions=False, base_url="http://127.0.0.1")
    answers = [
        client.post(GENERATE, json={}),
        client.post(GENERATE, content=b"[", headers={"Content-Type": "application/json"}),
        client.post(GENERATE, json={"prompt": "sun", "wrong": 1}),
        client.post(GENERATE, json={"prompt": "sun", "n": 0}),
        client.post(GENERATE, json={"prompt": "sun", "model": "other"}),
        client.post(GENERATE, json={"prompt": "sun", "size": "1x1"}),
        client.post(GENERATE, json={"prompt": "word " * 200}),
        client.post(GENERATE, content=b"x" * 70_000, headers={"Content-Type": "application/json"}),
        client.post(GENERATE, content=b"x", headers={"Content-Type": "text/plain"}),
        client.post(GENERATE, content=b"{}", headers={"Transfer-Encoding": "chunked",
                                                      "Content-Length": "2"}),
        client.put("/v1/models"),
        client.get("/nothing"),
    ]  # fmt: skip
    codes = [answer.json()["error"]["code"] for answer in answers]
    assert len(set(codes)) == len(codes) and set(codes) <= CODES
    assert OTHER not in codes
    assert answers[-2].headers["allow"] == "GET"
