"""Conversions: every byte kept in both directions, in pieces, after a kill, and nothing half done."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from golden import TEXT_CASES, VISION_CASES, golden_case
from safetensors.numpy import load_file, save_file
from tensor_files import tensors_in
from tiny import tiny_arrays, tiny_config, tiny_model, tiny_vision_config

import maxllama4
from maxllama4 import cli
from maxllama4.checkpoint import convert as conversion
from maxllama4.checkpoint import hf, tensors
from maxllama4.checkpoint.convert import Conversion, check_space, convert
from maxllama4.checkpoint.folders import open_source
from maxllama4.checkpoint.store import CheckpointStore
from maxllama4.config import ConfigError
from maxllama4.model.weights import ModelTemplate, arrays_of

STACKED = tiny_config(num_hidden_layers=5, param_dtype="bfloat16")  # two cycles, and one layer more


@pytest.fixture
def small_pieces(monkeypatch):
  """Pieces of some dozen elements, so that tiny tensors are cut in every way that large ones are."""
  monkeypatch.setattr(tensors, "PIECE_BYTES", 100)


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder of a stacked model."""
  maxllama4.save_model(tiny_model(STACKED), tmp_path / "hf", format="hf")
  return tmp_path / "hf"


def run(source, destination, **asked):
  """Converts, and returns what was said."""
  out = io.StringIO()
  convert(open_source(source), destination, Conversion(**asked), out)
  return out.getvalue()


def same_models(one, other):
  one, other = (arrays_of(maxllama4.load_model(path)) for path in (one, other))
  return set(one) == set(other) and all(
    one[path].dtype == other[path].dtype and np.array_equal(one[path], other[path]) for path in one
  )


@pytest.mark.parametrize("name", (*TEXT_CASES, *VISION_CASES))
def test_import_and_export_give_back_every_byte(name, tmp_path):
  case = golden_case(name)
  run(case.folder, tmp_path / "ours", to="maxllama4")
  run(tmp_path / "ours", tmp_path / "hf", to="hf", shard_bytes=200_000)
  assert tensors_in(tmp_path / "hf") == tensors_in(case.folder)
  generation = "generation_config.json"
  assert (tmp_path / "hf" / generation).read_bytes() == (case.folder / generation).read_bytes()


@pytest.mark.parametrize(
  "config",
  [
    STACKED,
    tiny_config(num_hidden_layers=3, tie_word_embeddings=True, param_dtype="float16"),
    tiny_vision_config(),
  ],
  ids=["stacked", "tied", "vision"],
)
def test_pieces_of_any_tensor_come_to_their_place_in_both_directions(
  config, tmp_path, small_pieces
):
  maxllama4.save_model(tiny_model(config), tmp_path / "hf", format="hf")
  run(tmp_path / "hf", tmp_path / "ours", to="maxllama4")
  run(tmp_path / "ours", tmp_path / "again", to="hf")
  assert tensors_in(tmp_path / "again") == tensors_in(tmp_path / "hf")
  assert same_models(tmp_path / "ours", tmp_path / "hf")


def test_orbax_restores_what_was_written_in_pieces(folder, small_pieces):
  run(folder, folder.parent / "ours", to="maxllama4")
  store = CheckpointStore(folder.parent / "ours")
  restored = store.restore_model(0, ModelTemplate(STACKED).shapes)
  store.close()
  for path, array in arrays_of(tiny_model(STACKED)).items():
    np.testing.assert_array_equal(restored[path], array)


def test_a_tensor_of_zeros_is_written_too(tmp_path):
  arrays = tiny_arrays(STACKED)
  model = ModelTemplate(STACKED).model({p: jnp.zeros_like(a) for p, a in arrays.items()})
  maxllama4.save_model(model, tmp_path / "hf", format="hf")
  run(tmp_path / "hf", tmp_path / "ours", to="maxllama4")
  assert same_models(tmp_path / "ours", tmp_path / "hf")


def test_a_checkpoint_that_training_saved_is_exported(tmp_path, small_pieces):
  """Its chunks are whole arrays, not our pieces."""
  maxllama4.save_model(tiny_model(STACKED), tmp_path / "ours", format="maxllama4")
  run(tmp_path / "ours" / "checkpoints" / "0", tmp_path / "hf", to="hf")
  assert same_models(tmp_path / "ours", tmp_path / "hf")


