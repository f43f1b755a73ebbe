"""Pages of other sites and proxies get nothing from a node without keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from modelops.base.errors import UsageError
from modelops.serving.http.app import create_app
from modelops.serving.http.keys import KeyRing
from modelops.serving.settings import NodeSettings

IMAGES, MODELS = "/v1/images/generations", "/v1/models"


@pytest.fixture
def client() -> Iterator[TestClient]:
    """Of a node that has no model yet: whatever gets in is answered with 503."""
    app = create_app()
    with TestClient(app, base_url="http://127.0.0.1:3000", client=("127.0.0.1", 1)) as client:
        yield client


@pytest.mark.parametrize("path", [MODELS, "/metrics", "/", "/openapi.json", "/nothing"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:3000", "127.0.0.1.evil.example"])
def test_a_foreign_name_is_misdirected(client: TestClient, path: str, host: str) -> None:
    answer = client.get(path, headers={"Host": host})
    assert answer.status_code == 421
    assert answer.json()["error"]["code"] == "misdirected_request"


@pytest.mark.parametrize("host", ["127.0.0.1:3000", "localhost", "LOCALHOST:8", "[::1]:3000"])
def test_its_own_names_are_answered(client: TestClient, host: str) -> None:
    own = {"Host": host, "Origin": f"http://{host}"}
    for headers in ({"Host": host}, own):
        assert client.get(MODELS, headers=headers).status_code == 503
    for path in ("/healthz", "/readyz"):  # probes of a platform
        assert client.get(path, headers={"Host": "pod.example"}).status_code != 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "x"])
def test_a_page_of_another_site_is_refused(client: TestClient, origin: str) -> None:
    answer = client.post(IMAGES, headers={"Origin": origin}, json={"prompt": "red heart"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin_request")


def test_a_body_says_what_it_is(client: TestClient) -> None:
    """Without Content-Type a browser sends it to any site, and asks nobody first."""
    body = b'{"prompt":"red heart"}'
    answer = client.post(IMAGES, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert client.post(IMAGES, json={"prompt": "red heart"}).status_code == 503


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_of_another_site_embeds_is_refused(client: TestClient, site: str) -> None:
    """A browser sends no Origin with an image or a script, but says that it is of another site."""
    embedded = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    answer = client.get("/openapi.json", headers=embedded)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin_request")
    link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert client.get(MODELS, headers=own).status_code == 503


@pytest.mark.parametrize(
    "name",
    ["X-Forwarded-For", "Forwarded", "X-Forwarded-Host", "X-Real-IP", "X-Forwarded-Proto", "Via",
     "CF-Connecting-IP", "True-Client-IP", "X-Client-IP"],
)  # fmt: skip
def test_nothing_comes_in_through_a_proxy(client: TestClient, name: str) -> None:
    answer = client.get(MODELS, headers={name: "10.0.0.7"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "api_keys_not_configured")


def test_with_keys_a_proxy_and_its_names_are_fine(client: TestClient) -> None:
    digest = hashlib.sha256(b"mo-secret").hexdigest()
    client.app.state.access.keys = KeyRing(digests=(digest,))  # type: ignore[attr-defined]
    headers = {
        "Host": "images.example",
        "X-Forwarded-For": "10.0.0.7",
        "Origin": "https://a.example",
    }
    assert client.get(MODELS, headers=headers).status_code == 401
    headers["Authorization"] = "Bearer mo-secret"
    assert client.get(MODELS, headers=headers).status_code == 503


def test_allowed_origins_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELOPS_ALLOWED_ORIGINS", "https://studio.example, http://localhost:8000")
    app = create_app()
    with TestClient(app, base_url="http://127.0.0.1:3000") as client:
        asked = {
            "Origin": "https://studio.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }  # fmt: skip
        answer = client.options(IMAGES, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "https://studio.example"
        asked["Origin"] = "https://evil.example"
        assert "Access-Control-Allow-Origin" not in client.options(IMAGES, headers=asked).headers
        answer = client.get(MODELS, headers={"Origin": "https://studio.example"})
        assert answer.status_code == 503
        assert answer.headers["Access-Control-Allow-Origin"] == "https://studio.example"
    for bad in ("studio.example", "https://a.example/path", "ftp://a.example", "https://"):
        with pytest.raises(UsageError, match="is no origin"):
            NodeSettings.from_environment({"MODELOPS_ALLOWED_ORIGINS": bad})
