"""Experts spread over devices: the values and gradients of one device, for every way of moving rows and every mesh."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_model, tiny_run

from maxllama4.config import ConfigError, MeshConfig
from maxllama4.kernels.choice import Choice, use_kernels
from maxllama4.mesh import build_mesh
from maxllama4.model import dispatch
from maxllama4.model import moe as model_moe
from maxllama4.model.moe import (
  _route_on_mesh,
  drop_beyond_capacity,
  expert_kernels,
  route,
)
from maxllama4.sharding import MeshContext, gather_embed

E, D, F, B, T, C = 8, 16, 8, 8, 6, 2
# How tokens choose: at random; all the same two; nobody chooses the experts of the first half; some tokens are padding.
SPREADS = ("random", "skewed", "half empty", "padding")
MESHES = {
  "length and experts": {"fsdp": 1, "expert": 4, "context": 2},
  "weights and experts": {"fsdp": 2, "expert": 2, "tensor": 2},
  "tokens not split": {"fsdp": 2, "expert": 4, "rules": {"batch": ("data", "fsdp")}},
  "no experts": {"data": 2, "fsdp": 2, "tensor": 2},
}


def choices_of(spread: str) -> np.ndarray:
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((B, T, E))
  if spread == "skewed":
    logits[..., [2, 5]] += 100
  if spread == "half empty":
    logits[..., : E // 2] -= 100
  experts = np.argsort(-logits, axis=-1)[..., :C].astype(np.int32)
  if spread == "padding":
    experts[rng.random((B, T)) < 0.4] = E
  return experts


@functools.cache
def arrays():
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = ((B, T, D), (B, T, C), (E, 2, D, F), (E, F, D), (B, T, D))
  return [0.3 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def gradients(routing):
  """A function of the choices: the layer's output, and its gradients by tokens, scores and weights."""

  def run(experts, x, scores, gate_up, down, direction):
    y, pull = jax.vjp(
      lambda *inputs: routing(inputs[0], experts, *inputs[1:]), x, scores, gate_up, down
    )
    return y, *pull(direction)

  return jax.jit(run)


@functools.cache
def expected(spread: str):
  return _expected()(choices_of(spread), *arrays())


@functools.cache
def _expected():
  return gradients(route)


