"""Safetensors and JSON files, read and written piece by piece.

A safetensors file is eight bytes of length, that much JSON (dtype, shape and place of each tensor), and the tensors'
bytes. Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxllama4.config import ConfigError

_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
}
_CODES = {jnp.dtype(name): code for code, name in _DTYPES.items()}
_MAX_HEADER_BYTES = 10**8  # as in the reference


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor in a file."""

  file: pathlib.Path
  offset: int  # bytes from the start of the file
  shape: jax.ShapeDtypeStruct

  def open(self) -> np.ndarray:
    """The tensor, mapped into memory: its pages are read when they are touched, and let go with the array."""
    return np.memmap(self.file, self.shape.dtype, "r", self.offset, tuple(self.shape.shape))


class FileView:
  """A tensor in a file, in `dims`; indexed with a box it reads that."""

  def __init__(self, entry: Entry, dims: tuple[int, ...]):
    self._entry, self._dims = entry, dims

  def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
    sizes = [part.stop - part.start for part in box]
    cut = next((axis for axis, size in enumerate(sizes) if size > 1), len(sizes))
    if list(self._dims[cut + 1 :]) != sizes[cut + 1 :]:
      return self._entry.open().reshape(self._dims)[box]
    # A contiguous range. Reading it is faster than touching its pages, and mapped pages count as our memory.
    dtype = jnp.dtype(self._entry.shape.dtype)
    start = int(np.ravel_multi_index([part.start for part in box], self._dims))
    count, offset = math.prod(sizes) * dtype.itemsize, self._entry.offset + start * dtype.itemsize
    return np.fromfile(self._entry.file, np.uint8, count, offset=offset).view(dtype).reshape(sizes)


def num_bytes(tensor: jax.ShapeDtypeStruct) -> int:
  return math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize


def read_header(path: pathlib.Path) -> dict[str, Entry]:
  """What the file at `path` holds, by name. Raises: ConfigError when it is no safetensors file, or cut short."""
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MAX_HEADER_BYTES):
      raise ConfigError(f"{path} is cut short, or no safetensors file; copy it again.")
    try:
      header = json.loads(file.read(length))
      header.pop("__metadata__", None)
      entries = {name: _entry(path, 8 + length, name, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise ConfigError(f"{path} has no safetensors header ({error}); copy it again.") from None
  end = 8 + length
  for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
    if entry.offset < end:
      raise ConfigError(f"{path}: {name} overlaps the tensor before it; copy the file again.")
    end = entry.offset + num_bytes(entry.shape)
  if end > size:
    raise ConfigError(
      f"{path} is cut short: {size} bytes where {end} were expected; copy it again."
    )
  return entries


def _entry(path: pathlib.Path, start: int, name: str, entry: dict[str, Any]) -> Entry:
  """What the header says of a tensor. Raises: ValueError when it contradicts itself."""
  dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
  if dtype not in _DTYPES:
    raise ValueError(f"{name}: dtype {dtype} is unknown")
  if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
    raise ValueError(f"{name}: {entry} is no shape and place")
  shape = jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(_DTYPES[dtype]))
  if end - begin != num_bytes(shape):
    raise ValueError(f"{name} has {end - begin} bytes where {num_bytes(shape)} were expected")
  return Entry(path, start + begin, shape)


class SafetensorsWriter:
  """Writes into a file that `create` made, anywhere in its tensors and from any thread."""

  def __init__(self, path: pathlib.Path):
    self._entries = read_header(path)
    self._file = os.open(path, os.O_WRONLY)

  @staticmethod
  def create(path: pathlib.Path, tensors: dict[str, jax.ShapeDtypeStruct]) -> None:
    """A file of its final size at `path`, with a header for `tensors` and no content yet."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
      code, end = _CODES[jnp.dtype(tensor.dtype)], offset + num_bytes(tensor)
      header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
      offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      file.truncate(8 + len(text) + offset)

  @property
  def names(self) -> list[str]:
    return list(self._entries)

  def write(self, name: str, start: int, piece: np.ndarray) -> None:
    """Puts `piece` at element `start` of the tensor `name`."""
    data = memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
    offset = self._entries[name].offset + start * piece.dtype.itemsize
    while len(data):
      written = os.pwrite(self._file, data, offset)
      data, offset = data[written:], offset + written

  def sync(self) -> None:
    """Returns when all that was written is on the disk."""
    os.fdatasync(self._file)

  def close(self) -> None:
    os.close(self._file)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a file. Raises: ConfigError when there is none."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path.") from None
  except (ValueError, RecursionError) as error:
    raise ConfigError(f"{path} is not valid JSON ({error}).") from None
  if not isinstance(content, dict):
    raise ConfigError(f"{path} holds a JSON {type(content).__name__} where an object was expected.")
  return content


def check_kinds(raw: dict[str, Any], kinds: dict[str, type], source: str | pathlib.Path) -> None:
  """Checks values of a JSON object that are not null. Raises: ConfigError naming `source` and the first that is wrong."""
  for name, kind in kinds.items():
    value = raw.get(name)
    if value is not None and type(value) is not kind:
      raise ConfigError(f"{source}: {name}={value!r} must be a JSON {_KINDS[kind]}.")


_KINDS = {dict: "object", list: "array", int: "whole number", str: "string"}


def write_json(path: pathlib.Path, value: Any) -> None:
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(temporary, path)
