"""The chunked cross-entropy against the plain one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_run

from maxllama4.config import MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.sharding import use_mesh
from maxllama4.training.loss import LANES, cross_entropy_sums

B, T, D, V = 2, 13, 8, 40


def plain(x, head, targets, weights, z_loss):
  """The same sums from whole logits in float32."""
  logits = jnp.einsum("BTD,DV->BTV", x.astype(jnp.float32), head.astype(jnp.float32))
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  nats = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return (weights * (nats + z_loss * normalizer**2)).sum(), (weights * nats).sum()


def inputs(dtype=jnp.float32, param_dtype=jnp.float32, length=T, vocab=V):
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (B, length, D), dtype)
  head = jax.random.normal(keys[1], (D, vocab), param_dtype)
  targets = jax.random.randint(keys[2], (B, length), 0, vocab)
  weights = jax.random.uniform(keys[3], (B, length)) * (jnp.arange(length) % 5 > 0)
  return x, head, targets, weights


@pytest.mark.parametrize(
  "chunk_tokens", [1, 8, 26, 1000]
)  # 13, 4, 1 chunks: 4 x 4 does not make 13
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens, z_loss):
  x, head, targets, weights = inputs()

  def value_and_gradients(sums):
    both = jax.jit(jax.value_and_grad(lambda x, head: 3 * sums(x, head)[0], argnums=(0, 1)))
    return both(x, head)

  ours = value_and_gradients(
    lambda x, head: cross_entropy_sums(x, head, targets, weights, z_loss, chunk_tokens)
  )
  expected = value_and_gradients(lambda x, head: plain(x, head, targets, weights, z_loss))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
  nats = cross_entropy_sums(x, head, targets, weights, z_loss, chunk_tokens)[1]
  np.testing.assert_allclose(nats, plain(x, head, targets, weights, 0.0)[1], rtol=1e-5)


def test_a_token_of_weight_zero_has_no_gradient_and_any_target():
  x, head, targets, weights = inputs()

  def gradients(targets):
    return jax.grad(
      lambda x, head: cross_entropy_sums(x, head, targets, weights, 0.1, 8)[0], (0, 1)
    )(x, head)

  gradient_x, gradient_head = gradients(targets)
  assert np.all(np.asarray(gradient_x)[np.asarray(weights) == 0] == 0)
  others = jnp.where(weights == 0, (targets + 1) % V, targets)
  for one, other in zip(gradients(others), (gradient_x, gradient_head), strict=True):
    np.testing.assert_array_equal(one, other)


def test_bfloat16_activations_keep_float32_sums_and_a_float32_softmax():
  x, head, targets, weights = inputs(jnp.bfloat16)
  sums = cross_entropy_sums(x, head, targets, weights, 0.1, 8)
  rounded = head.astype(jnp.bfloat16)  # the product takes both in the dtype of x
  expected = plain(x, rounded, targets, weights, 0.1)
  assert sums[0].dtype == sums[1].dtype == jnp.float32
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  gradient_x, gradient_head = jax.grad(
    lambda x, head: cross_entropy_sums(x, head, targets, weights, 0.1, 8)[0], (0, 1)
  )(x, head)
  assert (gradient_x.dtype, gradient_head.dtype) == (jnp.bfloat16, jnp.float32)
  expected = jax.grad(lambda x, head: plain(x, head, targets, weights, 0.1)[0], (0, 1))(
    x.astype(jnp.float32), rounded.astype(jnp.float32)
  )
  for one, other in zip((gradient_x, gradient_head), expected):  # bfloat16 has 8 bits
    np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize("differentiate", [False, True])
def test_no_float32_array_of_the_size_of_all_logits_ever_exists(differentiate):
  length, vocab = 64, 512
  arguments = inputs(length=length, vocab=vocab)

  def loss(x, head, targets, weights):
    return cross_entropy_sums(x, head, targets, weights, 0.1, 16)[0]

  function = jax.value_and_grad(loss, argnums=(0, 1)) if differentiate else loss
  sizes = [
    value.aval.size
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    for value in equation.outvars
    if value.aval.dtype == jnp.float32
  ]
  assert max(sizes) < B * length * vocab // 2
  assert max(sizes) >= 16 * vocab  # the walk did reach a chunk's logits


# On a mesh

ROWS, LENGTH = 8, 16
MESHES = {
  "fsdp": {"fsdp": 8},
  "tensor": {"tensor": 8},
  "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
  "context": {"context": 4, "fsdp": 2},
  "vocabulary over fsdp": {"fsdp": 4, "tensor": 2, "rules": {"vocab": ("tensor", "fsdp"), "embed": None}},
  "width over tensor": {"fsdp": 4, "tensor": 2, "rules": {"vocab": None, "embed": ("fsdp", "tensor"), "ffn": None, "heads": None, "kv_heads": None}},
}  # fmt: skip


def whole_inputs():
  keys = jax.random.split(jax.random.key(1), 4)
  x = jax.random.normal(keys[0], (ROWS, LENGTH, D))
  head = jax.random.normal(keys[1], (D, V))
  targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, V)
  return x, head, targets, jax.random.uniform(keys[3], (ROWS, LENGTH))


def value_and_gradients(x, head, targets, weights):
  def loss(x, head):
    sums = cross_entropy_sums(x, head, targets, weights, 0.3, 4)
    return 3 * sums[0], sums

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, head)


@functools.cache
def compiled_on(name):
  """The loss and its gradients compiled for eight devices, and arguments placed on them."""
  settings = {"fsdp": 1} | MESHES[name]
  model = tiny_config(
    hidden_size=D, vocab_size=V, num_attention_heads=8, num_key_value_heads=8, num_local_experts=8
  )
  config = tiny_run(model, mesh=MeshConfig(**settings), sequence_length=LENGTH)
  arguments = whole_inputs()
  with use_mesh(build_mesh(config), config.mesh) as context:
    names = (("batch", "length", None), ("embed", "vocab"), *[("batch", "length")] * 2)
    shardings = tuple(map(context.sharding, names))
    placed = jax.device_put(arguments, shardings)
    gradients = context.sharding(()), shardings[:2]
    program = jax.jit(lambda *inputs: value_and_gradients(*inputs), out_shardings=gradients)
    return program.lower(*placed).compile(), placed


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_neither_sums_nor_gradients(name):
  compiled, placed = compiled_on(name)
  expected = jax.jit(value_and_gradients)(*whole_inputs())
  for one, other in zip(jax.tree.leaves(compiled(*placed)), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def collectives(compiled):
  """Kind and size, and whether it is inside the loop over chunks, of every collective of a compiled program."""
  pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\((.*)"
  return {
    (kind, max(map(elements, re.findall(r"\[([\d,]*)\]", shape))), "/while/body" in rest)
    for shape, kind, rest in re.findall(pattern, compiled.as_text())
  }


def elements(dims):
  return math.prod(map(int, dims.split(","))) if dims else 1


SCALARS = ("all-reduce", 1, False)  # the sums


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    (
      "fsdp",
      {("all-gather", D * LANES, False), ("reduce-scatter", D * LANES // 8, False), SCALARS},
    ),
    # A maximum and two sums of the chunk's tokens, one of each row; and the gradient of x, summed over the vocabulary.
    ("tensor", {("all-reduce", ROWS, True), ("all-reduce", ROWS * LENGTH * D, False)}),
    (
      "mixed",  # two rows a device, two tokens of each a chunk; half the vocabulary
      {
        ("all-gather", D * LANES, False),
        ("reduce-scatter", D * LANES // 2, False),
        ("all-reduce", D * LANES // 2, False),
        ("all-reduce", 2 * 2, True),
        ("all-reduce", 2 * LENGTH * D, False),
        SCALARS,
      },
    ),
  ],
)
def test_the_head_is_gathered_once_and_its_gradient_scattered_once_and_its_vocabulary_stays_split(
  name, expected
):
  assert collectives(compiled_on(name)[0]) == expected


@pytest.mark.parametrize(
  ("name", "tokens", "vocab"), [("fsdp", 16, LANES), ("tensor", 128, V // 8)]
)
def test_no_array_on_a_device_is_as_large_as_the_logits_of_its_tokens(name, tokens, vocab):
  shapes = re.findall(r"f32\[([\d,]+)\]", compiled_on(name)[0].as_text())
  sizes = {elements(dims) for dims in shapes if dims.endswith(f",{vocab}")}
  assert D * vocab in sizes and max(sizes) < tokens * vocab


def equations(jaxpr):
  """All equations of a jaxpr, also those inside its loops and calls."""
  for equation in jaxpr.eqns:
    yield equation
    for parameter in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
    ):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from equations(inner)
