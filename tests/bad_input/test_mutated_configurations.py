"""No run starts from a configuration that is wrong: its mistake is named, before anything is written or a device asked."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from mutations import EDITS, FILES, GOOD, WORDS
from refusals import assert_names

from maxllama4 import cli

ROOT = pathlib.Path(__file__).parents[2]


def named(row):
  return " ".join(row)[:60] if isinstance(row, list) else None


def test_there_are_as_many_mutations_as_promised():
  assert len(WORDS) + len(EDITS) + len(FILES) >= 250


def test_what_is_mutated_is_good(run, capfd):
  assert cli.main(["show", "run.yml"]) == 0
  run.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())  # as Windows saves it
  assert cli.main(["show", "run.yml"]) == 0
  assert capfd.readouterr().err == ""


@pytest.mark.parametrize("command", ["show", "train"])
@pytest.mark.parametrize(("words", "told"), WORDS, ids=named)
def test_a_word_that_is_wrong_is_refused(desk, run, command, words, told):
  assert_names(desk.mistake(command, "run.yml", *words), *told)


@pytest.mark.parametrize(("old", "new", "told"), EDITS)
def test_a_file_with_a_mistake_in_it_is_refused(desk, run, old, new, told):
  assert GOOD.count(old) == 1
  run.write_text(GOOD.replace(old, new))
  assert_names(desk.mistake("train", "run.yml"), *told)


@pytest.mark.parametrize(("content", "told"), [row[1:] for row in FILES], ids=[r[0] for r in FILES])
def test_a_file_that_is_no_configuration_is_refused(desk, run, content, told):
  run.write_bytes(content)
  assert_names(desk.mistake("train", "run.yml"), *told)


def test_a_folder_a_missing_file_and_a_name_too_long_are_no_configurations(desk, run):
  for path in ("texts", "none.yml", "run.yml/none.yml", f"{'long' * 100}.yml"):
    assert_names(desk.mistake("train", path), path, "cannot be read")


ALL = """
import contextlib, io, json, sys
from maxllama4 import cli
for words in json.loads(sys.argv[2]):
  err = io.StringIO()
  with contextlib.redirect_stderr(err):
    code = cli.main(["train", sys.argv[1], *words])
  if code != 2:
    sys.exit(f"{words} ended with {code}: {err.getvalue()}")
"""


def test_no_device_is_asked_before_a_configuration_is_refused(run):
  """A backend that does not exist would be another error as soon as JAX looked for devices."""
  rows = json.dumps([words for words, _ in WORDS if not any("\udce9" in word for word in words)])
  done = subprocess.run(
    [sys.executable, "-c", ALL, str(run), rows],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "no_such_backend"},
  )
  assert (done.returncode, done.stderr) == (0, "")