def test_training_saves_each_layer_of_a_stack_by_itself(tmp_path):
  """So that an export reads no more than one layer at a time."""
  maxllama4.save_model(tiny_model(STACKED), tmp_path / "ours", format="maxllama4")
  for path, shape in ModelTemplate(STACKED).shapes.items():
    base = f"file://{tmp_path}/ours/checkpoints/0/model/"
    store = {"driver": "ocdbt", "base": base, "path": f"{path}/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
    chunk = (1, *shape.shape[1:]) if path.startswith("decoder/cycles/") else shape.shape
    assert array.chunk_layout.read_chunk.shape == chunk, path


@pytest.mark.parametrize("to", ["hf", "maxllama4"])
def test_weights_get_the_dtype_asked_for(folder, to):
  run(folder, folder.parent / "out", to=to, dtype="float32")
  model = maxllama4.load_model(folder.parent / "out")
  assert model.config.param_dtype == "float32"
  for path, array in arrays_of(tiny_model(STACKED)).items():
    assert arrays_of(model)[path].dtype == jnp.float32
    np.testing.assert_array_equal(arrays_of(model)[path], array)


def test_shards_hold_each_tensor_once_and_no_more_bytes_than_asked(folder):
  out = folder.parent / "out"
  run(folder, out, to="hf", shard_bytes=4000)
  index = json.loads((out / hf.INDEX).read_text())
  files = sorted(path.name for path in out.glob("*.safetensors"))
  assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
  for file in files:
    held = load_file(out / file)
    assert sorted(held) == sorted(n for n, f in index["weight_map"].items() if f == file)
    assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 4000
  assert index["metadata"]["total_size"] == sum(len(t[2]) for t in tensors_in(out).values())
  assert tensors_in(out) == tensors_in(folder)


def test_what_belongs_to_a_model_beside_its_weights_goes_along(folder):
  texts = {name: f"text of {name}" for name in conversion.COMPANIONS if "*" not in name}
  texts["chat_template.jinja"] = "{{ messages }}"
  for name, text in texts.items():
    (folder / name).write_text(text)
  run(folder, folder.parent / "ours", to="maxllama4")
  run(folder.parent / "ours", folder.parent / "out", to="hf")
  for name, text in texts.items():
    assert (folder.parent / "out" / name).read_text() == text


def test_a_folder_without_a_generation_config_gets_one(folder):
  assert json.loads((folder / "generation_config.json").read_text()) == {
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
  }


# Other spellings, and mistakes


def rewrite(folder, change):
  """Applies `change` to the dictionary of a folder's tensors."""
  held = load_file(folder / hf.SINGLE)
  change(held)
  save_file(held, folder / hf.SINGLE)


def unfuse(held):
  for name in [name for name in held if ".experts." in name]:
    fused = held.pop(name)
    prefix = name.rpartition(".")[0]
    for expert, matrix in enumerate(fused):
      if name.endswith("down_proj"):
        parts = {"down_proj": matrix}
      else:
        parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2, axis=1)))
      for part, value in parts.items():
        held[f"{prefix}.{expert}.{part}.weight"] = np.ascontiguousarray(value.T)


def test_experts_with_matrices_of_their_own_become_the_same_model(folder, small_pieces):
  expected = tensors_in(folder)
  rewrite(folder, unfuse)
  assert set(tensors_in(folder)) != set(expected)
  run(folder, folder.parent / "ours", to="maxllama4")
  run(folder.parent / "ours", folder.parent / "fused", to="hf")
  assert tensors_in(folder.parent / "fused") == expected
  assert same_models(folder, folder.parent / "fused")
  with pytest.raises(ConfigError, match="convert it to=maxllama4"):
    run(folder, folder.parent / "out", to="hf")


