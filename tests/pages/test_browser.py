"""The page as people use it: in a real Chromium, by keyboard, against the real command."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


playwright = pytest.importorskip("playwright.sync_api", reason="the tests of pages in a browser need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="the tests of pages in a browser need Chromium in the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve(manifest: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    """Function that starts `hy-prfl annotate` on the manifest and returns its address and process."""
    processes = []

    def start(*options: str) -> tuple[str, subprocess.Popen[str]]:
        words = [sys.executable, "-m", "hy_prfl.cli", "annotate", "--manifest", str(manifest)]
        words += ["--output", str(tmp_path / "labels.json"), "--port", "0", *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().split()[0], process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def open_page(browser: Any, address: str, name: str, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.problems.append(message.text))
    page.set_default_timeout(10000)
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#clips video[src]")
    return page


def press(page: Any, *keys: str) -> None:
    """Answer one clip, and wait for what comes next."""
    for key in keys[:-1]:
        page.keyboard.press(key)
    with page.expect_response(re.compile("/api/")):
        page.keyboard.press(keys[-1])
    page.wait_for_function("() => pending === null")


def journal(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "labels.json.journal.jsonl").read_text().splitlines()]


def test_twenty_clips_by_keyboard(browser: Any, serve: Callable[..., Any], tmp_path: Path) -> None:
    address, process = serve("--labels_per_clip", "2")
    page = open_page(browser, address, "ann")
    for number in range(10):
        press(page, "1", "2" if number % 2 else "1")
    assert "10 by you, 14 left" in page.inner_text("header")
    # A reload in the middle of a clip: the same clip, with what was said of it.
    caption, half = page.inner_text("#caption"), len(journal(tmp_path))
    page.keyboard.press("3")
    page.reload()
    page.wait_for_selector("#clips video[src]")
    assert page.inner_text("#caption") == caption
    assert (
        page.get_by_role("group", name="physics quality")
        .get_by_role("button", name="unsure")
        .get_attribute("aria-pressed")
        == "true"
    )
    assert len(journal(tmp_path)) == half
    # Killed and restarted: nothing is lost, and the page goes on after its request is sent again.
    process.kill()
    process.wait()
    page.keyboard.press("1")
    page.keyboard.press("1")
    page.wait_for_function("() => document.getElementById('message').textContent.startsWith('Not saved')")
    port = address.rstrip("/").rsplit(":", 1)[1]
    _, process = serve("--labels_per_clip", "2", "--port", port)
    press(page, "Enter")
    assert "11 by you" in page.inner_text("header")
    press(page, "z")
    assert "10 by you" in page.inner_text("header")
    # A second person at the same time.
    other = open_page(browser, address, "bob")
    for _ in range(10):
        press(page, "1", "1")
        press(other, "2", "2")
    press(page, "s")
    assert "20 by you" in page.inner_text("header")
    assert re.search(r"\d+ an hour.*about \d+ min left", page.inner_text("header"), re.DOTALL)
    assert not [problem for problem in page.problems + other.problems if "ERR_CONNECTION_REFUSED" not in problem]
    process.send_signal(signal.SIGTERM)
    process.wait()
    rows = json.loads((tmp_path / "labels.json").read_text())
    summary = json.loads((tmp_path / "labels.json.summary.json").read_text())
    assert {name: person["labels"] for name, person in summary["annotators"].items()} == {"ann": 20, "bob": 10}
    assert len(rows) == 24
    given = Counter((event["annotator"], event["item"], event["type"]) for event in journal(tmp_path)[1:])
    assert max(given[key] for key in given if key[2] == "label") <= 2
    undone = [key for key in given if key[2] == "undo"]
    assert sum(count for key, count in given.items() if key[2] == "label") - len(undone) == 30


def test_a_study_of_pairs(browser: Any, serve: Callable[..., Any], tmp_path: Path) -> None:
    address, process = serve("--mode", "pairs")
    page = open_page(browser, address, "ann")
    assert page.locator("#clips video").count() == 2
    # In step: both at the same time, and in the same frame after steps.
    page.wait_for_function("() => videos().every((video) => video.currentTime > 0.2)")
    times = page.evaluate("() => videos().map((video) => video.currentTime)")
    assert abs(times[0] - times[1]) < 0.2
    page.keyboard.press("Space")
    for key in ",,....":
        page.keyboard.press(key)
    page.wait_for_function("() => videos().every((video) => !video.seeking)")
    frames = page.evaluate("() => videos().map((video) => video.currentTime * 16)")
    assert frames[0] == frames[1]
    assert frames[0] % 1 == pytest.approx(0.5)
    page.keyboard.press("+")
    assert page.evaluate("() => videos().map((video) => video.playbackRate)") == [1.5, 1.5]
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", *["1"] * 9):
        press(page, key)
    assert page.locator("#finished").is_visible()
    assert page.evaluate("() => document.activeElement.id") == "finished"
    assert not page.problems
    process.send_signal(signal.SIGTERM)
    process.wait()
    rows = json.loads((tmp_path / "labels.json").read_text())
    assert sum("rejected_id" in row for row in rows) == 11


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_used(
    browser: Any, serve: Callable[..., Any], width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    address, _ = serve("--tasks", "physics_quality", "human_quality", "text_alignment")
    page = open_page(
        browser, address, "ann", viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
    )
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    if width == 1280:
        assert page.evaluate("() => document.documentElement.scrollHeight") <= 800
    # Everything that can be operated has a name, can be reached by Tab, and shows it.
    for role in ("button", "combobox"):
        for control in page.get_by_role(role).all():
            assert control.evaluate("(node) => node.ariaLabel || node.innerText || node.labels?.[0]?.innerText"), role
    for _ in range(25):
        page.keyboard.press("Tab")
        assert page.evaluate(REACHED) in ("3px", None)
    missed = page.evaluate(
        "() => [...document.querySelectorAll('button:not(:disabled), select')]"
        ".filter((node) => node.checkVisibility() && !node.dataset.reached).map((node) => node.outerHTML)"
    )
    assert not missed
    # Colours of text on their ground, WCAG AA.
    assert page.evaluate(CONTRAST) >= 4.5


# Width of the outline of what Tab has reached.
REACHED = """() => {
  const node = document.activeElement;
  if (!node.matches("button, select")) return null;
  node.dataset.reached = "yes";
  return getComputedStyle(node).outlineWidth;
}"""
# Smallest contrast of any text of the page to the ground that it stands on.
CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => parse(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((parse(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let least = 21;
  for (const node of document.querySelectorAll("body *")) {
    const isText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!isText || !node.checkVisibility() || node.disabled || node.closest("svg")) continue;
    const pair = [light(getComputedStyle(node).color), light(ground(node))];
    least = Math.min(least, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
  }
  return least;
}"""
