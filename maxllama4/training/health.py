"""Whether a step's numbers are sound: decided on the device, so that no bad update ever reaches the weights."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maxllama4.config import TrainingConfig

FINE = 0
REASONS = {1: "the loss is not finite", 2: "the gradient is not finite", 3: "the loss leapt up"}
LOSS_MEMORY = 0.98  # share that the past keeps in the running mean and variance of the loss
LOSSES_NEEDED = 50  # before a leap can be told from the noise of the start
MAX_SKIPPED_IN_A_ROW = 20  # a run that does nothing but skip has failed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
  """The guard's memory, a part of the training state."""

  halted: Bool[Array, ""]  # a bad step came that must not be skipped: nothing moves any more
  skipped: Int[Array, ""]  # steps whose update was left out
  skipped_in_a_row: Int[Array, ""]
  losses: Int[Array, ""]  # in the mean and the variance
  loss_mean: Float[Array, ""]
  loss_variance: Float[Array, ""]

  @classmethod
  def fresh(cls) -> "Health":
    def zero(dtype):  # an array of its own each: the state's buffers are donated
      return jnp.zeros((), dtype)

    counts = (zero(jnp.int32) for _ in range(3))
    return cls(zero(bool), *counts, zero(jnp.float32), zero(jnp.float32))


def judge(
  config: TrainingConfig, health: Health, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
) -> tuple[Int[Array, ""], Health]:
  """FINE or a key of `REASONS`, and the health after this step.

  A bad step is skipped with `training.skip_nonfinite`; without, or after too many in a row, it halts the run: its
  health is otherwise that before it, for the step will be taken again.
  """
  spike = jnp.zeros((), bool)
  if config.loss_spike_sigmas:
    limit = health.loss_mean + config.loss_spike_sigmas * jnp.sqrt(health.loss_variance)
    spike = (health.losses >= LOSSES_NEEDED) & (loss > limit)
  causes = [~jnp.isfinite(loss), ~jnp.isfinite(gradient_norm), spike]
  verdict = jnp.select(causes, jnp.asarray(list(REASONS), jnp.int32), FINE)
  bad = verdict != FINE
  in_a_row = jnp.where(bad, health.skipped_in_a_row + 1, 0)
  too_many = in_a_row > (MAX_SKIPPED_IN_A_ROW if config.skip_nonfinite else 0)
  share = jnp.maximum(1 / (health.losses + 1), 1 - LOSS_MEMORY)
  distance = loss - health.loss_mean
  after = Health(
    halted=health.halted,
    skipped=health.skipped + bad,
    skipped_in_a_row=in_a_row,
    losses=health.losses + 1,
    loss_mean=health.loss_mean + share * distance,
    loss_variance=(1 - share) * (health.loss_variance + share * distance**2),
  )
  after = _where(jnp.isfinite(loss), after, _keep_losses(after, health))
  halted = health.halted | (bad & too_many)
  return verdict, _where(halted, dataclasses.replace(health, halted=halted), after)


def _keep_losses(health: Health, earlier: Health) -> Health:
  names = ("losses", "loss_mean", "loss_variance")
  return dataclasses.replace(health, **{name: getattr(earlier, name) for name in names})


def _where(condition: Bool[Array, ""], one: Health, other: Health) -> Health:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)
