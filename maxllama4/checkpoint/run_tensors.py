"""Our own checkpoints read and written piece by piece: the arrays that Orbax keeps, opened with TensorStore.

Orbax hands over whole arrays, and a stack of scanned layers is one array. Its files are TensorStore's zarr arrays in one
database (OCDBT) a checkpoint, in which any box of an array can be read or written; see docs/decisions/0005.
"""

import contextlib
import math
import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
import yaml

from maxllama4.checkpoint import tensors as pieces
from maxllama4.checkpoint.checksums import remove_records
from maxllama4.checkpoint.hf import tensor_table, warn_of_biases
from maxllama4.checkpoint.safetensors_files import read_json
from maxllama4.checkpoint.store import CHECKPOINTS, CheckpointStore
from maxllama4.checkpoint.tensors import (
  Box,
  Tensor,
  TensorSink,
  TensorSource,
  box_shape,
  place_arrays,
)
from maxllama4.config import ConfigError, ModelConfig, model_to_section
from maxllama4.model.weights import Arrays, ModelTemplate

# A chunk that is not there is an error, not zeros; so zeros are written out.
_WHOLE = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}


class RunTensors(TensorSource):
  """The tensors of one checkpoint of a run directory, whose `config` is the run's.

  Raises: ConfigError when an array is misshapen; OSError when one is missing or damaged, also as it is read.
  """

  def __init__(self, run_dir: pathlib.Path, step: int, config: ModelConfig):
    self.folder, self.config, self.name = run_dir, config, str(run_dir)
    self._model = run_dir / CHECKPOINTS / str(step) / "model"
    self.files = [run_dir / "config.yml", self._model / "_METADATA", self._model / "manifest.ocdbt"]
    self._metadata = read_json(self._model / "_METADATA")
    self.table = tensor_table(config)
    template = ModelTemplate(config)
    self._arrays = {path: self._open(path) for path in template.shapes}
    problems = [
      f"{path} is {list(self._arrays[path].shape)} where {list(shape.shape)} was expected"
      for path, shape in template.shapes.items()
      if tuple(self._arrays[path].shape) != shape.shape
    ]
    if problems:
      raise ConfigError(
        f"{run_dir} does not hold the model of its config.yml: {'; '.join(problems)}."
      )
    self.tensors = {}
    for tensor in self.table:
      array = self._arrays[tensor.path]
      shape = tensor.file_shape(tensor.part_shape(tuple(array.shape)))
      self.tensors[tensor.name] = jax.ShapeDtypeStruct(shape, array.dtype.numpy_dtype)

  def _open(self, path: str) -> tensorstore.TensorStore:
    driver = "zarr3" if self._metadata.get("use_zarr3") else "zarr"
    spec = {"driver": driver, "kvstore": _database(self._model, path)} | _WHOLE
    try:
      return tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
      raise self._damaged(path, error) from None

  def _numbers(self, path: str, box: Any) -> np.ndarray:
    try:
      return self._arrays[path][box].read().result()
    except ValueError as error:
      raise self._damaged(path, error) from None

  def _damaged(self, path: str, error: ValueError) -> OSError:
    reason = str(error).partition(" [tensorstore_spec")[0]
    return OSError(
      f"{self._model}: the array {path} cannot be read; take another checkpoint ({reason})."
    )

  def arrays(
    self, template: ModelTemplate, shardings: dict[str, jax.sharding.Sharding] | None = None
  ) -> Arrays:
    return place_arrays(template.shapes, shardings, lambda path, _, box: self._numbers(path, box))

  def read(self, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in self.table if tensor.name == name)
    return tensor.to_file(self._numbers(tensor.path, tensor.index))

  def view(self, tensor: Tensor, dims: tuple[int, ...]) -> Any:
    array = self._arrays[tensor.path]
    part = array[tensor.index].transpose(tensor.order)
    chunk = math.prod(array.chunk_layout.read_chunk.shape) * array.dtype.numpy_dtype.itemsize
    return part if chunk <= pieces.PIECE_BYTES else part.read().result()  # each chunk once

  def check_exportable(self) -> None:
    biases = [array for path, array in self._arrays.items() if path.endswith("router/bias")]
    warn_of_biases(array.read().result() for array in biases)


