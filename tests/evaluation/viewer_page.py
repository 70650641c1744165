"""A viewer of a report in a browser, for tests: what it shows and says."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["PLANES", "By", "Keys", "ViewerPage", "WebDriverWait", "open_page"]

PLANES = ("sagittal", "coronal", "axial")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PIXELS = """
return Object.fromEntries([...arguments[0].querySelectorAll("canvas")].map(canvas => {
  const {width, height} = canvas, {data} = canvas.getContext("2d").getImageData(0, 0, width, height);
  return [canvas.getAttribute("aria-label"), [width, height, ...data.filter((_, i) => i % 4 == 0)]];
}));
"""
SET = """
const [viewer, name, value] = arguments, input = viewer.querySelector(`input[name=${name}]`);
if (input.type == "checkbox") input.checked = value; else input.value = value;
input.dispatchEvent(new Event("input", {bubbles: true}));
"""


class ViewerPage:
    """
    Opens a viewer, by its button.

    Args:
        browser: that has opened the page.
        heading: of the article that the viewer is in.
    """

    def __init__(self, browser: Chrome, heading: str) -> None:
        self.browser = browser
        articles = browser.find_elements(By.CSS_SELECTOR, "article")
        article = next(each for each in articles if each.find_element(By.CSS_SELECTOR, "h3").text == heading)
        self.element = article.find_element(By.CSS_SELECTOR, ".viewer")
        self.element.find_element(By.CSS_SELECTOR, "button").click()
        WebDriverWait(browser, 60).until(lambda _: self.element.find_elements(By.CSS_SELECTOR, "canvas"))

    def canvas(self, plane: str, title: str) -> WebElement:
        return self.element.find_element(By.CSS_SELECTOR, f'canvas[aria-label="{plane}, {title}"]')

    def pictures(self) -> dict[str, np.ndarray]:
        """The slices that are drawn, by ``"plane, title"``, each ``[right, up]`` as in the volume."""
        found = self.browser.execute_script(PIXELS, self.element)
        return {label: np.array(pixels).reshape(height, width)[::-1].T for label, (width, height, *pixels) in found.items()}

    @property
    def position(self) -> list[int]:
        return [int(self.element.find_element(By.NAME, plane).get_property("value")) for plane in PLANES]

    def set(self, name: str, value: float) -> None:
        self.browser.execute_script(SET, self.element, name, value)

    def minimum(self, name: str) -> int:
        """The lowest value of a slider."""
        return int(self.element.find_element(By.NAME, name).get_property("min"))

    def press(self, key: str, name: str | None = None) -> None:
        """Press a key, on a slider or on what has the focus."""
        focus = self.element.find_element(By.NAME, name) if name else self.browser.switch_to.active_element
        focus.send_keys(key)

    def reset(self) -> None:
        """Press the button, and wait for the pictures."""
        self.element.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
        self.browser.execute_async_script("setTimeout(arguments[0])")

    def told(self) -> dict[str, list[float]]:
        """Voxel, place in mm, and the value of each volume."""
        parts = self.element.find_element(By.CSS_SELECTOR, ".told").text.split(" · ")
        numbers = [[float(number) for number in NUMBER.findall(part)] for part in parts]
        names = ["voxel", "mm", *[NUMBER.sub("", part).strip() for part in parts[2:]]]
        return dict(zip(names, numbers))

    def point_at(self, plane: str, title: str, shares: Sequence[float], click: bool = False) -> int:
        """Move the mouse to a place of a picture, 0 to 1 from the left and from below; how bright the screen is there."""
        frame = self.canvas(plane, title).find_element(By.XPATH, "..")
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", frame)
        box = frame.rect
        top = box["y"] - self.browser.execute_script("return window.scrollY")
        x, y = int(box["x"] + shares[0] * box["width"]), int(top + (1 - shares[1]) * box["height"])
        actions = ActionBuilder(self.browser, duration=0)
        actions.pointer_action.move_to_location(x, y)
        if click:
            actions.pointer_action.click()
        actions.perform()
        return Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("L").getpixel((x, y))

    def turn_wheel(self, plane: str, title: str, steps: int) -> None:
        """Turn the wheel over a picture, away from oneself for positive steps."""
        origin = ScrollOrigin.from_element(self.canvas(plane, title).find_element(By.XPATH, ".."))
        turns = ActionChains(self.browser, duration=0)
        for _ in range(abs(steps)):
            turns.scroll_from_origin(origin, 0, -100 if steps > 0 else 100)
        turns.perform()


def open_page(browser: Chrome, path: Path) -> None:
    """Open a file."""
    browser.get_log("browser")  # which also empties it
    browser.get(path.resolve().as_uri())
