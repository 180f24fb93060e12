"""The figures of a run that stand at the top of a report, and how the run is doing."""

import dataclasses
import datetime
from typing import Any

from maxllama4.report.run_files import Run
from maxllama4.report.text import UNKNOWN, count, duration, percent, plain

SILENT_AFTER_SECONDS = 900  # without a line, unless a logging interval takes longer


@dataclasses.dataclass(frozen=True)
class State:
  """How a run is doing: `kind` for the style, `words` for the reader."""

  kind: str
  words: str


@dataclasses.dataclass(frozen=True)
class Tile:
  name: str
  value: str
  hint: str = ""


def state_of(run: Run, now: datetime.datetime) -> State:
  """Finished, stopped, failed, running, or silent: nothing was written for a while."""
  if run.stopped is not None:
    reason = str(run.stopped.get("reason", "")).strip()
    if reason == "done":
      return State("finished", "finished")
    if reason.startswith("failure"):
      return State("failed", "failed")
    return State("stopped", "stopped by a signal" if reason == "signal" else "stopped")
  if run.steps is not None and run.step >= run.steps:
    return State("finished", "finished")
  if run.updated is None:
    return State("empty", "nothing logged yet")
  waited = (now - run.updated).total_seconds()
  if waited > max(SILENT_AFTER_SECONDS, 5 * _seconds_between_lines(run)):
    return State("silent", f"nothing written for {duration(waited)}")
  return State("running", "running")


def _seconds_between_lines(run: Run) -> float:
  every = run.settings.get("training.log_every")
  return (run.last("step_seconds") or 0.0) * (every if type(every) is int else 1)


def start_seconds(run: Run) -> float:
  """Time that all starts of the run took, up to their first steps."""
  return sum(
    max(_seconds(event, "startup_seconds"), _seconds(event, "compile_seconds"))
    for event in run.started
  )


def _seconds(event: dict[str, Any], name: str) -> float:
  value = event.get(name)
  return float(value) if type(value) in (int, float) and 0 <= value < 1e12 else 0.0


def seconds_spent(run: Run) -> float | None:
  """All time that the run tells of."""
  return sum(run.seconds.values()) + start_seconds(run) or None


def goodput(run: Run) -> float | None:
  """Share of the time, starts included, that was spent in steps."""
  spent = seconds_spent(run)
  return run.seconds["step"] / spent if spent and "step" in run.seconds else None


def seconds_left(run: Run) -> float | None:
  """Time until the last step, at the present speed and goodput."""
  seconds = run.last("step_seconds")
  if seconds is None or run.steps is None or run.step >= run.steps:
    return None
  spent = sum(run.seconds.values())
  share = run.seconds["step"] / spent if spent and run.seconds.get("step") else 1.0
  return (run.steps - run.step) * seconds / share


def tiles(run: Run, state: State) -> list[Tile]:
  """The headline figures."""
  tokens = run.last("tokens")
  result = [
    Tile("Loss", plain(run.last("loss")), _held_out_loss(run)),
    Tile("Bits per byte", plain(run.last("eval/bits_per_byte")), _best_evaluation(run)),
    Tile("Tokens", count(tokens), _of_tokens(run, tokens)),
    Tile("Tokens/s", count(run.last("tokens_per_second")), _a_step(run)),
  ]
  mfu, good = run.last("mfu"), goodput(run)
  result.append(
    Tile(
      "MFU", percent(mfu), "of the chips' peak" if mfu is not None else "peak of the chip not known"
    )
  )
  if good is None:
    result.append(Tile("Goodput", UNKNOWN, "times not logged"))
  else:
    result.append(Tile("Goodput", percent(good), "of the time in steps"))
  left = seconds_left(run)
  if state.kind in ("running", "silent", "stopped", "failed") and left is not None:
    result.append(Tile("Time left", duration(left), "at this speed"))
  else:
    result.append(Tile("Time taken", duration(seconds_spent(run)), _starts(run)))
  return result


def _held_out_loss(run: Run) -> str:
  loss = run.last("eval/loss")
  return "nats a token" if loss is None else f"held out {plain(loss)}"


def _best_evaluation(run: Run) -> str:
  series = run.series.get("eval/bits_per_byte")
  best = best_point(run, "eval/bits_per_byte")
  if series is None or best is None:
    return "not evaluated"
  if best[0] == series.last[0]:
    return "held out, best so far"
  return f"held out, best {plain(best[1])} at step {best[0]:,}"


def best_point(run: Run, key: str) -> tuple[int, float] | None:
  """(step, value) where a quantity was lowest."""
  series = run.series.get(key)
  points = [] if series is None else [point for piece in series.extremes() for point in piece]
  return min(points, key=lambda point: point[1], default=None)


def best_value(run: Run, key: str) -> float | None:
  """The lowest value of a quantity."""
  best = best_point(run, key)
  return None if best is None else best[1]


def _of_tokens(run: Run, tokens: float | None) -> str:
  if not tokens or not run.steps or not 0 < run.step < run.steps:
    return "counted as targets"
  return f"of {count(tokens / run.step * run.steps)}"


def _a_step(run: Run) -> str:
  seconds = run.last("step_seconds")
  return "" if seconds is None else f"{plain(seconds, 3)} s a step"


def _starts(run: Run) -> str:
  return f"{len(run.started)} starts" if len(run.started) > 1 else ""