@functools.cache
def on_mesh(mesh: str, kind: str):
  rules = MeshConfig(**MESHES[mesh])
  model = tiny_config(num_local_experts=E, hidden_size=D, intermediate_size=F)
  context = MeshContext(build_mesh(tiny_run(model, mesh=rules, sequence_length=T)), rules)

  def routing(*inputs):
    with use_kernels(Choice(experts_dispatch=kind)):
      return _route_on_mesh(context, *inputs)

  return gradients(routing)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(
  ("mesh", "kind"),
  [
    *((mesh, "auto" if mesh == "tokens not split" else "ring") for mesh in MESHES),
    *((mesh, "ragged_all_to_all") for mesh in list(MESHES)[:2]),
  ],
)
def test_values_and_gradients_are_those_of_one_device(mesh, kind, spread):
  found = on_mesh(mesh, kind)(choices_of(spread), *arrays())
  for one, other in zip(found, expected(spread), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
  unchosen = np.bincount(choices_of(spread).ravel(), minlength=E + 1)[:E] == 0
  for gradient in found[3:]:
    assert np.all(np.asarray(gradient)[unchosen] == 0)


def test_a_block_holds_a_quarter_more_than_an_even_share_and_never_more_than_all_rows():
  assert dispatch.Exchange("expert", 16, "ring").block(8192) == 10240
  assert dispatch.Exchange("expert", 2, "ragged_all_to_all").block(4) == 8
  assert dispatch.Exchange("expert", 4, "alike").block(8192) == 2560


@pytest.mark.parametrize("kind", ["ring", "ragged_all_to_all"])
def test_moving_tokens_is_refused_where_devices_have_the_same(kind):
  rules = MeshConfig(**MESHES["tokens not split"])
  context = MeshContext(build_mesh(tiny_run(tiny_config(), mesh=rules)), rules)
  with use_kernels(Choice(experts_dispatch=kind)), pytest.raises(ConfigError) as error:
    _route_on_mesh(context, *arrays()[:1], choices_of("random"), *arrays()[1:4])
  assert f"kernels.experts_dispatch={kind} moves tokens" in str(error.value)


def test_an_expert_takes_its_capacity_of_a_row_first_come_first_served_and_no_padding():
  experts = jnp.array([[[0], [0], [2], [0], [2], [1]], [[4], [0], [0], [0], [4], [1]]])
  kept, load = drop_beyond_capacity(experts, 4, 1.25)  # 1.25 x 6 / 4: two of a row
  assert kept[..., 0].tolist() == [[0, 0, 2, 4, 2, 1], [4, 0, 0, 4, 4, 1]]
  assert load.tolist() == [4, 2, 2, 0]


def test_the_load_counts_what_capacity_leaves_and_a_dropped_token_gets_the_shared_expert_alone():
  model = tiny_model(tiny_config(num_local_experts=2)).decoder.layer(1).feed_forward
  x = jnp.ones((1, 4, 16))  # all choose the same expert

  def run(x):
    return model(x, jnp.ones((1, 4), bool))

  with use_kernels(Choice(expert_capacity_factor=1.0)):
    y, statistics = jax.jit(run)(x)
  assert sorted(statistics.load.tolist()) == [0, 2]
  np.testing.assert_allclose(y[:, 2:], model.shared_expert(x[:, 2:]), rtol=1e-6, atol=1e-6)
  uncapped, statistics = jax.jit(lambda x: run(x))(x)
  assert sorted(statistics.load.tolist()) == [0, 4]
  np.testing.assert_allclose(y[:, :2], uncapped[:, :2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["megablox", "tokamax"])
def test_products_that_these_devices_do_not_have_are_refused(kind):
  model = tiny_model().decoder.layer(1).feed_forward
  with use_kernels(Choice(grouped_matmul=kind)), pytest.raises(ConfigError) as error:
    model(jnp.ones((1, 4, 16)), jnp.ones((1, 4), bool))
  assert f"kernels.grouped_matmul={kind}" in str(error.value)


def test_megablox_is_refused_for_a_dtype_that_it_does_not_multiply(monkeypatch):
  monkeypatch.setattr(model_moe, "current_platform", lambda: "tpu")
  with pytest.raises(ConfigError, match=r"grouped_matmul=megablox .* dtype=float16; set"):
    expert_kernels(tiny_config(dtype="float16"), Choice(grouped_matmul="megablox"))
  kinds = expert_kernels(tiny_config(dtype="bfloat16"), Choice(grouped_matmul="megablox"))
  assert kinds == {"grouped_matmul": "megablox"}


def test_weights_are_gathered_twice_and_their_gradients_scattered_once_all_in_the_dtype_of_tokens():
  rules = MeshConfig(fsdp=8)
  context = MeshContext(build_mesh(tiny_run(tiny_config(), mesh=rules)), rules)
  x, scores, gate_up, down, direction = arrays()

  def objective(gate_up, down):
    def layer(x, *weights):
      return _route_on_mesh(context, x, choices_of("random"), scores.astype(x.dtype), *weights)

    y = jax.checkpoint(layer)(x.astype(jnp.bfloat16), gate_up, down)
    return (y**2 * direction).sum()  # so that the gradient needs the result, too

  text = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(gate_up, down).as_text()
  found = collections.Counter(
    re.findall(
      rf"stablehlo\.(all_gather|reduce_scatter)\W.*?-> tensor<({E}x\d+x[^>]*)>", text, re.S
    )
  )
  # Gate, up, and down transposed: forward, and again for the gradient.
  assert found == {
    ("all_gather", f"{E}x{D}x{F}xbf16"): 6,
    ("reduce_scatter", f"{E}x{D // 8}x{F}xbf16"): 3,
  }
  # Nothing is summed but along axes of one device.
  pattern = r"stablehlo\.all_reduce\W.*?replica_groups = .*?: tensor<(\d+x\d+)xi64>"
  assert set(re.findall(pattern, text, re.S)) <= {"8x1"}


def test_a_gather_in_phases_and_its_gradient_are_those_of_one_gather():
  rules, axes = MeshConfig(fsdp=8), ("experts", "expert_embed", "ffn")

  class Phased(MeshContext):
    def scatter_phases(self, axis):  # as on a torus of three dimensions
      grid = np.arange(8).reshape(4, 2)
      return [grid.T.tolist(), grid.tolist()]

  context = Phased(build_mesh(tiny_run(tiny_config(), mesh=rules)), rules)
  keys = jax.random.split(jax.random.key(0))
  weight = jax.random.normal(keys[0], (2, D, 3))
  directions = jax.random.normal(keys[1], (8, 2, D, 3))

  def local(weight, direction):
    return (gather_embed(context, weight, axes, jnp.float32) * direction[0]).sum()[None]

  one_each = jax.P("fsdp")
  dots = jax.shard_map(
    local,
    mesh=context.mesh,
    in_specs=(context.spec(axes), one_each),
    out_specs=one_each,
    check_vma=False,
  )
  run = jax.value_and_grad(
    lambda weight: (lambda y: (y.sum(), y))(dots(weight, directions)), has_aux=True
  )
  (_, found), gradient = jax.jit(run)(weight)
  np.testing.assert_allclose(found, (weight * directions).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(gradient, directions.sum(0), rtol=1e-5, atol=1e-5)
