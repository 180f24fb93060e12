"""Arithmetic on a step: against the shards of the state itself, and against what a mesh must exchange."""

import dataclasses
import json
import math

import jax
import pytest

from benchmarks.plan_estimates import CASES, HELD_OUT, RESULTS, estimate_case
from maxllama4.config import MESH_AXES, MeshConfig, OptimizerConfig, load_config
from maxllama4.mesh import build_mesh
from maxllama4.model.llama4 import count_parameters
from maxllama4.model.weights import ModelTemplate
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.estimate import estimate
from maxllama4.sharding import use_mesh
from maxllama4.training.optimizer import make_optimizer
from maxllama4.training.state import abstract_state
from tests.tiny import tiny_config, tiny_run

V5P = parse_topology("v5p:2x2x2")


def estimate_of(config, topology=V5P):
  return estimate(config, config.mesh.resolve(topology.devices))


def scout(*settings, topology="v5p:4x4x4"):
  config = load_config("configs/llama4_scout.yml", settings)
  return estimate_of(config, parse_topology(topology))


def sent(cost, kind, axis):
  """Bytes of collectives of `kind` over exactly the mesh axis `axis`."""
  return sum(c.bytes for c in cost.collectives if c.kind == kind and c.axes == (axis,))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
  "mesh",
  [MeshConfig(), MeshConfig(fsdp=2, expert=2, tensor=2), MeshConfig(data=2, fsdp=2, context=2)],
)
def test_parameters_and_optimizer_are_those_of_the_state(mesh, optimizer):
  config = tiny_run(
    tiny_config(num_hidden_layers=5),
    mesh=mesh,
    optimizer=OptimizerConfig(name=optimizer),
    sequence_length=16,
  )
  template = ModelTemplate(config.model)
  with use_mesh(build_mesh(config), config.mesh) as context:
    state = abstract_state(
      template, make_optimizer(config.optimizer, config.training.steps, template), context
    )

  def shards(tree):
    return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )

  cost = estimate_of(config)
  assert cost.hbm_bytes["parameters"] == shards(state.model)
  assert cost.hbm_bytes["optimizer"] == shards(state.optimizer)


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
  model = load_config("configs/llama4_scout.yml").model
  cost, table = scout(), model.vocab_size * model.hidden_size
  parameters = count_parameters(model)[0] - table  # of the embedding, vectors travel
  once = 2 * parameters * 63 / 64  # bytes, bfloat16
  # The head, 1 % of the weights, is gathered once.
  assert sent(cost, "all-gather", "fsdp") == pytest.approx(2 * once, rel=0.02)
  assert sent(cost, "reduce-scatter", "fsdp") == pytest.approx(once, rel=0.001)
  assert sent(cost, "all-to-all", "fsdp") == pytest.approx(2 * 2 * 8192 * 5120 * 63 / 64, rel=1e-6)
  assert all(c.asynchronous for c in cost.collectives if c.kind != "all-to-all")


def test_microbatches_gather_weights_again_and_send_no_more_activations():
  settings = ("training.batch_size=256", "mesh.tensor=4")
  once, four = scout(*settings), scout(*settings, "training.gradient_accumulation=4")
  for kind in ("all-gather", "reduce-scatter"):
    assert sent(four, kind, "fsdp") == 4 * sent(once, kind, "fsdp")
  assert sent(four, "all-reduce", "tensor") == sent(once, "all-reduce", "tensor")


def test_tensor_parallelism_sums_the_stream_over_its_axis():
  config = load_config("configs/llama4_scout.yml", ["mesh.tensor=4"])
  cost = estimate_of(config, parse_topology("v5p:4x4x4"))
  stream = 4 * 8192 * 5120 * 2  # bytes: 4 rows a group
  # At least two sums a layer and direction; an all-reduce sends 2 x 3/4 of what it sums.
  assert sent(cost, "all-reduce", "tensor") >= 48 * 4 * 1.5 * stream
  assert sent(cost, "all-gather", "tensor") == 0


def test_context_parallelism_leaves_whole_chunks_alone():
  settings = ("mesh.context=8", "training.batch_size=8", "model.attention_chunk_size=8192")
  whole = scout(*settings, "training.sequence_length=65536")
  split = scout(*settings, "training.sequence_length=32768")
  keys = 2 * 8 * 128 * 2  # bytes a position
  # 12 of 48 layers gather keys and values, forward and again for the backward pass.
  assert sent(whole, "all-gather", "context") == pytest.approx(
    2 * 12 * 65536 * keys * 7 / 8, rel=0.01
  )
  assert sent(split, "all-gather", "context") == pytest.approx(
    2 * 48 * 32768 * keys * 7 / 8, rel=0.01
  )


