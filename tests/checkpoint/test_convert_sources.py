"""Conversions from Meta's files and from the models before Llama 4: the same arrays, and folders that are complete."""

import contextlib
import dataclasses
import io
import json
import pathlib
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from golden import golden_case
from meta_files import write_meta_folder
from tensor_files import tensors_in
from test_llama import write as write_llama
from test_meta import LLAMA, LLAMA_PARAMS, TEXT, VISION
from tiny import tiny_arrays, tiny_config, tiny_model

import maxllama4
from maxllama4 import cli
from maxllama4.checkpoint import convert as conversion
from maxllama4.checkpoint import meta, tensors
from maxllama4.checkpoint.convert import Conversion, convert, describe
from maxllama4.checkpoint.folders import open_source
from maxllama4.checkpoint.hf import HuggingFaceWriter
from maxllama4.checkpoint.run_tensors import RunWriter
from maxllama4.config import ConfigError
from maxllama4.model.weights import ModelTemplate, arrays_of

COMPANION = "tokenizer.model"


@pytest.fixture
def small_pieces(monkeypatch):
  """Pieces of some dozen elements, so that boxes lie across shards, halves and heads in every way."""
  monkeypatch.setattr(tensors, "PIECE_BYTES", 100)


def write_source(kind: str, folder: pathlib.Path) -> pathlib.Path:
  """A folder of each kind that is neither Hugging Face's Llama 4 nor ours, with a tokenizer."""
  if kind == "llama":
    write_llama(folder)
  elif kind == "original llama":
    arrays = tiny_arrays(LLAMA)
    write_meta_folder(
      folder, LLAMA, arrays, num_shards=2, released=False, params=LLAMA_PARAMS | {"rope_theta": 5e5}
    )
  else:
    config = {"meta text": TEXT, "meta vision": VISION}[kind]
    write_meta_folder(folder, config, tiny_arrays(config), num_shards=4)
  (folder / COMPANION).write_text("a tokenizer")
  return folder


@pytest.mark.parametrize(
  ("kind", "to"),
  [
    ("meta text", "hf"),
    ("meta vision", "hf"),
    ("meta vision", "maxllama4"),
    ("original llama", "hf"),
    ("llama", "hf"),
    ("llama", "maxllama4"),
  ],
)
def test_every_source_becomes_either_format_with_its_arrays_settings_and_tokenizer(
  kind, to, tmp_path, small_pieces, capsys
):
  source, out = write_source(kind, tmp_path / "source"), tmp_path / "out"
  assert cli.main(["convert", str(source), str(out), f"to={to}"]) == 0, capsys.readouterr().err
  expected, found = maxllama4.load_model(source), maxllama4.load_model(out)
  assert found.config.layer_kinds == expected.config.layer_kinds
  same_layers = {"nope_layers": None, "nope_layer_interval": 0}
  assert dataclasses.replace(found.config, **same_layers) == dataclasses.replace(
    expected.config, **same_layers
  )
  expected, found = arrays_of(expected), arrays_of(found)
  assert set(found) == set(expected)
  for path, array in expected.items():
    assert found[path].dtype == array.dtype, path
    np.testing.assert_array_equal(found[path], array, err_msg=path)
  assert (out / COMPANION).read_text() == "a tokenizer"
  assert (out / "generation_config.json").exists() == (to == "hf")


@pytest.mark.parametrize("shards", ["meta_mp1", "meta_mp2"])
def test_metas_golden_files_become_hugging_faces_byte_for_byte(shards, tmp_path):
  case = golden_case("p08_meta_text")
  ours, out = str(tmp_path / "ours"), tmp_path / "hf"
  assert cli.main(["convert", str(case.folder / shards), str(out), "to=hf"]) == 0
  assert tensors_in(out) == tensors_in(case.folder)
  assert cli.main(["convert", str(case.folder / shards), ours, "to=maxllama4"]) == 0
  assert cli.main(["convert", ours, str(tmp_path / "again"), "to=hf"]) == 0
  assert tensors_in(tmp_path / "again") == tensors_in(case.folder)


def test_any_box_of_any_tensor_of_metas_is_that_of_the_whole(tmp_path):
  write_meta_folder(tmp_path, VISION, tiny_arrays(VISION), num_shards=2)
  source, rng = meta.MetaFolder(tmp_path), np.random.default_rng(0)
  shapes = source._shapes
  for tensor in source.table:
    dims = tensor.dims(shapes[tensor.path].shape)
    whole = source.read(tensor.name).reshape(dims)
    view = source.view(tensor, dims)
    for _ in range(3):
      ends = [sorted(rng.choice(dim + 1, 2, replace=False)) for dim in dims]
      box = tuple(slice(int(start), int(stop)) for start, stop in ends)
      np.testing.assert_array_equal(view[box], whole[box], err_msg=tensor.name)


