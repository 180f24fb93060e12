"""Documents that cannot be read end a run with the file and the line, and leave nothing behind."""

import json
import os

import pytest
from refusals import assert_names
from tiny_tokenizers import write_hugging_face

from maxllama4 import load_tokenizer
from maxllama4.config import ConfigError, DataConfig
from maxllama4.data.packing import RowPacker
from maxllama4.data.sources import DataError, Excerpts, open_documents
from maxllama4.data.tokenizer import train_tokenizer

RUN = ("train", "run.yml", "run_dir=out", "data.held_out_fraction=0")

BROKEN = [
  ("a.txt", "café".encode("latin-1"), ["a.txt: byte 3 (line 1", "not UTF-8"]),
  ("a.txt", b"fine\nfine\n\xff\xfe", ["a.txt: byte 10 (line 3", "not UTF-8"]),
  ("a.txt", "to be".encode("utf-16"), ["a.txt: byte 0", "not UTF-8"]),
  ("a.txt", b"", ["data.paths", "hold no text"]),
  ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl:2: not valid JSON"]),
  ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', ["a.jsonl:3: not valid JSON"]),
  ("a.jsonl", b'{"text": "a"}\n{"txt": "b", "id": 1}\n', ["a.jsonl:2: no text in field 'text'", "txt, id"]),
  ("a.jsonl", b'{"text": null}\n', ["a.jsonl:1: no text in field 'text'"]),
  ("a.jsonl", b'{"text": ["a"]}\n', ["a.jsonl:1: no text in field 'text'"]),
  ("a.jsonl", b'["text"]\n', ["a.jsonl:1: a JSON list, not an object"]),
  ("a.jsonl", b'{"text": "\xff"}\n', ["a.jsonl:1: byte 10", "not UTF-8"]),
  ("a.jsonl", b'{"text": "\\udce9"}\n', ["a.jsonl:1: field 'text' is not Unicode text"]),
  ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n', ["a.jsonl:1: not valid JSON", "BOM"]),
  ("a.jsonl", b"[" * 30_000 + b"\n", ["a.jsonl:1: not valid JSON"]),
  ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ["a.jsonl:1: not valid JSON", "digits"]),
  ("a.jsonl", b"\n \n\r\n", ["data.paths", "hold no document"]),
  ("a.json", b'[{"text": "a"},\n', ["a.json:1: not valid JSON"]),
  ("a.jsonl", bytes(64), ["a.jsonl:1: not valid JSON"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "told"), BROKEN)
def test_a_broken_document_is_named_with_its_line(desk, run, name, content, told):
  desk.write(f"broken/{name}", content)
  assert_names(
    desk.failure(*RUN, "data.paths=[broken]" if name != "a.json" else "data.paths=[broken/a.json]"),
    *told,
  )


def test_a_broken_document_behind_good_ones_is_named_too(desk, run):
  """The tokenizer's trainer, which reads it, runs in C++ and has errors of its own."""
  for i in range(9):
    desk.write(f"texts/{i}.txt", "to be or not to be " * 9)
  desk.write("texts/5.txt", b"\xff")
  assert_names(desk.failure(*RUN), "texts/5.txt: byte 0")


MISSING = [
  "none.txt",
  "none/*.txt",
  "texts/*.jsonl",
  "fifo",
  "folder of fifos",
  "empty folder",
  "link to nothing",
  "link to itself",
  "folder.jsonl",
  "texts/[",
  "~nobody-of-this-name/texts",
  "long" * 100,
  "[z-a].txt",
  "stdlib:none*.py",
]


@pytest.mark.parametrize("path", MISSING)
def test_a_path_without_files_is_the_users_mistake(desk, run, path):
  os.mkfifo("fifo")
  for folder in ("folder of fifos", "empty folder", "folder.jsonl"):
    os.mkdir(folder)
  os.mkfifo("folder of fifos/a.txt")
  os.symlink("nowhere", "link to nothing")
  os.symlink("link to itself", "link to itself")
  assert_names(desk.mistake(*RUN, f"data.paths=[texts, '{path}']"), path)


def test_a_file_that_may_not_be_read_is_named(desk, run):
  path = desk.write("texts/b.txt", "to be")
  path.chmod(0)
  if os.access(path, os.R_OK):
    pytest.skip("this user may read everything")
  message = desk.failure(*RUN)
  path.chmod(0o600)
  assert_names(message, "texts/b.txt: cannot be read", "Permission denied")


def test_folders_and_links_in_a_loop_are_read_once(desk):
  desk.write("texts/a.txt", "to be")
  os.symlink("..", "texts/up")
  os.symlink("itself", "texts/itself")
  os.symlink("../texts", "texts/again")
  assert len(open_documents(DataConfig(paths=("texts",), held_out_fraction=0), "all")) == 1


def test_nothing_is_held_out_of_a_single_document(desk, run):
  message = desk.mistake("train", "run.yml", "run_dir=out", "training.eval_every=5")
  assert_names(message, "data.held_out_fraction=0.03", "none of 1 documents for evaluation")


def test_documents_of_nothing_but_blanks_are_still_documents(desk):
  desk.write("texts/a.txt", "\n\n")
  documents = open_documents(DataConfig(paths=("texts",), held_out_fraction=0), "all")
  assert [documents[i].text for i in range(len(documents))] == ["\n\n"]


# Data that changes while a run reads it