def test_expert_parallelism_leaves_experts_where_they_are():
  alone, spread = scout(), scout("mesh.expert=16")
  assert sent(spread, "all-gather", "fsdp") < sent(alone, "all-gather", "fsdp") / 4
  # Five trips of every token's row, to its expert and back, and again backward.
  assert sent(spread, "ragged-all-to-all", "expert") == 48 * 5 * 8192 * 5120 * 2 * 15 // 16
  # Blocks have a quarter more rows than there are when experts are chosen alike.
  assert spread.grouped_flops == pytest.approx(1.25 * alone.grouped_flops)


def test_slices_exchange_what_each_chip_has_left():
  settings = ("mesh.dcn_data=2", "training.batch_size=128")
  config = load_config("configs/llama4_scout.yml", settings)
  cost = estimate(config, config.mesh.resolve(128))
  parameters = count_parameters(config.model)[0]
  across = sum(c.bytes for c in cost.collectives if c.dcn)
  assert across == pytest.approx(2 * parameters / 64, rel=0.01)  # all-reduce of bfloat16 shards


def test_twice_the_rows_keep_twice_the_activations_without_remat():
  one, two = (
    estimate_of(
      tiny_run(
        batch_size=rows,
        sequence_length=64,
        remat="none",
        loss_chunk=8,
        mesh=MeshConfig(data=-1, fsdp=1),  # with fsdp, gathered weights are kept as well
      )
    )
    for rows in (64, 128)
  )
  assert two.hbm_bytes["activations"] == 2 * one.hbm_bytes["activations"] > 0
  assert two.executed_flops == pytest.approx(2 * one.executed_flops)


def test_policies_trade_memory_for_work():
  costs = {remat: scout(f"training.remat={remat}") for remat in ("none", "matmuls", "full")}
  kept = [cost.hbm_bytes["activations"] for cost in costs.values()]
  done = [cost.executed_flops for cost in costs.values()]
  assert kept[0] > kept[1] > kept[2] and done[0] < done[1] < done[2]
  assert {cost.useful_flops for cost in costs.values()} == {costs["none"].useful_flops}


def test_what_is_offloaded_leaves_the_device_for_the_host():
  full, offloaded = scout(), scout("training.remat=offload")
  assert offloaded.host_bytes == full.hbm_bytes["activations"] == 48 * 8192 * 5120 * 2
  assert offloaded.hbm_bytes["activations"] < full.hbm_bytes["activations"] / 20
  # What is kept is a microbatch's, and travels with each.
  smaller = scout(
    "training.remat=offload", "training.batch_size=256", "training.gradient_accumulation=4"
  )
  assert smaller.host_bytes == offloaded.host_bytes
  assert smaller.host_traffic_bytes == 4 * offloaded.host_traffic_bytes == 8 * offloaded.host_bytes
  state = scout("optimizer.state_memory=host")
  assert state.host_bytes == full.hbm_bytes["optimizer"]
  assert state.peak_hbm_bytes < full.peak_hbm_bytes
  assert scout("optimizer.state_dtype=bfloat16").hbm_bytes["optimizer"] == pytest.approx(
    full.hbm_bytes["optimizer"] / 2
  )


def test_useful_work_is_that_of_the_documented_rule():
  cost = scout()
  assert cost.useful_flops == pytest.approx(8192 * 108.9e9, rel=0.001)
  # All of it again in the forward pass, and more in attention's kernels.
  assert 1.3 < cost.executed_flops / cost.useful_flops < 1.5


def test_every_mesh_does_the_same_work_in_all():
  works = []
  for sizes in ({"fsdp": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}, {"data": 4, "context": 2}):
    mesh = MeshConfig(**({axis: 1 for axis in MESH_AXES} | sizes))
    cost = estimate_of(dataclasses.replace(tiny_run(sequence_length=16), mesh=mesh))
    grouped = cost.grouped_flops / (
      1.25 if mesh.expert > 1 else 1
    )  # blocks have some rows to spare
    dense = cost.executed_flops - cost.attention_flops - cost.grouped_flops
    works.append((dense + grouped, cost.useful_flops))
  # The router is not split by `tensor`.
  assert works[0] == pytest.approx(works[2]) and works[1] == pytest.approx(works[0], rel=0.05)


@pytest.mark.parametrize("name", [*CASES, *HELD_OUT])
def test_memory_is_within_a_tenth_of_what_the_compiler_said(name):
  entry = json.loads((RESULTS / "plan_estimates.json").read_text())[name]
  _, topology, settings = case = {**CASES, **HELD_OUT}[name]
  assert (entry["topology"], entry["settings"]) == (topology, settings)  # it is of this very run
  assert sum(estimate_case(*case).values()) == pytest.approx(entry["compiler_peak_bytes"], rel=0.1)
