"""Documents to rows of a fixed length, without losing or repeating a target.

A document is its ids with bos in front and eos behind. It is cut into pieces; a piece of n inputs `ids[o:o+n]` has the
targets `ids[o+1:o+n+1]`, so the last input of a piece predicts the first of the next one, and every id but bos is a
target exactly once. Pieces fill rows in order: what does not fit in a row goes on in the next one.

A piece is a sequence of its own (segment and positions from 0), because the model cannot see what another row held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from maxllama4.data.sources import DataError

Row = dict[str, np.ndarray]  # arrays [T] by the names in ROW_DTYPES
Batch = dict[str, np.ndarray]  # arrays [B, T] by the same names
ROW_DTYPES = {
  "tokens": np.int32,  # inputs; pad_token_id where the row is padded
  "targets": np.int32,  # the id after each input; pad_token_id where padded
  "segment_ids": np.int32,  # the piece, from 1 in each row; 0: padding
  "positions": np.int32,  # of the input in its piece, from 0; 0 where padded
  "weights": np.float32,  # 1 where the target counts; 0: padding
}


class RowPacker(Iterator[Row]):
  """Rows of the documents `document(0)`, `document(1)`, ..., endless unless `num_documents` is given.

  `document(i)` returns at least two ids, bos and eos with them. `position` (the next document, and the input in it at
  which the next row starts) is the whole state: setting it resumes exactly, at the price of reading one document.
  """

  def __init__(
    self,
    document: Callable[[int], np.ndarray],
    sequence_length: int,
    pad_token_id: int,
    num_documents: int | None = None,
  ):
    self._document = document
    self._sequence_length = sequence_length
    self._pad_token_id = pad_token_id
    self._num_documents = num_documents
    self.position = (0, 0)

  @property
  def position(self) -> tuple[int, int]:
    """The next document, and the offset in its ids of the next row's first input."""
    return self._index, self._offset

  @position.setter
  def position(self, position: Sequence[int]) -> None:
    self._index, self._offset = (int(number) for number in position)
    self._ids: np.ndarray | None = None

  def __next__(self) -> Row:
    """One row; the last of finitely many documents is padded. Raises: StopIteration after it."""
    row = padding((self._sequence_length,), self._pad_token_id)
    used = segment = 0
    while used < self._sequence_length and self._index != self._num_documents:
      inputs, targets = self._take(self._sequence_length - used)
      span = slice(used, used + len(inputs))
      used, segment = span.stop, segment + 1
      row["tokens"][span], row["targets"][span] = inputs, targets
      row["segment_ids"][span], row["weights"][span] = segment, 1
      row["positions"][span] = np.arange(len(inputs))
    if not used:
      raise StopIteration
    return row

  def _take(self, space: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs and targets of the next piece, at most `space` of each."""
    if self._ids is None:
      self._ids = self._document(self._index)
      if self._offset >= len(self._ids) - 1:
        raise DataError(
          f"document {self._index} of the data's order is shorter than it was when the run was saved; put it back, or"
          " start a new run_dir."
        )
    start, last = self._offset, len(self._ids) - 1
    stop = min(start + space, last)
    inputs, targets = self._ids[start:stop], self._ids[start + 1 : stop + 1]
    if stop < last:
      self._offset = stop
    else:
      self.position = (self._index + 1, 0)
    return inputs, targets


def padding(shape: tuple[int, ...], pad_token_id: int) -> Row:
  """Rows in which nothing counts."""
  row = {name: np.zeros(shape, dtype) for name, dtype in ROW_DTYPES.items()}
  row["tokens"][:] = row["targets"][:] = pad_token_id
  return row


def pack_documents(
  documents: Sequence[np.ndarray],
  sequence_length: int,
  pad_token_id: int,
  token_num_bytes: np.ndarray,
) -> tuple[Batch, int]:
  """All `documents` once, as arrays [rows, T] with the last row padded, and the UTF-8 bytes of the targets.

  `token_num_bytes` [V] is the tokenizer's.
  """
  rows = list(RowPacker(documents.__getitem__, sequence_length, pad_token_id, len(documents)))
  packed = stack_rows(rows) if rows else padding((0, sequence_length), pad_token_id)
  return packed, count_target_bytes(packed, token_num_bytes)


def stack_rows(rows: Sequence[Row]) -> Batch:
  """Arrays [len(rows), T]."""
  return {name: np.stack([row[name] for row in rows]) for name in ROW_DTYPES}


def count_target_bytes(batch: Row | Batch, token_num_bytes: np.ndarray) -> int:
  """UTF-8 bytes of the text that the counted targets stand for; `token_num_bytes` [V] is the tokenizer's.

  Cuts lie between tokens, so the sum over the rows of whole documents is the size of their text.
  """
  return int(token_num_bytes[batch["targets"][batch["weights"] > 0]].sum(dtype=np.int64))
