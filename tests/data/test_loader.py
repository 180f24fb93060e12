import dataclasses
import json
import threading

import numpy as np
import pytest

from maxllama4.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig
from maxllama4.data.loader import (
  encode_document,
  make_eval_batches,
  make_loader,
  merge_states,
  prepare_tokenizer,
)
from maxllama4.data.packing import ROW_DTYPES
from maxllama4.data.sources import DataError, Document, open_documents
from maxllama4.data.tokenizer import train_tokenizer

T, B = 16, 4
MODEL = ModelConfig(
  vocab_size=512, hidden_size=8, intermediate_size=8, intermediate_size_mlp=8, num_hidden_layers=1,
  num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_local_experts=0, num_experts_per_tok=1,
  interleave_moe_layer_step=0, moe_layers=None, nope_layer_interval=0, nope_layers=None,
  attention_chunk_size=None, use_qk_norm=False, attn_temperature_tuning=False, floor_scale=8192.0, attn_scale=0.1,
  rope_theta=1e4, rope_scaling=None, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.02,
  tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype="float32",
  param_dtype="float32",
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
  """41 documents of 0 to 40 words, each word its own."""
  for i in range(41):
    words = " ".join(f"w{i}.{j} \u00e9\u2581\n" for j in range((7 * i) % 41))
    (tmp_path / "texts" / f"{i:02d}.txt").parent.mkdir(exist_ok=True)
    (tmp_path / "texts" / f"{i:02d}.txt").write_text(words, encoding="utf-8")
  return Config(
    model=MODEL,
    data=DataConfig(paths=(str(tmp_path / "texts"),), held_out_fraction=0.2),
    training=TrainingConfig(steps=1, batch_size=B, sequence_length=T, seed=5),
    run_dir=str(tmp_path / "run"),
  )


@pytest.fixture
def tokenizer(config):
  return prepare_tokenizer(config, config.run_dir)


def change(config, section, **values):
  return dataclasses.replace(
    config, **{section: dataclasses.replace(getattr(config, section), **values)}
  )


def take(loader, count):
  return [next(loader) for _ in range(count)]


def assert_same(left, right):
  assert len(left) == len(right)
  for step, (a, b) in enumerate(zip(left, right)):
    for name in ROW_DTYPES:
      np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name}, batch {step}")


