"""A run from its configuration: batch, step, log, evaluate, checkpoint."""

import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import yaml

from maxllama4.checkpoint.store import CheckpointStore, gather_json
from maxllama4.config import Config, ConfigError, config_to_dict, read_yaml
from maxllama4.data.loader import make_eval_batches, make_loader, merge_states, prepare_tokenizer
from maxllama4.mesh import build_mesh
from maxllama4.model.llama4 import count_parameters, train_flops_per_token
from maxllama4.model.weights import ModelTemplate
from maxllama4.sharding import MeshContext, use_mesh
from maxllama4.training.evaluate import Evaluation, place_batch
from maxllama4.training.metrics import MetricsWriter, Progress, Stopwatch, peak_flops, to_plain
from maxllama4.training.optimizer import learning_rate_schedule, make_optimizer
from maxllama4.training.state import TrainState, abstract_state, init_state
from maxllama4.training.step import make_train_step


def train(config: Config) -> None:
  """Trains to `training.steps`, from the newest checkpoint of `run_dir` if there is one."""
  hosts = config.distributed
  if hosts.enabled:
    jax.distributed.initialize(hosts.coordinator_address, hosts.num_processes, hosts.process_id)
  mesh = build_mesh(config)
  run_dir = pathlib.Path(config.run_dir)
  keep_config(config, run_dir)
  progress = Progress(config.training.steps)
  tokenizer = prepare_tokenizer(config, run_dir, process_index=jax.process_index())
  with use_mesh(mesh, config.mesh) as context:
    run = Run(config, context, tokenizer, progress)
    run.resume()
    run.loop()
  progress.say(f"done: {run_dir}")


