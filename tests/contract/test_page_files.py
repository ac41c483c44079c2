"""The page: what is served at / and under /web, to whom, and with which headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gateway.web
from tests.support.app import Gateway

pytestmark = pytest.mark.anyio

FOLDER = Path(gateway.web.__file__).parent
OWN = [path for path in FOLDER.rglob("*") if path.suffix in (".html", ".js", ".css") and "vendor" not in path.parts]


@pytest.fixture
async def visitor(gateway: Gateway) -> Gateway:
    """A gateway whose client sends no key."""
    del gateway.client.headers["Authorization"]
    return gateway


async def _files(visitor: Gateway) -> list[str]:
    """Return the paths that the page names."""
    page = (await visitor.client.get("/")).text
    return re.findall(r'(?:src|href)="(/[^"]+)"', page)


async def test_page_needs_no_key(visitor: Gateway) -> None:
    response = await visitor.client.get("/")

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>Shannon</title>" in response.text


async def test_page_names_only_files_that_are_there(visitor: Gateway) -> None:
    files = await _files(visitor)

    assert len(files) > 8
    for path in files:
        assert (await visitor.client.get(path)).status_code == 200, path


async def test_modules_import_only_files_that_are_there(visitor: Gateway) -> None:
    base = next(path for path in await _files(visitor) if path.endswith("/main.js")).removesuffix("main.js")
    for module in FOLDER.glob("*.js"):
        for name in re.findall(r'from "\./([^"]+)"', module.read_text()):
            response = await visitor.client.get(base + name)
            assert response.status_code == 200, (module.name, name)
            assert response.headers["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize("path", ["/", "/main.js", "/style/base.css"])
async def test_policy_lets_nothing_in_from_elsewhere(visitor: Gateway, path: str) -> None:
    if path != "/":
        path = next(name for name in await _files(visitor) if name.endswith(path))
    headers = (await visitor.client.get(path)).headers

    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == "same-origin"


async def test_page_is_asked_for_each_time_and_answered_by_304_while_it_is_the_same(visitor: Gateway) -> None:
    first = await visitor.client.get("/")
    second = await visitor.client.get("/", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    other = await visitor.client.get("/", headers={"If-None-Match": '"other"'})

    assert first.headers["cache-control"] == "no-cache"
    assert (second.status_code, second.content) == (304, b"")
    assert second.headers["etag"] == first.headers["etag"]
    assert other.status_code == 200


async def test_files_are_kept_for_good_under_a_path_of_their_version(visitor: Gateway) -> None:
    path = next(name for name in await _files(visitor) if name.endswith("/main.js"))
    response = await visitor.client.get(path)

    assert re.fullmatch(r"/web/[0-9a-f]{16}/main\.js", path)
    assert "immutable" in response.headers["cache-control"]


@pytest.mark.parametrize(
    "path",
    [
        "/web/0000000000000000/main.js",
        "/web/{version}/nothing.js",
        "/web/{version}/../api/web.py",
        "/web/{version}/%2e%2e/api/web.py",
        "/web/{version}//etc/passwd",
        "/web/{version}/index.html",
        "/web/{version}/__init__.py",
        "/web/{version}/vendor/markdown-it/LICENSES.txt",
        "/web/{version}",
        "/web/",
    ],
)
async def test_nothing_else_is_served(visitor: Gateway, path: str) -> None:
    version = (await _files(visitor))[0].split("/")[2]
    response = await visitor.client.get(path.format(version=version))

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_head_has_the_headers_and_no_body(visitor: Gateway) -> None:
    whole = await visitor.client.get("/")
    head = await visitor.client.head("/")

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


async def test_page_is_not_part_of_the_api_document(gateway: Gateway) -> None:
    paths = (await gateway.client.get("/openapi.json")).json()["paths"]

    assert not [path for path in paths if path == "/" or path.startswith("/web")]


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_own_files_have_nothing_inline_and_name_no_other_host(path: Path) -> None:
    text = path.read_text()

    assert not re.search(r"<script(?![^>]*\bsrc=)", text)
    assert not re.search(r'\s(?:style|on[a-z]+)="', text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert set(re.findall(r"https?://[\w.-]+", text)) <= {"http://www.w3.org"}


def test_vendored_files_have_their_licences_beside_them() -> None:
    assert {path.name for path in (FOLDER / "vendor").iterdir()} == {"markdown-it"}
    assert "Permission is hereby granted" in (FOLDER / "vendor/markdown-it/LICENSES.txt").read_text()
    assert "SIL OPEN FONT LICENSE" in (FOLDER / "fonts/OFL.txt").read_text()
