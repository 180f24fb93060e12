import json
import os
import subprocess
import sys

import numpy as np
import pytest

from maxllama4.config import ConfigError, DataConfig
from maxllama4.data.sources import DataError, is_held_out, list_files, open_documents


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder


def text(*paths, **settings):
  settings = {"held_out_fraction": 0.0} | settings
  return DataConfig(paths=tuple(map(str, paths)), **settings)


def names(data):
  return [file.name for file in list_files(data)]


def test_a_folder_gives_its_text_files_sorted_by_relative_name_and_no_hidden_ones(tmp_path):
  write(
    tmp_path,
    {"b.txt": "", "a/z.py": "", "a.md": "", "Z.txt": "", "image.png": "", ".git/x.txt": ""},
  )
  assert names(text(tmp_path)) == ["Z.txt", "a.md", "a/z.py", "b.txt"]


def test_the_order_does_not_depend_on_the_order_in_which_the_system_lists_a_folder(
  tmp_path, monkeypatch
):
  write(tmp_path, {f"{folder}/{i}.txt": "" for folder in "cab" for i in range(5)})
  expected = names(text(tmp_path))
  scandir = os.scandir
  monkeypatch.setattr(
    os, "scandir", lambda path: sorted(scandir(path), key=lambda e: e.name[::-1], reverse=True)
  )
  assert names(text(tmp_path)) == expected == sorted(expected)


@pytest.mark.parametrize(
  ("glob", "expected"),
  [
    ("*.py", ["top.py"]),
    ("**/*.py", ["pkg/deep/x.py", "pkg/x.py", "test/t.py", "top.py"]),
    ("pkg/*.py", ["x.py"]),  # names start behind the last part without a wildcard
    ("p*/**/*.py", ["pkg/deep/x.py", "pkg/x.py"]),
    ("[!t]*/?.py", ["pkg/x.py"]),
  ],
)
def test_a_star_stays_in_its_folder_and_two_cross_any_number_of_them(tmp_path, glob, expected):
  write(tmp_path, {"top.py": "", "pkg/x.py": "", "pkg/deep/x.py": "", "test/t.py": ""})
  assert names(text(tmp_path / glob)) == expected


@pytest.mark.parametrize(
  ("exclude", "left"),
  [
    ("**/test/**", ["a/contest/x.py", "a/test.py", "x.py"]),  # a leading test/ goes, too
    ("test/**", ["a/contest/x.py", "a/test.py", "a/test/x.py", "x.py"]),
    ("**/x.py", ["a/test.py"]),
    ("*.py", ["a/contest/x.py", "a/test.py", "a/test/x.py", "test/x.py"]),
  ],
)
def test_exclude_is_matched_against_the_path_below_the_entry(tmp_path, exclude, left):
  root = tmp_path / "test" / "root"  # its own path must not count
  write(
    root, dict.fromkeys(["x.py", "test/x.py", "a/test/x.py", "a/contest/x.py", "a/test.py"], "")
  )
  assert names(text(root, exclude=(exclude,))) == left


