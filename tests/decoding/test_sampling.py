"""Filters against their definitions, and samples against the distributions they should have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxllama4.decoding.sampling import Sampling, filter_logits, sample

PROBABILITIES = np.array([0.4, 0.05, 0.25, 0.2, 0.1])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
DRAWS = 20_000


def kept(**settings):
  filtered = filter_logits(LOGITS, Sampling(temperature=1.0, **settings))[0]
  np.testing.assert_array_equal(filtered[filtered > -jnp.inf], LOGITS[0][filtered > -jnp.inf])
  return np.flatnonzero(np.asarray(filtered) > -np.inf).tolist()


@pytest.mark.parametrize(
  ("settings", "tokens"),
  [
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 1}, [0]),
    ({"top_k": 3}, [0, 2, 3]),
    ({"top_k": 9}, [0, 1, 2, 3, 4]),  # more than there are
    ({"top_p": 0.3}, [0]),  # the likeliest stays, however large its mass
    ({"top_p": 0.5}, [0, 2]),  # 0.4 lies before token 2, 0.65 before token 3
    ({"top_p": 0.7}, [0, 2, 3]),
    ({"top_p": 0.999}, [0, 1, 2, 3, 4]),
    ({"top_k": 2, "top_p": 0.6}, [0]),  # of what top-k left, token 0 has 0.4 / 0.65
  ],
)
def test_filters_keep_exactly_the_likeliest(settings, tokens):
  assert kept(**settings) == tokens


def test_filters_look_at_each_row_alone():
  logits = jnp.concatenate([LOGITS, LOGITS[:, ::-1]])
  filtered = np.asarray(filter_logits(logits, Sampling(temperature=1.0, top_k=2, top_p=0.9)))
  assert [np.flatnonzero(row > -np.inf).tolist() for row in filtered] == [[0, 2], [2, 4]]


def shares(sampling):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  tokens = jax.jit(lambda keys, logits: sample(keys, logits, sampling))(
    keys, jnp.tile(LOGITS, (DRAWS, 1))
  )
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=5) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_their_temperature(temperature):
  expected = PROBABILITIES ** (1 / temperature)
  expected /= expected.sum()
  error = np.sqrt(expected * (1 - expected) / DRAWS)
  assert np.all(np.abs(shares(Sampling(temperature=temperature)) - expected) < 5 * error)


def test_samples_never_leave_what_the_filters_keep_and_follow_its_softmax():
  found = shares(Sampling(temperature=1.0, top_k=4, top_p=0.8))  # 0, 2, 3
  expected = np.where([1, 0, 1, 1, 0], PROBABILITIES, 0) / 0.85
  assert np.all(found[expected == 0] == 0)
  np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / DRAWS))


def test_temperature_zero_takes_the_first_of_the_likeliest():
  keys = jax.random.split(jax.random.key(0), 2)
  logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [5.0, 0.0, 0.0, 0.0]])
  assert sample(keys, logits, Sampling(temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize(
  "settings", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_settings_out_of_range_are_refused(settings):
  with pytest.raises(ValueError, match=next(iter(settings))):
    Sampling(**settings)
