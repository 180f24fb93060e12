"""What the compiled training step exchanges, over which mesh axes and how many bytes: read from what the compiler for TPUs
made of it, for chips that are only described. Needs libtpu, which no chip has to be there for.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

MESHES = {  # settings, and slices of the topology
  "fsdp": ({"fsdp": 8}, 1),
  "data": ({"data": 8, "fsdp": 1}, 1),
  "tensor": ({"tensor": 8, "fsdp": 1}, 1),
  "expert": ({"expert": 8, "fsdp": 1}, 1),
  "slices": ({"dcn_data": 2, "fsdp": 4}, 2),
}
# Sizes that fill a TPU's tiles: two layers, one dense, one with experts.
MODEL = {
  "vocab_size": 1024,
  "hidden_size": 512,
  "intermediate_size": 512,
  "intermediate_size_mlp": 1024,
  "num_attention_heads": 8,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "num_local_experts": 8,
  "attention_chunk_size": 128,
  "max_position_embeddings": 1024,
  "dtype": "bfloat16",
}
ROWS, LENGTH = 8, 512
SMALL = 0.02  # of the weights' bytes: norms, routers, statistics

pytestmark = [
  pytest.mark.slow,  # minutes on two cores, a process for each mesh
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not there",
  ),
]


def compile_step(name):
  """The facts about one mesh's step as plain values; runs in a process of its own."""
  import jax
  import numpy as np
  from jax.experimental import topologies
  from tiny import tiny_config, tiny_run

  from maxllama4.config import MeshConfig
  from maxllama4.mesh import build_mesh
  from maxllama4.model.weights import ModelTemplate
  from maxllama4.planning.hlo import summarize
  from maxllama4.sharding import use_mesh
  from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
  from maxllama4.training.state import abstract_state
  from maxllama4.training.step import make_train_step

  settings, slices = MESHES[name]
  several = {"num_slices": slices} if slices > 1 else {}
  topology = topologies.get_topology_desc(
    "v5p:2x2x1" if several else "v5p:2x2x2", platform="tpu", **several
  )
  config = tiny_run(
    tiny_config(**MODEL),
    mesh=MeshConfig(**settings),
    batch_size=ROWS,
    sequence_length=LENGTH,
    loss_chunk=512,
  )
  mesh = build_mesh(config, topology.devices)
  with use_mesh(mesh, config.mesh) as context:
    template = ModelTemplate(config.model)
    optimizer = make_optimizer(config.optimizer, config.training.steps, template)
    schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    state, lain = (
      abstract_state(template, optimizer, context),
      context.sharding(("batch", "length")),
    )
    dtypes = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), np.int32)
    batch = {
      key: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=lain)
      for key, dtype in (dtypes | {"weights": np.float32}).items()
    }
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), context.sharding(())
    step = make_train_step(config, template, optimizer, schedule)
    step = jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(state, batch).compile()
  shapes, axes = template.shapes, template.axes

  def count(has):
    return sum(shapes[path].size for path in shapes if has(axes[path]))

  collectives = summarize(step.as_text(), mesh).collectives
  fields = ["kind", "axes", "count", "bytes", "dtype", "dcn"]
  return {
    "parameters": count(lambda names: True),
    "split_by_embed": count(lambda names: "embed" in names),
    "in_experts": count(lambda names: "experts" in names),
    "argument_bytes": step.memory_analysis().argument_size_in_bytes,
    "collectives": [{field: getattr(c, field) for field in fields} for c in collectives],
  }


@functools.cache
def facts(name):
  command = [sys.executable, __file__, name]
  root = pathlib.Path(__file__).parents[1]
  path = os.pathsep.join([str(root), str(root / "tests"), *filter(None, sys.path)])
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "PYTHONPATH": path,
  }
  run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


def wire(name, kind, axis):
  """Bytes of floating-point numbers that a chip sends for `kind` over the mesh axis `axis`, and their dtypes."""
  found = [c for c in facts(name)["collectives"] if c["kind"] == kind and axis in c["axes"]]
  found = [c for c in found if "f" in c["dtype"]]
  return sum(c["bytes"] for c in found), {c["dtype"] for c in found}


def test_fsdp_gathers_weights_in_bfloat16_at_most_twice_and_scatters_most_gradients_once():
  """Measured: 0.96 of the weights gathered (rows of the embedding travel by themselves), gradients of 0.84 scattered, and
  of 0.12 summed whole."""
  once = 7 / 8 * 2 * facts("fsdp")["split_by_embed"]
  gathered, dtypes = wire("fsdp", "all-gather", "fsdp")
  assert dtypes == {"bf16"} and 0.9 * once <= gathered <= (2 + SMALL) * once
  scattered, dtypes = wire("fsdp", "reduce-scatter", "fsdp")
  assert dtypes == {"bf16"} and 0.8 * once <= scattered <= (1 + SMALL) * once
  assert wire("fsdp", "all-reduce", "fsdp")[0] < 0.3 * once


def test_weights_and_moments_are_split_alike_over_fsdp():
  state = 12 * facts("fsdp")["parameters"] / 8  # a weight and two moments in float32
  assert state <= facts("fsdp")["argument_bytes"] <= (1 + SMALL) * state


def test_data_only_sums_gradients():
  weights = facts("data")["parameters"]
  summed, _ = wire("data", "all-reduce", "data")
  assert 2 * 7 / 8 * 2 * weights * (1 - SMALL) <= summed <= 2 * 7 / 8 * 4 * weights * (1 + SMALL)
  assert wire("data", "all-gather", "data")[0] < SMALL * weights


@pytest.mark.parametrize("name", ["tensor", "expert"])
def test_weights_stay_where_they_are_over_an_axis_that_splits_them(name):
  split = 2 * facts(name)["in_experts" if name == "expert" else "parameters"]
  tokens = 2 * ROWS * LENGTH * MODEL["hidden_size"]  # of a layer's activations
  for kind in ("all-gather", "reduce-scatter"):
    assert wire(name, kind, name)[0] < 8 * tokens < split


def test_between_slices_only_gradients_are_summed():
  between = [c for c in facts("slices")["collectives"] if c["dcn"]]
  assert {c["kind"] for c in between} <= {"all-reduce"} and {tuple(c["axes"]) for c in between} == {
    ("data",)
  }
  summed, weights = sum(c["bytes"] for c in between), facts("slices")["parameters"] / 4
  assert 2 * weights * (1 - SMALL) <= summed <= 4 * weights * (1 + SMALL)


if __name__ == "__main__":
  print(json.dumps(compile_step(sys.argv[1])))
