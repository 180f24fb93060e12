"""A run whose numbers go wrong: what it keeps of the step, how that is run again, and how the run goes on."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_run

from maxllama4.cli import main
from maxllama4.config import (
  CheckpointConfig,
  DataConfig,
  KernelsConfig,
  OptimizerConfig,
  ProfileConfig,
)
from maxllama4.data.loader import encode_document, make_loader, prepare_tokenizer
from maxllama4.data.sources import open_documents
from maxllama4.mesh import build_mesh
from maxllama4.model import moe
from maxllama4.model.moe import drop_beyond_capacity
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import use_mesh
from maxllama4.training.failure import (
  TrainingFailure,
  first_bad_layer,
  make_diagnosis,
  read_batch,
)
from maxllama4.training.loop import train

MODEL = tiny_config(vocab_size=300)


def exploding(folder, **training):
  """A run whose first update throws the weights so far that the second gradient is not finite."""
  (folder / "texts").mkdir()
  for i in range(9):
    (folder / "texts" / f"{i}.txt").write_text(f"text number {i}, " * (i + 1))
  config = tiny_run(
    MODEL,
    run_dir=folder / "run",
    data=DataConfig(paths=(str(folder / "texts"),), held_out_fraction=0.0),
    optimizer=OptimizerConfig(learning_rate=1e30, max_gradient_norm=0.0),
    checkpoint=CheckpointConfig(every=0),
    batch_size=16,
    **{"steps": 4, "log_every": 1} | training,
  )
  return dataclasses.replace(config, compilation_cache="compiled")  # it starts again and again


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
  """The configuration of a run that stopped, and what it said."""
  config = exploding(
    tmp_path_factory.mktemp("failed"), gradient_accumulation=2, steps=9, log_every=5
  )  # nobody looks at step 2 before step 3 is on its way
  with pytest.raises(TrainingFailure) as failure:
    train(config)
  return config, str(failure.value)


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_stops_at_the_first_bad_step_with_a_checkpoint_from_before_it(failed):
  config, sentence = failed
  run_dir = pathlib.Path(config.run_dir)
  assert sentence.startswith("step 2: the gradient is not finite (loss 5.7")
  assert "failures/step-2" in sentence and "training.skip_nonfinite=true" in sentence
  assert not (run_dir / "metrics.jsonl").exists()
  assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["1"]
  assert lines_of(run_dir / "events.jsonl")[-1]["reason"] == "failure: the gradient is not finite"


def test_the_failed_batch_is_kept_with_the_documents_it_came_from(failed):
  config, _ = failed
  folder = pathlib.Path(config.run_dir) / "failures" / "step-2"
  tokenizer = prepare_tokenizer(config, config.run_dir)
  loader = make_loader(config, tokenizer)
  expected = [next(loader), next(loader)][1]
  loader.close()
  batch = read_batch(folder)
  for name, rows in expected.items():
    np.testing.assert_array_equal(batch[name], rows, err_msg=name)
  split = open_documents(config.data, "train")
  ids = {split.name(i): encode_document(tokenizer, split[i]) for i in range(len(split))}
  covered = np.zeros_like(batch["segment_ids"])
  for piece in lines_of(folder / "documents-0.jsonl"):
    first, last = piece["columns"]
    tokens = batch["tokens"][piece["row"], first : last + 1]
    document = ids[piece["document"]][piece["offset"] :]
    np.testing.assert_array_equal(tokens, document[: len(tokens)])
    covered[piece["row"], first : last + 1] += 1
  np.testing.assert_array_equal(covered, batch["segment_ids"] > 0)


def test_replay_gives_the_same_numbers_and_names_the_layer(failed, capsys):
  config, _ = failed
  folder = pathlib.Path(config.run_dir) / "failures" / "step-2"
  kept = json.loads((folder / "failure.json").read_text())
  assert main(["replay", str(folder), "output=json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["step"] == kept["step"] == 2
  for name, value in found.items():
    np.testing.assert_array_equal(value, kept[name], err_msg=name)
  assert np.shape(found["debug/activations/max"]) == (2,)
  assert main(["replay", str(folder)]) == 0
  printed = capsys.readouterr().out
  assert "from the loss backwards, with gradients that are not finite" in printed


def test_the_diagnosis_of_a_step_drops_the_tokens_that_the_step_drops(monkeypatch):
  """Traced only: in the pass with gradients, and in the one that looks at activations."""
  factors = []

  def drop(experts, num_experts, factor):
    factors.append(factor)
    return drop_beyond_capacity(experts, num_experts, factor)

  monkeypatch.setattr(moe, "drop_beyond_capacity", drop)
  model = tiny_config(num_hidden_layers=1, interleave_moe_layer_step=1)
  config = tiny_run(model, kernels=KernelsConfig(expert_capacity_factor=0.5))
  with use_mesh(build_mesh(config, jax.devices()[:1]), config.mesh) as context:
    diagnose = make_diagnosis(config, ModelTemplate(model), context)
    diagnose.trace(tiny_arrays(model), packed_batch(8, 10))
  assert factors == [0.5, 0.5]


def test_the_layer_where_numbers_first_went_wrong_is_found_forwards_then_backwards():
  def found(activations, gradients):
    return {"debug/activations/max": activations, "debug/gradients/max": gradients}

  inf, nan = np.inf, np.nan
  assert first_bad_layer(found([1, 2, 3], [1, 1, 1])) is None
  assert first_bad_layer(found([1, inf, nan], [nan] * 3)).startswith("layer 1 is the first whose")
  assert first_bad_layer(found([1, 2, 3], [nan, inf, 1])).startswith("layer 1 is the first, from")


def test_the_same_command_fails_again_in_the_same_way(failed):
  config, sentence = failed
  with pytest.raises(TrainingFailure) as failure:
    train(config)
  assert str(failure.value) == sentence


def test_what_is_no_failed_step_cannot_be_replayed(tmp_path, capsys):
  assert main(["replay", str(tmp_path)]) == 2
  assert "holds no batch" in capsys.readouterr().err
  np.savez(tmp_path / "batch-0.npz", tokens=np.zeros(1))
  assert main(["replay", str(tmp_path)]) == 2
  assert "is not a batch of a failed step" in capsys.readouterr().err


def test_bad_steps_are_skipped_and_counted_where_asked_for(tmp_path):
  config = exploding(tmp_path, skip_nonfinite=True)
  train(config)
  run_dir = pathlib.Path(config.run_dir)
  lines = lines_of(run_dir / "metrics.jsonl")
  assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3]
  assert len({line["tokens"] for line in lines}) == 1  # skipped ones are not counted
  skipped = [event for event in lines_of(run_dir / "events.jsonl") if event["event"] == "skipped"]
  assert [event["step"] for event in skipped] == [2, 3, 4]
  assert not (run_dir / "failures").exists()


def test_a_profile_is_written_where_it_is_asked_for(tmp_path):
  config = tiny_run(MODEL, run_dir=tmp_path, steps=4, checkpoint=CheckpointConfig(every=0))
  train(dataclasses.replace(config, profile=ProfileConfig(steps=(2, 3), memory=True)))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert (tmp_path / "profile" / "memory-0.prof").stat().st_size > 0
