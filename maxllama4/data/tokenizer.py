"""Text to token ids and back, and the training of a new vocabulary.

`Tokenizer` is what the rest of the library sees. `load_tokenizer` recognises the file and picks the class; a new kind
of file is one more class and one more line there.
"""

from __future__ import annotations

import abc
import base64
import binascii
import functools
import io
import json
import os
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

from maxllama4.config import ConfigError
from maxllama4.data.chat import END_OF_MESSAGE, END_OF_TURN, ChatTemplate, Message
from maxllama4.data.sources import DataError, DocumentSource
from maxllama4.files import write_whole

TOKENIZER_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"
# What Hugging Face keeps beside a tokenizer: names of its special tokens, ends of a turn, how a dialog is written.
BESIDE = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "generation_config.json",
  "chat_template.jinja",
)
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space; it cannot tell a real one from it
TRAINING_CHARACTERS = (
  16_000_000  # of text that training reads at most; BPE takes 2 s per 10 million
)
MAX_VOCAB_SIZE = 2**24  # no vocabulary comes near; tables have a row for each id
SENTENCE_CHARACTERS = 2_000  # of text that training sees as one sentence


class Tokenizer(abc.ABC):
  """Text to ids in 0..vocab_size-1 and back."""

  vocab_size: int
  bos_token_id: int  # before every document
  eos_token_id: int  # after every document
  pad_token_id: int  # fills a row; never a target that counts
  stop_token_ids: tuple[int, ...]  # end a generated text
  special_tokens: dict[str, int]  # by name; no text becomes one unless asked to
  token_num_bytes: np.ndarray  # int32 [V]: UTF-8 bytes that each id stands for; 0 for special ids

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    """Ids of `text`, without bos and eos; `allow_special`: names of special tokens in it become their ids.

    Raises: UnicodeEncodeError on a lone surrogate.
    """
    text.encode("utf-8")
    if not allow_special:
      return self._encode(text)
    ids: list[int] = []
    for number, part in enumerate(self._special_names.split(text)):
      ids += [self.special_tokens[part]] if number % 2 else self._encode(part)
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; special ids write nothing, bytes that are not UTF-8 write U+FFFD.

    Nor do ids beyond the vocabulary, which a model with more rows than pieces may produce.
    """
    special = self._special_ids
    return self._decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in special])

  def encode_chat(
    self,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    template: ChatTemplate | None = None,
  ) -> list[int]:
    """Ids of a dialog, with bos; `template` is the released models' unless given.

    Raises: ConfigError when a message is malformed, or the tokenizer lacks the special tokens of Llama 4's chats.
    """
    template = template or ChatTemplate()
    return template.encode(self, messages, add_generation_prompt).ids

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]:
    """Ids of `text`, none of them special."""

  @abc.abstractmethod
  def _decode(self, ids: list[int]) -> str:
    """Text of `ids`, which are in the vocabulary and not special."""

  @functools.cached_property
  def _special_ids(self) -> frozenset[int]:
    return frozenset(self.special_tokens.values())

  @functools.cached_property
  def _special_names(self) -> re.Pattern[str]:
    names = sorted(self.special_tokens, key=len, reverse=True)  # of two that fit, the longer
    return re.compile(f"({'|'.join(map(re.escape, names))})")


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in the file `path`, whose kind its content tells, or in a file of the folder `path`.

  In a folder that is `tokenizer.model` (SentencePiece or tiktoken), which the makers of a model hand out, or else
  `tokenizer.json` (Hugging Face). Raises: ConfigError when there is none, or the file is of an unknown kind.
  """
  file, content = _read_tokenizer(path)
  if content.startswith(b"{"):
    return HuggingFaceTokenizer(content, file)
  if TIKTOKEN_LINE.match(content):
    return TiktokenTokenizer(content, file)
  return SentencePieceTokenizer(content, file)


