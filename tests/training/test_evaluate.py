"""The score of a checkpoint by itself: the one that training logs, on any documents, in any format."""

import json
import math
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from meta_files import write_meta_folder
from tiny import tiny_config, tiny_run

from maxllama4 import cli, load_model, load_tokenizer, save_model
from maxllama4.config import ConfigError, DataConfig
from maxllama4.model.weights import arrays_of
from maxllama4.training.evaluate import evaluate_checkpoint
from maxllama4.training.loop import train


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
  words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
  for i in range(12):
    (folder / f"{i}.txt").write_text(". ".join(" ".join(rng.choices(words, k=7)) for _ in range(9)))
  return folder


@pytest.fixture(scope="module")
def run_dir(texts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "run"
  data = DataConfig(paths=(str(texts),), held_out_fraction=0.2)
  model = tiny_config(vocab_size=320)
  train(tiny_run(model, run_dir=folder, data=data, steps=2, eval_every=2, sequence_length=32))
  return folder


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
  """The run's model in Hugging Face's format, tokenizer included."""
  folder = tmp_path_factory.mktemp("exported") / "hf"
  assert cli.main(["convert", str(run_dir), str(folder), "to=hf"]) == 0
  return folder


def test_a_run_without_data_of_another_gets_the_score_that_training_logged(run_dir):
  logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
  score = evaluate_checkpoint(run_dir, [])
  assert score.loss == pytest.approx(logged["eval/loss"], rel=1e-6)
  assert score.bits_per_byte == pytest.approx(logged["eval/bits_per_byte"], rel=1e-6)


def test_the_score_is_that_of_the_logits_over_every_byte_of_the_documents(exported, texts):
  """Each document is one row here: bos, its ids, eos."""
  score = evaluate_checkpoint(
    exported, [f"data.paths={texts}/3.txt", "training.sequence_length=64"]
  )
  model, tokenizer = load_model(exported), load_tokenizer(exported)
  logits_of = jax.jit(lambda tokens: model(tokens))
  text = (texts / "3.txt").read_text()
  ids = [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
  nats, tokens = 0.0, 0
  for start in range(0, len(ids) - 1, 64):  # a longer document goes on in the next row
    row = jnp.array([ids[start : start + 65]])
    padded = jnp.pad(row[:, :-1], ((0, 0), (0, 65 - row.shape[1])))  # which no token sees
    logits = jax.nn.log_softmax(logits_of(padded), axis=-1)[:, : row.shape[1] - 1]
    nats -= float(jnp.take_along_axis(logits, row[:, 1:, None], axis=-1).sum())
    tokens += row.shape[1] - 1
  assert (score.tokens, score.bytes) == (tokens, len(text.encode()))
  assert score.loss == pytest.approx(nats / tokens, rel=1e-4)
  assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)


def test_every_format_gets_the_same_score(run_dir, exported, texts, tmp_path, capsys):
  words = [f"data.paths=[{texts}]", "training.sequence_length=32", "output=json"]
  model = load_model(run_dir)
  write_meta_folder(tmp_path / "meta", model.config, arrays_of(model), num_shards=2)
  shutil.copy(exported / "tokenizer.model", tmp_path / "meta")
  scores = []
  for path in (run_dir, run_dir / "checkpoints" / "2", exported, tmp_path / "meta"):
    assert cli.main(["evaluate", str(path), *words]) == 0
    scores.append(json.loads(capsys.readouterr().out))
  assert scores[0] == scores[1] == pytest.approx(scores[2], rel=1e-6)
  assert scores[2] == pytest.approx(scores[3], rel=1e-6)
  assert scores[0]["bytes"] == sum(len(path.read_bytes()) for path in texts.iterdir())


def test_what_is_missing_or_cannot_be_set_is_said(run_dir, exported, texts, tmp_path):
  with pytest.raises(ConfigError, match="names no files"):
    evaluate_checkpoint(exported, [])
  with pytest.raises(ConfigError, match=r"model\.vocab_size cannot be set here"):
    evaluate_checkpoint(run_dir, ["model.vocab_size=9"])
  save_model(load_model(exported), tmp_path / "bare", format="hf")
  with pytest.raises(ConfigError, match=r"tokenizer\.model cannot be read"):
    evaluate_checkpoint(tmp_path / "bare", [f"data.paths={texts}"])
