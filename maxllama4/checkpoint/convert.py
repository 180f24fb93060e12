"""From one format to another, tensor by tensor and piece by piece; what was stopped goes on where it was."""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxllama4.checkpoint.hf import SHARD_BYTES, HuggingFaceWriter, tensor_table
from maxllama4.checkpoint.run_tensors import RunWriter
from maxllama4.checkpoint.safetensors_files import read_json, write_json
from maxllama4.checkpoint.tensors import (
  Tensor,
  TensorSink,
  TensorSource,
  array_dtypes,
  boxes,
  check_tensors,
)
from maxllama4.config import DTYPES, ConfigError, ModelConfig
from maxllama4.files import sync
from maxllama4.model.weights import ModelTemplate

FORMATS = ("hf", "maxllama4")
THREADS = 4  # each holds one piece
SYNC_BYTES = 2**28  # written before the next tensors are recorded
RECORD, DONE = "conversion.json", "conversion.done"
# What belongs to a model beside its weights, copied as it stands.
COMPANIONS = (
  "generation_config.json",
  "tokenizer.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template*",
  "preprocessor_config.json",
  "processor_config.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
  """What is asked for."""

  to: str  # one of `FORMATS`
  dtype: str | None = None  # of the weights; null: each as it is
  shard_bytes: int = SHARD_BYTES  # hf: of the tensors in one file, at most
  dry_run: bool = False  # list the tensors of the result, and write nothing

  def __post_init__(self):
    if self.to not in FORMATS:
      raise ConfigError(f"to={self.to} is not one of {', '.join(FORMATS)}.")
    if self.dtype is not None and self.dtype not in DTYPES:
      raise ConfigError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}.")
    if self.shard_bytes <= 0:
      raise ConfigError(f"shard_bytes={self.shard_bytes} must be greater than 0.")


def convert(
  source: TensorSource,
  destination: pathlib.Path,
  asked: Conversion,
  out: io.TextIOBase | None = None,
) -> None:
  """Makes the folder `destination` from `source`; the folder exists only when it is complete.

  Work is kept in `destination` + ".partial" with a record of the tensors that are done, and the same call goes on from
  there. Progress goes to `out`, or to standard error. Raises: ConfigError when the source is not whole, `destination`
  holds something else, or the disk is too small, all before anything is written.
  """
  out = out or sys.stderr
  destination = destination.resolve()  # a link stays, and what it leads to is made
  plan = _plan(source, asked)
  if _is_done(destination, plan):
    out.write(f"{destination} is complete already\n")
    return
  config, dtypes = _result_of(source, asked, out)
  partial = _partial(destination)
  sink = _sink(partial, source, config, dtypes, asked)
  total = sum(size for _, size in sizes(source, dtypes))
  check_space(destination, total, *_space(partial))
  if not _is_started(partial, plan):
    _prepare(partial, source.folder, sink)
    write_json(partial / RECORD, plan)
  progress = Progress(total, out)
  _write_tensors(source, sink, dtypes, partial / DONE, progress.add)
  progress.close()
  _finish(partial, destination)


def save(source: TensorSource, destination: pathlib.Path, asked: Conversion) -> None:
  """`convert` without a word, and always from the start: for a source that is not a file."""
  config, dtypes = _result_of(source, asked, sys.stderr)
  destination = destination.resolve()
  partial = _partial(destination)
  sink = _sink(partial, source, config, dtypes, asked)
  _prepare(partial, None, sink)
  _write_tensors(source, sink, dtypes, partial / DONE, lambda size, copied=True: None)
  _finish(partial, destination)


def _partial(destination: pathlib.Path) -> pathlib.Path:
  """Where the work is kept, on the same disk. Raises: ConfigError when it could not become `destination`."""
  if destination.is_mount():
    raise ConfigError(
      f"{destination} is a mount point and cannot be replaced; give a folder in it."
    )
  return destination.with_name(f"{destination.name}.partial")


def _prepare(partial: pathlib.Path, companions: pathlib.Path | None, sink: TensorSink) -> None:
  """Starts afresh. Raises: ConfigError when `partial` is something else than what a conversion left."""
  if partial.exists() and any(partial.iterdir()) and not (partial / DONE).exists():
    raise ConfigError(f"{partial} is needed for the work, but holds something else; move it away.")
  partial.mkdir(parents=True, exist_ok=True)
  (partial / DONE).touch()  # from now on, and until all is done, this says whose folder it is
  for path in partial.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    elif path.name != DONE:
      path.unlink()
  (partial / DONE).write_bytes(b"")
  if companions is not None:
    _copy_companions(companions, partial)
  sink.prepare()


