"""Documents by index: local text and JSONL files, or a dataset prepared by TensorFlow Datasets.

Every document has a name that is the same on every machine: its path below the root of its entry in `data.paths`.
The name alone decides whether a document is held out, so no run ever trains on what another one evaluates on.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from maxllama4.config import ConfigError, DataConfig

JSON_LINES_SUFFIXES = (".jsonl", ".json")  # one object a line; every other file is one document
FOLDER_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")  # what is read of a whole folder
STDLIB = "stdlib:"
SPLITS = ("train", "held_out", "all")


# What the system says of text that cannot be a path, such as one that is too long; of `~name`, that there is no such user.
_NO_PATH = (OSError, KeyError, RuntimeError)


class DataError(Exception):
  """Data that cannot be read; names the file, the line where there is one, and the reason."""


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and its machine-independent name: `folder/file.txt`, `file.jsonl:LINE` (from 1), or a TFDS index.

  An excerpt of a longer document need not hold its end.
  """

  name: str
  text: str
  has_end: bool = True


class DocumentSource(Protocol):
  """Documents by index, in an order that depends on their names alone."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Document: ...

  def name(self, index: int) -> str:
    """The name of document `index`, without reading its text."""


def open_documents(data: DataConfig, split: str) -> Split:
  """The `train` or `held_out` documents that `data` names, or `all`; their files are listed and JSONL lines located now.

  Raises: ConfigError when `data` names no files, or none is left for `split`; DataError when a file cannot be read.
  """
  source = TfdsDocuments(data) if data.source == "tfds" else TextDocuments(data)
  chosen = Split(source, split, data.held_out_fraction)
  if len(source) == 0:
    raise DataError(f"data.paths={list(data.paths)} hold no document: all lines are blank.")
  if len(chosen) == 0:
    remedy = "raise" if split == "held_out" else "lower"
    raise ConfigError(
      f"data.held_out_fraction={data.held_out_fraction} leaves none of {len(source)} documents for"
      f" {'evaluation' if split == 'held_out' else 'training'}; {remedy} it, or add documents to"
      f" {'data.paths' if data.source == 'text' else 'the dataset'}."
    )
  return chosen


def is_held_out(name: str, held_out_fraction: float) -> bool:
  """Whether the document `name` is kept for evaluation: its BLAKE2b hash, as a number in [0, 1), is below the fraction."""
  digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
  return int.from_bytes(digest, "big") < held_out_fraction * 2**64


class Split:
  """The documents of `source` on one side of the held-out line, or on both, in the source's order."""

  def __init__(self, source: DocumentSource, split: str, held_out_fraction: float):
    if split not in SPLITS:
      raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    wanted = {"train": (False,), "held_out": (True,), "all": (False, True)}[split]
    self.source = source
    self._indices = np.array(
      [i for i in range(len(source)) if is_held_out(source.name(i), held_out_fraction) in wanted],
      np.int64,
    )

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Document:
    return self.source[int(self._indices[index])]

  def name(self, index: int) -> str:
    return self.source.name(int(self._indices[index]))


class Excerpts:
  """Documents of `source`, those of more than `length` characters cut at line ends into excerpts: an index of its own.

  A shuffle then mixes parts of documents, where it would mix whole ones. All documents are read once, now.
  """

  def __init__(self, source: DocumentSource, length: int):
    self._source = source
    self._spans = [
      (index, start, stop)
      for index in range(len(source))
      for start, stop in cut_at_lines(source[index].text, length)
    ]

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> Document:
    document, start, stop = self._spans[index]
    text = self._source[document].text
    if stop > len(text):
      raise DataError(
        f"{self._source.name(document)}: is shorter than it was when the run started; leave the data of a run as it is."
      )
    return Document(self.name(index), text[start:stop], stop == len(text))

  def name(self, index: int) -> str:
    """The document's name and the excerpt's first character in it."""
    document, start, _ = self._spans[index]
    return f"{self._source.name(document)}@{start}"


def cut_at_lines(text: str, length: int) -> list[tuple[int, int]]:
  """Spans of at most `length` characters that cover `text`, each but the last ending with a line where one ends."""
  spans, start = [], 0
  while len(text) - start > length:
    stop = text.rfind("\n", start, start + length) + 1 or start + length
    spans.append((start, stop))
    start = stop
  return [*spans, (start, len(text))]


@dataclasses.dataclass(frozen=True)
class TextFile:
  """One file and its name, the posix path below the root of its entry."""

  path: pathlib.Path
  name: str

  @property
  def is_json_lines(self) -> bool:
    return self.path.suffix.lower() in JSON_LINES_SUFFIXES


