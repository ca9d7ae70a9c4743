"""A headless Chromium over the real service with the bundled checkpoint."""

from __future__ import annotations

import os
import shutil
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from service.api.app import create_app
from service.config import ServiceConfig
from service.engine.build import build_engine
from tests.service.conftest import serving

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = (
    "\n*** NO BROWSER TESTS: there is no Chromium here. Install it (Debian: apt-get install "
    "chromium) or name one by SACCADE_CHROMIUM. ***\n"
)


def chromium():
    """The browser's program, or None."""
    return os.environ.get("SACCADE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def pytest_sessionstart():
    if chromium() is None:
        if os.environ.get("CI"):
            pytest.exit(MISSING, returncode=1)
        pytest.exit(MISSING, returncode=0)


@pytest.fixture(scope="session")
def service():
    """Base URL of the service."""
    config = ServiceConfig(kv_cache_gib=0.5)
    engine = build_engine(config)
    engine.start()
    with serving(create_app(engine, config)) as url:
        yield url
    engine.stop()


@pytest.fixture(scope="session")
def guarded():
    """Base URL of a service that asks for a key."""
    config = ServiceConfig(kv_cache_gib=0.05, api_key="open-sesame")
    engine = build_engine(config)
    engine.start()
    with serving(create_app(engine, config)) as url:
        yield url
    engine.stop()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        # An empty profile of its own is made for each launch.
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        expect.set_options(timeout=120_000)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens pages; at the end none has complained, or asked another host for anything."""
    contexts, trouble, hosts = [], [], set()

    def open_page(url, *, expected=(), **options):
        options = {"viewport": {"width": 1400, "height": 900}} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)

        def said(message):
            if message.type in ("error", "warning") and not any(
                x in message.text for x in expected
            ):
                trouble.append(message.text)

        page.on("console", said)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        own.add(urlsplit(url).netloc)
        page.goto(url)
        return page

    own = {""}  # of blobs
    yield open_page
    for context in contexts:
        context.close()
    assert not trouble
    assert hosts <= own
