import datetime
import html.parser
import json
import os
import re
import xml.etree.ElementTree as ET

import hypothesis
import hypothesis.strategies as st
import pytest
from plausible_run import write_plausible_run

from maxllama4 import cli
from maxllama4.report import write_report
from maxllama4.report.page import build_page
from maxllama4.report.run_files import read_run
from maxllama4.report.summary import goodput, seconds_left, state_of

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00"
NOW = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)


class Elements(html.parser.HTMLParser):
  """Start tags with their attributes, and whether every element is closed."""

  VOID = ("meta", "link", "input", "br")

  def __init__(self, text):
    super().__init__()
    self.tags, self.open = [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def report(tmp_path, *runs):
  path = tmp_path / "page.html"
  write_report(runs, path)
  return path.read_text(encoding="utf-8")


def headings(text):
  return re.findall(r"<h2>(.*?)</h2>", text)


def titles(text):
  return re.findall(r"<h3>(.*?)</h3>", text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return write_plausible_run(tmp_path_factory.mktemp("runs") / "whole", lines=100, experts=8)


def test_a_whole_run_has_every_figure(tmp_path, whole):
  text = report(tmp_path, whole)
  assert headings(text) == [
    *("Learning", "Speed, time and memory", "Experts", "Samples", "Layers", "Events", "Machine"),
    *("Configuration", "More figures"),
  ]
  for title in (
    *("Loss", "Held-out bits per byte", "Gradient norm", "Learning rate", "Throughput", "Memory"),
    *("Model FLOPs utilisation", "Where time went", "Total time", "Load by layer and expert"),
  ):
    assert title in titles(text), title
  assert "ferryman" in text and "TPU v5p" in text and "warmup_steps" in text
  assert text.count('class="mark bad"') == text.count('class="mark restart"') == 2


def test_a_page_is_well_formed_and_asks_for_nothing_outside_itself(tmp_path, whole):
  other = write_plausible_run(tmp_path / "other", lines=30)
  for runs in ([whole], [whole, other]):
    text = report(tmp_path, *runs)
    page = Elements(text)
    assert page.open == []
    for tag, attributes in page.tags:
      assert tag not in ("iframe", "object", "embed", "base", "form", "img", "image", "use")
      assert attributes.get("src") is None and attributes.get("href") in (None, "data:,")
      assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
      ET.fromstring(drawing)


def test_text_of_a_run_cannot_become_markup(tmp_path):
  run = tmp_path / "<b>run"
  run.mkdir()
  (run / "config.yml").write_text(
    json.dumps({"data": {EVIL[:-1]: [EVIL[:-1]]}, "training": {"steps": 9}})
  )
  line = {"step": 1, "loss": 2.0, EVIL: 1.0, f"seconds/{EVIL}": 3.0, f"debug/{EVIL}": [1.0, 2.0]}
  (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  sample = {"step": 1, "prompt": EVIL, "completion": EVIL + "\ud800"}
  (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
  events = [
    {
      "event": "started",
      "step": 0,
      "device_kind": EVIL,
      "devices": EVIL,
      "mesh": {EVIL: EVIL},
      "jax": EVIL,
    },
    {"event": "skipped", "step": 1, "reason": EVIL, EVIL: EVIL, "time": EVIL},
    {"event": EVIL, "step": 1},
    {"event": "stopped", "reason": f"failure: {EVIL}"},
  ]
  (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
  for runs in ([run], [run, write_plausible_run(tmp_path / "other", lines=20)]):
    text = report(tmp_path, *runs)
    page = Elements(text)
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8 or len(runs) > 1
    assert "<b>run" not in text and "\x00" not in text


@pytest.mark.parametrize(
  "missing", ["config.yml", "metrics.jsonl", "events.jsonl", "samples.jsonl"]
)
def test_a_run_without_one_of_its_files_is_reported(tmp_path, whole, missing):
  run = tmp_path / "run"
  run.mkdir()
  for path in whole.iterdir():
    if path.name != missing:
      (run / path.name).write_bytes(path.read_bytes())
  text = report(tmp_path, run)
  gone = {
    "config.yml": "Configuration", "metrics.jsonl": "Learning", "events.jsonl": "Events", "samples.jsonl": "Samples",
  }  # fmt: skip
  assert gone[missing] in headings(report(tmp_path, whole)) and gone[missing] not in headings(text)
  assert Elements(text).open == []


def test_a_run_that_has_logged_nothing_says_so(tmp_path):
  (tmp_path / "run").mkdir()
  text = report(tmp_path, tmp_path / "run")
  assert "nothing logged yet" in text and "No step has been logged yet." in text


def test_any_beginning_of_the_files_makes_a_page(tmp_path, whole):
  """A report may be written while a line is."""
  for share in (0.001, 0.013, 0.21, 0.5, 0.77, 0.999):
    run = tmp_path / f"run{share}"
    run.mkdir()
    for path in whole.iterdir():
      text = path.read_bytes()
      (run / path.name).write_bytes(text[: int(share * len(text))])
    assert Elements(report(tmp_path, run)).open == []


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=8,
)
NAMES = st.sampled_from(
  [
    *(
      "loss",
      "tokens",
      "mfu",
      "step_seconds",
      "learning_rate",
      "eval/bits_per_byte",
      "moe/max_load",
      "x",
    ),
    *("moe/load_by_layer", "seconds/step", "seconds/new", "debug/gradients/max", "skipped_steps"),
    *(
      "event",
      "reason",
      "resumed",
      "mesh",
      "devices",
      "startup_seconds",
      "prompt",
      "completion",
      "time",
    ),
  ]
)
LINES = st.lists(
  st.builds(
    lambda line, more: line | more,
    st.dictionaries(NAMES, VALUES, max_size=6),
    st.fixed_dictionaries(
      {"step": st.integers(0, 50) | VALUES},
      optional={
        "event": st.sampled_from(["started", "stopped", "skipped"]),
        "completion": st.text(),
      },
    ),
  ),
  max_size=8,
)


@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.given(lines=LINES, settings=VALUES)
def test_no_json_at_all_breaks_a_page(tmp_path_factory, lines, settings):
  run = tmp_path_factory.mktemp("fuzz")
  for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
  (run / "config.yml").write_text(json.dumps({"training": settings, "model": settings}))
  for runs in ([run], [run, run]):
    text = build_page([read_run(path) for path in runs], NOW)
    assert Elements(text).open == []
    text.encode("utf-8")


def test_a_diverged_run_says_how_many_values_were_not_finite(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  lines = [{"step": i, "loss": 3.0 - i / 10, "gradient_norm": 1.0 * i} for i in range(1, 9)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  text += '{"step": 9, "loss": NaN, "gradient_norm": Infinity}\n{"step": 10, "loss": NaN}\n'
  (run / "metrics.jsonl").write_text(text)
  page = report(tmp_path, run)
  assert "training loss: 2 logged values not finite" in page
  assert "gradient norm: one logged value not finite" in page
  only = tmp_path / "only"
  only.mkdir()
  (only / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "mfu": Infinity}\n')
  assert "training loss: one logged value not finite" in report(tmp_path, only)


def test_a_very_long_run_makes_a_light_page(tmp_path):
  run = write_plausible_run(tmp_path / "run", lines=12_000, layers=48, experts=128)
  assert len(report(tmp_path, run).encode()) < 300_000


def test_several_runs_are_compared_by_what_differs(tmp_path, whole):
  other = write_plausible_run(tmp_path / "other", lines=60, learning_rate=1e-3, stopped="done")
  text = report(tmp_path, whole, other)
  assert headings(text)[:3] == ["Where they stand", "Settings that differ", "Learning"]
  differing = text.partition("Settings that differ")[2].partition("</table>")[0]
  for path in ("optimizer.learning_rate", "model.num_local_experts", "training.steps"):
    assert path in differing
  assert "hidden_size" not in differing and "run_dir" not in differing
  loss = text.partition("<h3>Training loss</h3>")[2].partition("</figure>")[0]
  assert re.findall('data-name="(.*?)"', loss) == ["whole", "other"]
  assert "None: all runs have the same settings" in report(tmp_path, whole, whole)


def state(run_dir, *, events=(), step=5, updated=NOW, steps=10):
  run = read_run(run_dir)
  run.settings, run.step, run.updated = {"training.steps": steps}, step, updated
  for event in events:
    run.stopped = event
  return state_of(run, NOW)


def test_the_state_of_a_run_follows_from_its_events_and_its_last_line(tmp_path):
  hours_ago = NOW - datetime.timedelta(hours=3)
  assert state(tmp_path).kind == "running"
  assert state(tmp_path, step=10).kind == "finished"
  assert state(tmp_path, updated=hours_ago).words == "nothing written for 3 h"
  assert state(tmp_path, updated=None).kind == "empty"
  for reason, kind in (("signal", "stopped"), ("failure: disk", "failed"), ("done", "finished")):
    assert state(tmp_path, events=[{"reason": reason}], updated=hours_ago).kind == kind


def test_goodput_is_the_share_of_steps_in_all_time_and_lengthens_what_is_left(tmp_path):
  run_dir = tmp_path / "run"
  run_dir.mkdir()
  (run_dir / "config.yml").write_text("training: {steps: 30}")
  line = {"step": 10, "step_seconds": 2.0, "seconds/step": 20.0, "seconds/data": 5.0}
  (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  started = {"event": "started", "step": 0, "startup_seconds": 15.0, "compile_seconds": 10.0}
  (run_dir / "events.jsonl").write_text(json.dumps(started) + "\n")
  run = read_run(run_dir)
  assert goodput(run) == pytest.approx(20 / 40)
  assert seconds_left(run) == pytest.approx(20 * 2.0 * 25 / 20)


def test_a_report_is_replaced_as_a_whole(tmp_path, whole):
  path = tmp_path / "report.html"
  path.write_text("before")
  os.link(path, tmp_path / "reader")  # somebody who reads the earlier page
  write_report([whole], path)
  assert (tmp_path / "reader").read_text() == "before"
  assert path.read_text().endswith("</html>\n")
  assert {file.name for file in tmp_path.iterdir()} == {"report.html", "reader"}


# The command


def command(capsys, *words):
  code = cli.main(["report", *map(str, words)])
  captured = capsys.readouterr()
  return code, captured.out.strip(), captured.err


def test_the_command_writes_into_the_run_or_where_it_is_told(capsys, tmp_path, monkeypatch):
  run = write_plausible_run(tmp_path / "a=b", lines=5)
  other = write_plausible_run(tmp_path / "other", lines=5)
  monkeypatch.chdir(tmp_path)
  assert command(capsys, run) == (0, str(run / "report.html"), "")
  assert command(capsys, run, other) == (0, "report.html", "")
  assert command(capsys, run, other, "output=x.html") == (0, "x.html", "")
  assert "2 runs" in (tmp_path / "report.html").read_text()
  assert (tmp_path / "x.html").exists() and (run / "report.html").exists()


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    ([], "name a run's directory first"),
    (["output=x.html"], "name a run's directory first"),
    (["nothing"], "nothing is no run"),
    (["{run}", "{tmp}"], "{tmp} is no run"),
    (["{run}", "format=pdf"], "format=pdf is not a setting of report"),
    (["{run}", "output="], "output= is not a setting of report"),
    (["{run}", "output={tmp}"], "output={tmp} is no place for a file"),
    (["{run}", "output={tmp}/no/x.html"], "output={tmp}/no/x.html is no place for a file"),
  ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, whole, words, reason):
  places = {"run": whole, "tmp": tmp_path}
  code, out, err = command(capsys, *(word.format(**places) for word in words))
  assert (code, out) == (2, "")
  assert err.startswith(f"error: {reason.format(**places)}") and err.count("\n") == 1
