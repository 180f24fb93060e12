"""Batches for training and evaluation, as NumPy arrays; the training layer lays them over its mesh.

The global batch is `training.batch_size` endless streams, one a row. Stream r reads documents r, r + B, r + 2B, ... of
one global order (shuffled anew each epoch), so the data of a run does not depend on the number of hosts: a host reads the
streams whose rows its devices hold, and no other documents. A stream is where it is in its documents, and that is all the
state there is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np

from maxllama4.config import Config, ConfigError
from maxllama4.data.packing import Batch, RowPacker, count_target_bytes, padding, stack_rows
from maxllama4.data.sources import DataError, Document, DocumentSource, Excerpts, open_documents
from maxllama4.data.tokenizer import (
  TOKENIZER_FILE,
  Tokenizer,
  check_kept_tokenizer,
  load_tokenizer,
  train_tokenizer,
)

State = dict[str, Any]  # plain values, ready for JSON
SYNTHETIC_PAD_TOKEN_ID = 0  # synthetic rows are full: never written


def prepare_tokenizer(
  config: Config,
  run_dir: str | os.PathLike,
  *,
  process_index: int = 0,
  timeout_seconds: float = 600.0,
) -> Tokenizer | None:
  """The run's tokenizer: `data.tokenizer`, or the one kept in `run_dir`, or one trained now and kept there.

  It is trained by process 0 on the training documents; the others wait for the file, on a file system that all share.
  None for synthetic data. Raises: ConfigError when it cannot be read or has more pieces than model.vocab_size;
  TimeoutError when process 0 does not deliver.
  """
  if config.data.source == "synthetic":
    return None
  if config.data.tokenizer is not None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_vocabulary(config, tokenizer)
    check_kept_tokenizer(config.data.tokenizer, run_dir)
    return tokenizer
  path = pathlib.Path(run_dir) / TOKENIZER_FILE
  if not path.exists() and process_index == 0:
    documents = open_documents(config.data, "train")
    if config.training.eval_every:
      open_documents(config.data, "held_out")  # complains now, before anything is written
    train_tokenizer(documents, config.model.vocab_size, path, config.training.seed)
  _wait_for(path, timeout_seconds)
  tokenizer = load_tokenizer(path)
  _check_vocabulary(config, tokenizer)
  return tokenizer


def make_loader(
  config: Config, tokenizer: Tokenizer | None, rows: Sequence[int] | None = None
) -> TrainLoader:
  """The endless training batches of this host: of the global batch, its `rows` (all by default); see `ROW_DTYPES`.

  `tokenizer` is what `prepare_tokenizer` returned. Raises: ConfigError when there is no training document, or evaluation
  is asked of synthetic data; DataError, on a batch, when a document is broken.
  """
  rows = range(config.training.batch_size) if rows is None else rows
  if config.data.source == "synthetic":
    _check_no_evaluation(config)
    documents, identity, name = _synthetic_documents(config), "synthetic", str
    pad_token_id = SYNTHETIC_PAD_TOKEN_ID
  else:
    _check_vocabulary(config, tokenizer)
    split = open_documents(config.data, "train")
    if config.data.excerpt_length:
      split = Excerpts(split, config.data.excerpt_length)
    order = grain.MapDataset.range(len(split)).seed(config.training.seed).shuffle().repeat()
    documents = order.map(lambda index: encode_document(tokenizer, split[index]))
    identity, pad_token_id = _digest(split), tokenizer.pad_token_id

    def name(number: int) -> str:
      return split.name(order[number])

  return TrainLoader(config, documents, rows, pad_token_id, identity, name)


class TrainLoader(Iterator[Batch]):
  """Batches [rows of this host, T], `data.prefetch` of them made ahead in a thread.

  `get_state` is the position after the batches that were delivered, whatever lies ready behind them.
  """

  def __init__(
    self,
    config: Config,
    documents: grain.MapDataset,
    rows: Sequence[int],
    pad_token_id: int,
    identity: str,
    name: Callable[[int], str],
  ):
    """`name` gives that of a document by its number in the order."""
    self._rows, self._name = rows, name
    self._order = {
      "training.batch_size": config.training.batch_size,
      "training.seed": config.training.seed,
      "documents": identity,
    }
    packed = _PackedRows(documents, config, rows, pad_token_id)
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      packed, prefetch_buffer_size=config.data.prefetch
    )
    self._iterator = iter(dataset)

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> State:
    """Where this host's streams are: `streams` maps the global row to [its next document, offset in it].

    It goes through JSON unchanged. With several hosts, a checkpoint keeps `merge_states` of them all.
    """
    return {"order": dict(self._order), "streams": dict(self._iterator.get_state())}

  def set_state(self, state: State) -> None:
    """Goes on after the batch at which `state` was taken, also by another number of hosts.

    Raises: ConfigError when `state` is of another order of data (batch size, seed, documents) or lacks a stream.
    """
    for name, value in self._order.items():
      saved = state["order"].get(name)
      if saved != value:
        raise ConfigError(
          f"{name}={value}, but the checkpoint's data position was taken with {saved}; restore that, or start a new"
          " run_dir."
        )
    missing = [row for row in self._rows if str(row) not in state["streams"]]
    if missing:
      raise ConfigError(
        f"the checkpoint's data position lacks rows {missing[:3]}...: it is of one host of several; merge all of them"
        " (merge_states)."
      )
    self._iterator.set_state({str(row): list(state["streams"][str(row)]) for row in self._rows})

  def describe(self, batch: Batch, position: State) -> list[dict[str, Any]]:
    """Where each piece of `batch` comes from: row, columns, document, and its first input's offset in the document's ids.

    `position` is the loader's state before the batch.
    """
    pieces = []
    for row, segments in zip(self._rows, batch["segment_ids"]):
      number, offset = position["streams"][str(row)]
      for segment in range(1, int(segments.max()) + 1):
        columns = np.flatnonzero(segments == segment)
        span = [int(columns[0]), int(columns[-1])]
        name = self._name(row + number * self._order["training.batch_size"])
        pieces.append({"row": row, "columns": span, "document": name, "offset": offset})
        number, offset = number + 1, 0
    return pieces

  def close(self) -> None:
    """Stops the thread; the loader is of no use afterwards."""
    self._iterator.close()
    del self._iterator  # Grain complains when it meets a closed one as Python exits


def merge_states(states: Iterable[State]) -> State:
  """The state of all streams from one state a host, for `TrainLoader.set_state` with any number of hosts."""
  states = list(states)
  assert all(state["order"] == states[0]["order"] for state in states), "states of different runs"
  streams = {row: position for state in states for row, position in state["streams"].items()}
  return {
    "order": states[0]["order"],
    "streams": dict(sorted(streams.items(), key=lambda i: int(i[0]))),
  }


@dataclasses.dataclass(frozen=True)
class EvalSet:
  """The batches of this host, and the UTF-8 bytes that all hosts' counted targets stand for."""

  batches: list[Batch]
  num_bytes: int