def share(index, count):
  """The rows of one host of `count`."""
  return range(index * B // count, (index + 1) * B // count)


def side_by_side(parts):
  """One global batch from the hosts' batches."""
  return [
    {name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts)
  ]


def test_batches_have_the_promised_names_shapes_and_types(config, tokenizer):
  for batch in take(make_loader(config, tokenizer), 3):
    assert {name: value.dtype for name, value in batch.items()} == ROW_DTYPES
    assert {value.shape for value in batch.values()} == {(B, T)}
    assert (batch["weights"] == 1).all()  # training rows are full


def test_an_epoch_reads_every_training_document_once_and_the_next_in_another_order(
  config, tokenizer
):
  documents = open_documents(config.data, "train")
  all_ids = [encode_document(tokenizer, documents[i]) for i in range(len(documents))]
  batches = take(make_loader(config, tokenizer), 200)
  streams = [np.concatenate([batch["targets"][row] for batch in batches]) for row in range(B)]
  found = [split_at_eos(stream, tokenizer.eos_token_id) for stream in streams]
  order = [found[i % B][i // B] for i in range(2 * len(documents))]
  first, second = order[: len(documents)], order[len(documents) :]
  expected = sorted(tuple(ids[1:]) for ids in all_ids)
  assert sorted(first) == sorted(second) == expected
  assert first != second and first != [tuple(ids[1:]) for ids in all_ids]


def split_at_eos(targets, eos):
  ends = np.flatnonzero(targets == eos) + 1
  return [tuple(part) for part in np.split(targets, ends)[:-1]]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_loader_resumed_midway_equals_one_that_was_never_stopped(config, tokenizer, prefetch):
  config = change(config, "data", prefetch=prefetch)
  expected = take(make_loader(config, tokenizer), 40)
  loader = make_loader(config, tokenizer)
  for stop in (0, 1, 7, 29):
    resumed = make_loader(config, tokenizer)
    take(resumed, 3)  # it may have run, and made batches ahead, before
    resumed.set_state(json.loads(json.dumps(state_after(loader, stop))))
    assert_same(take(resumed, 5), expected[stop : stop + 5])
    resumed.close()


def state_after(loader, stop):
  """The state once `stop` batches are delivered in all, with more of them ready."""
  delivered = getattr(loader, "delivered", 0)
  take(loader, stop - delivered)
  loader.delivered = stop
  return loader.get_state()


def test_prefetching_changes_neither_batches_nor_states(config, tokenizer):
  loaders = [make_loader(change(config, "data", prefetch=n), tokenizer) for n in (0, 1, 8)]
  for _ in range(12):
    batches = [next(loader) for loader in loaders]
    assert_same(batches[:1] * 2, batches[1:])
    assert loaders[0].get_state() == loaders[1].get_state() == loaders[2].get_state()


def test_the_hosts_rows_side_by_side_are_the_single_hosts_batch(config, tokenizer):
  expected = take(make_loader(config, tokenizer), 20)
  for count in (2, 4):
    parts = [take(make_loader(config, tokenizer, share(i, count)), 20) for i in range(count)]
    assert parts[0][0]["tokens"].shape == (B // count, T)
    assert_same(side_by_side(parts), expected)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 2)])
def test_another_number_of_hosts_resumes_the_same_data(config, tokenizer, before, after):
  expected = take(make_loader(config, tokenizer), 18)

  def hosts(count):
    return [make_loader(config, tokenizer, share(i, count)) for i in range(count)]

  states = []
  for loader in hosts(before):
    take(loader, 11)
    states.append(json.loads(json.dumps(loader.get_state())))
  resumed = hosts(after)
  for loader in resumed:
    loader.set_state(merge_states(reversed(states)))
  assert_same(side_by_side([take(loader, 7) for loader in resumed]), expected[11:])


def test_a_host_reads_only_the_documents_of_its_own_streams(config, tokenizer):
  class Recorder:
    def __init__(self):
      self.texts = []

    def __getattr__(self, name):
      return getattr(tokenizer, name)

    def encode(self, text):
      self.texts.append(text)
      return tokenizer.encode(text)

  recorders = [Recorder(), Recorder()]
  for i, recorder in enumerate(recorders):
    loader = make_loader(change(config, "data", prefetch=0), recorder, share(i, 2))
    while len(recorder.texts) < 10:
      next(loader)
  assert not set(recorders[0].texts[:10]) & set(recorders[1].texts[:10])


def test_more_streams_than_documents_still_give_full_rows_and_resume(config, tokenizer):
  few = change(config, "data", paths=(config.data.paths[0] + "/0[1-3].txt",), held_out_fraction=0.0)
  few = change(few, "training", batch_size=8)
  loader = make_loader(few, tokenizer)
  take(loader, 5)
  resumed = make_loader(few, tokenizer)
  resumed.set_state(loader.get_state())
  batches = take(loader, 30)
  assert_same(batches, take(resumed, 30))
  assert all((batch["weights"] == 1).all() for batch in batches)


@pytest.mark.parametrize(
  ("section", "values", "name"),
  [
    ("training", {"batch_size": 8}, "training.batch_size=8"),
    ("training", {"seed": 6}, "training.seed=6"),
    ("data", {"held_out_fraction": 0.4}, "documents="),
  ],
)
def test_a_state_of_another_order_of_data_is_refused(config, tokenizer, section, values, name):
  state = make_loader(config, tokenizer).get_state()
  with pytest.raises(ConfigError, match=name):
    make_loader(change(config, section, **values), tokenizer).set_state(state)


def test_one_hosts_state_is_not_taken_for_all(config, tokenizer):
  state = make_loader(config, tokenizer, share(1, 2)).get_state()
  assert list(state["streams"]) == ["2", "3"]
  with pytest.raises(ConfigError, match=r"lacks rows \[0, 1\]"):
    make_loader(config, tokenizer).set_state(state)


def test_a_longer_sequence_goes_on_at_the_same_place(config, tokenizer):
  loader = make_loader(config, tokenizer)
  take(loader, 9)
  longer = make_loader(change(config, "training", sequence_length=2 * T), tokenizer)
  longer.set_state(loader.get_state())
  two = take(loader, 2)
  expected = np.concatenate([batch["targets"] for batch in two], axis=1)
  np.testing.assert_array_equal(next(longer)["targets"], expected)


def test_a_broken_document_stops_the_loader_with_its_name_even_from_the_thread(config, tokenizer):
  with open(config.data.paths[0] + "/03.txt", "wb") as stream:
    stream.write(b"\xff")
  with pytest.raises(DataError, match=r"03\.txt: byte 0"):
    take(make_loader(config, tokenizer), 200)


def test_closing_stops_the_thread(config, tokenizer):
  before = set(threading.enumerate())
  loader = make_loader(config, tokenizer)
  next(loader)
  assert set(threading.enumerate()) > before
  loader.close()
  assert set(threading.enumerate()) == before


@pytest.mark.parametrize("sequence_length", [5, 16, 300])
def test_evaluation_counts_every_held_out_target_and_byte_once(config, tokenizer, sequence_length):
  config = change(config, "training", sequence_length=sequence_length)
  held_out = open_documents(config.data, "held_out")
  texts = [held_out[i].text for i in range(len(held_out))]
  result = make_eval_batches(config, tokenizer)
  assert result.num_bytes == sum(len(text.encode()) for text in texts) > 0
  targets = [batch["targets"][batch["weights"] > 0] for batch in result.batches]
  expected = [encode_document(tokenizer, Document("", text))[1:] for text in texts]
  np.testing.assert_array_equal(np.concatenate(targets), np.concatenate(expected))
  assert {batch["tokens"].shape for batch in result.batches} == {(B, sequence_length)}


def test_limited_evaluation_counts_exactly_the_bytes_of_its_targets(config, tokenizer):
  every = make_eval_batches(config, tokenizer)
  assert len(every.batches) > 3
  for count in (1, 2, 3):
    result = make_eval_batches(change(config, "training", eval_batches=count), tokenizer)
    assert_same(result.batches, every.batches[:count])
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in result.batches])
    # Decoded byte by byte, because the cut may lie inside a character.
    size = sum(tokenizer.token_num_bytes[i] for i in targets)
    whole = tokenizer.decode(targets).rstrip("\ufffd").encode()
    assert result.num_bytes == size and 0 <= size - len(whole) < 3