class Run:
  """Everything that a run needs around its `TrainState`."""

  def __init__(self, config: Config, context: MeshContext, tokenizer: Any, progress: Progress):
    self.config, self.context, self.progress = config, context, progress
    self.template = ModelTemplate(config.model, config.training.frozen)
    self.optimizer = make_optimizer(config.optimizer, config.training.steps, self.template)
    self.schedule = learning_rate_schedule(config.optimizer, config.training.steps)
    self.store = CheckpointStore(config.run_dir, config.checkpoint)
    self.tokens = 0  # counted targets up to the last time somebody asked
    self._uncounted: list[jax.Array] = []
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    self.loader = make_loader(config, tokenizer, **hosts)
    self.evaluate = None
    if config.training.eval_every:
      held_out = make_eval_batches(config, tokenizer, **hosts)
      self.evaluate = Evaluation(config, self.template, context, held_out)

  def resume(self) -> None:
    """Restores the newest checkpoint, or starts afresh."""
    if not self.store.steps:
      self.state = init_state(
        self.template, self.optimizer, self.config.training.seed, self.context
      )
      return
    step = self.store.steps[-1]
    shapes = abstract_state(self.template, self.optimizer, self.context)
    rest = {"step": shapes.step, "optimizer": shapes.optimizer}
    model, rest, position = self.store.restore(step, shapes.model, rest)
    self.state = TrainState(rest["step"], model, rest["optimizer"])
    self.tokens = position["tokens"]
    self.loader.set_state(position["loader"])
    self.progress.say(f"resumed from step {step} of {self.config.run_dir}")

  def loop(self) -> None:
    """Steps until `training.steps` are done; the last one is always logged, evaluated and saved."""
    training, steps = self.config.training, self.config.training.steps
    first = int(self.state.step)
    if first >= steps:
      self.progress.say(f"nothing to do: step {first} of training.steps={steps} is reached")
      return
    train_step = self._compile_step()
    writer = MetricsWriter(pathlib.Path(self.config.run_dir), first_step=first)
    batches = self._batches()
    self.stopwatch = Stopwatch(first)
    for step in range(first + 1, steps + 1):
      self.state, metrics = train_step(self.state, next(batches))
      self._count(metrics)
      values = {}
      if is_due(step, training.log_every, steps):
        values |= self._log(step, metrics)
      if self.evaluate and is_due(step, training.eval_every, steps):
        values |= self._evaluate(step)
      if values:
        writer.write(step, values)
      if is_due(step, self.config.checkpoint.every, steps):
        self._save(step)
    writer.close()
    self.store.wait()
    self.store.close()

  def _compile_step(self) -> Callable:
    """The training step, compiled for this run's shapes before the first batch, and only once."""
    shape = (self.config.training.batch_size, self.config.training.sequence_length)
    sharding = self.context.sharding(("batch", "length"))
    dtypes = {name: np.int32 for name in ("tokens", "targets", "segment_ids", "positions")}
    batch = {
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
      for name, dtype in (dtypes | {"weights": np.float32}).items()
    }
    step = make_train_step(self.config, self.template, self.optimizer, self.schedule)
    start = time.perf_counter()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, self.context.sharding(())))
    compiled = compiled.lower(self.state, batch).compile()
    total, active = count_parameters(self.config.model)
    self.progress.say(
      f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active; {shape[0]} x {shape[1]} tokens a step"
      f" on {self.context.mesh.size} x {self._device_kind}; compiled in {time.perf_counter() - start:.1f} s"
    )
    return compiled

  @property
  def _device_kind(self) -> str:
    return self.context.mesh.devices.flat[0].device_kind

  def _batches(self) -> Iterator[dict[str, jax.Array]]:
    sharding = self.context.sharding(("batch", "length"))
    for batch in self.loader:
      yield place_batch(batch, sharding)

  def _count(self, metrics: dict[str, jax.Array]) -> None:
    """Keeps a step's token count on the device until somebody asks, so that steps need not wait."""
    self._uncounted.append(metrics.pop("step_tokens"))

  def _tokens(self) -> int:
    """Counted targets so far; waits for the last step."""
    self.tokens += sum(int(count) for count in self._uncounted)
    self._uncounted.clear()
    return self.tokens

  def _log(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """The step's metrics; seconds and rates are means since the last logged step."""
    tokens = self._tokens()
    seconds = self.stopwatch.read(step)
    training = self.config.training
    step_tokens = training.batch_size * training.sequence_length
    peak = peak_flops(self._device_kind)
    flops = step_tokens * train_flops_per_token(self.config.model, training.sequence_length)
    values = to_plain(metrics) | {
      "tokens": tokens,
      "step_seconds": seconds,
      "tokens_per_second": step_tokens / seconds,
      "mfu": None if peak is None else flops / seconds / (peak * self.context.mesh.size),
    }
    self.progress.show(step, values)
    return values

  def _evaluate(self, step: int) -> dict[str, float]:
    jax.block_until_ready(self.state)  # steps still under way are training's time
    with self.stopwatch.pause():
      score = self.evaluate(self.state.model)
    self.progress.say(
      f"step {step}: held-out loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits per byte"
    )
    return {"eval/loss": score.loss, "eval/bits_per_byte": score.bits_per_byte}

  def _save(self, step: int) -> None:
    rest = {"step": self.state.step, "optimizer": self.state.optimizer}
    loader = merge_states(gather_json(self.loader.get_state()))
    position = {"tokens": self._tokens(), "loader": loader}
    self.store.save(step, self.state.model, rest, position)


def is_due(step: int, every: int, steps: int) -> bool:
  """Whether something done every `every` steps (0: only at the end) is to be done after `step` of `steps`."""
  return step == steps or (every > 0 and step % every == 0)


def keep_config(config: Config, run_dir: pathlib.Path) -> None:
  """Writes the resolved configuration into the run. Raises: ConfigError when the run is of another model."""
  path = run_dir / "config.yml"
  tree = config_to_dict(config)
  if path.exists():
    earlier = read_yaml(path)
    for name, value in tree["model"].items():
      if earlier.get("model", {}).get(name) != value:
        raise ConfigError(
          f"model.{name}={value}, but {path} was trained with {earlier.get('model', {}).get(name)}; set run_dir to"
          " a new folder, or the model as it was."
        )
  if jax.process_index() == 0:
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