class RunWriter(TensorSink):
  """A run directory with one checkpoint, step 0, of a model alone; Orbax restores it like any other."""

  def __init__(
    self, folder: pathlib.Path, config: ModelConfig, table: list[Tensor], dtypes: dict[str, Any]
  ):
    """`table` are the tensors that will come, `dtypes` those to store, by path."""
    self._folder, self._config, self._table, self._dtypes = folder, config, table, dtypes
    self._model = folder.absolute() / CHECKPOINTS / "0" / "model"
    self._arrays: dict[str, tensorstore.TensorStore] = {}
    self._lock = threading.Lock()
    self._context = tensorstore.Context({"file_io_sync": False})  # `sync` does it

  def prepare(self) -> None:
    """Lets Orbax save a checkpoint of numbers in place of the arrays, and gives each its array instead."""
    section = yaml.safe_dump(model_to_section(self._config), sort_keys=False)
    (self._folder / "config.yml").write_text(section, encoding="utf-8")
    template = ModelTemplate(self._config)
    store = CheckpointStore(self._folder)
    stand_ins = {path: jnp.zeros(1, self._dtype(path, s)) for path, s in template.shapes.items()}
    store.save(0, stand_ins, {"step": jnp.zeros((), jnp.int32)}, {})
    store.close()
    remove_records(self._model.parent)  # of the stand-ins
    tensors = {tensor.path: tensor for tensor in self._table}
    for path, shape in template.shapes.items():
      dtype = self._dtype(path, shape)
      metadata = {
        "shape": list(shape.shape),
        "chunks": _chunks(tensors.get(path), shape.shape, dtype.itemsize),
        "compressor": None,  # weights hardly shrink
      }
      spec = {
        "driver": "zarr",
        "dtype": str(dtype),
        "metadata": metadata,
        "kvstore": _database(self._model, path),
      } | _WHOLE
      array = tensorstore.open(spec, create=True, delete_existing=True).result()
      if path not in tensors:
        array.write(np.zeros(shape.shape, dtype)).result()  # router biases

  def _dtype(self, path: str, shape: jax.ShapeDtypeStruct) -> np.dtype:
    return jnp.dtype(self._dtypes.get(path, shape.dtype))

  def open(self) -> None:
    self._arrays = {}

  def write(self, tensor: Tensor, dims: tuple[int, ...], box: Box, piece: np.ndarray) -> None:
    with self._lock:
      if tensor.path not in self._arrays:
        spec = {"driver": "zarr", "kvstore": _database(self._model, tensor.path)} | _WHOLE
        self._arrays[tensor.path] = tensorstore.open(
          spec, open=True, write=True, context=self._context
        ).result()
    part = self._arrays[tensor.path][tensor.index].transpose(tensor.order)
    part[box].write(piece).result()

  def sync(self) -> None:
    """Brings the database's files to the disk, together: TensorStore would wait for each, one after the other."""
    for path in (self._folder / CHECKPOINTS).rglob("*"):
      if path.is_file():
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # a lock file goes
          os.fsync(file.fileno())

  def close(self) -> None:
    self._arrays = {}


def _database(model: pathlib.Path, path: str) -> dict[str, str]:
  return {"driver": "ocdbt", "base": f"file://{model.absolute()}/", "path": f"{path}/"}


def _chunks(tensor: Tensor | None, shape: tuple[int, ...], itemsize: int) -> list[int]:
  """Chunks of an array such that each piece of its tensors is one; None: no file has this array."""
  if tensor is None:
    return list(shape)
  pieces = iter(np.array(box_shape(tensor.dims(shape), itemsize))[np.argsort(tensor.order)])
  places = [*tensor.index, *[slice(None)] * (len(shape) - len(tensor.index))]
  return [1 if isinstance(place, int) else int(next(pieces)) for place in places]
