"""Tensors of a checkpoint file and where they live in the model; whatever holds such tensors, read piece by piece.

A piece is a contiguous range of a file's tensor, and a box of one of our arrays. Everything that streams works on
pieces, so memory does not grow with the checkpoint.
"""

import abc
import dataclasses
import functools
import itertools
import math
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxllama4.config import ConfigError, ModelConfig
from maxllama4.model.weights import Arrays, ModelTemplate

PIECE_BYTES = (
  16 * 2**20
)  # small enough for the C library to reuse its memory instead of asking for new pages
DTYPES = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))
# Ends of names that some checkpoints carry and no model needs: tables that are computed, and training's counters.
IGNORABLE = (
  "rope.freqs",
  "freqs_cis",
  "freq_cis",
  "freqs_ci",
  "rotary_emb.inv_freq",
  "_extra_state",
  "global_gate_stats_3E",
  "running_gate_stats_3E",
  "expert_activation_DE",
)

Box = tuple[slice, ...]  # a part of a tensor, in its `dims`


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file and the part of an array of the model that it holds.

  `groups[i]` are the dims of that part that make up dim i of the file's tensor.
  """

  name: str
  path: str
  groups: tuple[tuple[int, ...], ...]
  stack_index: int | None = None  # place along the leading axis of a stack of scanned layers
  within: tuple[int | None, ...] = ()  # places along the (unstacked) array's first axes; None: all

  @property
  def index(self) -> tuple[int | slice, ...]:
    """What to index the whole array with to get the part."""
    places = (*(() if self.stack_index is None else (self.stack_index,)), *self.within)
    return tuple(slice(None) if place is None else place for place in places)

  @property
  def order(self) -> tuple[int, ...]:
    """The dims of the part in the order in which the file has them."""
    return tuple(dim for group in self.groups for dim in group)

  def part_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the part of an array of `shape`."""
    return np.broadcast_to(0, shape)[self.index].shape

  def dims(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the part's dims in the order of the file, of an array of `shape`."""
    part = self.part_shape(shape)
    return tuple(part[dim] for dim in self.order)

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file, given the shape of the part."""
    return tuple(math.prod(shape[dim] for dim in group) for group in self.groups)

  def from_file(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The part, of `shape`, as a view of the file's tensor."""
    return tensor.reshape([shape[dim] for dim in self.order]).transpose(np.argsort(self.order))

  def to_file(self, part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part.transpose(self.order)).reshape(self.file_shape(part.shape))


class TensorSource(abc.ABC):
  """A model's tensors under Hugging Face's names, wherever they come from.

  A format is one subclass: it says what there is, and reads one tensor at a time.
  """

  config: ModelConfig  # `param_dtype` and `dtype` are those of the tensors
  table: list[Tensor]  # what the model is made of
  tensors: dict[str, jax.ShapeDtypeStruct]  # what there is, by name
  folder: pathlib.Path  # that may hold a tokenizer and other companions of the model
  files: list[pathlib.Path]  # what the tensors are read from
  name: str  # for messages

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """The tensor `name`, possibly a view of a file whose pages are read when they are touched."""

  def view(self, tensor: Tensor, dims: tuple[int, ...]) -> Any:
    """The tensor in `dims`; indexed with a box and given to `np.asarray`, it yields a piece."""
    return self.read(tensor.name).reshape(dims)

  def arrays(
    self, template: ModelTemplate, shardings: dict[str, jax.sharding.Sharding] | None = None
  ) -> Arrays:
    """The model's arrays by path, each device's part read by itself; `shardings` None: on the default device.

    Router biases, which no file has, are zero. Raises: ConfigError listing what is missing, unexpected or misshapen,
    before anything is read.
    """
    ignored = check_tensors(self, template.shapes)
    if ignored:
      warnings.warn(f"{self.name}: skipped {', '.join(ignored)}.", stacklevel=2)
    by_path: dict[str, list[Tensor]] = {}
    for tensor in self.table:
      by_path.setdefault(tensor.path, []).append(tensor)
    dtypes = array_dtypes(self)

    def read(path, shape, index):
      dtype = dtypes.get(path, shape.dtype)
      return _read_part(self, by_path.get(path, []), shape.shape, dtype, index)

    return place_arrays(template.shapes, shardings, read)

  def check_exportable(self) -> None:  # noqa: B027
    """Warns of what a Hugging Face folder has no place for. Raises: ConfigError when it cannot be written from here."""


class TensorSink(abc.ABC):
  """A checkpoint in the making: `prepare` once, then `open`, and `write` in any order and from any thread.

  What was written and `sync`ed before a crash is still there when the same sink is opened again.
  """

  @abc.abstractmethod
  def prepare(self) -> None:
    """Makes everything but the tensors' content, anew."""

  @abc.abstractmethod
  def open(self) -> None:
    """Gets ready to write, into what `prepare` made."""

  @abc.abstractmethod
  def write(self, tensor: Tensor, dims: tuple[int, ...], box: Box, piece: np.ndarray) -> None:
    """Puts `piece`, in the dtype to be stored, into `box` of the tensor in `dims`."""

  @abc.abstractmethod
  def sync(self) -> None:
    """Returns when all that was written is on the disk."""

  @abc.abstractmethod
  def close(self) -> None: ...


def check_tensors(source: TensorSource, shapes: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
  """Names in `source` that may be ignored; `shapes` are those of the model's arrays.

  Raises: ConfigError listing every tensor that is missing, unexpected, or of a shape or dtype that it cannot have.
  """
  known = {tensor.name for tensor in source.table}
  extra = sorted(set(source.tensors) - known)
  ignored = [name for name in extra if is_ignorable(name, source.config)]
  problems = [f"{name} is not part of the model" for name in extra if name not in ignored]
  for tensor in source.table:
    shape = shapes[tensor.path].shape
    expected = tensor.file_shape(tensor.part_shape(shape))
    found = source.tensors.get(tensor.name)
    if found is None:
      problems.append(f"{tensor.name} {list(expected)} is missing")
    elif tuple(found.shape) != expected:
      problems.append(f"{tensor.name} is {list(found.shape)} where {list(expected)} was expected")
    elif jnp.dtype(found.dtype) not in DTYPES:
      names = ", ".join(map(str, DTYPES))
      problems.append(f"{tensor.name} is of {found.dtype} where one of {names} was expected")
  if problems:
    raise ConfigError(
      f"{source.name} does not hold the model that its configuration describes: {'; '.join(problems)}."
    )
  return ignored


def is_ignorable(name: str, config: ModelConfig) -> bool:
  """Whether a tensor may be left out: no part of any model, or the copy of the embedding that a tied head is."""
  tied = config.tie_word_embeddings and name.endswith("lm_head.weight")
  return tied or any(name == end or name.endswith((f".{end}", f"_{end}")) for end in IGNORABLE)


def array_dtypes(source: TensorSource) -> dict[str, jnp.dtype]:
  """The dtype of each array by path: that of its tensors, or one that holds all of them."""
  dtypes: dict[str, jnp.dtype] = {}
  for tensor in source.table:
    dtype = jnp.dtype(source.tensors[tensor.name].dtype)
    dtypes[tensor.path] = jnp.promote_types(dtypes.get(tensor.path, dtype), dtype)
  return dtypes


def box_shape(dims: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """Sizes of the pieces of a tensor: contiguous, nearly equal, at most `PIECE_BYTES`."""
  sizes, size = [1] * len(dims), itemsize
  for axis in reversed(range(len(dims))):
    fitting = max(1, PIECE_BYTES // size)
    if dims[axis] > fitting:
      sizes[axis] = math.ceil(dims[axis] / math.ceil(dims[axis] / fitting))
      break
    sizes[axis] = dims[axis]
    size *= dims[axis]
  return tuple(sizes)


def boxes(dims: tuple[int, ...], itemsize: int) -> list[Box]:
  """The pieces of a tensor, in the order in which they lie in a file."""
  starts = [range(0, dim, size) for dim, size in zip(dims, box_shape(dims, itemsize))]
  return [
    tuple(slice(s, min(s + r.step, dim)) for s, r, dim in zip(start, starts, dims))
    for start in itertools.product(*starts)
  ]


def place_arrays(
  shapes: dict[str, jax.ShapeDtypeStruct],
  shardings: dict[str, jax.sharding.Sharding] | None,
  read: Callable[[str, jax.ShapeDtypeStruct, Box], np.ndarray],
) -> Arrays:
  """Arrays on their devices; `read` gives the box of an array that one device holds."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {
    path: jax.make_array_from_callback(
      shape.shape,
      device if shardings is None else shardings[path],
      functools.partial(read, path, shape),
    )
    for path, shape in shapes.items()
  }


def _read_part(
  source: TensorSource, tensors: list[Tensor], shape: tuple[int, ...], dtype: Any, index: Box
) -> np.ndarray:
  """The box `index` of an array of `shape`, put together from the tensors that reach into it."""
  bounds = [part.indices(size)[:2] for part, size in zip(index, shape)]
  result = np.zeros([stop - start for start, stop in bounds], dtype)
  for tensor in tensors:
    places = [*tensor.index, *[slice(None)] * (len(shape) - len(tensor.index))]
    if all(start <= p < stop for p, (start, stop) in zip(places, bounds) if isinstance(p, int)):
      target = [p - b[0] if isinstance(p, int) else p for p, b in zip(places, bounds)]
      wanted = [slice(*b) for p, b in zip(places, bounds) if not isinstance(p, int)]
      box = tuple(wanted[dim] for dim in tensor.order)
      piece = np.asarray(source.view(tensor, tensor.dims(shape))[box])
      result[tuple(target)] = piece.transpose(np.argsort(tensor.order))
  return result
