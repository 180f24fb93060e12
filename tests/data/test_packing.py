import numpy as np
import pytest

from maxllama4.data.packing import ROW_DTYPES, RowPacker, pack_documents

PAD, BOS, EOS = 0, 1, 2


def make_documents(lengths):
  """bos, then ids that occur nowhere else, then eos."""
  first = np.cumsum([10, *lengths])
  return [
    np.array([BOS, *range(start, start + n), EOS], np.int32) for start, n in zip(first, lengths)
  ]


def pack(documents, sequence_length):
  return pack_documents(documents, sequence_length, PAD, np.ones(10_000, np.int32))[0]


def test_a_row_reads_as_drawn():
  # Documents of 3, 0 and 4 ids in rows of 6: the third is cut after its second input.
  rows = pack(make_documents([3, 0, 4]), 6)
  expected = {
    "tokens": [[1, 10, 11, 12, 1, 1], [13, 14, 15, 16, 0, 0]],
    "targets": [[10, 11, 12, 2, 2, 13], [14, 15, 16, 2, 0, 0]],
    "segment_ids": [[1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 0, 0]],
    "positions": [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 0, 0]],
    "weights": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]],
  }
  for name, value in expected.items():
    np.testing.assert_array_equal(rows[name], value, err_msg=name)
    assert rows[name].dtype == ROW_DTYPES[name]


@pytest.mark.parametrize("sequence_length", [1, 2, 5, 7, 16, 1000])
def test_every_id_but_bos_is_a_target_once_and_in_order(sequence_length):
  documents = make_documents([0, 1, 13, 4, 5, 6, 40, 0, 0, 3])
  rows = pack(documents, sequence_length)
  counted = rows["weights"] > 0
  np.testing.assert_array_equal(
    rows["targets"][counted], np.concatenate([d[1:] for d in documents])
  )
  np.testing.assert_array_equal(
    rows["tokens"][counted], np.concatenate([d[:-1] for d in documents])
  )
  assert counted[:-1].all()  # only the last row is padded
  np.testing.assert_array_equal(counted, rows["segment_ids"] > 0)


@pytest.mark.parametrize("sequence_length", [2, 5, 16])
def test_a_piece_is_one_segment_with_positions_from_0(sequence_length):
  rows = pack(make_documents([0, 1, 13, 4, 5, 6, 40, 0, 0, 3]), sequence_length)
  for tokens, segments, positions in zip(rows["tokens"], rows["segment_ids"], rows["positions"]):
    segments = segments[segments > 0]
    starts = (np.arange(len(segments)) == 0) | (tokens[: len(segments)] == BOS)
    np.testing.assert_array_equal(segments, np.cumsum(starts))
    since = np.arange(len(segments)) - np.flatnonzero(starts)[segments - 1]
    np.testing.assert_array_equal(positions[: len(segments)], since)


def test_a_packer_set_to_any_position_goes_on_exactly_and_reads_one_document_for_it():
  documents = make_documents([3, 30, 0, 8, 1])
  packer = RowPacker(documents.__getitem__, 7, PAD, len(documents))
  positions, rows = [packer.position], []
  for row in packer:
    rows.append(row)
    positions.append(packer.position)
  for start, position in enumerate(positions[:-1]):
    read = []
    resumed = RowPacker(lambda i, read=read: read.append(i) or documents[i], 7, PAD, 5)
    resumed.position = position
    for row in rows[start:]:
      for name, value in next(resumed).items():
        np.testing.assert_array_equal(value, row[name], err_msg=name)
    assert read == list(range(position[0], 5))
    with pytest.raises(StopIteration):
      next(resumed)


def test_rows_do_not_share_memory():
  packer = RowPacker(lambda index: make_documents([9])[0], 4, PAD)
  first = next(packer)
  before = first["tokens"].copy()
  next(packer)
  np.testing.assert_array_equal(first["tokens"], before)


def test_bytes_are_those_of_the_counted_targets():
  num_bytes = np.zeros(20, np.int32)
  num_bytes[10:14] = [1, 20, 300, 4000]
  num_bytes[PAD] = 7  # a padded target counts nothing
  assert pack_documents(make_documents([3, 1]), 4, PAD, num_bytes)[1] == 4321
  rows, total = pack_documents([], 4, PAD, num_bytes)
  assert rows["tokens"].shape == (0, 4) and total == 0