def make_eval_batches(
  config: Config,
  tokenizer: Tokenizer | None,
  rows: Sequence[int] | None = None,
  *,
  split: str = "held_out",
) -> EvalSet:
  """The held-out documents (or those of another `split`) in order, packed once into batches of training.batch_size rows over all hosts.

  This host's batches hold its `rows` (all by default). Rows that the last batch lacks are padding (segment 0, weight 0). With `training.eval_batches` > 0 only that many
  batches are made, and `num_bytes` is that of their targets: the sum of what each counted target stands for, exact also
  where the last document is cut.

  Raises: ConfigError when there is no held-out document, or the data is synthetic.
  """
  rows = range(config.training.batch_size) if rows is None else rows
  if config.data.source == "synthetic":
    raise ConfigError(
      "data.source=synthetic holds no documents to evaluate on; set another data.source."
    )
  _check_vocabulary(config, tokenizer)
  documents = open_documents(config.data, split)
  training = config.training
  packer = RowPacker(
    lambda index: encode_document(tokenizer, documents[index]),
    training.sequence_length,
    tokenizer.pad_token_id,
    len(documents),
  )
  limit = training.eval_batches * training.batch_size or None
  batches, num_bytes = [], 0
  packed = itertools.islice(packer, limit)
  while chunk := list(itertools.islice(packed, training.batch_size)):
    num_bytes += sum(count_target_bytes(row, tokenizer.token_num_bytes) for row in chunk)
    lacking = training.batch_size - len(chunk)
    chunk += [padding((training.sequence_length,), tokenizer.pad_token_id)] * lacking
    batches.append(stack_rows([chunk[row] for row in rows]))
  if num_bytes == 0:
    raise DataError(f"the {len(documents)} documents to evaluate on hold no text.")
  return EvalSet(batches, num_bytes)


