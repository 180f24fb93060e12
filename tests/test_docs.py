"""Links lead somewhere, what a page names exists where it says, and figures show what the model does."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4.config import load_config
from maxllama4.data.images import ImageTokenIds, best_canvas, image_token_layout, size_on_canvas
from maxllama4.model.attention import attention_mask

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXPLAINED = ROOT / "docs" / "what-a-llama-4-computes.md"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
DEFINITION = re.compile(r"^\[([^\]]+)\]: (\S+)$", re.MULTILINE)
LINK = re.compile(r"\[([^\[\]]+)\](?:\(([^()\s]+)\)|\[([^\[\]]+)\])")


def prose(page: pathlib.Path) -> str:
  """The page without its blocks of code."""
  return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(text: str, page: pathlib.Path) -> list[tuple[str, str]]:
  """(words, target) of the links in `text`; a target that `page` does not define is an error."""
  targets = dict(DEFINITION.findall(prose(page)))
  return [(words, target or targets[name]) for words, target, name in LINK.findall(text)]


def anchors(page: pathlib.Path) -> set[str]:
  """Names of the page's headings, as GitHub makes them."""
  headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined_in(path: pathlib.Path) -> set[str]:
  """Functions, classes and their methods (`Class.method`)."""
  names = set()
  for node in ast.parse(path.read_text(encoding="utf-8")).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    if isinstance(node, ast.ClassDef):
      methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
      names |= {f"{node.name}.{method.name}" for method in methods}
  return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_a_heading_leads_somewhere(page):
  for _, target in links(prose(page), page):
    if "://" in target:
      continue
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    assert path.exists(), target
    assert not anchor or anchor in anchors(path), target


def test_what_the_page_on_the_model_names_is_in_the_file_it_links():
  named = [
    (words.strip("`"), (EXPLAINED.parent / target).resolve())
    for words, target in links(prose(EXPLAINED), EXPLAINED)
    if words.startswith("`") and words.strip("`") != pathlib.Path(target).name
  ]
  assert named
  for name, path in named:
    assert name in defined_in(path), f"{name} is not in {path.relative_to(ROOT)}"
    assert name.startswith("test_") == path.is_relative_to(ROOT / "tests"), name


def test_each_section_of_the_page_on_the_model_links_code_and_tests():
  sections = re.split(r"^## ", prose(EXPLAINED), flags=re.MULTILINE)[1:]
  for section in sections:
    targets = [target for _, target in links(section, EXPLAINED)]
    for folder in ("../maxllama4/", "../tests/"):
      assert any(target.startswith(folder) for target in targets), (section.splitlines()[0], folder)


def test_figures_are_what_their_script_draws(tmp_path):
  subprocess.run([sys.executable, FIGURES / "draw.py", tmp_path], check=True)
  drawn, committed = (
    {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    for folder in (tmp_path, FIGURES)
  )
  assert drawn and drawn == committed


def test_every_figure_is_shown_with_words_for_those_who_cannot_see_it():
  shown = re.findall(r"!\[([^\]]{40,})\]\(figures/(\w+\.svg)\)", prose(EXPLAINED))
  assert {name for _, name in shown} == {path.name for path in FIGURES.glob("*.svg")}


def drawing():
  """The module docs/figures/draw.py."""
  spec = importlib.util.spec_from_file_location("draw", FIGURES / "draw.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_figures_show_what_the_model_does():
  draw = drawing()
  for _, positions, segments, chunk in draw.MASKS:
    places = range(len(positions))
    drawn = [[draw.sees(i, j, positions, segments, chunk) for j in places] for i in places]
    p, s = jnp.asarray([positions]), jnp.asarray([segments])
    np.testing.assert_array_equal(drawn, attention_mask(p, p, s, s, chunk)[0])

  for name, *intervals in draw.MODELS:
    config = load_config(ROOT / "configs" / f"llama4_{name.lower()}.yml").model
    drawn = [draw.layer_kind(i, *intervals) for i in range(draw.NUM_LAYERS)]
    assert drawn == [(kind.uses_rope, kind.is_moe) for kind in config.layer_kinds]
    assert config.inhomogeneous_layer_cycle_interval == draw.CYCLE

  order = np.argsort(draw.DISPATCHED, stable=True)
  assert draw.sorted_places(draw.DISPATCHED) == order.tolist()


def test_the_picture_in_the_figure_of_tiles_lies_and_reads_as_drawn():
  draw = drawing()
  assert best_canvas(*draw.PICTURE) == draw.CANVAS
  assert size_on_canvas(*draw.PICTURE, draw.CANVAS) == draw.PLACED
  names = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
  ids = {name: number for number, name in enumerate(names)}
  drawn = [token for line in draw.token_layout(*draw.CANVAS) for token in line]
  expected = [
    number
    for token in drawn
    for number in ([ids["patch"]] * 144 if token.isdigit() else [ids[token]])
  ]
  assert [int(token) for token in drawn if token.isdigit()] == list(range(7))
  assert expected == image_token_layout(*draw.CANVAS, 144, ImageTokenIds(**ids))
  assert len(expected) == 1017
