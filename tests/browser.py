"""A headless Chromium, and someone who reads a page in it. Needs chromium, chromedriver and selenium."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
waiting = pytest.importorskip("selenium.webdriver.support.wait", reason="selenium is not installed")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)


@contextmanager
def chromium(profile: Path):
    """A headless Chromium; skips the test where there is none."""
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver on PATH: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS.split(), f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


class Reader:
    """A reader with one page open. What the browser complained about is asserted empty at the end of each test."""

    Keys = webdriver.Keys

    def __init__(self, chrome):
        self.chrome = chrome

    def open(self, page, width=1280, dark=False):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.chrome.get(page.as_uri())
        # On a busy machine Chromium was seen to be asked of a page that it had read half of.
        whole = "return document.readyState === 'complete' && location.href === arguments[0]"
        waiting.WebDriverWait(self.chrome, 60).until(lambda chrome: chrome.execute_script(whole, page.as_uri()))
        return self

    def run(self, script, *args):
        return self.chrome.execute_script(script, *args)

    def all(self, css):
        return self.chrome.find_elements("css selector", css)

    def one(self, css):
        (element,) = self.all(css)
        return element

    def texts(self, css):
        return [element.text for element in self.all(css)]

    def token(self, index):
        return self.one(f'#answer [data-index="{index}"]')

    def indices(self, css):
        return {int(element.get_attribute("data-index")) for element in self.all(css)}

    def press(self, *keys):
        webdriver.ActionChains(self.chrome).send_keys(*keys).perform()

    def hover(self, element):
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        webdriver.ActionChains(self.chrome).move_to_element(element).perform()

    def colour(self, element, name):
        """What is painted, 0 to 255 each, on the page's paper."""
        return self.run(
            """const [element, name] = arguments, canvas = document.createElement('canvas');
            canvas.width = canvas.height = 1;
            const context = canvas.getContext('2d');
            for (const fill of [getComputedStyle(document.body).backgroundColor, getComputedStyle(element)[name]]) {
              context.fillStyle = fill; context.fillRect(0, 0, 1, 1);
            }
            return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);""",
            element,
            name,
        )

    def pixel(self, element, x, y):
        """What is seen at x, y of `element`'s own coordinates (an SVG's units), 0 to 255 each."""
        self.run("arguments[0].closest('svg').scrollIntoView({block: 'center'})", element)
        left, top = self.run(
            """const [element, x, y] = arguments, p = new DOMPoint(x, y).matrixTransform(element.getScreenCTM());
            return [p.x, p.y];""",
            element,
            x,
            y,
        )
        return self.chrome.execute_async_script(
            """const [png, x, y, done] = arguments, image = new Image(), canvas = document.createElement('canvas');
            image.onload = () => {
              [canvas.width, canvas.height] = [image.width, image.height];
              const context = canvas.getContext('2d');
              context.drawImage(image, 0, 0);
              done([...context.getImageData(x, y, 1, 1).data].slice(0, 3));
            };
            image.src = 'data:image/png;base64,' + png;""",
            self.chrome.get_screenshot_as_base64(),
            round(left),
            round(top),
        )

    def complaints(self):
        return [entry["message"] for entry in self.chrome.get_log("browser")]


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