def test_the_hosts_evaluate_the_same_rows_as_one_and_know_all_bytes(config, tokenizer):
  expected = make_eval_batches(config, tokenizer)
  parts = [make_eval_batches(config, tokenizer, share(i, 2)) for i in range(2)]
  assert_same(side_by_side([part.batches for part in parts]), expected.batches)
  assert [part.num_bytes for part in parts] == [expected.num_bytes] * 2


def test_synthetic_rows_are_full_depend_on_the_seed_and_not_on_hosts_and_resume(config):
  config = change(config, "data", source="synthetic")
  assert prepare_tokenizer(config, config.run_dir) is None
  loader = make_loader(config, None)
  batches = take(loader, 6)
  for batch in batches:
    np.testing.assert_array_equal(batch["segment_ids"], 1)
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(T), (B, 1)))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < MODEL.vocab_size
  rows = np.concatenate([batch["tokens"] for batch in batches])
  assert len(np.unique(rows, axis=0)) == 6 * B
  parts = [take(make_loader(config, None, share(i, 2)), 6) for i in range(2)]
  assert_same(side_by_side(parts), batches)
  resumed = make_loader(config, None)
  resumed.set_state(json.loads(json.dumps(loader.get_state())))
  assert_same([next(resumed)], [next(loader)])
  other = next(make_loader(change(config, "training", seed=6), None))
  assert (other["tokens"] != batches[0]["tokens"]).mean() > 0.9


def test_synthetic_data_cannot_be_evaluated(config):
  config = change(config, "data", source="synthetic")
  with pytest.raises(ConfigError, match="synthetic holds no documents"):
    make_eval_batches(config, None)
  with pytest.raises(ConfigError, match=r"training\.eval_every=3.*set training\.eval_every=0"):
    make_loader(change(config, "training", eval_every=3), None)


def test_the_runs_tokenizer_is_trained_once_on_training_documents_alone(config, tmp_path):
  held_out = open_documents(config.data, "held_out").name(0)
  with open(f"{config.data.paths[0]}/{held_out}", "a") as stream:
    stream.write("zebra " * 500)
  first = prepare_tokenizer(config, tmp_path / "run")
  assert len(first.encode(" zebra")) > 3
  file = tmp_path / "run" / "tokenizer.model"
  written = file.stat().st_mtime_ns
  (tmp_path / "texts" / "more.txt").write_text("quince " * 500)
  again = prepare_tokenizer(config, tmp_path / "run")
  assert file.stat().st_mtime_ns == written
  assert again.encode("w1.1 quince") == first.encode("w1.1 quince")


def test_other_hosts_wait_for_the_tokenizer_and_give_up_in_words(config, tmp_path):
  with pytest.raises(TimeoutError, match="process 0 has not written"):
    prepare_tokenizer(config, tmp_path / "run", process_index=1, timeout_seconds=0.1)
  assert not (tmp_path / "run").exists()
  writer = threading.Timer(0.3, prepare_tokenizer, (config, tmp_path / "run"))
  writer.start()
  waited = prepare_tokenizer(config, tmp_path / "run", process_index=1, timeout_seconds=30)
  writer.join()
  assert waited.vocab_size <= MODEL.vocab_size


def test_a_given_tokenizer_must_fit_the_model_and_nothing_is_written_yet(config, tmp_path):
  path = tmp_path / "given.model"
  given = train_tokenizer(open_documents(config.data, "train"), 400, path)
  config = change(config, "data", tokenizer=str(path))
  assert prepare_tokenizer(config, tmp_path / "run").encode("w1.1") == given.encode("w1.1")
  small = change(config, "model", vocab_size=given.vocab_size - 1)
  for make in (
    lambda: prepare_tokenizer(small, tmp_path / "new"),
    lambda: make_loader(small, given),
  ):
    with pytest.raises(ConfigError, match=r"model\.vocab_size=\d+ is less than the tokenizer's"):
      make()
  assert not (tmp_path / "new").exists() and not (tmp_path / "run").exists()
