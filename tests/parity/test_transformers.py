"""The same folder, loaded by transformers and by us, gives the same numbers. Needs the extra `parity`."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded: the folders are made here

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import VARIANTS, tiny_model

from maxllama4 import generate, load_model, save_model
from maxllama4.config import ConfigError
from maxllama4.model.llama4 import Llama4ForCausalLM, sequences_of
from maxllama4.model.weights import ModelTemplate, arrays_of

reason = "needs torch and transformers: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

LOGIT_TOLERANCE = 5e-5  # float32 noise of both sides together is near 1e-5
# Two rows of 40: over six chunk borders and eight steps of the temperature.
TOKENS = np.random.default_rng(1).integers(3, 96, (2, 40)).astype(np.int32)


@dataclasses.dataclass
class Pair:
  """Our model, and transformers' of the folder that `save_model` wrote."""

  ours: Llama4ForCausalLM
  theirs: Any
  folder: pathlib.Path
  forward: Callable  # arrays -> logits, rows of each expert by layer; compiled once

  def loss(self):
    """Their mean cross-entropy of `TOKENS`, a tensor."""
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    return self.theirs(input_ids=tokens, labels=tokens, use_cache=False).loss


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
  ours = tiny_model(request.param)
  folder = tmp_path_factory.mktemp("checkpoint") / request.param
  save_model(ours, folder, format="hf")
  theirs = transformers.Llama4ForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32
  )
  template = ModelTemplate(ours.config)

  @jax.jit
  def forward(arrays):
    model, tokens = template.model(arrays), jnp.asarray(TOKENS)
    sequences = sequences_of(tokens, None, None, ours.config)
    return model(tokens), model.hidden_states(tokens, sequences)[1].load

  return Pair(ours, theirs.eval(), folder, forward)


def test_logits_of_a_saved_folder_are_the_same_in_transformers(pair):
  with torch.no_grad():
    expected = pair.theirs(torch.tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()
  assert expected.std() > 0.5  # not all alike, or a comparison says little
  logits, load = pair.forward(arrays_of(pair.ours))
  np.testing.assert_allclose(np.asarray(logits), expected, atol=LOGIT_TOLERANCE, rtol=0)
  assert np.all(load.sum(-1) == TOKENS.size * pair.ours.config.num_experts_per_tok)
  assert np.all((load > 0).sum(-1) > 1)  # every layer chose between experts


def test_a_folder_that_transformers_wrote_gives_our_logits(pair, tmp_path):
  pair.theirs.save_pretrained(tmp_path / "theirs")
  loaded = load_model(tmp_path / "theirs")
  assert loaded.config.layer_kinds == pair.ours.config.layer_kinds
  logits, expected = (pair.forward(arrays_of(model))[0] for model in (loaded, pair.ours))
  np.testing.assert_array_equal(np.asarray(logits), np.asarray(expected))


def test_greedy_completions_are_the_same_in_transformers(pair):
  prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist()]  # a chunk border behind, and ahead
  completions = generate(pair.ours, prompts, max_new_tokens=20)
  pair.theirs.generation_config.eos_token_id = None
  for prompt, completion in zip(prompts, completions):
    prompt = torch.tensor([prompt])
    tokens = pair.theirs.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=20,
      do_sample=False,
      pad_token_id=0,
    )
    assert completion.tokens == tokens[0, prompt.shape[1] :].tolist()


def test_the_loss_and_its_gradients_are_the_same_in_transformers(pair):
  template = ModelTemplate(pair.ours.config)

  @jax.jit
  @jax.value_and_grad
  def objective(arrays):
    logits = template.model(arrays)(jnp.asarray(TOKENS))[:, :-1]
    targets = jnp.asarray(TOKENS)[:, 1:, None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1).mean()

  loss, gradients = objective(arrays_of(pair.ours))
  pair.theirs.zero_grad()
  expected = pair.loss()
  expected.backward()
  assert abs(float(loss) - expected.item()) <= 1e-5
  embedding = pair.theirs.get_input_embeddings().weight.grad.numpy()
  np.testing.assert_allclose(np.asarray(gradients["embed/weight"]), embedding, atol=1e-5, rtol=1e-4)


def test_a_folder_is_not_written_over(pair):
  with pytest.raises(ConfigError, match="already holds something"):
    save_model(pair.ours, pair.folder, format="hf")
