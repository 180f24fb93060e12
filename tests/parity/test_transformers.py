"""The same folder, loaded by transformers and by us, gives the same numbers. Needs the extra `parity`."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: the folders are made here

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import VARIANTS, tiny_model

from maxllama4 import generate, load_model, save_model
from maxllama4.config import ConfigError

reason = "needs torch and transformers: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

TOLERANCE = 5e-5  # float32 noise of both sides together is near 1e-5


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
  """Our model, and transformers' of the folder that `save_model` wrote."""
  ours = tiny_model(request.param)
  folder = tmp_path_factory.mktemp("checkpoint") / request.param
  save_model(ours, folder, format="hf")
  theirs = transformers.Llama4ForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32
  )
  return ours, theirs.eval(), folder


def random_tokens(rows, length, seed=1):
  return np.random.default_rng(seed).integers(3, 96, (rows, length)).astype(np.int32)


def their_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


def test_logits_of_a_saved_folder_are_the_same_in_transformers(pair):
  ours, theirs, _ = pair
  tokens = random_tokens(2, 40)  # over six chunk borders and eight steps of the temperature
  expected = their_logits(theirs, tokens)
  assert expected.std() > 0.5  # not all alike, or a comparison says little
  np.testing.assert_allclose(np.asarray(ours(jnp.asarray(tokens))), expected, atol=TOLERANCE)


def test_a_folder_that_transformers_wrote_gives_our_logits(pair, tmp_path):
  ours, theirs, _ = pair
  theirs.save_pretrained(tmp_path / "theirs")
  loaded = load_model(tmp_path / "theirs")
  tokens = jnp.asarray(random_tokens(1, 20))
  assert loaded.config.layer_kinds == ours.config.layer_kinds
  np.testing.assert_array_equal(np.asarray(loaded(tokens)), np.asarray(ours(tokens)))


def test_greedy_completions_are_the_same_in_transformers(pair):
  ours, theirs, _ = pair
  prompts = random_tokens(2, 9).tolist()
  lengths = (9, 4)  # a chunk border behind, and one right ahead
  for prompt, length in zip(prompts, lengths):
    prompt = prompt[:length]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, length, dtype=torch.long),
      max_new_tokens=20,
      do_sample=False,
      pad_token_id=0,
    )[0, length:].tolist()
    assert generate(ours, [prompt], max_new_tokens=20)[0].tokens == expected


def test_the_loss_and_its_gradients_are_the_same_in_transformers(pair):
  ours, theirs, _ = pair
  from maxllama4.model.weights import ModelTemplate, arrays_of

  tokens = random_tokens(2, 24, seed=3)
  theirs.zero_grad()
  ids = torch.tensor(tokens, dtype=torch.long)
  loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
  loss.backward()

  import jax

  template = ModelTemplate(ours.config)

  def objective(arrays):
    logits = template.model(arrays)(jnp.asarray(tokens))[:, :-1]
    targets = jnp.asarray(tokens)[:, 1:, None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1).mean()

  value, gradients = jax.value_and_grad(objective)(arrays_of(ours))
  np.testing.assert_allclose(float(value), loss.item(), atol=1e-5)
  embedding = theirs.get_input_embeddings().weight.grad.numpy()
  np.testing.assert_allclose(np.asarray(gradients["embed/weight"]), embedding, atol=1e-5)


def test_every_expert_of_the_tiny_models_gets_tokens(pair):
  ours, _, _ = pair
  from maxllama4.model.llama4 import sequences_of

  tokens = jnp.asarray(random_tokens(2, 40))
  sequences = sequences_of(tokens, None, None, ours.config)
  statistics = ours.hidden_states(tokens, sequences)[1]
  load = np.asarray(statistics.load)
  assert np.all(load.sum(-1) == tokens.size * ours.config.num_experts_per_tok)
  assert np.all((load > 0).sum(-1) >= 2)


def test_a_folder_is_not_written_over(pair):
  ours, _, folder = pair
  with pytest.raises(ConfigError, match="already holds something"):
    save_model(ours, folder, format="hf")