def test_a_link_to_a_folder_above_is_entered_once(tmp_path):
  write(tmp_path, {"a/x.txt": ""})
  (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
  assert names(text(tmp_path)) == ["a/x.txt"]
  assert names(text(tmp_path / "**/*.txt")) == ["a/x.txt"]


def test_a_file_that_two_entries_reach_is_read_once(tmp_path):
  write(tmp_path, {"a/x.txt": "", "a/y.txt": ""})
  assert names(text(tmp_path / "a/y.txt", tmp_path)) == ["y.txt", "a/x.txt"]


def test_stdlib_globs_are_below_the_running_python():
  data = text("stdlib:json/*.py", "stdlib:**/ast.py", exclude=("**/site-packages/**",))
  assert "json/decoder.py" in names(data)
  assert names(data)[-1] == "ast.py"
  with open(json.decoder.__file__, newline="", encoding="utf-8") as stream:
    documents = open_documents(data, "train")
    assert documents[names(data).index("json/decoder.py")].text == stream.read()


def test_line_ends_and_marks_of_a_text_stay_as_they_are(tmp_path):
  content = "\ufeffone\r\ntwo\rthree\n\n"
  write(tmp_path, {"x.txt": content})
  assert open_documents(text(tmp_path), "train")[0].text == content


def test_json_lines_are_read_by_offset_under_names_that_count_blank_lines(tmp_path):
  write(tmp_path, {"x.jsonl": '{"text": "é"}\n\n  \n{"text": "two\\nlines"}\r\n{"text": ""}'})
  documents = open_documents(text(tmp_path), "train")
  found = [documents[i] for i in (2, 1, 0)]
  assert [(d.name, d.text) for d in found] == [
    ("x.jsonl:5", ""), ("x.jsonl:4", "two\nlines"), ("x.jsonl:1", "é"),
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    (b'{"text": ', "not valid JSON"),
    (b'{"body": "x"}', "no text in field 'text'.*body"),
    (b'{"text": 3}', "no text in field 'text'"),
    (b'["x"]', "a JSON list"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "not Unicode"),
    (b'{"n": %s}' % (b"9" * 5000), "not valid JSON"),
  ],
)
def test_a_broken_json_line_is_named_by_file_and_line(tmp_path, line, reason):
  write(tmp_path, {"x.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
  documents = open_documents(text(tmp_path), "train")
  assert documents[0].text == "fine"
  with pytest.raises(DataError, match=f"x.jsonl:2: .*{reason}"):
    documents[1]


def test_text_that_is_not_utf_8_is_named_by_file_and_line(tmp_path):
  write(tmp_path, {"x.txt": b"one\ntwo \xe9\n"})
  with pytest.raises(DataError, match=r"x\.txt: byte 8 \(line 2 "):
    open_documents(text(tmp_path), "train")[0]


def test_a_path_without_files_is_the_users_mistake(tmp_path):
  write(tmp_path, {"x.txt": ""})
  for entry in ("nothing.txt", "nothing/*.txt", "*.md"):
    with pytest.raises(ConfigError, match=r"data\.paths\[1\]=.*names no file"):
      list_files(text(tmp_path, tmp_path / entry))
  with pytest.raises(ConfigError, match=r"data\.exclude"):
    list_files(text(tmp_path, exclude=("**",)))


def test_held_out_documents_are_the_same_on_every_machine_and_never_trained_on(tmp_path):
  write(tmp_path, {f"{i}.txt": str(i) for i in range(100)})
  data = text(tmp_path, held_out_fraction=0.1)
  parts = [open_documents(data, split) for split in ("train", "held_out")]
  train, held_out = [{part[i].name for i in range(len(part))} for part in parts]
  # From `printf 14.txt | b2sum -l 64` and so on: a changed hash would leak held-out text into old runs.
  assert held_out == {f"{i}.txt" for i in (14, 48, 68, 71, 72, 79)}
  assert train | held_out == {f"{i}.txt" for i in range(100)} and not train & held_out
  assert parts[1].name(0) == parts[1][0].name


def test_a_larger_fraction_only_adds_held_out_documents():
  held_out = [{i for i in range(2000) if is_held_out(str(i), f)} for f in (0.05, 0.2)]
  assert held_out[0] < held_out[1]
  np.testing.assert_allclose([len(h) / 2000 for h in held_out], [0.05, 0.2], atol=0.03)


def test_moving_the_folder_does_not_change_what_is_held_out(tmp_path):
  for folder in ("here", "there"):
    write(tmp_path / folder, {f"{i}.txt": "" for i in range(30)})
  here, there = (
    open_documents(text(tmp_path / folder, held_out_fraction=0.3), "held_out")
    for folder in ("here", "there/*.txt")
  )
  assert [here.name(i) for i in range(len(here))] == [there.name(i) for i in range(len(there))]


def test_an_empty_side_of_the_split_is_the_users_mistake(tmp_path):
  write(tmp_path, {"x.txt": "x"})
  with pytest.raises(ConfigError, match=r"held_out_fraction=0.0 .* evaluation; raise it"):
    open_documents(text(tmp_path), "held_out")
  with pytest.raises(ConfigError, match=r"held_out_fraction=0.99999 .* training; lower it"):
    open_documents(text(tmp_path, held_out_fraction=0.99999), "train")


TFDS_BUILDER = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class TinyTexts(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "number": np.int64})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, manager):
    return {"train": ((i, {"body": f"text {i} \\u00e9", "number": i}) for i in range(20))}
  def _generate_examples(self):
    pass

TinyTexts(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_a_prepared_tensorflow_dataset_is_read_without_tensorflow(tmp_path):
  # Prepared by another process: the builder class must not be registered where it is read.
  subprocess.run(
    [sys.executable, "-c", TFDS_BUILDER, str(tmp_path)], check=True, capture_output=True
  )
  data = DataConfig(
    source="tfds",
    tfds_name="tiny_texts",
    tfds_dir=str(tmp_path),
    text_field="body",
    held_out_fraction=0.2,
  )
  parts = [open_documents(data, split) for split in ("train", "held_out")]
  found = [part[i] for part in parts for i in range(len(part))]
  assert all(len(part) for part in parts)
  assert {document.text for document in found} == {f"text {i} é" for i in range(20)}
  assert {document.name for document in found} == {str(i) for i in range(20)}
  assert "tensorflow" not in sys.modules


def test_a_tensorflow_dataset_that_is_not_prepared_is_the_users_mistake(tmp_path):
  data = DataConfig(source="tfds", tfds_name="no_such_texts", tfds_dir=str(tmp_path))
  with pytest.raises(ConfigError, match=r"data\.tfds_name=no_such_texts.*array_record"):
    open_documents(data, "train")