def _finish(partial: pathlib.Path, destination: pathlib.Path) -> None:
  """Makes `destination` of what is complete, once all of it is on the disk."""
  for path in (*partial.rglob("*"), partial):
    sync(path)
  (partial / DONE).unlink()
  if destination.exists():
    destination.rmdir()  # it is empty
  os.replace(partial, destination)
  sync(destination.parent)


def _result_of(
  source: TensorSource, asked: Conversion, out: io.TextIOBase
) -> tuple[ModelConfig, dict[str, Any]]:
  """The configuration of the result, and the dtype of each array by path; says what is lost on the way."""
  ignored = check_tensors(source, ModelTemplate(source.config).shapes)
  if ignored:
    out.write(f"skipped, as no model needs them: {', '.join(ignored)}\n")
  if asked.to == "hf":
    source.check_exportable()
  if asked.dtype is not None:
    config = dataclasses.replace(source.config, dtype=asked.dtype, param_dtype=asked.dtype)
    return config, {tensor.path: jnp.dtype(asked.dtype) for tensor in source.table}
  dtypes = array_dtypes(source)
  widened = [t.name for t in source.table if source.tensors[t.name].dtype != dtypes[t.path]]
  if widened:
    out.write(
      f"of one dtype with the rest of their stack, wider than before: {', '.join(widened)}\n"
    )
  return source.config, dtypes


def _sink(
  folder: pathlib.Path,
  source: TensorSource,
  config: ModelConfig,
  dtypes: dict[str, Any],
  asked: Conversion,
) -> TensorSink:
  if asked.to == "hf":
    return HuggingFaceWriter(folder, config, dtypes, asked.shard_bytes)
  return RunWriter(folder, config, source.table, dtypes)


def sizes(source: TensorSource, dtypes: dict[str, Any]) -> list[tuple[Tensor, int]]:
  """Every tensor with its bytes in the result."""
  return [
    (tensor, int(np.prod(source.tensors[tensor.name].shape)) * dtypes[tensor.path].itemsize)
    for tensor in source.table
  ]


def check_space(destination: pathlib.Path, needed: int, free: int, kept: int = 0) -> None:
  """Raises: ConfigError unless `needed` bytes fit into those `free` and those `kept` from an earlier start."""
  needed += 2**24 + needed // 1000  # headers and indices
  if needed > free + kept:
    raise ConfigError(
      f"{destination} needs {needed / 1e9:,.2f} GB, and its disk has {(free + kept) / 1e9:,.2f} GB free; make room, or"
      " write elsewhere."
    )


def _space(partial: pathlib.Path) -> tuple[int, int]:
  """Bytes free on the disk of `partial`, and those that it has taken already."""
  parent = next(folder for folder in partial.parents if folder.exists())
  blocks = [path.stat().st_blocks for path in partial.rglob("*")] if partial.exists() else []
  return shutil.disk_usage(parent).free, 512 * sum(blocks)


# Stopping and going on


