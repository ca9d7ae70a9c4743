"""Inside an answer, and the service's live figures."""

from __future__ import annotations

import re

from playwright.sync_api import expect


def ask(page, tokens="4096"):
    page.select_option("#sample-size", tokens)
    page.locator("#sample").click()
    expect(page.locator("#size")).to_have_text(re.compile(r"\d{4} characters|,\d{3} characters"))
    question = page.locator("#question").input_value()
    text = page.locator("#document").input_value()
    page.locator("#go").click()
    key = re.search(r"for (\S+) mentioned", question)[1]
    value = re.search(rf"for {key} is: (\d+)", text)[1]
    return key, value


def test_the_planted_fact_lights_up_as_the_answer_comes(opened, service):
    page = opened(f"{service}/explorer#answer")
    key, value = ask(page)
    for policy in ("dynamic", "fixed", "dense"):
        expect(page.locator(f"[data-policy={policy}]")).to_have_attribute("data-done", "true")
    for policy in ("dynamic", "dense"):
        assert value in page.locator(f"[data-policy={policy}] .answer").inner_text()
    assert value not in page.locator("[data-policy=fixed] .answer").inner_text()
    for policy, heaviest in (("dynamic", True), ("dense", True), ("fixed", False)):
        page.locator(f"[data-policy={policy}] header button").click()
        expect(page.locator("#view")).to_have_text(re.compile(f"^{policy}, all"))
        first = page.locator("#passages li").first
        fact = re.compile(rf"for {key} is: {value}")
        expect(first).to_have_text(fact) if heaviest else expect(first).not_to_have_text(fact)
    page.locator("[data-policy=dynamic] header button").click()
    page.locator("#view").scroll_into_view_if_needed()
    page.locator("#text").scroll_into_view_if_needed()
    fact = page.locator("#text .fact.lit", has_text=value)
    expect(fact).to_be_in_viewport()
    marked = "".join(fact.locator("mark").all_inner_texts())
    assert set(value) <= set(marked)
    # A digit's token looks at that digit, and at little else that is not near.
    digits = page.locator("[data-policy=dynamic] .token", has_text=re.compile(r"^\s*\d$"))
    assert digits.count() == len(value)
    digits.nth(3).click()
    expect(page.locator("#view")).to_have_text(re.compile("dynamic, the token"))
    expect(page.locator("#passages li").first).to_have_text(re.compile(value))
    page.select_option("#layer", "0")
    expect(page.locator("#view")).to_have_text(re.compile("density"))
    whole = page.locator("#view").inner_text()
    page.select_option("#head", "1")
    expect(page.locator("#view")).not_to_have_text(whole)


def test_an_answer_is_stopped(opened, service):
    page = opened(f"{service}/explorer#answer")
    ask(page, "8192")
    expect(page.locator("[data-policy=dense]")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#go")).to_be_enabled()
    expect(page.locator("[data-policy=dense]")).to_contain_text("stopped")


def test_a_file_is_opened_and_nothing_is_asked_of_nothing(opened, service, tmp_path):
    page = opened(f"{service}/explorer#answer")
    page.locator("#go").click()
    expect(page.locator("#ask-error")).to_have_text("Give a document and a question first.")
    file = tmp_path / "note.txt"
    file.write_text("One of the special magic numbers for \u00fcber-\U0001f600 is: 1234567.")
    page.set_input_files("#file", file)
    expect(page.locator("#document")).to_have_value(file.read_text())
    page.locator("#question").fill("What is the number?")
    page.locator("#most").fill("4")
    page.locator("#go").click()
    expect(page.locator("[data-policy=dense]")).to_have_attribute("data-done", "true")


def test_a_wrong_pattern_is_told_as_an_error_beside_the_answers(opened, service):
    page = opened(f"{service}/explorer#answer", expected=("400",))
    page.locator("#document").fill("The number is 7.")
    page.locator("#question").fill("What is the number?")
    page.locator("#fixed-pattern").fill("windw:3")
    page.locator("#go").click()
    expect(page.locator("[data-policy=fixed] .error")).to_contain_text("windw")
    expect(page.locator("[data-policy=dense]")).to_have_attribute("data-done", "true")


def test_live_figures_are_the_services(opened, service):
    page = opened(f"{service}/explorer#live")
    expect(page.locator("#fallbacks tr")).not_to_have_count(0)
    expect(page.locator("#live-running")).to_have_text("0")
    for name in ("generated", "density", "coverage", "kv", "fallback"):
        expect(page.locator(f"#live-{name}-plot svg")).to_be_visible()
    expect(page.locator("#live-note")).to_contain_text("every 2 seconds")