@pytest.fixture
def lines(desk):
  desk.write("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
  return open_documents(DataConfig(paths=("a.jsonl",), held_out_fraction=0), "all")


@pytest.mark.parametrize("content", [b"", b'{"text": "longer than before"}\n{"text": "two"}\n'])
def test_a_file_that_changed_since_it_was_listed_is_named(desk, lines, content):
  desk.write("a.jsonl", content)
  with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
    lines[1]


def test_a_file_that_vanished_since_it_was_listed_is_named(desk, lines):
  (desk.folder / "a.jsonl").unlink()
  with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file"):
    lines[1]


def test_a_text_that_shrank_since_it_was_cut_is_named(desk):
  desk.write("a.txt", "one\ntwo\nthree\n")
  documents = open_documents(DataConfig(paths=("a.txt",), held_out_fraction=0), "all")
  excerpts = Excerpts(documents, 4)
  desk.write("a.txt", "one\n")
  assert excerpts[0].text == "one\n"
  with pytest.raises(DataError, match=r"a\.txt: is shorter than it was"):
    excerpts[len(excerpts) - 1]


def test_a_document_that_shrank_since_the_checkpoint_is_named():
  packer = RowPacker(lambda index: range(3), sequence_length=8, pad_token_id=0)
  packer.position = (0, 5)
  with pytest.raises(DataError, match=r"document 0 .* is shorter than it was"):
    next(packer)


# What is no mistake


def test_long_documents_and_odd_characters_lose_nothing(desk):
  """A document of many rows, one line of a million characters, null characters, and signs beyond Unicode's first plane."""
  texts = ["word " * 2000, "x" * 10**6, "a\0b\0", "\U0001f600 \u2581 \r\n", ""]
  for i, text in enumerate(texts):
    desk.write(f"texts/{i}.txt", text)
  documents = open_documents(DataConfig(paths=("texts",), held_out_fraction=0), "all")
  tokenizer = train_tokenizer(documents, 400, "tokenizer.model")
  ids = [
    [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id] for text in texts
  ]
  rows = list(RowPacker(ids.__getitem__, 128, tokenizer.pad_token_id, len(ids)))
  targets = [int(t) for row in rows for t, w in zip(row["targets"], row["weights"]) if w]
  assert targets == [i for document in ids for i in document[1:]]
  assert [tokenizer.decode(i) for i in ids] == texts


# Broken tokenizers


def test_a_vocabulary_larger_than_the_models_is_refused(desk, run, good):
  message = desk.mistake(*RUN, f"data.tokenizer={good}/tokenizer.model", "model.vocab_size=300")
  assert_names(message, "model.vocab_size=300 is less than the tokenizer's", "data.tokenizer=")


def test_a_vocabulary_too_small_for_the_text_is_refused(desk, run):
  assert_names(desk.mistake(*RUN, "model.vocab_size=256"), "model.vocab_size=256 is too small")


def test_every_way_to_cut_a_sentencepiece_model_is_noticed(desk, good):
  content = (good / "tokenizer.model").read_bytes()
  for size in [
    *range(0, 5000, 97),
    *range(5500, len(content), len(content) // 40),
    len(content) - 1,
  ]:
    desk.write("cut.model", content[:size])
    with pytest.raises(ConfigError, match=r"cut\.model"):
      load_tokenizer("cut.model")


TOKENIZERS = [
  (b"", "is empty"),
  (b"no tokenizer", "is not a SentencePiece model"),
  (bytes(range(256)), "is not a SentencePiece model"),
  (b"QQ== 0\nQg== 2\n", "line 2: not a new token in base64 and its rank 1"),
  (b"QQ== 0\nQQ== 1\n", "line 2: "),
  (b"QQ== 0\nQ=Q= 1\n", "line 2: "),
  (b"QQ== 0\n", "lacks tokens of single bytes"),
  (b"{}", "is not a tokenizer.json"),
  (b'{"model": 3}', "is not a tokenizer.json"),
  (b'{"version": "1.0", "model": {"type": "Magic", "vocab": {}}}', "is not a tokenizer.json"),
  (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "is not a tokenizer.json"),
  (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "no token for the start"),
  (b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "id 4000000000"),
  (b"{" * 100_000, "is not a tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "told"), TOKENIZERS, ids=lambda value: str(value)[:40])
def test_a_broken_tokenizer_is_refused(desk, run, content, told):
  desk.write("tokenizer", content)
  assert_names(desk.mistake(*RUN, "data.tokenizer=tokenizer"), "data.tokenizer=tokenizer", told)


@pytest.mark.parametrize(
  "path", ["none", "texts", "run.yml/x", "long" * 100, "~nobody-of-this-name/x"]
)
def test_a_tokenizer_that_is_not_there_is_named(desk, run, path):
  assert_names(
    desk.mistake(*RUN, f"data.tokenizer={path}"), f"data.tokenizer={path}", "cannot be read"
  )


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("special_tokens_map.json", "{"),
    ("tokenizer_config.json", "[1]"),
    ("generation_config.json", "{" * 100_000),
  ],
)
def test_a_broken_file_beside_a_tokenizer_json_is_named(desk, run, name, content):
  write_hugging_face(desk.folder / "tokenizer.json")
  desk.write(name, content)
  assert_names(desk.mistake(*RUN, "data.tokenizer=tokenizer.json"), name, "beside the tokenizer")


@pytest.mark.parametrize("odd", [[10**9], {"id": 3}, "none such", -1, 10**9, 1.0, True])
def test_tokens_that_do_not_exist_are_not_taken_from_beside_a_tokenizer_json(desk, odd):
  plain = load_tokenizer(write_hugging_face(desk.folder / "tokenizer.json"))
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  desk.write("generation_config.json", json.dumps(dict.fromkeys(names, odd)))
  desk.write("tokenizer_config.json", json.dumps({"bos_token": odd, "eos_token": {"text": odd}}))
  found = load_tokenizer("tokenizer.json")
  assert found.stop_token_ids == plain.stop_token_ids
  for name in names:
    assert getattr(found, name) == getattr(plain, name)
