"""The service's page in a real browser: a person tries the example, reads a ranking, and sees errors."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import Running

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")
ANSWERS = {"The digit is 7.": 9.0, "The digit is 3.": -9.0, "The image shows 1.": 0.0}


def browser_problem() -> str | None:
    """Why there is no browser; installs Debian's where that is possible."""
    if shutil.which("chromium") and shutil.which("chromedriver"):
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "chromium and chromedriver are not installed"
    install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver"
    done = subprocess.run(install, shell=True, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"chromium cannot be installed: {done.stderr[-300:]}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    if problem := browser_problem():
        pytest.skip(problem)
    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
             "disable-background-networking", "disable-component-update", "disable-sync",
             f"user-data-dir={profile}", "window-size=420,900")  # fmt: skip
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def service() -> Iterator[Running]:
    running = Running(token="secret")
    running.judge.strengths = dict(ANSWERS)
    yield running
    running.stop()


def wait_for(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 300).until(condition)


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def test_the_example_is_ranked(browser, service: Running, tmp_path: Path) -> None:
    browser.get(f"{service.url}/?token=secret")
    find(browser, "#example").click()
    assert len(browser.find_elements("css selector", "#thumbs img")) == 1
    find(browser, "#go").click()
    wait_for(browser, lambda b: find(b, "#result").is_displayed())
    places = [item.text for item in browser.find_elements("css selector", "ol.ranking li")]
    assert [place.split(" — ")[0] for place in places] == ["1. Answer 1", "2. Answer 3", "3. Answer 2"]
    assert "The digit is 7." in places[0]
    widths = [bar.size["width"] for bar in browser.find_elements("css selector", ".bar span")]
    assert widths == sorted(set(widths), reverse=True)
    verdicts = browser.find_elements("css selector", "details")
    assert len(verdicts) == 3
    assert "both orders agree" in verdicts[0].text
    verdicts[0].find_element("css selector", "summary").click()
    assert "shown first: prefers answer 1" in verdicts[0].text
    assert service.judge.calls == 6
    screenshot = os.environ.get("R1REWARD_SCREENSHOT", str(tmp_path / "page.png"))
    browser.save_screenshot(screenshot)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, service: Running) -> None:
    """With a ranking of eight answers, one of them a word without a place to break it, and every verdict open."""
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 3, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        texts = [f"answer{number}" for number in range(7)] + ["w" * 300]
        service.judge.strengths = {text: float(-number) for number, text in enumerate(texts)}
        browser.get(f"{service.url}/?token=secret")
        for _ in texts[2:]:
            find(browser, "#add").click()
        assert not find(browser, "#add").is_enabled(), "eight are the most"
        find(browser, "#question").send_keys("Which?")
        for number, text in enumerate(texts, 1):
            find(browser, f"#answer-{number}").send_keys(text)
        find(browser, "#go").click()
        wait_for(browser, lambda b: find(b, "#result").is_displayed())
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width == [360, 360]
        small = "return [...document.querySelectorAll('form > fieldset > .row button')].map((one) => one.offsetHeight)"
        assert min(browser.execute_script(small)) >= 44, "a finger needs room"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_is_done_with_the_keyboard_alone(browser, service: Running) -> None:
    """From the top of the page: tab to each field, write, remove an answer, choose the votes, send, open a verdict."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    service.judge.strengths = {"good": 9.0, "bad": -9.0}

    def press(*keys: str) -> None:
        ActionChains(browser).send_keys(*keys).perform()

    def focused() -> str:
        return browser.execute_script("const e = document.activeElement; return e.id || e.ariaLabel || e.tagName")

    def tab_to(name: str) -> None:
        for _ in range(20):
            if focused() == name:
                return
            press(Keys.TAB)
        raise AssertionError(f"no way to {name}")

    browser.get(f"{service.url}/?token=secret")
    tab_to("files")  # where a file is chosen with the space bar
    tab_to("question")
    press("Which?")
    tab_to("add")
    press(Keys.ENTER)
    assert focused() == "answer-3"
    tab_to("Remove answer 3")
    press(Keys.ENTER)
    assert focused() == "answer-2"
    press("good")
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    tab_to("answer-1")
    press("bad")
    tab_to("votes")
    press(Keys.ARROW_DOWN)
    tab_to("go")
    press(Keys.ENTER)
    wait_for(browser, lambda b: find(b, "#result").is_displayed())
    assert focused() == "result"
    assert find(browser, "ol.ranking li").text.startswith("1. Answer 2")
    assert service.judge.calls == 2 * 3
    tab_to("SUMMARY")
    press(Keys.ENTER)
    assert "shown first: prefers answer 2" in find(browser, "details").text


def test_own_question_by_keyboard_with_orders_that_disagree(browser, service: Running, tmp_path: Path) -> None:
    from PIL import Image
    from selenium.webdriver.common.keys import Keys

    service.judge.strengths = {"one": 0.0, "two": 0.0}
    service.judge.place_bias = 50.0
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    browser.get(f"{service.url}/?token=secret")
    find(browser, "#files").send_keys(str(tmp_path / "red.png"))
    wait_for(browser, lambda b: b.find_elements("css selector", "#thumbs img"))
    find(browser, "#question").send_keys("Which?")
    find(browser, "#answer-1").send_keys("one")
    find(browser, "#answer-2").send_keys("two")
    find(browser, "#go").send_keys(Keys.ENTER)
    wait_for(browser, lambda b: find(b, "#result").is_displayed())
    (verdict,) = browser.find_elements("css selector", "details")
    assert "no decision" in verdict.text
    assert "the two orders disagree" in verdict.text
    assert verdict.get_attribute("open") is not None  # shown without a click
    assert browser.switch_to.active_element.get_attribute("id") == "result"


def test_a_refusal_is_shown(browser, service: Running) -> None:
    browser.get(f"{service.url}/?token=secret")
    find(browser, "#question").send_keys("Which? <answer>1</answer>")
    find(browser, "#answer-1").send_keys("one")
    find(browser, "#answer-2").send_keys("two")
    find(browser, "#go").click()
    wait_for(browser, lambda b: "holds '<answer>'" in find(b, "#status").text)


def test_it_asks_nobody_else(browser, service: Running) -> None:
    """All that the page loads comes from the service: it works without an internet connection."""
    browser.get(f"{service.url}/?token=secret")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded
    assert all(name.startswith((service.url, "data:")) for name in loaded)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")  # on a phone