def _plan(source: TensorSource, asked: Conversion) -> dict[str, Any]:
  """What a result is made from; the same for the same command and the same source."""
  digest = hashlib.blake2b(digest_size=16)
  for path in source.files:
    facts = path.stat()
    digest.update(f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
  return {
    **dataclasses.asdict(asked),
    "source": source.folder.name,
    "source_digest": digest.hexdigest(),
  }


def _is_done(destination: pathlib.Path, plan: dict[str, Any]) -> bool:
  """Whether `destination` is the result already. Raises: ConfigError when it is something else."""
  if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
    return False
  record = destination / RECORD
  if record.exists() and read_json(record) == plan:
    return True
  raise ConfigError(f"{destination} already holds something; give a new or empty folder.")


def _is_started(partial: pathlib.Path, plan: dict[str, Any]) -> bool:
  """Whether `partial` is the beginning of this very conversion. Raises: ConfigError when it is of another."""
  if not (partial / RECORD).exists():
    return False  # nothing, or stopped before the first tensor
  if read_json(partial / RECORD) == plan:
    return True
  raise ConfigError(
    f"{partial} is the beginning of another conversion, or its source has changed; delete it, or give that command again."
  )


def _done(record: pathlib.Path) -> set[str]:
  """Names of the tensors that are written; a last line that was cut off does not count."""
  text = record.read_text(encoding="utf-8") if record.exists() else ""
  return set(text.rpartition("\n")[0].splitlines())


def _write_tensors(
  source: TensorSource,
  sink: TensorSink,
  dtypes: dict[str, Any],
  record: pathlib.Path,
  report: Callable[..., None],
) -> None:
  """Writes the tensors that `record` does not list, and lists them there once they are on the disk."""
  shapes = ModelTemplate(source.config).shapes
  done, written, unsynced = _done(record), [], 0
  _cut_to_lines(record)

  def keep(names):
    sink.sync()
    with record.open("a", encoding="utf-8") as file:
      file.writelines(f"{name}\n" for name in names)
      file.flush()
      os.fsync(file.fileno())

  sink.open()
  pools = concurrent.futures.ThreadPoolExecutor
  try:
    with pools(THREADS) as threads, pools(1) as recorder:
      recorded = recorder.submit(keep, [])
      for tensor, size in sizes(source, dtypes):
        if tensor.name in done:
          report(size, copied=False)
          continue
        for copied in _copy(source, sink, tensor, shapes[tensor.path].shape, dtypes, threads):
          report(copied)
        written.append(tensor.name)
        unsynced += size
        if unsynced >= SYNC_BYTES:
          recorded.result()  # the last one; the next tensors are copied meanwhile
          recorded, written, unsynced = recorder.submit(keep, written), [], 0
      recorded.result()
      keep(written)
  finally:
    sink.close()


def _cut_to_lines(record: pathlib.Path) -> None:
  """Takes back a last line that was cut off, so that the next one is not appended to it."""
  if record.exists():
    text = record.read_text(encoding="utf-8")
    record.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def _copy(
  source: TensorSource,
  sink: TensorSink,
  tensor: Tensor,
  shape: tuple[int, ...],
  dtypes: dict[str, Any],
  threads: concurrent.futures.Executor,
) -> Iterator[int]:
  """Copies one tensor, its pieces in parallel; yields the bytes of each."""
  dims, dtype = tensor.dims(shape), dtypes[tensor.path]
  view = source.view(tensor, dims)

  def copy(box):
    piece = _cast(np.asarray(view[box]), dtype, tensor.name)
    sink.write(tensor, dims, box, piece)
    return piece.nbytes

  return threads.map(copy, boxes(dims, dtype.itemsize))


def _cast(piece: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """The piece of tensor `name` in `dtype`. Raises: ConfigError where numbers become infinite: float16 ends at 65504."""
  if dtype == piece.dtype:
    return piece
  with np.errstate(over="ignore"):
    cast = piece.astype(dtype)
  if dtype == np.float16 and np.isinf(cast).sum() != np.isinf(piece).sum():
    raise ConfigError(f"{name} has numbers beyond 65504, the end of dtype=float16; take bfloat16.")
  return cast


def _copy_companions(source: pathlib.Path, destination: pathlib.Path) -> None:
  for pattern in COMPANIONS:
    for path in source.glob(pattern):
      if path.is_dir():
        shutil.copytree(path, destination / path.name)
      else:
        shutil.copyfile(path, destination / path.name)


# What the user sees


def describe(source: TensorSource, asked: Conversion, out: io.TextIOBase) -> None:
  """Prints every tensor of the result with its shape, dtype and bytes, and what would be skipped; writes no file."""
  dtypes = _result_of(source, asked, out)[1]
  named = tensor_table(source.config) if asked.to == "hf" else source.table
  names = {(tensor.path, tensor.stack_index, tensor.within): tensor.name for tensor in named}
  rows = [
    (
      names[t.path, t.stack_index, t.within],
      str(list(source.tensors[t.name].shape)),
      str(dtypes[t.path]),
      f"{size:,}",
    )
    for t, size in sizes(source, dtypes)
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  for name, shape, dtype, size in rows:
    out.write(
      f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}\n"
    )
  total = sum(size for _, size in sizes(source, dtypes))
  out.write(f"{len(rows)} tensors, {total:,} bytes ({total / 1e9:,.2f} GB)\n")


class Progress:
  """A live bar in a terminal, a line every ten seconds into a pipe."""

  def __init__(self, total: int, out: io.TextIOBase):
    self._total, self._out = max(total, 1), out
    self._passed = self._copied = 0
    self._start = self._shown = time.monotonic()

  def add(self, size: int, copied: bool = True) -> None:
    """`size` more bytes are done, copied now or found done already."""
    self._passed += size
    self._copied += size if copied else 0
    if time.monotonic() - self._shown > (0.2 if self._out.isatty() else 10):
      self._show()

  def close(self) -> None:
    self._show()
    self._out.write("\n" if self._out.isatty() else "")

  def _show(self) -> None:
    self._shown = time.monotonic()
    share, rate = self._passed / self._total, self._copied / max(self._shown - self._start, 1e-9)
    left = (self._total - self._passed) / rate if rate else 0
    bar = "#" * int(30 * share)
    text = (
      f"[{bar:<30}] {share:4.0%}  {self._passed / 1e9:,.2f} of {self._total / 1e9:,.2f} GB"
      f"  {rate / 1e6:,.0f} MB/s  {left:,.0f} s left"
    )
    self._out.write(f"\r\x1b[2K{text}" if self._out.isatty() else f"{text}\n")
    self._out.flush()
