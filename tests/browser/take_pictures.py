"""Takes the documentation's pictures of the explorer: `python tests/browser/take_pictures.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.running import running, standalone  # noqa: E402
from tests.browser.conftest import FLAGS, chromium  # noqa: E402

START = 120.0  # seconds
FOLDER = ROOT / "tests/browser/pictures"
PATTERN = "#patterns?spec=global:4%2Bwindow:16%2Bdilated:12,8&n=128"


def main() -> None:
    """Both pictures, of the bundled checkpoint's service."""
    with (
        running(standalone(ROOT / "models/checkpoints/saccade-12m"), START) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 830})
        page.goto(f"{server.url}/explorer{PATTERN}")
        expect(page.locator("#mask")).to_have_attribute("aria-busy", "false")
        expect(page.locator("#model")).to_have_text("saccade-12m")
        page.screenshot(path=FOLDER / "patterns.png")
        page.locator("#tab-answer").click()
        page.locator("#sample").click()
        expect(page.locator("#size")).to_contain_text(",")
        page.locator("#go").click()
        for policy in ("dynamic", "fixed", "dense"):
            column = page.locator(f"[data-policy={policy}]")
            expect(column).to_have_attribute("data-done", "true", timeout=120_000)
        expect(page.locator("#toast")).not_to_have_class("toast on")
        page.set_viewport_size({"width": 1280, "height": 1060})
        page.locator("#columns").scroll_into_view_if_needed()
        page.evaluate("() => scrollTo(0, document.querySelector('#question').offsetTop - 20)")
        page.wait_for_timeout(500)
        page.screenshot(path=FOLDER / "answer.png")
        browser.close()


if __name__ == "__main__":
    main()
