"""Every mesh axis, and mixtures of them, against one device; and meshes that cannot be."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_run, tiny_vision_config

from maxllama4.config import MESH_AXES, ConfigError, DataConfig, MeshConfig, model_dimensions
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import MeshContext, use_mesh
from maxllama4.training.step import batch_totals, microbatch_objective

# Every dimension divides by 8; one layer is dense, chunked and with RoPE, one has experts, is global and without.
MODEL = tiny_config(
  num_attention_heads=8,
  num_key_value_heads=8,
  head_dim=4,
  num_local_experts=8,
  num_experts_per_tok=2,
)
MESHES = (
  {"data": 8},
  {"fsdp": 8},
  {"expert": 8},
  {"tensor": 8},
  {"context": 8},
  {"data": 2, "fsdp": 2, "expert": 2},
  {"fsdp": 2, "tensor": 2, "context": 2},
  {"expert": 4, "tensor": 2},
  {"expert": 2, "context": 4},
  {"dcn_data": 2, "fsdp": 2, "tensor": 2},
  {"dcn_fsdp": 2, "fsdp": 2, "expert": 2},
)
TOLERANCE = 1e-5


def run_on(mesh: MeshConfig):
  losses = {"load_balance_loss": 0.1, "router_z_loss": 0.1, "z_loss": 0.1}
  data = DataConfig(paths=("unread",))  # rows may be packed
  return tiny_run(MODEL, mesh=mesh, data=data, sequence_length=8, **losses)


def loss_and_gradients(config, model, batch):
  """What the training step takes from one microbatch, all leaves in order."""
  template = ModelTemplate(config.model)

  def objective(model, batch):
    return microbatch_objective(config, template, model, batch, batch_totals(batch))

  return jax.tree.leaves(jax.jit(jax.value_and_grad(objective, has_aux=True))(model, batch))


@functools.cache
def on_one_device():
  """A batch of packed documents with padding, a model, and what `loss_and_gradients` makes of them."""
  batch = packed_batch(8, 8)
  model = tiny_arrays(MODEL)
  return batch, model, loss_and_gradients(run_on(MeshConfig()), model, batch)


def name_of(sizes):
  return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_a_mesh_gives_the_loss_and_the_gradients_of_one_device(sizes):
  batch, model, expected = on_one_device()
  config = run_on(MeshConfig(**{"fsdp": 1} | sizes))
  with use_mesh(build_mesh(config), config.mesh) as context:
    model = jax.device_put(model, ModelTemplate(MODEL).shardings(context))
    batch = jax.device_put(batch, context.sharding(("batch", "length")))
    found = loss_and_gradients(config, model, batch)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
  ("sizes", "changes", "numbers"),
  [
    ({"tensor": 8}, {"num_key_value_heads": 4}, ("num_key_value_heads=4", "mesh.tensor=8")),
    ({"expert": 8}, {"num_local_experts": 4}, ("num_local_experts=4", "mesh.expert=8")),
    ({"fsdp": 8}, {"hidden_size": 20}, ("hidden_size=20", "mesh.fsdp=8")),
    ({"tensor": 8}, {"vocab_size": 33}, ("vocab_size=33", "mesh.tensor=8")),
    ({"tensor": 8}, {"intermediate_size": 12}, ("intermediate_size=12", "mesh.tensor=8")),
    ({"tensor": 8}, {"intermediate_size_mlp": 12}, ("intermediate_size_mlp=12", "mesh.tensor=8")),
  ],
)
def test_a_dimension_that_the_mesh_cannot_split_is_an_error_with_both_numbers(
  sizes, changes, numbers
):
  model = dataclasses.replace(MODEL, **changes)
  with pytest.raises(ConfigError) as error:
    tiny_run(model, mesh=MeshConfig(**{"fsdp": 1} | sizes), sequence_length=8)
  assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize(
  ("axis", "size", "changes"),
  [
    ("fsdp", 16, {"hidden_size": 24, "intermediate_size": 96}),
    ("fsdp", 8, {"projector_output_dim": 12, "vision_output_dim": 12}),
    ("tensor", 2, {"num_attention_heads": 1}),
    ("tensor", 2, {"projector_input_dim": 11}),
  ],
)
def test_so_is_one_of_the_vision_tower(axis, size, changes):
  sides = dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 16)
  vision = tiny_vision_config(**sides | changes).vision_config
  model = dataclasses.replace(MODEL, vision_config=vision, image_token_index=9)
  mesh = MeshConfig(**{"fsdp": 1} | {axis: size})
  name, value = next(iter(changes.items()))
  with pytest.raises(ConfigError, match=rf"vision_config.{name}={value} .*mesh.{axis}={size}"):
    tiny_run(model, mesh=mesh, batch_size=size, sequence_length=8)


@pytest.mark.parametrize("model", [MODEL, tiny_config(num_hidden_layers=5), tiny_vision_config()])
def test_every_dimension_that_a_rule_can_split_is_one_of_those_checked(model):
  template = ModelTemplate(model)
  found = {
    (axis, size)
    for path, array in template.shapes.items()
    for axis, size in zip(template.axes[path], array.shape, strict=True)
    if axis is not None
  }
  assert found == {(axis, size) for axis, _, size in model_dimensions(model)}


def test_an_axis_that_takes_what_is_left_is_checked_too_once_the_devices_are_counted():
  config = tiny_run(MODEL, mesh=MeshConfig(fsdp=-1), batch_size=4)
  with pytest.raises(ConfigError, match=r"batch_size.*=4 .* 8 parts .*mesh.fsdp=8"):
    build_mesh(config)
  assert build_mesh(config, jax.devices()[:4]).shape["fsdp"] == 4


@pytest.mark.parametrize("sizes", [{"data": 4, "fsdp": 1}, {"data": 3, "fsdp": -1}])
def test_a_mesh_of_another_number_of_devices_is_an_error_with_both_numbers(sizes):
  config = tiny_run(MODEL, mesh=MeshConfig(**sizes), batch_size=12)
  with pytest.raises(ConfigError) as error:
    build_mesh(config)
  assert {"8", str(sizes["data"])} <= set(re.findall(r"\d+", str(error.value)))


def test_axes_stand_in_one_order_and_the_compiler_places_what_is_not_said():
  mesh = build_mesh(run_on(MeshConfig(tensor=2, expert=2)))
  assert tuple(mesh.shape.items()) == (
    ("data", 1), ("fsdp", 2), ("expert", 2), ("tensor", 2), ("context", 1),
  )  # fmt: skip
  assert mesh.axis_names == MESH_AXES
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


# Several slices


@pytest.mark.parametrize(
  ("sizes", "spanning"),
  [
    ({"dcn_data": 2, "fsdp": 4}, "data"),
    ({"dcn_fsdp": 2, "fsdp": -1}, "fsdp"),
    ({"dcn_expert": 2, "expert": 2, "tensor": 2}, "expert"),
    ({"dcn_tensor": 2, "fsdp": 4}, "tensor"),
    ({"dcn_context": 2, "context": 2, "fsdp": 2}, "context"),
  ],
  ids=lambda value: name_of(value) if isinstance(value, dict) else value,
)
def test_only_the_axis_that_spans_slices_leads_from_one_to_the_other(sizes, spanning):
  """Eight CPU devices as two slices: devices 0 to 3 and 4 to 7."""
  mesh = build_mesh(run_on(MeshConfig(**{"fsdp": 1} | sizes)))
  slices = np.vectorize(lambda device: device.id // 4)(mesh.devices)
  assert mesh.devices.size == 8 and set(slices.flat) == {0, 1}
  for place, axis in enumerate(MESH_AXES):
    if axis == spanning:  # neighbours are in different slices
      found = np.moveaxis(slices, place, 0)
      assert [set(found[first::2].flat) for first in (0, 1)] == [{0}, {1}]
    else:
      assert np.all(slices == slices.take([0], axis=place))


def test_sums_are_scattered_inside_slices_first():
  sizes = MeshConfig(dcn_fsdp=2, fsdp=4)
  context = MeshContext(build_mesh(run_on(sizes)), sizes)
  inside = [[[0, 2, 4, 6], [1, 3, 5, 7]]]
  assert context.scatter_phases("fsdp") == [*inside, [[0, 1], [2, 3], [4, 5], [6, 7]]]


class Chip:
  """Of a device, what says where it is."""

  def __init__(self, platform, number, slice_index):
    self.platform, self.device_kind, self.id = platform, platform, number
    self.process_index, self.slice_index = 0, slice_index


def test_real_slices_are_told_apart_by_what_their_devices_say():
  chips = [Chip("gpu", number, slice_index=number % 2) for number in range(8)]
  mesh = build_mesh(run_on(MeshConfig(fsdp=2, tensor=2, dcn_data=2)), chips)
  assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
  ("platform", "slices", "sizes"),
  [
    ("tpu", 2, {"fsdp": 8}),
    ("tpu", 1, {"dcn_data": 2, "fsdp": 4}),
    ("gpu", 4, {"dcn_data": 2, "fsdp": 4}),
  ],
)
def test_another_number_of_slices_than_the_mesh_spans_is_an_error_with_both_numbers(
  platform, slices, sizes
):
  chips = [Chip(platform, number, number % slices) for number in range(8)]
  mesh = MeshConfig(**sizes)
  with pytest.raises(ConfigError, match=f"spans {mesh.num_slices} slice.* in {slices};"):
    build_mesh(run_on(mesh), chips)


def test_gpus_of_several_machines_may_be_one_slice():
  chips = [Chip("gpu", number, slice_index=number // 4) for number in range(8)]
  assert build_mesh(run_on(MeshConfig(fsdp=8)), chips).shape["fsdp"] == 8


@pytest.mark.parametrize("sizes", [{"dcn_data": 3}, {"dcn_data": 2, "tensor": 3}])
def test_devices_that_do_not_divide_into_the_slices_are_an_error(sizes):
  model = dataclasses.replace(
    MODEL, vocab_size=36, intermediate_size=24, num_attention_heads=6, num_key_value_heads=6
  )
  config = tiny_run(model, mesh=MeshConfig(**sizes), batch_size=12, sequence_length=8)
  with pytest.raises(ConfigError, match=r"over 8 devices: .* in each of [23] slices"):
    build_mesh(config)


def test_a_dimension_that_whole_axes_cannot_split_names_both_settings():
  with pytest.raises(
    ConfigError, match=r"hidden_size=20 .* 8 parts \(mesh.fsdp=4 x mesh.dcn_fsdp=2"
  ):
    model = dataclasses.replace(MODEL, hidden_size=20)
    tiny_run(model, mesh=MeshConfig(fsdp=4, dcn_fsdp=2), sequence_length=8)