class TextDocuments:
  """Files of text (one document each) and of JSON lines (one document a line that is not blank).

  JSONL is indexed by the byte offset of each line: 24 bytes of memory a document, and one reading of the file. Text
  keeps its line ends as they are.
  """

  def __init__(self, data: DataConfig):
    self.files = list_files(data)
    self._text_field = data.text_field
    self._file, self._offset, self._line = array.array("q"), array.array("q"), array.array("q")
    for number, file in enumerate(self.files):
      for offset, line in _json_lines(file) if file.is_json_lines else [(0, 0)]:
        self._file.append(number)
        self._offset.append(offset)
        self._line.append(line)

  def __len__(self) -> int:
    return len(self._file)

  def name(self, index: int) -> str:
    file, line = self.files[self._file[index]], self._line[index]
    return f"{file.name}:{line}" if line else file.name

  def __getitem__(self, index: int) -> Document:
    """Raises: DataError when the file is not UTF-8, or its line no JSON object with the text field."""
    file, line = self.files[self._file[index]], self._line[index]
    try:
      with open(file.path, "rb") as stream:
        stream.seek(self._offset[index])
        content = stream.readline() if line else stream.read()
    except OSError as error:
      raise _unreadable(file.path, error) from None
    where = f"{file.path}:{line}" if line else str(file.path)
    text = _decode(content, where)
    if line:
      text = _text_of(text, self._text_field, where)
    return Document(self.name(index), text)


class TfdsDocuments:
  """The `train` split of a dataset already prepared in array_record format; a document's name is its index.

  Reading needs no TensorFlow; nothing is downloaded.
  """

  def __init__(self, data: DataConfig):
    import tensorflow_datasets as tfds  # slow to import, and most runs do without it

    where = f"data.tfds_name={data.tfds_name}, data.tfds_dir={data.tfds_dir}"
    try:
      self._records = tfds.data_source(
        data.tfds_name, split="train", data_dir=data.tfds_dir, download=False
      )
    except (
      tfds.core.DatasetNotFoundError,
      AssertionError,  # known to tfds, but not prepared there
      NotImplementedError,  # prepared as another format
    ) as error:
      reason = str(error).split("\n")[0].split(". ")[0].strip(".")
      raise ConfigError(
        f"{where}: no such dataset is prepared there as array_record ({reason}); prepare it with"
        " tfds build --file_format=array_record, or correct the two settings."
      ) from None
    self._text_field = data.text_field
    self._where = where

  def __len__(self) -> int:
    return len(self._records)

  def name(self, index: int) -> str:
    return str(index)

  def __getitem__(self, index: int) -> Document:
    record, where = self._records[index], f"{self._where}, record {index}"
    text = record.get(self._text_field)
    if isinstance(text, bytes):
      text = _decode(text, where)
    if not isinstance(text, str):
      raise _no_text(where, self._text_field, record)
    return Document(str(index), text)


def list_files(data: DataConfig) -> list[TextFile]:
  """The files that `data.paths` name, less `data.exclude`: entries in order, sorted by name within each.

  An entry is a file, a folder (all below it whose suffix is in FOLDER_SUFFIXES) or a glob; `stdlib:GLOB` is below the
  running Python's standard library. In a glob `*` and `?` stay within a folder, `**/` is any number of folders, none
  included. Globs and folders pass over hidden names (`.git`) and enter a folder once, however many links lead to it.
  `data.exclude` is matched against names; a file that several entries reach is read once, under its first name.

  Raises: ConfigError when an entry names no file.
  """
  exclude = [_Glob(pattern) for pattern in data.exclude]
  files: dict[str, TextFile] = {}
  for position, entry in enumerate(data.paths):
    try:
      found = _files_of_entry(entry, exclude)
    except _NO_PATH as error:
      reason = getattr(error, "strerror", None) or error
      raise ConfigError(
        f"data.paths[{position}]={entry} is no path ({reason}); correct it."
      ) from None
    if not found:
      raise ConfigError(
        f"data.paths[{position}]={entry} names no file that data.exclude={list(data.exclude)} leaves;"
        f" correct the path (relative ones start at the working directory; of a folder, {', '.join(FOLDER_SUFFIXES)} are"
        " read), or drop the entry."
      )
    for file in sorted(found, key=lambda file: file.name):
      files.setdefault(os.path.realpath(file.path), file)
  return list(files.values())


