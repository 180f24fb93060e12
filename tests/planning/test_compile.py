"""Programs compiled for machines that are not there, by the TPU's own compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_run

from maxllama4.chips import CHIPS
from maxllama4.config import ConfigError, MeshConfig
from maxllama4.planning import compile as planning_compile
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.compile import (
  CompilerError,
  _overflow,
  _text_of,
  compile_train_step,
  described_devices,
)
from maxllama4.sharding import MeshContext
from maxllama4.training.footprint import bytes_per_device
from maxllama4.xla_flags import PRESETS

GIB = 2**30


@pytest.fixture(scope="module")
def config():
  return tiny_run(mesh=MeshConfig(fsdp=4), batch_size=4)


@pytest.fixture(scope="module")
def step(config):
  pytest.importorskip("libtpu")
  return compile_train_step(config, parse_topology("v5p:2x2x1"))


def test_the_training_step_compiles_for_chips_that_are_not_there(step):
  compiled, text = step
  assert compiled.fits and text.startswith("HloModule jit_train_step")
  assert compiled.summary.executed_flops > 0 and compiled.summary.estimated_cycles > 0
  assert {c.axes for c in compiled.summary.collectives} == {("fsdp",)}


def test_the_state_is_given_away_and_counted_as_it_is_sharded(step, config):
  compiled, text = step
  expected = bytes_per_device(config)
  assert compiled.state_bytes["parameters"] == expected["parameters_bytes"]
  guard = compiled.state_bytes["optimizer"] - expected["optimizer_bytes"]
  assert 0 <= guard < 64  # the scalars that watch over losses
  # Small arrays take more than they hold: tiles are padded. What comes out is written over them.
  assert compiled.peak_hbm_bytes > compiled.arguments_bytes >= sum(compiled.state_bytes.values())
  assert "may-alias" in text.partition("\n")[0]


def test_moments_on_the_host_take_no_memory_of_the_chip(step, config):
  optimizer = dataclasses.replace(config.optimizer, state_memory="host")
  compiled, text = compile_train_step(
    dataclasses.replace(config, optimizer=optimizer), parse_topology("v5p:2x2x1")
  )
  assert (
    "S(5)" in text.partition("\n")[0]
  )  # the host's memory, where the program takes its arguments from
  moments = bytes_per_device(config)["optimizer_bytes"]
  assert compiled.host_bytes >= 0.99 * moments
  assert compiled.state_bytes["optimizer"] < 0.01 * moments
  assert compiled.arguments_bytes < step[0].arguments_bytes - 0.9 * moments


def small_program(topology: str, rows: int):
  """A lowered product of two arrays of `rows`, on all described devices alike, and their context."""
  devices = described_devices(parse_topology(topology))
  mesh = jax.make_mesh(
    (len(devices),), ("fsdp",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,)
  )
  x = jax.ShapeDtypeStruct((rows, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
  lowered = jax.jit(lambda x: jnp.sin(x) @ x.T).lower(x)
  return lowered, MeshContext(mesh, MeshConfig()), x


def test_what_does_not_fit_is_said_with_how_much_is_missing():
  pytest.importorskip("libtpu")
  lowered, context, x = small_program("v5e:2x2", 80_000)
  compiled, text = planning_compile._compile(lambda: lowered, context, {}, {"parameters": x})
  needed = 80_000**2 * 4 + 80_000 * 128 * 4
  assert not compiled.fits and compiled.summary is None and text == ""
  assert abs(compiled.peak_hbm_bytes / needed - 1) < 0.1 and needed > CHIPS["v5e"].hbm_bytes


@pytest.mark.parametrize(
  ("message", "peak"),
  [
    ("Ran out of memory on HBM, the total memory required for HLO temporaries (17.50G) exceeds available HBM"
     " (15.75G).", 17.5 * GIB + 100),
    ("Ran out of memory in memory space hbm. Used 97.25G of 95.74G hbm. Exceeded hbm capacity by 1.51G.",
     97.25 * GIB),
  ],
)  # fmt: skip
def test_overflows_are_read_in_both_of_the_compilers_wordings(message, peak):
  found = _overflow(f"RESOURCE_EXHAUSTED: {message}", {"parameters": 60, "optimizer": 40}, 1.0)
  assert not found.fits and found.peak_hbm_bytes == int(peak)


def test_another_failure_of_the_compiler_is_no_overflow():
  with pytest.raises(CompilerError, match="compiler failed: INTERNAL: Mosaic"):
    _overflow("INTERNAL: Mosaic failed", {"parameters": 1}, 1.0)


def test_text_that_this_jax_cannot_read_is_written_by_libtpu_itself():
  pytest.importorskip("libtpu")
  lowered, _, _ = small_program("v5p:2x2x1", 256)

  class Unreadable:
    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: async-update has no operands")

  compiled = lowered.compile()
  assert (
    _text_of(Unreadable(), lowered, {}).split("\n\n", 1)[1]
    == compiled.as_text().split("\n\n", 1)[1]
  )


@pytest.mark.parametrize("chip", sorted(CHIPS))
def test_every_chip_is_known_to_libtpu_and_takes_its_options(chip):
  pytest.importorskip("libtpu")
  shape = "2x2" if CHIPS[chip].torus_dims == 2 else "2x2x1"
  lowered, context, x = small_program(f"{chip}:{shape}", 256)
  assert context.mesh.size == 4 * CHIPS[chip].devices
  compiled, _ = planning_compile._compile(lambda: lowered, context, {}, {"parameters": x})
  assert compiled.fits and PRESETS[chip]


def test_slices_are_told_apart():
  pytest.importorskip("libtpu")
  devices = described_devices(parse_topology("v5p:2x2x1", slices=2))
  assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4


def test_a_shape_that_no_slice_has_is_refused():
  pytest.importorskip("libtpu")
  with pytest.raises(
    ConfigError, match=r"topology=v5p:3x3x3 is none that libtpu knows: .*divisible"
  ):
    described_devices(parse_topology("v5p:3x3x3"))


def test_without_libtpu_the_message_says_what_to_install(monkeypatch, config):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'maxllama4\[tpu\]'"):
    compile_train_step(config, parse_topology("v5p:2x2x1"))


def test_a_mesh_that_the_machine_has_not_is_refused(config):
  pytest.importorskip("libtpu")
  wrong = dataclasses.replace(config, mesh=MeshConfig(fsdp=2))
  with pytest.raises(ConfigError, match="cannot be laid over 4 devices"):
    compile_train_step(wrong, parse_topology("v5p:2x2x1"))
