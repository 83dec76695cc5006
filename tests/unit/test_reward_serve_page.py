from fastapi import FastAPI
from starlette.testclient import TestClient

from rlhf_ray.reward.serve.page import page_routes


def test_page_needs_no_other_host_and_nothing_inline() -> None:
    app = FastAPI()
    app.include_router(page_routes())
    client = TestClient(app)
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert " style=" not in page.text
    assert "<style" not in page.text
    for path in ("/page/page.css", "/page/page.js", "/page/charts.js", "/page/service.js", "/page/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "innerHTML" not in answer.text
        assert not [
            line for line in answer.text.splitlines() if "://" in line and "http://www.w3.org/2000/svg" not in line
        ]
        assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
