"""How long the explorer takes to answer a hand: first toggle, and others, in a headless Chromium.

    python tests/bench/explorer.py

Starts the service alone on a free port and opens its page in a fresh profile, several times. Time
is from the click until mask, figures and name are those of the new pattern. Exits with 1 where the
median of the first toggles is more than `--most` seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.running import running, standalone  # noqa: E402
from tests.browser.conftest import FLAGS, MISSING, chromium  # noqa: E402

START = 120.0  # seconds
OTHERS = ("dilated", "global", "fixed", "axial", "random")


def toggled(page, name: str) -> float:
    """Seconds that switching a primitive on takes."""
    before = page.locator("#mask").get_attribute("data-spec")
    begun = time.perf_counter()
    page.locator(f"[data-name={name}]").click()
    expect(page.locator("#mask")).not_to_have_attribute("data-spec", before)
    expect(page.locator("#mask")).to_have_attribute("aria-busy", "false")
    return time.perf_counter() - begun


def main() -> int:
    """Measure; 0 where it is fast enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models/checkpoints/saccade-12m")
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--most", type=float, default=1.0, help="seconds of a first toggle")
    options = parser.parse_args()
    program = chromium()
    if program is None:
        print(MISSING)
        return 0
    shown, first, others, large = [], [], [], []
    with running(standalone(options.model), START) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for _ in range(options.visits):
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            page = context.new_page()
            begun = time.perf_counter()
            page.goto(f"{server.url}/explorer")
            expect(page.locator("#mask")).to_have_attribute("aria-busy", "false", timeout=60_000)
            shown.append(time.perf_counter() - begun)
            first.append(toggled(page, "block_local"))
            others += [toggled(page, name) for name in OTHERS]
            page.select_option("#length", "4096")
            expect(page.locator("#place")).to_contain_text("4,095", timeout=60_000)
            large.append(toggled(page, "full"))
            context.close()
        browser.close()
    for what, seconds in (
        ("page shown", shown),
        ("first toggle, 128 tokens", first),
        ("other toggles, 128 tokens", others),
        ("a toggle, 4,096 tokens", large),
    ):
        print(
            f"{what:<28} median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s, "
            f"of {len(seconds)}"
        )
    return 0 if statistics.median(first) <= options.most else 1


if __name__ == "__main__":
    sys.exit(main())
