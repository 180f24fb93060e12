"""Text to token ids and back, and the training of a new vocabulary.

A tokenizer is any class with the members of `Tokenizer`. `load_tokenizer` recognises the file and picks the class; a
new kind of file is one more class and one more line there.
"""

from __future__ import annotations

import io
import os
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import sentencepiece

from maxllama4.config import ConfigError
from maxllama4.data.sources import DataError, DocumentSource

TOKENIZER_FILE = "tokenizer.model"
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space; it cannot tell a real one from it
TRAINING_CHARACTERS = (
  16_000_000  # of text that training reads at most; BPE takes 2 s per 10 million
)
SENTENCE_CHARACTERS = 2_000  # of text that training sees as one sentence


class Tokenizer(Protocol):
  """Text to ids in 0..vocab_size-1 and back.

  `encode` adds no special token, and `decode` writes none.
  """

  vocab_size: int
  bos_token_id: int  # before every document
  eos_token_id: int  # after every document
  pad_token_id: int  # fills a row; never a target that counts
  stop_token_ids: tuple[int, ...]  # end a generated text
  token_num_bytes: np.ndarray  # int32 [V]: UTF-8 bytes that each id stands for; 0 for special ids

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in the file `path`, or in the file `tokenizer.model` of the folder `path`.

  Raises: ConfigError when there is none, or the file is of an unknown kind.
  """
  path = pathlib.Path(path).expanduser()
  file = path / TOKENIZER_FILE if path.is_dir() else path
  try:
    content = file.read_bytes()
  except OSError as error:
    raise ConfigError(
      f"data.tokenizer={path}: {file} cannot be read ({error.strerror}); name a SentencePiece file, or a folder"
      f" that holds {TOKENIZER_FILE}."
    ) from None
  return SentencePieceTokenizer(content, file)


class SentencePieceTokenizer:
  """A SentencePiece model. Ours (`train_tokenizer`) give every text back: decode(encode(text)) == text.

  A literal U+2581 is encoded around: it becomes the three pieces of its UTF-8 bytes. `pad_token_id` is `eos_token_id`
  where the model has no padding piece. Raises: ConfigError when `content` is no such model, or lacks bos or eos.
  """

  def __init__(self, content: bytes, path: str | os.PathLike):
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
      raise ConfigError(
        f"data.tokenizer={path} is not a SentencePiece model, the only kind that can be read; convert it, or set"
        " data.tokenizer=null to train one."
      ) from None
    self.vocab_size: int = self._model.vocab_size()
    self.bos_token_id: int = self._model.bos_id()
    self.eos_token_id: int = self._model.eos_id()
    if min(self.bos_token_id, self.eos_token_id) < 0:
      raise ConfigError(
        f"data.tokenizer={path} has no piece for the start or the end of a text (bos, eos); take one with both."
      )
    pad = self._model.pad_id()
    self.pad_token_id: int = pad if pad >= 0 else self.eos_token_id
    self.stop_token_ids: tuple[int, ...] = (self.eos_token_id,)
    self.token_num_bytes = np.array([self._num_bytes(i) for i in range(self.vocab_size)], np.int32)
    self._mark_ids = self._ids_of_space_mark()

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos. Raises: UnicodeEncodeError on a lone surrogate."""
    text.encode("utf-8")
    if self._mark_ids is None or SPACE_MARK not in text:
      return self._model.encode(text)
    ids: list[int] = []
    for number, part in enumerate(text.split(SPACE_MARK)):
      ids += self._mark_ids if number else []
      ids += self._model.encode(part)
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special ids write nothing, bytes that are not UTF-8 write U+FFFD.

    Nor do ids beyond the vocabulary, which a model with more rows than pieces may produce.
    """
    return self._model.decode([int(i) for i in ids if i < self.vocab_size])

  def _num_bytes(self, token_id: int) -> int:
    if self._model.is_byte(token_id):
      return 1
    if self._model.is_control(token_id) or self._model.is_unknown(token_id):
      return 0
    return len(self._model.id_to_piece(token_id).replace(SPACE_MARK, " ").encode("utf-8"))

  def _ids_of_space_mark(self) -> list[int] | None:
    """The byte pieces of U+2581; None where there are none, or where each text is given a leading space."""
    ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
    has_bytes = all(self._model.is_byte(i) for i in ids)
    adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
    return ids if has_bytes and not adds_space else None


def train_tokenizer(
  documents: DocumentSource,
  vocab_size: int,
  path: str | os.PathLike,
  seed: int = 0,
  *,
  crosses_words: bool = False,
) -> Tokenizer:
  """A byte-level-safe BPE tokenizer of at most `vocab_size` pieces, learnt from `documents` and written to `path`.

  Nothing is normalised, and what no piece covers becomes bytes, so every text comes back as it was. Pieces may hold
  newlines, indentation and punctuation (`):\\n`); they hold a space only in front, or `crosses_words`. Ids 0..3 are
  pad, bos, eos, unk (unk is never produced). A sample of whole documents, drawn with `seed`, is read until it has
  TRAINING_CHARACTERS. The same documents and arguments give the same bytes. A small text can give fewer pieces.

  Raises: ConfigError when `vocab_size` has no room for the bytes and the characters of the text; DataError when the
  documents hold no text.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(_sample(documents, seed)),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,  # a small text has fewer merges
      byte_fallback=True,
      character_coverage=0.9999,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,  # indentation
      split_by_whitespace=not crosses_words,
      split_by_unicode_script=False,  # code mixes letters and signs: `(self,`
      max_sentencepiece_length=32,
      max_sentence_length=4 * SENTENCE_CHARACTERS,  # bytes; none is left out
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      num_threads=2,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _training_failure(vocab_size, str(error)) from None
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  unfinished.write_bytes(model.getvalue())
  os.replace(unfinished, path)
  return load_tokenizer(path)


def _training_failure(vocab_size: int, reason: str) -> Exception:
  sizes = re.search(r"required_chars. \d+ vs (\d+)", reason)
  if sizes:
    return ConfigError(
      f"model.vocab_size={vocab_size} is too small to train a tokenizer: the bytes and the characters of the text in"
      f" data.paths need {sizes[1]} pieces; set it higher, or set data.tokenizer."
    )
  return DataError(f"a tokenizer cannot be trained on the documents of data.paths: {reason}")


def _sample(documents: DocumentSource, seed: int) -> Iterator[str]:
  """Texts in a random order, each once, until they have TRAINING_CHARACTERS; the last one is cut there."""
  remaining = TRAINING_CHARACTERS
  for index in random.Random(seed).sample(range(len(documents)), len(documents)):
    text = documents[index].text[:remaining]
    yield text
    remaining -= len(text)
    if remaining <= 0:
      return


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """The texts in pieces of at most SENTENCE_CHARACTERS, cut before a newline where there is one."""
  for text in texts:
    start = 0
    while start < len(text):
      stop = start + SENTENCE_CHARACTERS
      newline = text.rfind("\n", start + 1, stop) if stop < len(text) else -1
      stop = newline if newline > 0 else stop
      yield text[start:stop]
      start = stop
