"""Who may ask: keys, hosts, origins; and the headers that keep the page closed."""

import pytest

from tests.web.conftest import serving

PATHS = ["/v1/models", "/v1/chat/completions", "/openapi.json", "/v1/x_synapse/memories/a", "/v1/x_synapse/memories/a/file", "/none"]


@pytest.fixture(scope="module")
def locked():
    with serving(api_key="secret", allowed_hosts="chat.example") as running:
        yield running


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer wrong", "Basic secret", "Bearer secret2", "secret"])
def test_without_the_key_nothing_is_answered(locked, path, key):
    for method in ("GET", "POST", "PUT", "DELETE"):
        answer = locked.client.request(method, path, headers={"authorization": key or ""}, json={})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_with_the_key_it_is_and_the_page_is_always(locked):
    assert locked.ask().status_code == 200
    for path in ("/", "/health", "/page/app.js"):
        assert locked.client.get(path, headers={"authorization": ""}).status_code == 200
    assert locked.client.get("/page/../../guards.py", headers={"authorization": ""}).status_code in (401, 404)
    assert locked.client.get("/page/%2e%2e/guards.py", headers={"authorization": ""}).status_code in (401, 404)


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:1", 200), ("chat.example", 200), ("evil.example", 421), ("", 421), ("192.168.1.2", 421)]
)
def test_only_known_hosts_are_answered(locked, host, status):
    assert locked.client.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize(("origin", "status"), [("own", 200), ("https://evil.example", 403), ("null", 403), ("http://[", 403)])
def test_only_the_own_page_may_ask(server, origin, status):
    origin = server.url if origin == "own" else origin
    assert server.client.get("/v1/models", headers={"origin": origin}).status_code == status


def test_other_sites_cannot_embed_or_read_answers(server):
    assert server.client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    for path in ("/", "/v1/models", "/none"):
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in headers
