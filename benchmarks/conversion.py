"""Memory and speed of conversions, on a generated checkpoint with Scout's widths and fewer layers.

  python benchmarks/conversion.py [--gigabytes 8] [--layers L] [--experts E] [--vocab V] [--folder DIR]

Writes a Hugging Face folder of random bits in bfloat16, copies it as plain files, converts it to our format and back,
each from a cold page cache and until it is on the disk, and compares every byte. Peak memory is the resident set of the
converting process, start-up and mapped files included. Results go to benchmarks/results/conversion.json; the folder
needs three times the checkpoint's size.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np
import yaml
from record import keep

from maxllama4.checkpoint.hf import SHARD_BYTES, HuggingFaceFolder, HuggingFaceWriter, tensor_table
from maxllama4.checkpoint.safetensors_files import num_bytes
from maxllama4.checkpoint.tensors import boxes
from maxllama4.config import ModelConfig, config_from_section
from maxllama4.model.weights import ModelTemplate

ROOT = pathlib.Path(__file__).parent.parent
MAIN = "import sys; from maxllama4.cli import main; sys.exit(main())"


def scout(layers: int, **changes) -> ModelConfig:
  """Scout's text model with so many layers."""
  section = yaml.safe_load((ROOT / "configs" / "models" / "llama4_scout.yml").read_text())
  section |= {"num_hidden_layers": layers, "dtype": "bfloat16", "param_dtype": "bfloat16"}
  section |= {name: None for name in section if name.endswith(("_token_id", "_token_index"))}
  section |= {"vision_config": None} | {k: v for k, v in changes.items() if v is not None}
  return config_from_section(ModelConfig, section, "scout: ")


def size_of(config: ModelConfig) -> int:
  """Bytes of a checkpoint in bfloat16."""
  shapes = ModelTemplate(config).shapes
  return 2 * sum(int(np.prod(t.part_shape(shapes[t.path].shape))) for t in tensor_table(config))


def generate(folder: pathlib.Path, config: ModelConfig) -> None:
  """A Hugging Face folder of `config`; no two pieces are alike."""
  table, shapes = tensor_table(config), ModelTemplate(config).shapes
  bits = np.random.default_rng(0).integers(0, 2**16, 2**23 + 1, np.uint16).view(jnp.bfloat16)
  writer = HuggingFaceWriter(
    folder, config, {t.path: jnp.dtype("bfloat16") for t in table}, SHARD_BYTES
  )
  folder.mkdir(parents=True)
  writer.prepare()
  writer.open()
  for number, tensor in enumerate(table):
    dims = tensor.dims(shapes[tensor.path].shape)
    for place, box in enumerate(boxes(dims, 2)):
      size = int(np.prod([part.stop - part.start for part in box]))
      writer.write(tensor, dims, box, np.resize(np.roll(bits, 1000 * number + place), size))
  writer.sync()
  writer.close()


def leave_page_cache(folder: pathlib.Path) -> None:
  """Makes the next reader go to the disk."""
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: pathlib.Path, destination: pathlib.Path) -> float:
  """Seconds to copy a folder's files as they are, until they are on the disk."""
  leave_page_cache(source)
  start = time.perf_counter()
  shutil.copytree(source, destination)
  for path in destination.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())
  seconds = time.perf_counter() - start
  shutil.rmtree(destination)
  return seconds


def convert(source: pathlib.Path, destination: pathlib.Path, to: str) -> tuple[float, float, int]:
  """Seconds, seconds of processor time, and peak resident bytes of `maxllama4 convert` in a process of its own."""
  leave_page_cache(source)
  command = [sys.executable, "-c", MAIN, "convert", str(source), str(destination), f"to={to}"]
  start = time.perf_counter()
  process = os.spawnv(os.P_NOWAIT, sys.executable, command)
  _, status, usage = os.wait4(process, 0)
  os.sync()
  if status:
    raise SystemExit(f"{' '.join(command)} failed with status {status}")
  seconds = time.perf_counter() - start
  return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def digests(folder: pathlib.Path) -> dict[str, str]:
  """A hash of every tensor's bytes, by name."""
  source = HuggingFaceFolder(folder)
  return {
    name: hashlib.blake2b(source.read(name).reshape(-1).view(np.uint8)).hexdigest()
    for name in source.tensors
  }


def measure(folder: pathlib.Path, config: ModelConfig) -> dict:
  theirs, ours, back = folder / "hf", folder / "ours", folder / "back"
  generate(theirs, config)
  size = size_of(config)
  largest = max(map(num_bytes, HuggingFaceFolder(theirs).tensors.values()))
  limit = 1.5 * largest + 1.5e9
  copies = [copy(theirs, folder / "copy")]
  rows = {}
  for name, arguments in {
    "import": (theirs, ours, "maxllama4"),
    "export": (ours, back, "hf"),
  }.items():
    seconds, processor, peak = convert(*arguments)
    rows[name] = {
      "seconds": seconds,
      "processor_seconds": processor,
      "bytes_per_second": size / seconds,
      "peak_bytes": peak,
    }
  same = digests(theirs) == digests(back)
  copies.append(copy(theirs, folder / "copy"))
  rate = size * len(copies) / sum(copies)
  for row in rows.values():
    row["share_of_copy_rate"] = row["bytes_per_second"] / rate
    row["within_memory_limit"] = row["peak_bytes"] <= limit
  return {
    "checkpoint_bytes": size,
    "layers": config.num_hidden_layers,
    "experts": config.num_local_experts,
    "vocab_size": config.vocab_size,
    "stacked_cycles": config.num_cycles,
    "largest_tensor_bytes": largest,
    "memory_limit_bytes": limit,
    "copy_seconds": copies,
    "copy_bytes_per_second": rate,
    **rows,
    "same_bytes": same,
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--gigabytes", type=float, default=8.0)
  parser.add_argument("--layers", type=int, help="instead of as many as make --gigabytes")
  parser.add_argument("--experts", type=int)
  parser.add_argument("--vocab", type=int)
  parser.add_argument("--folder", type=pathlib.Path, help="default: a temporary one")
  arguments = parser.parse_args()
  changes = {"num_local_experts": arguments.experts, "vocab_size": arguments.vocab}
  layers = arguments.layers or 1
  if arguments.layers is None:
    while size_of(scout(layers, **changes)) < arguments.gigabytes * 1e9:
      layers += 1
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    result = measure(pathlib.Path(folder), scout(layers, **changes))
  keep("conversion", ("jax", "orbax-checkpoint", "tensorstore", "numpy"), result)


if __name__ == "__main__":
  main()
