"""Tensors of torch's `.pth` files, read without torch and without running anything that a file holds.

Such a file is a zip archive. Its member `data.pkl` is a pickle of the tensors' names, shapes and places; the numbers
lie uncompressed in members of their own, so that any one tensor can be read alone.
"""

import collections
import dataclasses
import io
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from maxllama4.config import ConfigError

# The classes that a pickle names for its storages.
_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
# What a pickle that is cut short, or made to harm, makes the unpickler raise.
_MALFORMED = (
  pickle.UnpicklingError,
  EOFError,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
  ArithmeticError,
  MemoryError,
  RecursionError,
)
_LOCAL_HEADER_BYTES = 30


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file, of which nothing is read before `read`."""

  file: pathlib.Path
  dtype: np.dtype
  start_bytes: int  # in the file, of the tensor's first element
  shape: tuple[int, ...]
  strides_bytes: tuple[int, ...]
  size_bytes: int  # from the first element to the end of its storage

  def read(self) -> np.ndarray:
    """The tensor, read-only, mapped from the file: elements are read as they are used."""
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    content = np.memmap(self.file, np.uint8, "r", self.start_bytes, (self.size_bytes,))
    return np.ndarray(self.shape, self.dtype, content, strides=self.strides_bytes)


def read_pth(path: pathlib.Path) -> dict[str, Any]:
  """What the file holds by name; tensors are `StoredTensor`s.

  Raises: ConfigError when it is no zip archive of torch's, is damaged, or holds anything but tensors and plain values.
  """
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      content = _Archive(path, file, archive).content()
  except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
    raise ConfigError(
      f"{path} is not a zip archive: it is damaged, or of torch before 1.6, whose pickles are not read; copy it again,"
      " or load and save it with a newer torch."
    ) from None
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from None
  if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
    raise ConfigError(f"{path} holds no tensors by name; it is not a checkpoint.")
  return content


class _Archive:
  """An open `.pth` file."""

  def __init__(self, path: pathlib.Path, file: io.BufferedReader, archive: zipfile.ZipFile):
    self.path, self._file = path, file
    self._members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in self._members if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
      raise self.error("is a zip archive, but not of torch's: it has no data.pkl")
    self._folder = pickles[0].removesuffix("data.pkl")

  def error(self, problem: str) -> ConfigError:
    return ConfigError(f"{self.path} {problem}; take the file from where it was released.")

  def content(self) -> Any:
    """The unpickled `data.pkl`."""
    if f"{self._folder}byteorder" in self._members and self._bytes("byteorder") != b"little":
      raise self.error("was written on a big-endian machine, which is not supported")
    try:
      return _TensorUnpickler(io.BytesIO(self._bytes("data.pkl")), self).load()
    except ConfigError:
      raise
    except _MALFORMED as error:
      raise self.error(f"has a data.pkl that is damaged ({type(error).__name__})") from None

  def _bytes(self, name: str) -> bytes:
    start, size = self.place(name)
    self._file.seek(start)
    return self._file.read(size)

  def place(self, name: str) -> tuple[int, int]:
    """Where in the file the member `name` starts, and its size; both in bytes."""
    info = self._members.get(f"{self._folder}{name}")
    if info is None:
      raise self.error(f"has no member {name!r}, which its data.pkl names")
    if info.compress_type != zipfile.ZIP_STORED:
      raise self.error(f"has a compressed member {name!r}, which torch never writes")
    self._file.seek(info.header_offset)
    header = self._file.read(_LOCAL_HEADER_BYTES)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER_BYTES + names
    if start + info.file_size > self.path.stat().st_size:
      raise self.error("is cut short")
    return start, info.file_size


@dataclasses.dataclass(frozen=True)
class _Storage:
  """Numbers in a row that tensors are views of."""

  file: pathlib.Path
  dtype: np.dtype
  start_bytes: int
  count: int


class _Rebuild:
  """Stands for the function that torch rebuilds a tensor with; without attributes that a pickle could set."""

  __slots__ = ()

  def __call__(self, storage, offset, shape, strides, *_) -> StoredTensor:
    if not isinstance(storage, _Storage):
      raise TypeError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
      raise ValueError("a shape that is none")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if 0 not in shape and last >= storage.count:
      raise ValueError("a tensor that reaches beyond its storage")
    size = storage.dtype.itemsize
    return StoredTensor(
      file=storage.file,
      dtype=storage.dtype,
      start_bytes=storage.start_bytes + offset * size,
      shape=tuple(shape),
      strides_bytes=tuple(stride * size for stride in strides),
      size_bytes=(storage.count - offset) * size,
    )


class _Parameter:
  """Stands for the function that torch rebuilds a parameter with, which is its tensor."""

  __slots__ = ()

  def __call__(self, tensor, *_) -> Any:
    return tensor


class _Unread:
  """Stands for what some files hold beside tensors, and no one asks for: states of layers as bytes."""

  __slots__ = ()

  def __new__(cls, *_):
    return super().__new__(cls)

  def __setstate__(self, state) -> None:
    pass


# All that a pickle may name besides storages; none of it does anything.
_NAMES = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
  ("torch._utils", "_rebuild_parameter"): _Parameter(),
  ("_io", "BytesIO"): _Unread,
  ("_codecs", "encode"): _Unread,
}


class _TensorUnpickler(pickle.Unpickler):
  """An unpickler that knows no function or class but the few above, so that a file cannot have anything run."""

  def __init__(self, file: io.BytesIO, archive: _Archive):
    super().__init__(file)
    self._archive = archive

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
      return np.dtype(_DTYPES[name])
    if (module, name) in _NAMES:
      return _NAMES[module, name]
    raise self._archive.error(
      f"names {module}.{name} in its pickle, which no file of tensors needs; it is not read further"
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, count = pid
    if kind != "storage" or not isinstance(dtype, np.dtype) or type(count) is not int:
      raise ValueError("a storage that is none")
    if not (isinstance(key, str) and key.isdecimal()):
      raise self._archive.error(f"names a storage {key!r}, which is not a number")
    start, size = self._archive.place(f"data/{key}")
    if not 0 <= count * dtype.itemsize <= size:
      raise self._archive.error(
        f"has {size} bytes in data/{key} where {count} x {dtype} were expected"
      )
    return _Storage(self._archive.path, dtype, start, count)
