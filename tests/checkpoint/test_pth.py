"""Torch's files read without torch: every layout of a tensor, and nothing that a file would have run."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from meta_files import (
  call_op,
  name_op,
  storage_op,
  tensor_op,
  value_op,
  write_archive,
  write_meta_folder,
  write_pth,
)
from tiny import tiny_arrays, tiny_config

import maxllama4
from maxllama4.checkpoint.pth import StoredTensor, read_pth
from maxllama4.config import ConfigError


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_every_bit_of_a_tensor_is_read(tmp_path, dtype):
  bits = np.arange(24, dtype=f"u{np.dtype(dtype).itemsize}") * 3 + 1
  array = bits.view(dtype).reshape(2, 3, 4)
  write_pth(tmp_path / "x.pth", {"a": array, "scalar": array[0, 0, :1].reshape(())})
  content = read_pth(tmp_path / "x.pth")
  found = content["a"].read()
  assert content["a"].shape == found.shape == (2, 3, 4) and found.dtype == array.dtype
  assert (
    found.tobytes() == array.tobytes()
    and content["scalar"].read().tobytes() == array.tobytes()[: array.itemsize]
  )
  with pytest.raises(ValueError, match="read-only"):
    found[0] = 0


def test_strides_and_offsets_into_a_storage_of_several_tensors_are_respected(tmp_path):
  numbers = np.arange(20, dtype=np.float32)
  storage = storage_op("0", "float32", 20)
  values = {
    "transposed": tensor_op(storage, 2, (4, 3), (1, 4)),
    "strided": tensor_op(storage, 1, (3,), (6,)),
    "expanded": tensor_op(storage, 19, (2, 5), (0, 0)),
    "empty": tensor_op(storage, 0, (0, 7), (7, 1)),
  }
  write_archive(tmp_path / "x.pth", values, {"0": numbers.tobytes()})
  content = read_pth(tmp_path / "x.pth")
  np.testing.assert_array_equal(content["transposed"].read(), numbers[2:14].reshape(3, 4).T)
  np.testing.assert_array_equal(content["strided"].read(), [1, 7, 13])
  np.testing.assert_array_equal(content["expanded"].read(), np.full((2, 5), 19))
  assert content["empty"].read().shape == (0, 7)


def test_states_of_layers_as_bytes_are_passed_over(tmp_path):
  state = call_op(
    name_op("_io", "BytesIO"), [call_op(name_op("_codecs", "encode"), [value_op("x")])]
  )
  parameter = call_op(
    name_op("torch._utils", "_rebuild_parameter"),
    [tensor_op(storage_op("0", "float32", 1), 0, (1,), (1,)), b"\x88", b"}"],
  )
  write_archive(tmp_path / "x.pth", {"_extra_state": state, "w": parameter}, {"0": b"\0" * 4})
  content = read_pth(tmp_path / "x.pth")
  assert isinstance(content["w"], StoredTensor)
  assert not isinstance(content["_extra_state"], StoredTensor)


class Harm:
  """Pickles as a call of `function`, which makes a file."""

  def __init__(self, function, *arguments):
    self.call = (function, arguments)

  def __reduce__(self):
    return self.call


def harms(marker):
  import builtins
  import os
  import subprocess

  yield Harm(os.system, f"touch {marker}")
  yield Harm(builtins.eval, f"open({str(marker)!r}, 'w')")
  yield Harm(builtins.exec, f"open({str(marker)!r}, 'w')")
  yield Harm(open, str(marker), "w")
  yield Harm(subprocess.check_call, ["touch", str(marker)])
  yield Harm(np.save, str(marker), np.zeros(1))
  yield Harm(getattr, os, "system")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "old format"])
def test_a_pickle_that_would_run_something_is_refused_and_does_not(tmp_path, in_zip, protocol):
  config, marker = tiny_config(), tmp_path / "marker"
  write_meta_folder(tmp_path, config, tiny_arrays(config))
  for harm in harms(marker):
    try:
      content = pickle.dumps({"norm.weight": harm}, protocol)
    except TypeError:  # what no pickle can hold
      continue
    path = tmp_path / "consolidated.00.pth"
    if in_zip:
      with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    else:
      path.write_bytes(content)
    with pytest.raises(ConfigError, match="in its pickle" if in_zip else "before 1.6") as error:
      maxllama4.load_model(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "_rebuild_tensor_v2.__globals__", "_rebuild_tensor"])
def test_only_whole_names_are_admitted(tmp_path, name):
  values = {"x": name_op("torch._utils", name)}
  write_archive(tmp_path / "x.pth", values, {})
  with pytest.raises(ConfigError, match=r"names torch\._utils\."):
    read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("key", ["../../etc/passwd", "/etc/passwd", "..", "0/../1", ""])
def test_a_storage_that_names_a_path_is_refused(tmp_path, key):
  values = {"x": tensor_op(storage_op(key, "float32", 1), 0, (1,), (1,))}
  write_archive(tmp_path / "x.pth", values, {key: b"\0" * 4})
  with pytest.raises(ConfigError, match="which is not a number"):
    read_pth(tmp_path / "x.pth")


STORAGE = storage_op("0", "float32", 4)


@pytest.mark.parametrize(
  ("value", "words"),
  [
    (tensor_op(STORAGE, 0, (5,), (1,)), "damaged"),
    (tensor_op(STORAGE, 1, (2, 2), (2, 1)), "damaged"),
    (tensor_op(STORAGE, -1, (2,), (1,)), "damaged"),
    (tensor_op(STORAGE, 3, (2,), (-1,)), "damaged"),
    (tensor_op(STORAGE, 0, (2, 2), (1,)), "damaged"),
    (tensor_op(value_op("0"), 0, (2,), (1,)), "damaged"),
    (tensor_op(storage_op("0", "float32", 5), 0, (5,), (1,)), "16 bytes in data/0 where 5 x"),
    (tensor_op(storage_op("1", "float32", 4), 0, (4,), (1,)), "no member 'data/1'"),
    (b"R", "damaged"),
  ],
)
def test_a_tensor_that_its_file_does_not_hold_is_refused(tmp_path, value, words):
  write_archive(tmp_path / "x.pth", {"x": value}, {"0": b"\0" * 16})
  with pytest.raises(ConfigError, match=words):
    read_pth(tmp_path / "x.pth")


def test_files_that_are_cut_compressed_empty_or_of_another_kind_are_refused(tmp_path):
  path = tmp_path / "x.pth"
  write_pth(path, {"x": np.zeros(1000, np.float32)})
  whole = path.read_bytes()
  for content, words in (
    (whole[:-100], "not a zip archive"),
    (b"", "not a zip archive"),
    (b"\x80\x02}.", "before 1.6"),
    (whole.replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xaa"), "not a zip archive"),
  ):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
      read_pth(path)
  storages = {"0": b"\0" * 4000}
  values = {"x": tensor_op(storage_op("0", "float32", 1000), 0, (1000,), (1,))}
  write_archive(path, values, storages, zipfile.ZIP_DEFLATED)
  with pytest.raises(ConfigError, match="compressed member"):
    read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme", "hello")
  with pytest.raises(ConfigError, match=r"no data\.pkl"):
    read_pth(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x/data.pkl", b"\x80\x02K\x01.")
  with pytest.raises(ConfigError, match="no tensors by name"):
    read_pth(path)
  with pytest.raises(ConfigError, match="cannot be read"):
    read_pth(tmp_path / "nowhere.pth")