def encode_document(tokenizer: Tokenizer, document: Document) -> np.ndarray:
  """int32 ids of a document, bos in front, and eos behind where it ends: an excerpt may stop before that."""
  end = [tokenizer.eos_token_id] * document.has_end
  return np.array([tokenizer.bos_token_id, *tokenizer.encode(document.text), *end], np.int32)


class _PackedRows(grain.IterDataset):
  """Batches of the streams `rows` of `documents`, a row a stream."""

  def __init__(
    self, documents: grain.MapDataset, config: Config, rows: Sequence[int], pad_token_id: int
  ):
    super().__init__()
    self._documents = documents
    self._training = config.training
    self._rows = rows
    self._pad_token_id = pad_token_id

  def __iter__(self) -> _PackedRowsIterator:
    packers = {str(row): self._packer(row) for row in self._rows}
    return _PackedRowsIterator(packers)

  def _packer(self, row: int) -> RowPacker:
    documents, step = self._documents, self._training.batch_size
    return RowPacker(
      lambda index: documents[row + index * step],
      self._training.sequence_length,
      self._pad_token_id,
    )


class _PackedRowsIterator(grain.DatasetIterator):
  """Its state is the position of every stream, by global row."""

  def __init__(self, packers: dict[str, RowPacker]):
    super().__init__()
    self._packers = packers

  def __next__(self) -> Batch:
    return stack_rows([next(packer) for packer in self._packers.values()])

  def get_state(self) -> State:
    return {row: list(packer.position) for row, packer in self._packers.items()}

  def set_state(self, state: State) -> None:
    for row, packer in self._packers.items():
      packer.position = state[row]


def _synthetic_documents(config: Config) -> grain.MapDataset:
  """Random ids that fill one row each, as good as endless; number i depends on training.seed and i alone."""
  length, seed = config.training.sequence_length + 1, config.training.seed
  numbers = grain.MapDataset.range(sys.maxsize)
  return numbers.map(
    lambda number: np.random.default_rng([seed, number]).integers(
      config.model.vocab_size, size=length, dtype=np.int32
    )
  )


def _check_no_evaluation(config: Config) -> None:
  if config.training.eval_every > 0:
    raise ConfigError(
      f"training.eval_every={config.training.eval_every}, but data.source=synthetic holds no documents to evaluate on;"
      " set training.eval_every=0."
    )


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ConfigError(
      f"model.vocab_size={config.model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} pieces"
      f" (data.tokenizer={config.data.tokenizer or 'null, trained into run_dir'}); raise it to that number."
    )


def _digest(split: DocumentSource) -> str:
  """A hash of the documents' names, in order: other documents would be another order of data."""
  digest = hashlib.blake2b(digest_size=8)
  for index in range(len(split)):
    digest.update(split.name(index).encode("utf-8", "surrogateescape") + b"\0")
  return f"{len(split)} named {digest.hexdigest()}"


def _wait_for(path: pathlib.Path, timeout_seconds: float) -> None:
  deadline = time.monotonic() + timeout_seconds
  while not path.exists():
    if time.monotonic() > deadline:
      raise TimeoutError(
        f"{path}: process 0 has not written the tokenizer within {timeout_seconds:.0f} s; put run_dir on a file system"
        " that all hosts share, or set data.tokenizer."
      )
    time.sleep(0.2)