def test_a_box_of_metas_takes_no_more_memory_than_itself(tmp_path):
  config = dataclasses.replace(TEXT, vocab_size=2**16)
  write_meta_folder(tmp_path, config, tiny_arrays(config), num_shards=2)
  source = meta.MetaFolder(tmp_path)
  for tensor in source.table:
    dims = tensor.dims(source._shapes[tensor.path].shape)
    view = source.view(tensor, dims)
    tracemalloc.start()
    view[tuple(slice(0, min(dim, 100)) for dim in dims)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000, tensor.name  # the embedding has 2 MB


@pytest.mark.parametrize(
  ("vocab_size", "ids"),
  [
    (202048, (200000, (200001, 200007, 200008), 200018)),
    (128256, (128000, (128001, 128008, 128009), 128004)),
    (32000, (1, 2, None)),
    (32, (None, None, None)),
  ],
)
def test_an_export_of_metas_files_knows_where_a_text_ends(vocab_size, ids, tmp_path):
  """params.json names no tokens; without these transformers would generate without an end."""
  config = dataclasses.replace(TEXT, vocab_size=vocab_size)
  write_meta_folder(tmp_path / "meta", config, tiny_arrays(config))
  convert(open_source(tmp_path / "meta"), tmp_path / "hf", Conversion(to="hf"), io.StringIO())
  for name in ("config.json", "generation_config.json"):
    said = json.loads((tmp_path / "hf" / name).read_text())
    found = tuple(said[f"{token}_token_id"] for token in ("bos", "eos", "pad"))
    assert found == tuple(list(i) if isinstance(i, tuple) else i for i in ids)


def test_a_dry_run_lists_the_names_of_the_result(tmp_path):
  write_llama(tmp_path / "llama")
  source, out = open_source(tmp_path / "llama"), io.StringIO()
  describe(source, Conversion(to="hf", dry_run=True), out)
  convert(source, tmp_path / "hf", Conversion(to="hf"), io.StringIO())
  listed = [line.split()[0] for line in out.getvalue().splitlines()[:-1]]
  assert sorted(listed) == sorted(tensors_in(tmp_path / "hf"))


# Destinations, and numbers that do not fit


@pytest.fixture
def folder(tmp_path):
  maxllama4.save_model(tiny_model(), tmp_path / "hf", format="hf")
  return tmp_path / "hf"


def test_a_link_to_a_folder_stays_and_the_folder_is_filled(folder, tmp_path):
  (tmp_path / "disk").mkdir()
  for number, target in enumerate(("disk/empty", "disk/new")):
    link = tmp_path / f"link{number}"
    link.symlink_to(tmp_path / target)
    if target == "disk/empty":
      (tmp_path / target).mkdir()
    convert(open_source(folder), link, Conversion(to="hf"), io.StringIO())
    assert link.is_symlink() and tensors_in(tmp_path / target) == tensors_in(folder)


def test_a_mount_point_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
  (tmp_path / "mounted").mkdir()
  monkeypatch.setattr(pathlib.Path, "is_mount", lambda path: path.name == "mounted")
  with pytest.raises(ConfigError, match="is a mount point and cannot be replaced"):
    convert(open_source(folder), tmp_path / "mounted", Conversion(to="hf"), io.StringIO())
  assert not (tmp_path / "mounted.partial").exists()


@pytest.mark.parametrize("to", ["hf", "maxllama4"])
def test_wherever_a_conversion_stops_the_same_call_finishes_it(to, folder, tmp_path, monkeypatch):
  """Stopped in turn while it makes its files, says what it is, clears what was made, and is about to finish."""
  source, out = open_source(folder), tmp_path / "out"

  def stop(*_, **__):
    raise KeyboardInterrupt

  sink = HuggingFaceWriter if to == "hf" else RunWriter
  for place, name in (
    (sink, "prepare"),
    (pathlib.Path, "unlink"),
    (conversion, "write_json"),
    *(() if to == "hf" else ((conversion.shutil, "rmtree"),)),  # there are no folders in it
    (conversion, "_write_tensors"),
    (conversion.os, "replace"),
  ):
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
      patch.setattr(place, name, stop)
      convert(source, out, Conversion(to=to), io.StringIO())
    assert not out.exists(), name
  convert(source, out, Conversion(to=to), io.StringIO())
  assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
  found, expected = (arrays_of(maxllama4.load_model(path)) for path in (out, folder))
  assert all(np.array_equal(found[path], array) for path, array in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_float16_cannot_hold_are_not_made_infinite(dtype, tmp_path):
  config = tiny_config(param_dtype=dtype)
  arrays = tiny_arrays(config)
  arrays["norm/weight"] = arrays["norm/weight"].at[3].set(jnp.asarray(7e4, dtype))
  model = ModelTemplate(config).model(arrays)
  maxllama4.save_model(model, tmp_path / "hf", format="hf")
  with pytest.raises(ConfigError, match=r"model\.norm\.weight has numbers beyond 65504"):
    convert(open_source(tmp_path / "hf"), tmp_path / "out", Conversion(to="hf", dtype="float16"))
  assert not (tmp_path / "out").exists()
