"""Decoding against the forward pass of the same tokens, and what `generate` promises about batches, stops and seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from maxllama4 import ConfigError, generate
from maxllama4.decoding.generate import NO_TOKEN, decode_step, pad_prompts, prefill, stream
from maxllama4.decoding.sampling import Sampling
from maxllama4.model.decoder import init_caches
from maxllama4.model.weights import ModelTemplate, arrays_of

# Two scanned cycles and a layer left over; chunks of 4 positions; temperature steps every 3.
DEEP = tiny_config(num_hidden_layers=5, num_experts_per_tok=2)
MODEL = tiny_config()  # compiles fast, for what has nothing to do with layers
LENGTH = 15  # prompt and answer together: chunk borders at 4, 8 and 12
PROMPTS = ([3], [5, 1, 2, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11])  # one token; a chunk; two and a half


@functools.cache
def model(config=MODEL):
  return tiny_model(config, seed=2)  # its greedy answers are varied


@functools.cache
def forward(config):
  """A function from rows of up to `LENGTH` tokens to their logits, without a cache."""
  template, arrays = ModelTemplate(config), arrays_of(model(config))
  apply = jax.jit(lambda arrays, tokens: template.model(arrays)(tokens))

  def run(rows):
    tokens = np.zeros((3, LENGTH), np.int32)
    for row, values in enumerate(rows):
      tokens[row, : len(values)] = values
    return np.asarray(apply(arrays, tokens))

  return run


@functools.cache
def prefill_and_steps():
  """A jitted function: logits after the prompts and after each of the tokens `rest` [B, n] that follow."""
  template = ModelTemplate(DEEP)

  @jax.jit
  def run(arrays, prompts, segment_ids, rest):
    model = template.model(arrays)
    caches = init_caches(DEEP, prompts.shape[0], LENGTH)
    first, caches = prefill(model, prompts, segment_ids, caches)

    def step(carry, token):
      position, caches = carry
      logits, caches = decode_step(model, token, position, caches)
      return (position + 1, caches), logits

    _, others = jax.lax.scan(step, (segment_ids.sum(1), caches), rest.T)
    return jnp.concatenate([first[None], others]).swapaxes(0, 1)

  return run


@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_steps_equal_the_forward_pass_across_chunk_borders_for_unequal_prompts(side):
  tokens = np.random.default_rng(0).integers(1, 32, (3, LENGTH), dtype=np.int32)
  lengths = [1, 4, 10]
  prompts, segments = pad_prompts([row[:n].tolist() for row, n in zip(tokens, lengths)], 0)
  if side == "left":
    prompts, segments = (
      np.stack([np.roll(row, 10 - n) for row, n in zip(array, lengths)])
      for array in (prompts, segments)
    )
  rest = np.stack([row[n : n + 5] for row, n in zip(tokens, lengths)])
  ours = prefill_and_steps()(arrays_of(model(DEEP)), prompts, segments, rest)
  expected = forward(DEEP)(tokens)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(ours[row], expected[row, n - 1 : n + 5], atol=3e-5, rtol=0)


def test_a_chunked_layer_keeps_at_most_a_chunk_of_positions_and_a_global_one_all():
  caches = init_caches(DEEP, 3, 100)
  chunked, whole = caches["cycles"]
  assert chunked.key.shape == (2, 3, 4, 2, 6) and whole.key.shape == (2, 3, 100, 2, 6)
  assert caches["rest"][0].key.shape == (3, 4, 2, 6)
  assert init_caches(DEEP, 3, 2)["cycles"][0].key.shape[2] == 2  # shorter than a chunk


@functools.cache
def greedy():
  return generate(model(), PROMPTS, max_new_tokens=5, logprobs=True)


def test_greedy_tokens_and_logprobs_are_those_of_the_forward_pass():
  rows = [[*prompt, *completion.tokens] for prompt, completion in zip(PROMPTS, greedy())]
  for prompt, completion, logits in zip(PROMPTS, greedy(), forward(MODEL)(rows)):
    logits = logits[len(prompt) - 1 :][:5]
    assert completion.tokens == np.argmax(logits, -1).tolist()
    logprobs = jax.nn.log_softmax(logits)[np.arange(5), np.array(completion.tokens)]
    np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)
    assert completion.finish_reason == "length"


def test_a_prompt_in_a_batch_of_unequal_lengths_gets_what_it_gets_alone():
  for prompt, completion in list(zip(PROMPTS, greedy()))[::2]:
    (alone,) = generate(model(), [prompt], max_new_tokens=5)
    assert alone.tokens == completion.tokens


def test_a_row_ends_before_its_stop_token_and_the_others_go_on():
  before = [completion.tokens for completion in greedy()]
  stops = [before[0][0], before[2][2]]  # right at the start of row 0, later in row 2
  assert not set(stops) & {*before[1], *before[2][:2]}
  completions = generate(model(), PROMPTS, max_new_tokens=5, stop_tokens=stops, logprobs=True)
  assert [c.tokens for c in completions] == [[], before[1], before[2][:2]]
  assert [c.finish_reason for c in completions] == ["stop", "length", "stop"]
  assert [len(c.logprobs) for c in completions] == [0, 5, 2]


def test_pieces_of_a_stream_are_the_completion_cut_up():
  sampling = Sampling(temperature=0.0)
  pieces = list(stream(model(), PROMPTS, 5, sampling, 0, (), piece=3))
  assert [tokens.shape[1] for tokens, _ in pieces] == [3, 2]
  tokens, logprobs = (np.concatenate(parts, axis=1) for parts in zip(*pieces))
  assert tokens.tolist() == [completion.tokens for completion in greedy()]
  np.testing.assert_allclose(logprobs, [c.logprobs for c in greedy()], atol=1e-5)
  assert NO_TOKEN not in tokens


@functools.cache
def sampled(seed):
  return [c.tokens for c in generate(model(), [PROMPTS[1]] * 3, 5, temperature=1.5, seed=seed)]


def test_a_seed_repeats_its_samples_and_another_one_gives_others():
  again = [c.tokens for c in generate(model(), [PROMPTS[1]] * 3, 5, temperature=1.5, seed=0)]
  assert again == sampled(0) != sampled(1)


def test_rows_of_one_prompt_are_sampled_independently():
  assert len({tuple(tokens) for tokens in sampled(0)}) == 3


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"prompts": []}, "prompts is empty"),
    ({"prompts": [[1], []]}, "prompts[1] is empty"),
    ({"prompts": [[1, 32]]}, "prompts[0] holds token 32, outside 0..31"),
    ({"prompts": [[-1]]}, "prompts[0] holds token -1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_k": -1}, "top_k=-1"),
  ],
)
def test_what_cannot_be_generated_is_named(arguments, words):
  with pytest.raises(ConfigError) as error:
    generate(model(), **{"prompts": [[1]]} | arguments)
  assert words in str(error.value)


def test_pixels_for_a_text_model_are_refused():
  with pytest.raises(ValueError, match="pixel_values"):
    generate(model(), [[1]], pixel_values=jnp.zeros((1, 3, 4, 4)))
