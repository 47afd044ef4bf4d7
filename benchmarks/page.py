"""The HTML page of a plan: its size, how long it takes to write and, where Chromium is installed, to open.

python benchmarks/page.py                   10,000 ops at desktop and phone width
python benchmarks/page.py --pictures DIR    also the screenshots of docs/page.md
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.show.large import large_plan

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

WIDTHS = {"desktop": 1280, "phone": 390}
HEIGHTS = {"desktop": 1720, "phone": 2300}


def main() -> None:
    """Print the figures; take the pictures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="a folder for screenshots of the page of examples/models.py:gpt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = large_plan()
        begin = time.perf_counter()
        path = plan.save_html(Path(folder) / "large.html")
        seconds = time.perf_counter() - begin
        print(f"{len(plan.program.ops)} ops: {path.stat().st_size / 1e6:.2f} MB, written in {seconds:.2f} s")
        if not (shutil.which("chromium") and shutil.which("chromedriver")):
            print("how long it takes to open is not measured: no Chromium with its driver here")
            return
        browser = headless()
        for name, width in WIDTHS.items():
            print(
                f"ready after {sorted(ready_after(browser, path, width) for _ in range(5))[2]} ms ({name}, median of 5)"
            )
        if arguments.pictures:
            take_pictures(browser, Path(folder) / "gpt.html", arguments.pictures)
        browser.quit()


def headless() -> Chrome:
    """Chromium without a window."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.binary_location = str(shutil.which("chromium"))
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


def ready_after(browser: Chrome, path: Path, width: int) -> int:
    """Milliseconds from the navigation until everything is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())
    wait = WebDriverWait(browser, 10, poll_frequency=0.02)
    return int(wait.until(lambda b: b.execute_script("return document.documentElement.dataset.ready")))


def take_pictures(browser: Chrome, page: Path, folder: Path) -> None:
    """Light at desktop width, dark at phone width; in 192 colours, so that they are small."""
    from PIL import Image

    step = str(Path(__file__).parent.parent / "examples/models.py:gpt")
    plan_it = ["plan", step, "--budget", "50%", "--html", str(page), "--time-limit", "60"]
    subprocess.run([sys.executable, "-m", "autoremat.cli", *plan_it], check=True)
    folder.mkdir(parents=True, exist_ok=True)
    for (name, width), scheme in zip(WIDTHS.items(), ("light", "dark"), strict=True):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ready_after(browser, page, width)
        clip = {"x": 0, "y": 0, "width": width, "height": HEIGHTS[name], "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        target = folder / f"page-{name}.png"
        target.write_bytes(base64.b64decode(shot["data"]))
        Image.open(target).convert("RGB").quantize(192).save(target, optimize=True)


if __name__ == "__main__":
    main()