def keep_tokenizer(path: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Copies the tokenizer in `path`, with what lies beside it, so that `folder` by itself gives the same one."""
  file, content = _read_tokenizer(path)
  folder = pathlib.Path(folder)
  copies = {_kept_name(content): content}
  copies |= {
    name: file.with_name(name).read_bytes() for name in BESIDE if file.with_name(name).is_file()
  }
  folder.mkdir(parents=True, exist_ok=True)
  for name, copy in copies.items():
    write_whole(folder / name, copy)


def check_kept_tokenizer(path: str | os.PathLike, folder: str | os.PathLike) -> None:
  """Raises: ConfigError when the run in `folder` keeps another tokenizer than that in `path`: its ids mean other text."""
  _, content = _read_tokenizer(path)
  kept = pathlib.Path(folder) / _kept_name(content)
  others = [pathlib.Path(folder) / name for name in (TOKENIZER_FILE, HUGGING_FACE_FILE)]
  if any(other.exists() for other in others) and not (
    kept.exists() and kept.read_bytes() == content
  ):
    raise ConfigError(
      f"data.tokenizer={path} is not the tokenizer that {folder} was trained with; leave it out, or set run_dir to a"
      " new folder."
    )


def _kept_name(content: bytes) -> str:
  return HUGGING_FACE_FILE if content.startswith(b"{") else TOKENIZER_FILE


def _read_tokenizer(path: str | os.PathLike) -> tuple[pathlib.Path, bytes]:
  """The tokenizer's file in `path`, and its content. Raises: ConfigError when there is none."""
  file = path = pathlib.Path(path)
  try:
    file = path = path.expanduser()
    if path.is_dir():
      file = path / TOKENIZER_FILE
      if not file.exists() and (path / HUGGING_FACE_FILE).exists():
        file = path / HUGGING_FACE_FILE
    content = file.read_bytes()
  except (OSError, RuntimeError) as error:  # the last one: of `~name`, that there is no such user
    reason = getattr(error, "strerror", None) or error
    raise ConfigError(
      f"data.tokenizer={path}: {file} cannot be read ({reason}); name a tokenizer's file, or a folder that"
      f" holds {TOKENIZER_FILE} or {HUGGING_FACE_FILE}."
    ) from None
  if not content:
    raise ConfigError(f"data.tokenizer={path}: {file} is empty; copy it again.")
  return file, content


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model. Ours (`train_tokenizer`) give every text back: decode(encode(text)) == text.

  A literal U+2581 is encoded around: it becomes the three pieces of its UTF-8 bytes. `pad_token_id` is `eos_token_id`
  where the model has no padding piece. Raises: ConfigError when `content` is no such model, or lacks bos or eos.
  """

  def __init__(self, content: bytes, path: str | os.PathLike):
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
      raise ConfigError(
        f"data.tokenizer={path} is not a SentencePiece model, nor a tiktoken file or a tokenizer.json; take one of"
        " these, or set data.tokenizer=null to train one."
      ) from None
    self.vocab_size = self._model.vocab_size()
    self.bos_token_id = self._model.bos_id()
    self.eos_token_id = self._model.eos_id()
    if min(self.bos_token_id, self.eos_token_id) < 0:
      raise _no_bos_or_eos(path)
    pad = self._model.pad_id()
    self.pad_token_id = pad if pad >= 0 else self.eos_token_id
    self.stop_token_ids = (self.eos_token_id,)
    ids = range(self.vocab_size)
    self.special_tokens = {self._model.id_to_piece(i): i for i in ids if self._model.is_control(i)}
    self.token_num_bytes = np.array([self._num_bytes(i) for i in ids], np.int32)
    self._mark_ids = self._ids_of_space_mark()

  def _encode(self, text: str) -> list[int]:
    if self._mark_ids is None or SPACE_MARK not in text:
      return self._model.encode(text)
    ids: list[int] = []
    for number, part in enumerate(text.split(SPACE_MARK)):
      ids += self._mark_ids if number else []
      ids += self._model.encode(part)
    return ids

  def _decode(self, ids: list[int]) -> str:
    return self._model.decode(ids)

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


# Llama 4's own vocabulary

BEGIN_OF_TEXT, END_OF_TEXT, PADDING = (
  "<|begin_of_text|>",
  "<|end_of_text|>",
  "<|finetune_right_pad|>",
)
STOP_TOKENS = (END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN)


def _reserved(kind: str, start: int, stop: int) -> list[str]:
  return [f"<|{kind}reserved_special_token_{i}|>" for i in range(start, stop)]


# The 2,048 names of the ids behind the merges, in order; the comments give ids after 200,000 merges.
LLAMA4_SPECIAL_TOKENS = (
  *(BEGIN_OF_TEXT, END_OF_TEXT, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),  # 200000
  *("<|header_start|>", "<|header_end|>", END_OF_MESSAGE, END_OF_TURN, "<|step|>"),  # 200005
  *_reserved("text_post_train_", 0, 6),
  *("<|python_start|>", "<|python_end|>", PADDING),  # 200016
  *_reserved("text_post_train_", 8, 69),
  *("<|image_start|>", "<|image_end|>"),  # 200080
  *_reserved("vision_", 0, 2),
  *("<|tile_x_separator|>", "<|tile_y_separator|>"),  # 200084
  *_reserved("vision_", 2, 6),
  "<|image|>",  # 200090
  *_reserved("vision_", 6, 7),
  "<|patch|>",  # 200092
  *_reserved("vision_", 7, 1048),
  *_reserved("reasoning_", 0, 8),  # 201134
  *("<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),  # 201142
  *_reserved("", 0, 904),
)

_CAPITALS, _SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What a text is cut into before merges, which never cross a cut. The first alternative that fits wins.
LLAMA4_PATTERN = "|".join(
  (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]*[{_SMALL}]+{_SUFFIX}",  # a word, with the sign before it
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CAPITALS}]+[{_SMALL}]*{_SUFFIX}",  # a word all in capitals
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # signs, with the ends of lines behind them
    r"\s*[\r\n]+",
    r"\s+(?!\S)",  # spaces, but the last one goes with the word behind it
    r"\s+",
  )
)

LLAMA3_MERGES = 128_000
# A token's bytes and its rank.
TIKTOKEN_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\r?(?:\n|\Z)")
# Longer texts and runs without a change between space and other characters would crash tiktoken, or take it a time
# that grows with their square. Where they are cut is part of the format, since merges do not cross a cut.
BLOCK_CHARACTERS, RUN_CHARACTERS = 400_000, 25_000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{RUN_CHARACTERS + 1},}}|(?<!\s)\s{{{RUN_CHARACTERS + 1},}}")


class TiktokenTokenizer(Tokenizer):
  """Meta's file for Llama 4: byte-level merges in tiktoken's format, then 2,048 special tokens that it does not list.

  Raises: ConfigError when `content` is no such file. Source: meta-llama/llama-models
  models/llama4/tokenizer.py@a9c89c4.
  """

  def __init__(self, content: bytes, path: str | os.PathLike):
    ranks = _tiktoken_ranks(content, path)
    if len(ranks) == LLAMA3_MERGES:
      raise ConfigError(
        f"data.tokenizer={path} is Llama 3's, which cuts texts in another way and has other special tokens; take the"
        f" {HUGGING_FACE_FILE} of that model."
      )
    names = LLAMA4_SPECIAL_TOKENS
    self.vocab_size = len(ranks) + len(names)
    self.special_tokens = dict(zip(names, range(len(ranks), self.vocab_size)))
    self.bos_token_id = self.special_tokens[BEGIN_OF_TEXT]
    self.eos_token_id = self.special_tokens[END_OF_TEXT]
    self.pad_token_id = self.special_tokens[PADDING]
    self.stop_token_ids = tuple(self.special_tokens[name] for name in STOP_TOKENS)
    self.token_num_bytes = np.zeros(self.vocab_size, np.int32)
    self.token_num_bytes[list(ranks.values())] = [len(token) for token in ranks]
    self._model = tiktoken.Encoding(
      str(path), pat_str=LLAMA4_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )

  def _encode(self, text: str) -> list[int]:
    return [i for piece in _bounded_pieces(text) for i in self._model.encode_ordinary(piece)]

  def _decode(self, ids: list[int]) -> str:
    return self._model.decode(ids, errors="replace")


def _tiktoken_ranks(content: bytes, path: str | os.PathLike) -> dict[bytes, int]:
  """Ranks of tokens, 0, 1, ... in the order of the file. Raises: ConfigError unless they are, and hold every byte."""
  ranks: dict[bytes, int] = {}
  for number, line in enumerate(content.splitlines()):
    fields = TIKTOKEN_LINE.fullmatch(line)
    try:
      token = base64.b64decode(fields[1], validate=True) if fields else b""
    except binascii.Error:
      token = b""
    if not token or token in ranks or int(fields[2]) != number:
      raise ConfigError(
        f"data.tokenizer={path}, line {number + 1}: not a new token in base64 and its rank {number}; take Meta's file"
        " as it is."
      )
    ranks[token] = number
  if any(bytes([byte]) not in ranks for byte in range(256)):
    raise ConfigError(
      f"data.tokenizer={path} lacks tokens of single bytes; take Meta's whole file."
    )
  return ranks


def _bounded_pieces(text: str) -> Iterator[str]:
  """The text in pieces of at most BLOCK_CHARACTERS, cut in long runs after each RUN_CHARACTERS."""
  for offset in range(0, len(text), BLOCK_CHARACTERS):
    block = text[offset : offset + BLOCK_CHARACTERS]
    start = 0
    for run in _LONG_RUN.finditer(block):
      for cut in range(run.start() + RUN_CHARACTERS, run.end(), RUN_CHARACTERS):
        yield block[start:cut]
        start = cut
    yield block[start:]


class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizer.json`. What it does not say is read from the files beside it.

  bos, eos and pad are what `tokenizer_config.json` or `special_tokens_map.json` names, or else Llama 4's, or else the
  ids in `generation_config.json`; without padding, eos pads. Generation stops at eos, at what `generation_config.json`
  says, and at Llama 4's ends of a turn. Raises: ConfigError when `content` is no such file, or bos or eos is missing.
  """

  def __init__(self, content: bytes, path: str | os.PathLike):
    try:
      self._model = tokenizers.Tokenizer.from_buffer(content)
    except ValueError:
      raise ConfigError(
        f"data.tokenizer={path} is not a tokenizer.json as Hugging Face's library writes it; take such a file, or"
        f" {TOKENIZER_FILE}."
      ) from None
    self._model.no_truncation()
    self._model.no_padding()
    self._model.encode_special_tokens = True  # as text
    vocabulary = self._model.get_vocab(with_added_tokens=True)
    added = self._model.get_added_tokens_decoder()
    self.vocab_size = max(vocabulary.values(), default=-1) + 1
    if self.vocab_size > MAX_VOCAB_SIZE:
      raise ConfigError(
        f"data.tokenizer={path} has a token of id {self.vocab_size - 1}, beyond the {MAX_VOCAB_SIZE} that are read; take"
        " another."
      )
    self._set_special_tokens(pathlib.Path(path), vocabulary, added)
    self.token_num_bytes = np.zeros(self.vocab_size, np.int32)
    is_byte_level = "ByteLevel" in str(self._model.decoder)
    for piece, i in vocabulary.items():
      if i not in self._special_ids:
        self.token_num_bytes[i] = _piece_num_bytes(piece, is_byte_level and i not in added)

  def _encode(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids

  def _decode(self, ids: list[int]) -> str:
    return self._model.decode(ids)

  def _set_special_tokens(
    self, path: pathlib.Path, vocabulary: dict[str, int], added: dict[int, tokenizers.AddedToken]
  ) -> None:
    names = _read_json(path.with_name("special_tokens_map.json"))
    names |= _read_json(path.with_name("tokenizer_config.json"))
    generation = _read_json(path.with_name("generation_config.json"))
    stops = generation.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    ids = set(vocabulary.values())

    stops = [i for i in stops if type(i) is int and i in ids]

    def find(name: str, llama4: str, given: Any) -> int | None:
      token = names.get(f"{name}_token")
      token = token.get("content") if isinstance(token, dict) else token  # by transformers 4
      named = vocabulary.get(token) if isinstance(token, str) else None
      given = given if type(given) is int and given in ids else None  # no token has this id
      return next((i for i in (named, vocabulary.get(llama4), given) if i is not None), None)

    bos = find("bos", BEGIN_OF_TEXT, generation.get("bos_token_id"))
    eos = find("eos", END_OF_TEXT, stops[0] if stops else None)
    if bos is None or eos is None:
      raise _no_bos_or_eos(path)
    pad = find("pad", PADDING, generation.get("pad_token_id"))
    self.bos_token_id, self.eos_token_id = bos, eos
    self.pad_token_id = eos if pad is None else pad
    stops += [eos, *(vocabulary.get(name) for name in STOP_TOKENS)]
    self.stop_token_ids = tuple(sorted({i for i in stops if i is not None}))
    special = {i for i, token in added.items() if token.special} | {bos, eos, self.pad_token_id}
    self.special_tokens = {piece: i for piece, i in vocabulary.items() if i in special}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a file; empty without one. Raises: ConfigError when it holds something else."""
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(f"{path}, beside the tokenizer, cannot be read ({error}).") from None
  if not isinstance(content, dict):
    raise ConfigError(f"{path}, beside the tokenizer, is no JSON object.")
  return content


def _piece_num_bytes(piece: str, is_byte_level: bool) -> int:
  """UTF-8 bytes of a token's text: byte-level pieces have one character for each; others spell bytes <0x41>."""
  if is_byte_level:
    return len(piece)
  is_byte = re.fullmatch("<0x[0-9A-F]{2}>", piece)
  return 1 if is_byte else len(piece.replace(SPACE_MARK, " ").encode("utf-8"))


def _no_bos_or_eos(path: str | os.PathLike) -> ConfigError:
  return ConfigError(
    f"data.tokenizer={path} has no token for the start or the end of a text (bos, eos); take one with both."
  )


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
  sentences = list(_sentences(_sample(documents, seed)))  # SentencePiece would garble our errors
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
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
  write_whole(path, model.getvalue())
  return load_tokenizer(path)


def _training_failure(vocab_size: int, reason: str) -> Exception:
  sizes = re.search(r"required_chars. \d+ vs (\d+)", reason)
  if sizes:
    return ConfigError(
      f"model.vocab_size={vocab_size} is too small to train a tokenizer: the bytes and the characters of the text in"
      f" data.paths need {sizes[1]} pieces; set it higher, or set data.tokenizer."
    )
  reason = "they hold no text" if "sentences_.empty()" in reason else reason
  return DataError(f"a tokenizer cannot be trained on the documents of data.paths: {reason}.")


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
