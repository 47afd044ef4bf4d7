"""A page in a browser, asked in the words of tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


WIDE, PHONE = 1280, 390


class Page:
    """A page in a browser, asked in the words of these tests."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser

    def open(self, path: Path, width: int = WIDE, scheme: str = "light") -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer(scheme)
        self.browser.get(path.as_uri())
        self.browser.execute_script("localStorage.clear()")
        self.browser.get(path.as_uri())
        assert self.ready_after_milliseconds > 0

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    @property
    def ready_after_milliseconds(self) -> int:
        wait = WebDriverWait(self.browser, 10, poll_frequency=0.02)
        return int(wait.until(lambda _: self.ask("return document.documentElement.dataset.ready")))

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def one(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def bytes_of(self, css: str) -> list[int]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => Number(e.dataset.bytes))"
        return [int(n) for n in self.ask(script, css)]

    def texts_of(self, css: str) -> list[str]:
        return [
            str(t) for t in self.ask("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText)", css)
        ]

    def run_shown(self) -> int:
        return int(self.one("#moment").get_attribute("data-run") or -1)

    def point_at(self, chart: str, share: float) -> None:
        """Move the pointer over a chart, to a share of its width."""
        box = self.one(chart)
        self.ask("arguments[0].scrollIntoView({block: 'center'})", box)
        width = box.size["width"]
        ActionChains(self.browser).move_to_element_with_offset(box, int(width * (share - 0.5)), 0).perform()

    def press(self, *keys: str) -> None:
        ActionChains(self.browser).send_keys(*keys).perform()

    def focus(self, css: str) -> None:
        self.ask("document.querySelector(arguments[0]).focus()", css)

    def background(self) -> str:
        return str(self.ask("return getComputedStyle(document.body).backgroundColor"))


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, Service(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"Chromium is installed and does not start here: {error.msg}")
    yield driver
    driver.quit()
