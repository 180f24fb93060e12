"""One process of several, for test_hosts.py.

`hosts_driver.py FOLDER train CONFIG.yml key=value ...` is `maxllama4 train`, and writes what it trains on, a line a batch,
to FOLDER/data-ID.jsonl. Instead of `train`: `collectives` adds numbers with the others; `batches` checks on meshes of every
kind that each device gets its part of the batch, and prints the rows that this process reads.
HOLD_AT=N: before batch N (from 0) it writes FOLDER/held-ID and sleeps; PACE=S: seconds between batches; FAIL_AT=N: at
batch N it raises a ConfigError.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
import numpy as np

from maxllama4 import cli
from maxllama4.config import ConfigError

FOLDER = pathlib.Path(sys.argv[1])
HOLD_AT, FAIL_AT = (int(os.environ.get(name, -1)) for name in ("HOLD_AT", "FAIL_AT"))
PACE = float(os.environ.get("PACE", 0))


def before_batch(number):
  time.sleep(PACE)
  if number == FAIL_AT:
    raise ConfigError("data.paths=[here] is not what it should be.")
  if number == HOLD_AT:
    (FOLDER / f"held-{jax.process_index()}").touch()
    time.sleep(1000)


def record_data():
  """Makes the loader write down where each of its batches comes from."""
  from maxllama4.data.loader import TrainLoader

  next_batch, numbers = TrainLoader.__next__, iter(range(1_000_000))

  def recorded(loader):
    before_batch(next(numbers))
    position = loader.get_state()
    batch = next_batch(loader)
    with (FOLDER / f"data-{jax.process_index()}.jsonl").open("a") as file:
      file.write(json.dumps(loader.describe(batch, position)) + "\n")
    return batch

  TrainLoader.__next__ = recorded


def collectives(words):
  """A command: sums over all devices until something happens."""
  from maxllama4.config import load_config
  from maxllama4.hosts import start_hosts

  with start_hosts(load_config(words[0], words[1:])):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    ones = jax.make_array_from_process_local_data(rows, np.ones(jax.local_device_count()))
    add = jax.jit(lambda x: x.sum(), out_shardings=everywhere)
    for number in range(10_000):
      before_batch(number)
      assert add(ones) == jax.device_count()


def batches(words):
  """A command: the first batch, from each process's rows, on meshes that split rows, columns, or neither over hosts."""
  from maxllama4.config import MeshConfig, load_config
  from maxllama4.data.loader import make_loader
  from maxllama4.hosts import start_hosts
  from maxllama4.mesh import build_mesh
  from maxllama4.sharding import use_mesh
  from maxllama4.training.evaluate import local_rows, place_batch

  config = load_config(words[0], words[1:])
  expected = next(make_loader(config, None))
  with start_hosts(config):
    for axes in (
      {"data": 8},
      {"data": 2, "tensor": 4},
      {"data": 1, "tensor": 8},
      {"data": 1, "context": 8},
    ):
      mesh = MeshConfig(**{"fsdp": 1} | axes)
      config = dataclasses.replace(config, mesh=mesh)
      with use_mesh(build_mesh(config), mesh) as context:
        rows = local_rows(config, context)
        batch = place_batch(next(make_loader(config, None, rows)), config, context)
      for name, array in batch.items():
        for shard in array.addressable_shards:
          np.testing.assert_array_equal(shard.data, expected[name][shard.index])
      print(rows[0], rows[-1], len(rows))


if __name__ == "__main__":
  if sys.argv[2] == "train":
    record_data()
  cli.COMMANDS |= {"collectives": collectives, "batches": batches}
  sys.exit(cli.main(sys.argv[2:]))
