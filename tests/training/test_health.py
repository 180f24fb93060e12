"""The guard: which steps it takes for bad, when it halts, and that a bad step moves nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import packed_batch, tiny_arrays, tiny_config, tiny_run

from maxllama4.config import TrainingConfig
from maxllama4.model.weights import ModelTemplate
from maxllama4.training.health import LOSSES_NEEDED, MAX_SKIPPED_IN_A_ROW, REASONS, Health, judge
from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
from maxllama4.training.state import TrainState, split_trainable
from maxllama4.training.step import make_train_step

INF, NAN = math.inf, math.nan


def settings(**changes):
  return TrainingConfig(steps=1, batch_size=1, sequence_length=1, **changes)


def after(losses, gradient_norms=None, **changes):
  """Verdicts on a series of losses, and the health in the end."""
  health, verdicts, config = Health.fresh(), [], settings(**changes)
  judged = jax.jit(lambda health, loss, norm: judge(config, health, loss, norm))
  for loss, norm in zip(losses, gradient_norms or [1.0] * len(losses)):
    verdict, health = judged(health, jnp.float32(loss), jnp.float32(norm))
    verdicts.append(int(verdict))
  return verdicts, health


@pytest.mark.parametrize(
  ("loss", "norm", "reason"),
  [(NAN, 1, 1), (INF, 1, 1), (NAN, NAN, 1), (2, NAN, 2), (2, -INF, 2), (1e30, 1e30, 0)],
)
def test_what_is_not_finite_is_named_and_skipped_or_halts(loss, norm, reason):
  for skip in (True, False):
    verdicts, health = after([2.0, loss], [1.0, norm], skip_nonfinite=skip)
    assert verdicts == [0, reason] and (reason == 0 or reason in REASONS)
    assert bool(health.halted) == (reason > 0 and not skip)
    assert int(health.skipped) == (reason > 0 and skip)


def test_a_halted_guard_keeps_the_health_from_before_the_bad_step():
  _, before = after([2.0, 3.0])
  _, halted = after([2.0, 3.0, NAN, 2.5])
  assert halted.halted and not before.halted
  assert jax.tree.leaves(halted)[1:] == jax.tree.leaves(before)[1:]


def test_too_many_skipped_steps_in_a_row_halt_and_a_good_one_between_starts_the_count_anew():
  bad = [NAN] * MAX_SKIPPED_IN_A_ROW
  _, health = after([*bad, 2.0, *bad], skip_nonfinite=True)
  assert not health.halted and health.skipped == 2 * MAX_SKIPPED_IN_A_ROW
  _, health = after([*bad, NAN], skip_nonfinite=True)
  assert health.halted and health.skipped == MAX_SKIPPED_IN_A_ROW


def test_a_leap_of_the_loss_counts_only_when_asked_for_and_once_the_noise_is_known():
  rng = np.random.default_rng(0)
  calm = list(3 + 0.1 * rng.standard_normal(3 * LOSSES_NEEDED))
  asked = {"loss_spike_sigmas": 6.0, "skip_nonfinite": True}
  assert set(after(calm, **asked)[0]) == {0}
  assert after([*calm, 3.3], **asked)[0][-1] == 0
  assert after([*calm, 1.0], **asked)[0][-1] == 0  # downwards is progress
  assert after([*calm, 4.0], **asked)[0][-1] == 3
  assert after([*calm, 4.0])[0][-1] == 0
  assert set(after([3.0, 3.0, 9.0], **asked)[0]) == {0}
  assert set(after([*calm, *[4.0] * 100], **asked)[0][-40:]) == {0}  # a new level is got used to


def test_mean_and_deviation_are_those_of_the_losses():
  losses = np.random.default_rng(1).normal(5, 0.5, 40)  # shorter than the memory: plain averages
  _, health = after(losses)
  assert health.loss_mean == pytest.approx(losses.mean(), rel=1e-5)
  assert math.sqrt(health.loss_variance) == pytest.approx(losses.std(), rel=1e-4)
  assert after([*losses, NAN], skip_nonfinite=True)[1].loss_mean == health.loss_mean


@pytest.mark.parametrize("skip", [True, False])
def test_a_bad_batch_moves_no_weight_no_moment_and_no_bias(skip):
  model = tiny_config(num_hidden_layers=2)
  template, arrays = ModelTemplate(model), tiny_arrays(model)
  config = tiny_run(
    model, skip_nonfinite=skip, gradient_accumulation=2, router_bias_update_rate=0.1
  )
  optimizer = make_optimizer(config.optimizer, 10, template)
  schedule = learning_rate_schedule(config.optimizer, 10)
  step = jax.jit(make_train_step(config, template, optimizer, schedule))
  params, _ = split_trainable(arrays, template)
  state = TrainState(jnp.zeros((), jnp.int32), arrays, optimizer.init(params), Health.fresh())
  good = packed_batch(8, 10)
  bad = good | {"weights": good["weights"].at[3, 0].set(NAN)}
  first, _ = step(state, good)
  second, metrics = step(first, bad)
  assert metrics["verdict"] == 1 and metrics["step_tokens"] == 0
  assert second.step == (2 if skip else 1)
  for one, other in zip(
    jax.tree.leaves((first.model, first.optimizer)),
    jax.tree.leaves((second.model, second.optimizer)),
    strict=True,
  ):
    np.testing.assert_array_equal(one, other)
  third, metrics = step(second, good)
  moved = bool((third.model["embed/weight"] != second.model["embed/weight"]).any())
  assert moved == skip and bool(metrics["halted"]) != skip
  again, _ = step(second.resumable(), good)
  assert (again.model["embed/weight"] != second.model["embed/weight"]).any()