def test_keys_that_no_model_needs_are_skipped_and_said(folder):
  expected = tensors_in(folder)
  names = ["rope.freqs", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.x._extra_state"]
  rewrite(folder, lambda held: held.update({name: np.zeros(3, np.float32) for name in names}))
  said = run(folder, folder.parent / "ours", to="maxllama4")
  (line,) = [line for line in said.splitlines() if line.startswith("skipped")]
  assert all(name in line for name in names)
  run(folder.parent / "ours", folder.parent / "out", to="hf")
  assert tensors_in(folder.parent / "out") == expected


def test_what_is_wrong_with_a_folder_is_listed_and_nothing_is_written(folder):
  def spoil(held):
    del held["lm_head.weight"]
    held["model.norm.weight"] = np.zeros(17, np.float32)
    held["model.layers.9.input_layernorm.weight"] = np.zeros(16, np.float32)
    held["model.layers.0.input_layernorm.weight"] = np.zeros(16, np.int8)

  rewrite(folder, spoil)
  with pytest.raises(ConfigError) as error:
    run(folder, folder.parent / "ours", to="maxllama4")
  for words in (
    "lm_head.weight [32, 16] is missing",
    "model.norm.weight is [17] where [16] was expected",
    "model.layers.9.input_layernorm.weight is not part of the model",
    "model.layers.0.input_layernorm.weight is of int8",
  ):
    assert words in str(error.value)
  assert sorted(path.name for path in folder.parent.iterdir()) == ["hf"]


def test_a_file_that_is_cut_short_is_named(folder):
  path = folder / hf.SINGLE
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(ConfigError, match=r"model\.safetensors is cut short"):
    run(folder, folder.parent / "ours", to="maxllama4")


def test_layers_of_one_stack_that_differ_in_dtype_get_the_wider_one_and_it_is_said(folder):
  name = "model.layers.2.input_layernorm.weight"
  rewrite(folder, lambda held: held.update({name: held[name].astype(np.float32)}))
  said = run(folder, folder.parent / "ours", to="maxllama4")
  assert "wider than before: model.layers.0.input_layernorm.weight" in said
  assert same_models(folder, folder.parent / "ours")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written():
  check_space(pathlib.Path("out"), needed=10**9, free=11 * 10**8)
  check_space(pathlib.Path("out"), needed=10**9, free=10**8, kept=10**9)
  with pytest.raises(ConfigError, match=r"out needs 1\.02 GB, and its disk has 0\.90 GB free"):
    check_space(pathlib.Path("out"), needed=10**9, free=9 * 10**8)


@pytest.mark.parametrize("settings", [{"to": "gguf"}, {"to": "hf", "dtype": "int8"}])
def test_an_unknown_format_or_dtype_is_refused(settings):
  with pytest.raises(ConfigError, match="is not one of"):
    Conversion(**settings)


# Stopping and going on

# A conversion that kills itself at its n-th piece, without a chance to clean up.
KILLED = """
import os, signal, sys
from maxllama4 import cli
from maxllama4.checkpoint import convert, hf, run_tensors
convert.SYNC_BYTES = 1  # every tensor is recorded
kind, left = (hf.HuggingFaceWriter if sys.argv[1] == "hf" else run_tensors.RunWriter), [12]
write = kind.write
def write_or_die(*arguments):
  write(*arguments)
  left[0] -= 1
  if left[0] == 0:
    os.kill(os.getpid(), signal.SIGKILL)
kind.write = write_or_die
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("to", ["hf", "maxllama4"])
def test_a_conversion_that_is_killed_looks_unfinished_and_the_same_command_finishes_it(folder, to):
  source, out = folder, folder.parent / "out"
  if to == "hf":
    source = folder.parent / "ours"
    run(folder, source, to="maxllama4")
  words = ["convert", str(source), str(out), f"to={to}"]
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, to, *words], env=os.environ, capture_output=True, timeout=120
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  partial = folder.parent / "out.partial"
  assert not out.exists() and partial.exists()
  done = (partial / conversion.DONE).read_text().splitlines()
  assert 0 < len(done) < len(tensors_in(folder))
  with (partial / conversion.DONE).open("a") as record:
    record.write("model.nor")  # a line that was cut off
  with pytest.raises(ConfigError, match="beginning of another conversion"):
    run(source, out, to=to, dtype="float32")
  assert cli.main(words) == 0
  assert out.exists() and not partial.exists() and not (out / conversion.DONE).exists()
  assert same_models(out, folder)
  assert "complete already" in run(source, out, to=to)


def test_tensors_that_were_done_are_not_written_again(folder):
  """A record that lists them all leaves nothing to do: the empty file stays empty."""
  out, partial = folder.parent / "out", folder.parent / "out.partial"
  run(folder, out, to="hf")
  names = list(tensors_in(out))
  partial.mkdir()
  for path in out.iterdir():
    path.rename(partial / path.name)
  out.rmdir()
  rewrite(partial, lambda held: [value.fill(0) for value in held.values()])
  (partial / conversion.DONE).write_text("".join(f"{name}\n" for name in names[1:]))
  run(folder, out, to="hf")
  expected = tensors_in(folder)
  for name, (_, _, content) in tensors_in(out).items():
    assert content == (expected[name][2] if name == names[0] else bytes(len(content))), name


def test_a_folder_that_holds_something_else_is_left_alone(folder):
  out = folder.parent / "out"
  out.mkdir()
  run(folder, out, to="maxllama4")  # an empty one is taken
  with pytest.raises(ConfigError, match="already holds something"):
    run(folder, out, to="hf")


def test_a_folder_that_only_looks_like_our_work_is_left_alone(folder):
  partial = folder.parent / "out.partial"
  partial.mkdir()
  (partial / "thesis.txt").write_text("mine")
  with pytest.raises(ConfigError, match="holds something else; move it away"):
    run(folder, folder.parent / "out", to="hf")
  assert (partial / "thesis.txt").read_text() == "mine"


# The command


def test_a_dry_run_lists_every_tensor_and_writes_nothing(folder, capsys):
  words = ["convert", str(folder), str(folder.parent / "out"), "to=maxllama4", "dry_run=true"]
  assert cli.main(words) == 0
  out = capsys.readouterr().out
  for name, (dtype, shape, content) in tensors_in(folder).items():
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
    assert line.split(maxsplit=1)[1].split("  ")[0] == str(list(shape))
    assert dtype in line and line.endswith(f" {len(content):,}")
  assert f"{len(tensors_in(folder))} tensors" in out
  assert not (folder.parent / "out").exists() and not (folder.parent / "out.partial").exists()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["SRC"], "name SOURCE and DESTINATION first"),
    (["SRC", "to=hf"], "name SOURCE and DESTINATION first"),
    (["SRC", "OUT"], "to is missing"),
    (["SRC", "OUT", "to=hf", "shards=3"], "shards is not a setting"),
    (["/nowhere", "OUT", "to=hf"], "holds no model"),
  ],
)
def test_a_mistaken_command_is_one_sentence(words, message, folder, capsys):
  places = {"SRC": str(folder), "OUT": str(folder.parent / "out")}
  assert cli.main(["convert", *(places.get(word, word) for word in words)]) == 2
  assert message in capsys.readouterr().err
