"""A run from its configuration: batch, step, log, evaluate, checkpoint."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from maxllama4.checkpoint.store import CheckpointError, CheckpointStore, gather_json
from maxllama4.chips import peak_flops
from maxllama4.config import Config
from maxllama4.data.loader import make_eval_batches, make_loader, merge_states, prepare_tokenizer
from maxllama4.hosts import start_hosts
from maxllama4.mesh import build_mesh
from maxllama4.model.attention import attention_kernel
from maxllama4.model.llama4 import count_parameters, train_flops_per_token
from maxllama4.model.moe import expert_kernels
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import MeshContext, no_mesh, use_mesh
from maxllama4.training.evaluate import Evaluation, local_rows, place_batch
from maxllama4.training.failure import (
  TrainingFailure,
  make_diagnosis,
  write_diagnosis,
  write_failure,
)
from maxllama4.training.health import FINE, REASONS
from maxllama4.training.metrics import (
  Clock,
  Progress,
  RunWriter,
  check_wandb,
  end_events,
  memory_peaks,
  to_plain,
  versions,
)
from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
from maxllama4.training.profiler import Profiler
from maxllama4.training.run_dir import check_run_dir, compilation_cache_of, keep_config
from maxllama4.training.signals import StopRequest
from maxllama4.training.state import TrainState, abstract_state, init_state
from maxllama4.training.step import kernel_choice, lower_train_step
from maxllama4.xla_flags import compiler_options

LOAD_MAPS = 100  # of experts by layer that metrics.jsonl holds, about, however long the run


@dataclasses.dataclass
class StepTaken:
  """A step that was handed to the device; the host looks at its numbers one step later."""

  step: int
  batch: dict[str, np.ndarray]  # this host's rows
  position: dict[str, Any]  # of the data, before the batch
  metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

  @property
  def is_over(self) -> bool:
    return self.metrics["loss"].is_ready()


@dataclasses.dataclass(frozen=True)
class Extras:
  """What layers above the training hand in."""

  # Rewrites a run's report.html.
  report: Callable[[pathlib.Path], None] | None = None
  # Continuations, of a model, a tokenizer, prompts and a number of tokens.
  sample: Callable[[Any, Any, Sequence[str], int], list[str]] | None = None


def train(config: Config, extras: Extras | None = None) -> None:
  """Trains to `training.steps`, from the newest checkpoint of `run_dir` if there is one.

  SIGTERM and Ctrl-C stop it after the step (or evaluation) under way, with a checkpoint. Raises: TrainingFailure at a
  step whose numbers are bad, unless `training.skip_nonfinite`.
  """
  check_wandb(config)
  template = ModelTemplate(config.model, config.training.frozen)
  optimizer = make_optimizer(config.optimizer, config.training.steps, template)
  with start_hosts(config):
    train_on_devices(config, template, optimizer, extras or Extras())


def train_on_devices(
  config: Config,
  template: ModelTemplate,
  optimizer: optax.GradientTransformation,
  extras: Extras,
) -> None:
  """`train`, once JAX knows the devices of all hosts."""
  progress = Progress(config.training.steps)
  with StopRequest() as stop:
    mesh = build_mesh(config)
    check_run_dir(config)
    with compilation_cache_of(config), use_mesh(mesh, config.mesh) as context:
      run = Run(config, context, template, optimizer, progress, stop, extras)
      run.resume()
      keep_config(config)  # only now: what is refused leaves nothing behind
      run.loop()
  progress.say(f"{'stopped' if run.stopped else 'done'}: {config.run_dir}")


class Run:
  """Everything that a run needs around its `TrainState`."""

  def __init__(
    self,
    config: Config,
    context: MeshContext,
    template: ModelTemplate,
    optimizer: optax.GradientTransformation,
    progress: Progress,
    stop: StopRequest,
    extras: Extras,
  ):
    self.config, self.context, self.progress = config, context, progress
    self.stop, self.extras = stop, extras
    self.clock = Clock()
    self.stopped = False
    length, parts = config.training.sequence_length, context.size("length")
    platform = context.mesh.devices.flat[0].platform
    attention = attention_kernel(config.kernels.attention, config.model, platform, length, parts)
    experts = expert_kernels(config.model, kernel_choice(config))
    self.kernels = {"attention": attention, **experts}
    self.template, self.optimizer = template, optimizer
    self.schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    self.tokens = 0  # counted targets up to the last time somebody asked
    self._unchecked: collections.deque[StepTaken] = collections.deque()
    self.tokenizer = prepare_tokenizer(config, config.run_dir, process_index=jax.process_index())
    self.rows = local_rows(config, context)
    self.loader = make_loader(config, self.tokenizer, self.rows)
    self.evaluate = None
    if config.training.eval_every:
      held_out = make_eval_batches(config, self.tokenizer, self.rows)
      self.evaluate = Evaluation(config, self.template, context, held_out)
    self.store = CheckpointStore(config.run_dir, config.checkpoint)

  def resume(self) -> None:
    """Restores the newest whole checkpoint, or starts afresh."""
    self.resumed, memory = bool(self.store.steps), self.config.optimizer.state_memory
    if not self.resumed:
      self.state = init_state(
        self.template, self.optimizer, self.config.training.seed, self.context, memory
      )
      return
    shapes = abstract_state(self.template, self.optimizer, self.context, memory)
    rest = {"step": shapes.step, "optimizer": shapes.optimizer, "health": shapes.health}
    step, model, rest, position = self.store.restore_newest(shapes.model, rest, self.progress.say)
    self.state = TrainState(model=model, **rest)
    self.tokens = position["tokens"]
    self.loader.set_state(position["loader"])
    self.progress.say(f"resumed from step {step} of {self.config.run_dir}")

  def loop(self) -> None:
    """Steps until `training.steps` are done; the last one is always logged, evaluated and saved."""
    first, steps = int(self.state.step), self.config.training.steps
    if first >= steps:
      self.progress.say(f"nothing to do: step {first} of training.steps={steps} is reached")
      end_events(self.config, first)
      return
    train_step = self._compile_step()
    self.profiler = Profiler(self.config, first + 1)
    self.writer = RunWriter(self.config, first_step=first, report=self.extras.report)
    self._say_started(first)
    self.stop.defer()
    self.clock.start(first)
    try:
      step = self._steps(train_step, first, steps)
    except TrainingFailure:
      raise  # has said so itself
    except (Exception, KeyboardInterrupt) as error:
      self._give_up(error)
      raise
    self._finish(step, steps)

  def _steps(self, train_step: Callable, first: int, steps: int) -> int:
    """Takes the steps after `first`. Returns the last one, which is below `steps` when the run was asked to stop."""
    training = self.config.training
    for step in range(first + 1, steps + 1):
      self._step = step
      taken = self._next_batch(step)
      self.profiler.before(step)
      self.state, taken.metrics = train_step(self.state, self._place(taken.batch))
      self.profiler.after(step, self.state)
      self._check(taken)
      self.store.check()
      values = {}
      if step == steps or is_due(step, training.log_every):
        values |= self._log(taken)
      if self.evaluate and (step == steps or is_due(step, training.eval_every)):
        values |= self._evaluate(step)
      if values:
        self._write(step, values)
      last = step == steps or self.stop.after_this_step()
      if last or is_due(step, self.config.checkpoint.every):
        self._save(step)
      if last:
        return step
    raise AssertionError("the last step returns")

  def _compile_step(self) -> Callable:
    """The training step, compiled for this run's shapes before the first batch, and only once."""
    start = time.perf_counter()
    lowered = lower_train_step(
      self.config, self.template, self.optimizer, self.schedule, self.state, self.context
    )
    options = compiler_options(self._device_kind, self.config.compiler_options)
    compiled = lowered.compile(compiler_options=options)
    self.compile_seconds = time.perf_counter() - start
    total, active = count_parameters(self.config.model)
    training = self.config.training
    kernels = ", ".join(f"{name} {kind}" for name, kind in self.kernels.items())
    self.progress.say(
      f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active;"
      f" {training.batch_size} x {training.sequence_length} tokens a step on {self.context.mesh.size} x"
      f" {self._device_kind}; {kernels}; compiled in {self.compile_seconds:.1f} s"
    )
    return compiled

  @property
  def _device_kind(self) -> str:
    return self.context.mesh.devices.flat[0].device_kind

  def _next_batch(self, step: int) -> StepTaken:
    """The batch of `step`, and where the data stood before it. Waiting counts as data's time if it starves the device."""
    position = self.loader.get_state()
    start = time.perf_counter()
    batch = next(self.loader)
    if not self._unchecked or self._unchecked[-1].is_over:
      self.clock.add("data", time.perf_counter() - start)
    return StepTaken(step, batch, position)

  def _place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return place_batch(batch, self.config, self.context)

  def _check(self, taken: StepTaken) -> None:
    """Looks at the verdict on the step before `taken`, so that the device never waits for the host."""
    self._unchecked.append(taken)
    if len(self._unchecked) > 1:
      self._check_first()

  def _check_all(self) -> None:
    while self._unchecked:
      self._check_first()

  def _check_first(self) -> None:
    """Counts the oldest unchecked step, or reports what was wrong with it. Raises: TrainingFailure when that halts."""
    taken = self._unchecked.popleft()
    verdict = int(taken.metrics["verdict"])
    if bool(taken.metrics["halted"]):
      self._fail(taken, REASONS[verdict])
    self.tokens += int(taken.metrics["step_tokens"])
    if verdict != FINE:
      loss = float(taken.metrics["loss"])
      self.writer.event("skipped", taken.step, reason=REASONS[verdict], loss=loss)
      self.progress.say(f"step {taken.step}: {REASONS[verdict]} (loss {loss:.4g}); left out")

  def _fail(self, taken: StepTaken, reason: str) -> None:
    """Keeps the failed step, and a checkpoint of the state before it, from which the run goes on."""
    step = taken.step
    self._unchecked.clear()  # what came after it moved nothing
    self.state = self.state.resumable()
    documents = self.loader.describe(taken.batch, taken.position)
    folder = write_failure(self.config, step, reason, taken.batch, self.rows, documents)
    if step - 1 not in self.store.steps:
      self._save(step - 1, taken.position)
    self.store.wait()
    loss, norm = (float(taken.metrics[name]) for name in ("loss", "gradient_norm"))
    sentence = (
      f"step {step}: {reason} (loss {loss:.4g}, gradient norm {norm:.4g}). {folder} holds the batch, its documents and"
      f" statistics by layer; `maxllama4 replay {folder}` runs it again. The run goes on from before it, with"
      " training.skip_nonfinite=true without it."
    )
    self.writer.event("stopped", step, reason=f"failure: {reason}")
    self.writer.close()
    try:
      diagnose = make_diagnosis(self.config, self.template, self.context)
      write_diagnosis(folder, to_plain(diagnose(self.state.model, self._place(taken.batch))))
    except jax.errors.JaxRuntimeError as error:  # too much for a device that is nearly full
      self.progress.say(f"no statistics by layer: {str(error).splitlines()[0]}")
    raise TrainingFailure(sentence)

  def _give_up(self, error: BaseException) -> None:
    """Lets a save under way end, and says that the run has ended, as far as `error` leaves that possible."""
    with contextlib.suppress(CheckpointError, OSError):
      if jax.process_count() == 1:  # others may be gone, and the save with them
        self.store.wait()
    reason = " ".join(str(error).split()) or type(error).__name__
    with contextlib.suppress(OSError):
      self.writer.event("stopped", self._step, reason=f"failure: {reason}")
      self.writer.close()

  def _log(self, taken: StepTaken) -> dict[str, Any]:
    """The step's metrics; seconds and rates are means since the last logged step."""
    self._check_all()
    step, training = taken.step, self.config.training
    metrics = dict(taken.metrics)
    for name in ("verdict", "halted", "step_tokens"):
      del metrics[name]
    if not is_due(
      step, training.log_every * max(1, training.steps // training.log_every // LOAD_MAPS)
    ):
      metrics.pop("moe/load_by_layer", None)
    seconds = self.clock.seconds_a_step(step)
    step_tokens = training.batch_size * training.sequence_length
    peak = peak_flops(self._device_kind)
    flops = step_tokens * train_flops_per_token(self.config.model, training.sequence_length)
    values = to_plain(metrics) | {
      "tokens": self.tokens,
      "step_seconds": seconds,
      "tokens_per_second": step_tokens / seconds,
      "mfu": None if peak is None else flops / seconds / (peak * self.context.mesh.size),
      **memory_peaks(),
    }
    self.progress.show(step, values)
    return values

  def _evaluate(self, step: int) -> dict[str, float]:
    jax.block_until_ready(self.state)  # steps still under way are training's time
    with self.clock.spent_on("evaluation"):
      score = self.evaluate(self.state.model)
      self._sample(step)
    self.progress.say(
      f"step {step}: held-out loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits per byte"
    )
    return {"eval/loss": score.loss, "eval/bits_per_byte": score.bits_per_byte}

  def _write(self, step: int, values: dict[str, Any]) -> None:
    values = values | self.clock.read()
    with self.clock.spent_on("other"):
      self.writer.write(step, values)

  def _sample(self, step: int) -> None:
    prompts = self.config.reporting.sample_prompts
    if not prompts or self.extras.sample is None:
      return
    model, tokens = self.template.model(self.state.model), self.config.reporting.sample_tokens
    with no_mesh():  # a few prompts cannot be split over it; the weights stay where they are
      texts = self.extras.sample(model, self.tokenizer, prompts, tokens)
    for prompt, text in zip(prompts, texts):
      self.writer.sample(step, prompt, text)

  def _save(self, step: int, position: dict[str, Any] | None = None) -> None:
    """Starts a checkpoint; `position` is where the data stands, by default where it stands now."""
    self._check_all()
    with self.clock.spent_on("checkpoint"):
      # Four processes once hung where they tell each other where their data stands. Whether the step's own exchanges had
      # a part in it is not known; they are over by then.
      state = jax.block_until_ready(self.state)
      loader = merge_states(gather_json(position or self.loader.get_state()))
      rest = {"step": state.step, "optimizer": state.optimizer, "health": state.health}
      self.store.save(step, state.model, rest, {"tokens": self.tokens, "loader": loader})

  def _say_started(self, step: int) -> None:
    mesh = self.context.mesh
    total, active = count_parameters(self.config.model)
    self.writer.event(
      "started",
      step,
      resumed=self.resumed,
      devices=mesh.size,
      device_kind=self._device_kind,
      hosts=jax.process_count(),
      mesh=dict(mesh.shape),
      kernels=self.kernels,
      parameters=total,
      active_parameters=active,
      compile_seconds=self.compile_seconds,
      startup_seconds=self.clock.since_start(),
      **versions(),
    )

  def _finish(self, step: int, steps: int) -> None:
    """Waits until everything is on disk, and says why the run ends here."""
    self.stopped = step < steps
    with self.clock.spent_on("checkpoint"):
      self.store.wait()
    self.store.close()
    self.profiler.close()
    self.writer.event("stopped", step, reason="signal" if self.stopped else "done")
    self.writer.close()


def is_due(step: int, every: int) -> bool:
  """Whether something done every `every` steps (0: never) is to be done after `step`."""
  return every > 0 and step % every == 0
