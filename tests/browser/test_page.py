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