def _files_of_entry(entry: str, exclude: Sequence[_Glob]) -> list[TextFile]:
  if entry.startswith(STDLIB):
    root, pattern = pathlib.Path(sysconfig.get_paths()["stdlib"]), entry[len(STDLIB) :]
  else:
    path = pathlib.Path(entry).expanduser()
    if path.is_file():
      return [] if any(glob.matches(path.name) for glob in exclude) else [TextFile(path, path.name)]
    root, pattern = (path, None) if path.is_dir() else _split_glob(path)
  wanted = None if pattern is None else _Glob(pattern)
  return [
    TextFile(root / name, name)
    for name in _walk(root, exclude, wanted.depth if wanted else None)
    if (wanted.matches(name) if wanted else name.lower().endswith(FOLDER_SUFFIXES))
  ]


def _split_glob(path: pathlib.Path) -> tuple[pathlib.Path, str]:
  """The folder before the first part that holds `*`, `?` or `[`, and the rest."""
  parts = path.parts
  plain = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts) - 1)
  return pathlib.Path(*parts[:plain]), "/".join(parts[plain:])


class _Glob:
  """A pattern for posix paths: `*` and `?` within a folder, `[abc]`, and `**` across folders."""

  def __init__(self, pattern: str):
    self.depth = None if "**" in pattern else pattern.count("/") + 1  # folders deep it can match
    self._regex = _glob_regex(pattern)
    self._folder = _glob_regex(pattern[:-3]) if pattern.endswith("/**") else None

  def matches(self, name: str) -> bool:
    return self._regex.fullmatch(name) is not None

  def matches_all_below(self, folder: str) -> bool:
    return self._folder is not None and self._folder.fullmatch(folder) is not None


def _glob_regex(pattern: str) -> re.Pattern[str]:
  meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
  tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]/]*\])", pattern)
  pieces = []
  for token in tokens:
    if token.startswith("[") and len(token) > 2:
      inside = token[1:-1].replace("\\", r"\\")
      pieces.append(f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]")
    else:
      pieces.append(meanings.get(token, re.escape(token)))
  try:
    return re.compile("".join(pieces), re.DOTALL)
  except re.error as error:
    raise ConfigError(
      f"data.paths or data.exclude: {pattern} is not a glob ({error}); correct its [...]."
    ) from None


def _walk(root: pathlib.Path, exclude: Sequence[_Glob], depth: int | None) -> Iterator[str]:
  """Names of the files below `root`, hidden and excluded ones left out, at most `depth` levels deep."""
  entered: set[str] = set()
  pending = [""]
  while pending:
    folder = pending.pop()
    real = os.path.realpath(root / folder)
    if real in entered:
      continue
    entered.add(real)
    try:
      entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name, reverse=True)
    except FileNotFoundError:
      continue  # the folder before a glob may not exist; the caller reports that nothing was found
    except OSError as error:
      raise _unreadable(root / folder, error) from None
    for entry in entries:
      name = f"{folder}/{entry.name}" if folder else entry.name
      if entry.name.startswith("."):
        continue
      if os.path.isfile(entry.path):  # unlike the entry's own answer, false for a link to itself
        if not any(glob.matches(name) for glob in exclude):
          yield name
      elif os.path.isdir(entry.path) and (depth is None or name.count("/") + 1 < depth):
        pending += [] if any(glob.matches_all_below(name) for glob in exclude) else [name]


def _json_lines(file: TextFile) -> Iterator[tuple[int, int]]:
  """Byte offset and number (from 1) of each line that is not blank."""
  try:
    with open(file.path, "rb") as stream:
      offset = 0
      for number, line in enumerate(stream, start=1):
        if line.strip():
          yield offset, number
        offset += len(line)
  except OSError as error:
    raise _unreadable(file.path, error) from None


def _text_of(line: str, field: str, where: str) -> str:
  """The value of `field` in the JSON object `line`."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: not valid JSON ({error}).") from None
  if not isinstance(record, dict):
    raise DataError(f"{where}: a JSON {type(record).__name__}, not an object with a text in it.")
  text = record.get(field)
  if not isinstance(text, str):
    raise _no_text(where, field, record)
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise DataError(f"{where}: field {field!r} is not Unicode text ({error.reason}).") from None
  return text


def _decode(content: bytes, where: str) -> str:
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise DataError(
      f"{where}: byte {error.start} (line {line} of the document) is not UTF-8 ({error.reason})."
    ) from None


def _no_text(where: str, field: str, record: dict) -> DataError:
  return DataError(
    f"{where}: no text in field {field!r} (data.text_field); the fields are {', '.join(map(str, record))}."
  )


def _unreadable(path: pathlib.Path, error: OSError) -> DataError:
  return DataError(f"{path}: cannot be read ({error.strerror}).")
