"""Any folder that holds a model, to the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_model, tiny_run

import maxllama4
from maxllama4.config import ConfigError, MeshConfig
from maxllama4.mesh import build_mesh
from maxllama4.model.weights import ModelTemplate, arrays_of
from maxllama4.sharding import MeshContext

MODEL = tiny_config(num_hidden_layers=5, param_dtype="bfloat16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The same model in both formats."""
  folder = tmp_path_factory.mktemp("models")
  for format in ("hf", "maxllama4"):
    maxllama4.save_model(tiny_model(MODEL), folder / format, format=format)
  return folder


@pytest.mark.parametrize("path", ["hf", "maxllama4", "maxllama4/checkpoints/0"])
def test_every_folder_gives_back_its_arrays_and_the_dtype_asked_for(folders, path):
  model = maxllama4.load_model(folders / path, dtype="bfloat16")
  assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "bfloat16")
  expected = arrays_of(tiny_model(MODEL))
  found = arrays_of(model)
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def mesh():
  return build_mesh(tiny_run(MODEL, mesh=MeshConfig(fsdp=2, expert=2, tensor=2)))


@pytest.mark.parametrize("path", ["hf", "maxllama4"])
def test_a_model_can_be_loaded_straight_onto_a_mesh(folders, mesh, path):
  found = arrays_of(maxllama4.load_model(folders / path, mesh=mesh))
  shardings = ModelTemplate(MODEL).shardings(MeshContext(mesh, MeshConfig()))
  assert {name: array.sharding for name, array in found.items()} == shardings
  for name, array in arrays_of(tiny_model(MODEL)).items():
    np.testing.assert_array_equal(found[name], array)


def test_a_model_on_a_mesh_computes_what_it_does_on_one_device(folders, mesh):
  template = ModelTemplate(dataclasses.replace(MODEL, dtype="float32"))
  tokens = jnp.arange(18).reshape(2, 9)
  run = jax.jit(lambda arrays, tokens: template.model(arrays)(tokens))
  spread = run(arrays_of(maxllama4.load_model(folders / "hf", mesh=mesh)), tokens)
  alone = run(arrays_of(maxllama4.load_model(folders / "hf")), tokens)
  np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("nowhere", "holds no model"),
    ("maxllama4/checkpoints/7", "not among the checkpoints"),
    ("maxllama4/checkpoints", "holds no model"),
  ],
)
def test_a_folder_without_a_model_is_named(folders, path, words):
  with pytest.raises(ConfigError, match=words):
    maxllama4.load_model(folders / path)


def test_nothing_is_written_over_or_in_an_unknown_format(folders):
  with pytest.raises(ConfigError, match="already holds something"):
    maxllama4.save_model(tiny_model(MODEL), folders / "hf", format="hf")
  with pytest.raises(ConfigError, match="format=pickle"):
    maxllama4.save_model(tiny_model(MODEL), folders / "new", format="pickle")
  assert not (folders / "new").exists()
