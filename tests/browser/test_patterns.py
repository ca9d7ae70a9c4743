"""The view of patterns: what it shows is what the kernels' patterns say."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import expect

from kernels.patterns.parse import PRIMITIVES
from kernels.patterns.pattern import Pattern
from kernels.patterns.presets import recognise
from kernels.patterns.published import SPECS

START = "sinks:4+window:16+strided:16"


def patterns(opened, service, hash_="", **options):
    page = opened(f"{service}/explorer{hash_}", **options)
    settled(page)
    return page


def settled(page, spec=None):
    """Wait until the mask is that of `spec`."""
    if spec is not None:
        expect(page.locator("#mask")).to_have_attribute("data-spec", spec)
    expect(page.locator("#mask")).to_have_attribute("aria-busy", "false")


def check(page, length=128):
    """The figures are those of the pattern that the mask shows; its text and its pixels."""
    spec = page.locator("#mask").get_attribute("data-spec")
    pattern = Pattern.parse(spec)
    shown = float(page.locator("#sparsity").inner_text().split("%")[0])
    assert shown == pytest.approx(100 * pattern.sparsity(length), abs=0.051)
    pairs = page.locator("#pairs").inner_text().split("\n")[0]
    assert int(pairs.replace(",", "")) == pattern.selected_keys(length)
    named = page.locator("#recognised").inner_text().split("\n")[0]
    assert named == (recognise(pattern) or "no known model")
    assert page.locator("#complexity").inner_text().split("\n")[0] == pattern.complexity
    assert spec in page.locator("#summary").inner_text()
    return spec, page.evaluate("() => document.querySelector('#mask').toDataURL()")


def test_every_toggle_changes_mask_figures_and_name(opened, service):
    page = patterns(opened, service)
    seen = [check(page)]
    assert seen[0][0] == START
    for kind in PRIMITIVES:
        chip = page.locator(f"[data-name={kind.name}]")
        on = chip.get_attribute("aria-pressed") == "true"
        for _ in range(2):
            before = seen[-1]
            chip.click()
            on = not on
            expect(chip).to_have_attribute("aria-pressed", str(on).lower())
            settled(page)
            seen.append(check(page))
            assert seen[-1][0] != before[0]
            names = {one.name for one in Pattern.parse(seen[-1][0]).primitives}
            assert (kind.name in names) is on
            if Pattern.parse(seen[-1][0]).selected_keys(128) != Pattern.parse(
                before[0]
            ).selected_keys(128):
                assert seen[-1][1] != before[1]


def test_the_last_primitive_stays(opened, service):
    page = patterns(opened, service, "#patterns?spec=window:8&n=64")
    page.locator("[data-name=window]").click()
    expect(page.locator("#toast")).to_have_text(re.compile("one primitive"))
    assert check(page, 64)[0] == "window:8"


@pytest.mark.parametrize("name", SPECS)
def test_a_preset_is_recognised(opened, service, name):
    page = patterns(opened, service)
    page.select_option("#preset", name)
    settled(page, str(Pattern.parse(name)))
    length = int(page.locator("#length").input_value())
    check(page, length)
    assert page.locator("#recognised").inner_text().startswith(name)
    assert page.locator("#preset").input_value() == name


def test_numbers_and_operators_are_tuned(opened, service):
    page = patterns(opened, service)
    page.locator('[data-number="1.0"][type=number]').fill("40")
    settled(page, "sinks:4+window:40+strided:16")
    check(page)
    page.locator('[data-number="1.0"][type=range]').press("ArrowRight")
    settled(page, "sinks:4+window:41+strided:16")
    page.locator(".term select").nth(1).select_option("&")
    settled(page, "sinks:4+window:41&strided:16")
    check(page)
    page.get_by_text("Bidirectional", exact=True).click()
    settled(page, "sinks:4+window:41&strided:16@bidirectional")
    check(page)


def test_a_mistake_is_pointed_at(opened, service):
    page = patterns(opened, service, expected=["400"])
    page.locator("#spec").fill("window:8+windw:3")
    expect(page.locator("#spec-error")).to_contain_text("\n           ^")
    expect(page.locator("#spec")).to_have_attribute("aria-invalid", "true")
    page.locator("#spec").fill("window:8+(sinks:2&strided:4)")
    settled(page, "window:8+sinks:2&strided:4")
    expect(page.locator("#spec-error")).to_be_hidden()


def test_a_link_shows_the_same_again(opened, service):
    page = patterns(opened, service)
    page.locator("#spec").fill("fixed:64,8+window:100@bidirectional")
    settled(page, "fixed:64,8+window:100@bidirectional")
    page.select_option("#length", "4096")
    settled(page)
    page.locator("#zoom-in").click()
    page.locator("#mask").press("ArrowRight")
    expect(page.locator("#mask")).to_have_attribute("data-part", "1024,3072,1280,3328")
    settled(page)
    first = check(page, 4096)
    parameters = parse_qs(urlsplit(page.url).fragment.partition("?")[2])
    assert parameters["spec"] == [first[0]] and parameters["n"] == ["4096"]
    assert parameters["at"] == ["1024,1280,2048"]
    again = patterns(opened, service, "#" + urlsplit(page.url).fragment)
    settled(again, first[0])
    assert check(again, 4096) == first


def test_the_mask_is_saved_as_a_picture(opened, service):
    page = patterns(opened, service)
    with page.expect_download() as waiting:
        page.locator("#png").click()
    saved = waiting.value
    assert saved.suggested_filename == "sinks-4-window-16-strided-16-128.png"
    assert saved.path().read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_keyboard_is_enough(opened, service):
    page = patterns(opened, service)
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    assert "spec=" in page.url
    page.keyboard.press("Tab")
    expect(page.locator("#spec")).to_be_focused()
    for _ in range(40):  # every control in turn, up to the mask
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "zoom-in":
            break
        outline = page.evaluate(
            "() => { const e = document.activeElement; const s = getComputedStyle(e);"
            " return s.outlineStyle !== 'none' || e.type === 'radio'; }"
        )
        assert outline, page.evaluate("() => document.activeElement.outerHTML")
    page.keyboard.press("Enter")
    expect(page.locator("#place")).to_have_text(re.compile("queries 32.95, keys 32.95"))
    page.locator("#mask").focus()
    page.keyboard.press("0")
    expect(page.locator("#place")).to_have_text(re.compile("queries 0.127"))
    page.keyboard.press("Shift+ArrowLeft")
    expect(page.locator("#cell")).to_have_text("query 64, key 63: seen by window:16")
    chip = page.locator("[data-name=global]")
    chip.focus()
    page.keyboard.press("Space")
    settled(page, f"{START}+global:4")
    page.locator("#tab-patterns").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-answer")).to_be_focused()
    expect(page.locator("#panel-answer")).to_be_visible()
    expect(page.locator("#panel-patterns")).to_be_hidden()


def test_colours_follow_the_system_and_the_button(opened, service):
    def background(page):
        return page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor")

    light = patterns(opened, service, color_scheme="light")
    dark = patterns(opened, service, color_scheme="dark")
    assert background(light) != background(dark)
    assert check(light)[1] != check(dark)[1]
    system = background(dark)
    dark.locator("#theme").click()  # light
    assert background(dark) == background(light)
    dark.locator("#theme").click()  # dark
    assert background(dark) == system
    dark.reload()
    settled(dark)
    assert dark.locator("#theme").inner_text() == "Dark"


def test_a_narrow_screen_scrolls_one_way_only(opened, service):
    page = patterns(opened, service, viewport={"width": 360, "height": 640}, has_touch=True)
    for view in ("patterns", "answer", "live"):
        page.locator(f"#tab-{view}").click()
        expect(page.locator(f"#panel-{view}")).to_be_visible()
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360


def test_every_control_has_a_name(opened, service):
    page = patterns(opened, service)
    for view in ("patterns", "answer", "live"):
        page.locator(f"#tab-{view}").click()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea, canvas, svg")]
            .filter((e) => e.checkVisibility() && !e.ariaLabel && !e.textContent.trim()
                && !(e.labels && e.labels.length)).map((e) => e.outerHTML)"""
        )
        assert nameless == []


def test_the_key_is_asked_for_and_kept_out_of_the_address(opened, guarded):
    page = opened(f"{guarded}/explorer", expected=["401"])
    page.locator("#key").fill("wrong")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key-error")).to_have_text(re.compile("refused"))
    page.locator("#key").fill("open-sesame")
    page.get_by_role("button", name="Use key").click()
    settled(page, START)
    expect(page.locator("#key-form")).to_be_hidden()
    assert "open-sesame" not in page.url
    assert page.evaluate("() => JSON.stringify(localStorage)").find("sesame") < 0
