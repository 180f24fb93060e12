"""Predicted steps: against published ones, and what more work, slower links and overlap must do to them."""

import dataclasses

import pytest

from maxllama4.chips import CHIPS
from maxllama4.config import MeshConfig, load_config
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.estimate import estimate
from maxllama4.planning.hlo import Collective
from maxllama4.planning.step_time import Work, links_of, predict

V5P = CHIPS["v5p"]


def transfer(gigabytes: float, axis: str = "fsdp", **changes) -> Collective:
  collective = Collective("all-gather", (axis,), 1, round(gigabytes * 1e9), "bf16", False)
  return dataclasses.replace(collective, **changes)


# MaxText's own figures, and what docs/step_time.md says of them, with its transfers and with ours. What it sends is that of its compiled program, none of it asynchronous: for Scout 440 GB gathered
# and 213 GB all-reduced, 0.85 TB on the wire; for Maverick 1.46 TB, of which tensor parallelism's sums are taken from
# arithmetic.
@pytest.mark.parametrize(
  ("name", "topology", "settings", "wire", "published_seconds", "with_theirs", "with_ours"),
  [
    ("scout", "v5p:8x8x8", ("training.batch_size=4096",), {"fsdp": 850}, 31.65, 33.5, 31.8),
    (
      "maverick",
      "v5p:4x4x8",
      ("training.batch_size=512", "mesh.tensor=4"),
      {"fsdp": 980, "tensor": 480},
      24.79,
      22.3,
      19.3,
    ),
  ],
)
def test_published_steps_of_maxtext_are_predicted_within_a_quarter(
  name, topology, settings, wire, published_seconds, with_theirs, with_ours
):
  config = load_config(f"configs/llama4_{name}.yml", settings)
  topology = parse_topology(topology)
  sizes = config.mesh.resolve(topology.devices)
  work = estimate(config, sizes).work(links_of(topology, config.mesh, sizes))
  sent = [transfer(gigabytes, axis) for axis, gigabytes in wire.items()]
  step = predict(topology.chip, dataclasses.replace(work, collectives=sent))
  assert step.seconds == pytest.approx(published_seconds, rel=0.25)
  assert step.seconds == pytest.approx(with_theirs, rel=0.01)
  assert predict(topology.chip, work).seconds == pytest.approx(with_ours, rel=0.01)


def test_exposed_parts_add_up_to_the_step():
  work = Work(
    executed_flops=1e15,
    attention_flops=1e14,
    hbm_traffic_bytes=1e12,
    collectives=[transfer(100), transfer(3, dcn=True), transfer(900, asynchronous=True)],
  )
  step = predict(V5P, work)
  assert step.seconds == pytest.approx(sum(step.exposed.values()))
  assert all(0 <= step.exposed[part] <= step.parts[part] for part in step.parts)


def test_a_transfer_hides_behind_computation_only_when_it_is_asynchronous_and_fits():
  work = Work(executed_flops=1e15, links={"fsdp": 6})
  alone = predict(V5P, work).seconds

  def with_transfer(gigabytes, asynchronous):
    sent = [transfer(gigabytes, asynchronous=asynchronous)]
    return predict(V5P, dataclasses.replace(work, collectives=sent)).seconds

  assert with_transfer(100, True) == alone < with_transfer(100, False)
  assert alone < with_transfer(10_000, True) < with_transfer(10_000, False)


@pytest.mark.parametrize(
  ("work", "bound_by"),
  [
    (Work(executed_flops=1e15), "compute"),
    (Work(executed_flops=1e12, hbm_traffic_bytes=1e12), "hbm"),
    (Work(executed_flops=1e12, collectives=[transfer(100)]), "ici"),
    (Work(executed_flops=1e12, collectives=[transfer(100, dcn=True)]), "dcn"),
  ],
)
def test_the_longest_part_is_named(work, bound_by):
  assert predict(V5P, work).bound_by == bound_by


def test_cycles_of_the_compiler_stand_for_all_but_kernels():
  cycles = Work(executed_flops=1e15, grouped_flops=4e14, estimated_cycles=1.75e9)
  step = predict(V5P, cycles)
  assert step.seconds == pytest.approx(1 + 4e14 / 0.65 / 459e12)
  # The memory traffic of a whole program is inside its cycles, unless it would take longer.
  assert predict(V5P, dataclasses.replace(cycles, hbm_traffic_bytes=1e12)).seconds == step.seconds
  assert predict(V5P, dataclasses.replace(cycles, hbm_traffic_bytes=1e13)).bound_by == "hbm"


def test_two_devices_of_a_chip_have_half_its_rates():
  half = dataclasses.replace(V5P, devices=2)
  work = Work(executed_flops=1e15, hbm_traffic_bytes=1e12, collectives=[transfer(100)])
  assert predict(half, work).seconds == pytest.approx(2 * predict(V5P, work).seconds)


@pytest.mark.parametrize(
  ("topology", "sizes", "links"),
  [
    ("v5p:4x4x4", {"fsdp": 64}, {"fsdp": 6}),  # three closed rings
    ("v5p:4x4x4", {"fsdp": 16, "tensor": 4}, {"fsdp": 4, "tensor": 2}),
    ("v5p:2x2x1", {"fsdp": 4}, {"fsdp": 2}),  # lines
    ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}, {"fsdp": 5, "tensor": 1}),  # they share a dimension
    ("v6e:16x16", {"fsdp": 16, "expert": 16}, {"fsdp": 2, "expert": 2}),
    ("v6e:8x16", {"data": 8, "fsdp": 16}, {"data": 1, "fsdp": 2}),
  ],
)
def test_an_axis_sends_over_the_links_of_its_dimensions(topology, sizes, links):
  whole = {axis: sizes.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor", "context")}
  assert links_of(parse_topology(topology), MeshConfig(), whole) == links
