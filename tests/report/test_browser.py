"""Reports as a real browser shows them: figures drawn, readable, quiet."""

import numpy as np
import pytest
from chromium import NAMES, find_browser, running_browser
from plausible_run import write_plausible_run

from maxllama4.report import write_report

pytestmark = pytest.mark.skipif(
  find_browser() is None, reason=f"no browser that starts is on PATH, none of {', '.join(NAMES)}"
)

# Elements whose own text is seen, with its contrast to what lies behind it (WCAG 2: (L1 + 0.05) / (L2 + 0.05)).
CONTRASTS = """
(() => {
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    throw new Error("no background");
  };
  const result = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].filter((child) => child.nodeType === 3).map((child) => child.data.trim()).join("");
    const box = node.getBoundingClientRect();
    if (!own || !box.width || !box.height) continue;
    const style = getComputedStyle(node);
    const [a, b] = [luminance(parse(style.color)), luminance(ground(node))];
    result.push([own.slice(0, 30), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), parseFloat(style.fontSize)]);
  }
  return result;
})()
"""
# Parts that stick out of the window, unless they lie in something that scrolls.
STICKING_OUT = """
[...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return (box.right > innerWidth + 1 || box.left < -1) && !node.closest(".scroll") && !node.closest("svg");
}).map((node) => node.outerHTML.slice(0, 80))
"""
PLOTS = """
[...document.querySelectorAll(".plot")].map((plot) => {
  const { x, y, width, height } = plot.getBoundingClientRect();
  return [plot.ariaLabel, x + scrollX, y + scrollY, width, height, plot.matches(".map")];
})
"""
OPEN_ALL = 'document.querySelectorAll("details").forEach((fold) => { fold.open = true; })'


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """Files of reports by what they are about."""
  folder = tmp_path_factory.mktemp("reports")
  running = write_plausible_run(folder / "running", lines=300, steps=5000)
  other = write_plausible_run(folder / "a-run-with-a-rather-long-name-so-that-it-must-be-broken", lines=200, learning_rate=1e-3, experts=8, stopped="done")  # fmt: skip
  short = write_plausible_run(folder / "short", lines=1, experts=2, layers=2)
  (folder / "empty").mkdir()
  for run in (short, running, folder / "empty"):
    write_report([run], folder / f"{run.name}.html")
  write_report([running, other, short], folder / "compared.html")
  return {name: folder / f"{name}.html" for name in ("running", "short", "empty", "compared")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  with running_browser(find_browser(), tmp_path_factory.mktemp("browser") / "profile") as browser:
    yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["running", "short", "empty", "compared"])
def test_a_page_is_quiet_fits_its_window_and_can_be_read(browser, pages, name, width, scheme):
  browser.open(pages[name], width=width, scheme=scheme)
  browser.evaluate(OPEN_ALL)
  assert browser.evaluate("document.documentElement.scrollWidth") <= width
  assert browser.evaluate(STICKING_OUT) == []
  texts = browser.evaluate(CONTRASTS)
  assert len(texts) > (5 if name == "empty" else 40)
  assert [text for text in texts if text[1] < 4.5 or text[2] < 12] == []
  dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 23)"
  assert dark == (scheme == "dark")
  assert browser.messages == [] and browser.asked == [pages[name].as_uri()]


@pytest.mark.parametrize(
  ("name", "width", "scheme"),
  [
    *[("running", 1400, "light"), ("running", 390, "dark")],
    *[("short", 390, "light"), ("compared", 1400, "dark")],
  ],
)
def test_every_figure_has_colour_in_it(browser, pages, name, width, scheme):
  """Grids and labels are grey; a map of even loads is, too, but fills its place."""
  browser.open(pages[name], width=width, scheme=scheme)
  browser.evaluate(OPEN_ALL)
  picture = browser.picture()
  assert picture.shape[1] == width
  plots = browser.evaluate(PLOTS)
  assert len(plots) >= 10
  for title, x, y, plot_width, plot_height, is_map in plots:
    assert plot_width > 250 and plot_height >= 90, title
    pixels = picture[int(y) : int(y + plot_height), int(x) : int(x + plot_width)]
    if is_map:
      card = picture[int(y) - 2, int(x) - 2]
      assert (pixels != card).any(-1).mean() > 0.7, title
    else:
      assert (np.ptp(pixels, axis=-1) > 60).sum() >= 8, title


def move(browser, selector, across, down=0.5):
  """Moves the pointer over a plot, to shares of its size."""
  browser.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
  x, y, width, height = browser.evaluate(
    f"(({{x, y, width, height}}) => [x, y, width, height])(document.querySelector({selector!r}).getBoundingClientRect())"
  )
  place = {"x": x + across * width, "y": y + down * height}
  browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
  return browser.evaluate("[...document.querySelectorAll('.tip')].map((tip) => tip.innerText)")


@pytest.mark.parametrize("width", [390, 1400])
def test_a_pointer_over_a_curve_shows_its_values_and_nothing_sticks_out(browser, pages, width):
  browser.open(pages["running"], width=width)
  loss = "[aria-label^='Loss']"
  for across in (0.01, 0.3, 0.6, 0.99):
    (tip,) = move(browser, loss, across)
    assert tip.startswith("step ") and "training loss" in tip
    assert browser.evaluate(STICKING_OUT) == []
  assert (
    browser.evaluate("document.querySelectorAll('.hair').length") > 5
  )  # the same step in other figures
  (tip,) = move(browser, "[aria-label^='Where time went']", 0.5)
  assert "checkpoint" in tip and "%" in tip
  assert browser.messages == []


def test_the_value_in_a_tip_is_the_one_that_was_logged(browser, tmp_path):
  (tmp_path / "run").mkdir()
  lines = '{"step": 0, "loss": 4.5, "learning_rate": 0}\n{"step": 10, "loss": 0.0125, "learning_rate": 3e-4}\n'
  (tmp_path / "run" / "metrics.jsonl").write_text(lines)
  write_report([tmp_path / "run"], tmp_path / "page.html")
  browser.open(tmp_path / "page.html", width=1400)
  assert move(browser, "[aria-label^='Loss']", 0.98)[0].split("\n") == [
    "step 10",
    "training loss",
    "0.0125",
  ]
  assert "0.0003" in move(browser, "[aria-label^='Learning rate']", 0.98)[0]


def test_the_arrow_keys_walk_along_a_curve(browser, pages):
  browser.open(pages["running"], width=1400)
  browser.evaluate("document.querySelector('.plot').focus()")
  tips = []
  for _ in range(2):
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    tips.append(browser.evaluate("document.querySelector('.tip').innerText"))
  assert tips[0] != tips[1] and browser.messages == []


def test_the_slider_of_the_load_map_redraws_it_and_cells_tell_their_load(browser, pages):
  browser.open(pages["running"], width=1400)
  drawn = "[...document.querySelectorAll('.map path[class^=h]')].map((path) => path.getAttribute('d').length)"
  slide = """(to) => {
    const slider = document.querySelector(".slider input");
    slider.value = to;
    slider.dispatchEvent(new Event("input"));
    return document.querySelector(".slider output").textContent;
  }"""
  last = browser.evaluate(drawn)
  (tip,) = move(browser, ".map", 0.01, 0.01)
  assert tip.startswith("layer 1, expert 0") and tip.endswith("× the even share")
  assert browser.evaluate(f"({slide})(0)") == "70"
  first = browser.evaluate(drawn)
  assert sum(first) > 0 and first != last
  assert browser.evaluate(f"({slide})(99)") == "2,940"
  assert browser.messages == []
