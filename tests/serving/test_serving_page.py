"""The page at `/`, in headless Chromium: used by keys alone, on a desktop and a phone, in the dark and in the light."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser import Browser, browser
from reports import CHROMIUM
from servers import client, folders, running

from longwave.serving.server import Running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = folders(tmp_path_factory.mktemp("models"))
    with running([made["levels"], made["plain"]]) as begun:
        yield begun


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page was not drawn in a browser")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_page_needs_nothing_else(server: Running):
    with client(server) as web:
        reply = web.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|@import|url\((?!data:)", reply.text) == []
    assert "{{" not in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


WINDOWS: list[Any] = [(1280, 900, False), (390, 844, True)]


@pytest.mark.parametrize(("width", "height", "dark"), WINDOWS, ids=["desktop", "phone"])
def test_a_conversation_by_keys_alone(page: Browser, server: Running, width: int, height: int, dark: bool):
    page.open(server.url, width, height, dark)
    assert page.value("document.activeElement.id") == "text"
    assert page.value("document.documentElement.scrollWidth") <= width
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    page.value("find('max_tokens').value = 12")
    page.type("<b>hello</b>")
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('#log small').length == 1")
    assert page.value("document.querySelector('#log article').textContent") == "you<b>hello</b>"
    assert "12 written" in page.value("document.querySelector('#log small').textContent")
    assert page.value("document.activeElement.id") == "text"
    page.wait("!find('kept').hidden && document.querySelectorAll('#passage-text .dropped').length")
    total = page.value("document.querySelectorAll('#passage-text span').length")
    assert page.wait("find('shares').textContent.includes(' of ')")
    assert page.value("document.querySelectorAll('#passage-text .kept').length") in range(1, total)
    page.wait("Number(find('rate').textContent) > 0")
    assert page.errors == []
    assert {httpx.URL(one).host for one in page.requests} == {"127.0.0.1"}


def test_an_answer_is_stopped_and_a_model_without_turns_continues_text(page: Browser, server: Running):
    page.open(server.url)
    page.value(
        "(find('model').value = 'plain', find('model').dispatchEvent(new Event('change')), find('text').focus())"
    )
    assert page.value("find('mode').hidden")
    page.value("find('max_tokens').value = 500")
    page.type("the user")
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('#log article')[1]?.lastChild.data?.length > 3")
    page.press("Escape", 27)
    page.wait("document.querySelectorAll('#log small').length == 1")
    assert page.value("find('stop').hidden && !find('send').hidden")
    page.wait("find('running').textContent == '0'")
    assert page.value("document.querySelector('#log small').textContent").startswith("? tokens read")
    page.value("find('max_tokens').value = -4")
    page.value("find('text').focus()")
    page.type("again")
    page.press("Enter", 13)
    page.wait("document.querySelectorAll('#log small').length == 2")
    assert "greater than or equal to 1" in page.value("document.querySelector('#log .failed').textContent")
