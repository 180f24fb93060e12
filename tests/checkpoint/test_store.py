"""Checkpoints by step: which stay, and where they can be restored to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_run

from maxllama4.checkpoint.store import CheckpointStore
from maxllama4.config import CheckpointConfig, MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.sharding import MeshContext


def state(step):
  return {"a/b": jnp.full((8, 4), step, jnp.float32)}, {"count": jnp.int32(step)}


@pytest.mark.parametrize(
  ("keep", "keep_every", "left"), [(2, 0, [6, 7]), (1, 3, [0, 3, 6, 7]), (9, 0, list(range(8)))]
)
def test_the_newest_stay_and_multiples_of_keep_every_for_ever(tmp_path, keep, keep_every, left):
  store = CheckpointStore(tmp_path, CheckpointConfig(keep=keep, keep_every=keep_every))
  for step in range(8):
    store.save(step, *state(step), {"tokens": step})
  store.wait()
  assert store.steps == left
  store.close()
  again = CheckpointStore(tmp_path)
  assert again.steps == left
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state(0))
  model, rest, position = again.restore(left[0], *shapes)
  assert (rest["count"], position) == (left[0], {"tokens": left[0]})
  assert np.all(np.asarray(model["a/b"]) == left[0])
  again.close()


def test_arrays_saved_from_one_mesh_are_restored_to_another_in_the_parts_asked_for(tmp_path):
  def context(**sizes):
    mesh = MeshConfig(**{"fsdp": 1} | sizes)
    return MeshContext(build_mesh(tiny_run(mesh=mesh)), mesh)

  value = jnp.arange(128.0, dtype=jnp.bfloat16).reshape(16, 8)
  store = CheckpointStore(tmp_path)
  saved = jax.device_put(value, context(fsdp=8).sharding(("embed", None)))
  store.save(3, {"w": saved}, {"step": jnp.int32(3)}, {"loader": {"streams": {"0": [1, 2]}}})
  sharding = context(tensor=2, fsdp=4).sharding((None, "heads"))
  shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
  store.wait()
  (model,) = [store.restore_model(3, {"w": shape})]
  assert model["w"].sharding == sharding and model["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(model["w"], value)
  store.close()
