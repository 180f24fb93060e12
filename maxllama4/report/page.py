"""One self-contained page about one run, or about several beside each other."""

import base64
import contextlib
import datetime
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from maxllama4.report import figures
from maxllama4.report.run_files import Run, display_names, read_run
from maxllama4.report.summary import State, state_of, tiles
from maxllama4.report.tables import (
  comparison_sections,
  events_table,
  machine_table,
  settings_tables,
  time_table,
)
from maxllama4.report.text import escape

MAX_SAMPLE_CHARACTERS = 2000


def write_report(run_dirs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
  """Writes the page about the runs in `run_dirs` to `path`, whole or not at all."""
  runs = [read_run(pathlib.Path(run_dir)) for run_dir in run_dirs]
  text = build_page(runs, datetime.datetime.now(datetime.UTC))
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
  try:
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      unfinished.unlink()


def build_page(runs: Sequence[Run], now: datetime.datetime) -> str:
  """The page as HTML; it asks for nothing outside itself, and runs no script but its own."""
  names = display_names(runs)
  states = [state_of(run, now) for run in runs]
  files = importlib.resources.files("maxllama4.report")
  style, script = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
  )
  if len(runs) == 1:
    title, body = names[0], _one_run(runs[0], names[0], states[0])
  else:
    title, body = f"{len(runs)} runs", _several_runs(runs, names, states)
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
    f'<link rel="icon" href="data:,"><title>{escape(title)} · maxllama4</title>'
    f"<style>{style}</style></head><body>{body}"
    f"<footer>Written by maxllama4 at {_moment(now)}.</footer><script>{script}</script></body></html>\n"
  )


def _one_run(run: Run, name: str, state: State) -> str:
  runs, names = [run], [name]
  time = figures.speed_figures(runs, names)
  totals = time_table(run)
  return _header(run, name, state) + _main(
    ("Learning", _grid(figures.learning_figures(runs, names))),
    ("Speed, time and memory", _grid(time + totals)),
    ("Experts", _grid(figures.expert_figures(runs, names))),
    ("Samples", _card(_samples(run))),
    ("Layers", _grid(figures.layer_figures(run))),
    ("Events", _card(events_table(run))),
    ("Machine", _card(machine_table(run))),
    ("Configuration", _folded_card("All settings", settings_tables(run))),
    (
      "More figures",
      _folded_card("Everything else that was logged", _grid(figures.other_figures(runs, names))),
    ),
  )


def _several_runs(runs: Sequence[Run], names: Sequence[str], states: Sequence[State]) -> str:
  final, differing = comparison_sections(runs, names, states)
  header = (
    f'<header><div class="title"><h1>{len(runs)} runs</h1></div>'
    f'<div class="line"><span>{escape(" · ".join(names))}</span></div>{_problems(runs, names)}</header>'
  )
  return header + _main(
    ("Where they stand", _card(final)),
    ("Settings that differ", _card(differing)),
    ("Learning", _grid(figures.learning_figures(runs, names))),
    ("Speed and memory", _grid(figures.speed_figures(runs, names))),
    ("Experts", _grid(figures.expert_figures(runs, names))),
    ("Samples", _card("".join(_fold(name, _samples(run)) for run, name in zip(runs, names)))),
    (
      "More figures",
      _folded_card("Everything else that was logged", _grid(figures.other_figures(runs, names))),
    ),
  )


def _header(run: Run, name: str, state: State) -> str:
  steps = f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
  done = min(1.0, run.step / run.steps) if run.steps else 0.0
  updated = f"last update {_moment(run.updated)}" if run.updated else ""
  why = (
    str(run.stopped.get("reason", ""))
    if run.stopped and state.kind in ("failed", "stopped")
    else ""
  )
  why = f'<p class="note {state.kind}">{escape(why)}</p>' if why not in ("", "signal") else ""
  cells = "".join(
    f'<div><dt>{tile.name}</dt><dd><div class="value">{escape(tile.value)}</div>'
    f'<div class="hint">{escape(tile.hint)}</div></dd></div>'
    for tile in tiles(run, state)
  )
  share = f"<span>{100 * done:.0f} %</span>" if run.steps else ""
  return (
    f'<header><div class="title"><h1>{escape(name)}</h1>'
    f'<span class="state {state.kind}">{escape(state.words)}</span></div>'
    f'<div class="bar-of-steps"><b style="width:{100 * done:.2f}%"></b></div>'
    f'<div class="line"><span>{steps}</span>{share}<span>{updated}</span></div>{why}'
    f'{_problems([run], [name])}<dl class="tiles">{cells}</dl></header>'
  )


def _problems(runs: Sequence[Run], names: Sequence[str]) -> str:
  lines = [
    (f"{name}: " if len(runs) > 1 else "") + problem
    for run, name in zip(runs, names)
    for problem in run.problems
  ]
  items = "".join(f"<li>{escape(line)}</li>" for line in lines)
  return f'<ul class="problems">{items}</ul>' if lines else ""


def _main(*sections: tuple[str, str]) -> str:
  """The sections that have something in them."""
  body = "".join(
    f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content
  )
  return f"<main>{body or '<p class=quiet>No step has been logged yet.</p>'}</main>"


def _grid(content: str) -> str:
  return f'<div class="grid">{content}</div>' if content else ""


def _card(content: str) -> str:
  return f'<div class="card">{content}</div>' if content else ""


def _folded_card(summary: str, content: str) -> str:
  return _card(_fold(summary, content))


def _fold(summary: str, content: str, is_open: bool = False) -> str:
  if not content:
    return ""
  return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>{content}</details>"


def _samples(run: Run) -> str:
  """Samples by step, the newest first and unfolded."""
  groups = []
  for i, (step, samples) in enumerate(reversed(run.samples)):
    texts = "".join(
      f'<pre><span class="prompt">{_cut(sample.get("prompt"))}</span>{_cut(sample["completion"])}</pre>'
      for sample in samples
    )
    groups.append(_fold(f"step {step:,}", texts, is_open=i == 0))
  return "".join(groups)


def _cut(value: Any) -> str:
  text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
  rest = len(text) - MAX_SAMPLE_CHARACTERS
  return escape(text[:MAX_SAMPLE_CHARACTERS]) + (
    f" … ({rest:,} characters more)" if rest > 0 else ""
  )


def _moment(moment: datetime.datetime) -> str:
  text = moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  return f'<time datetime="{moment.isoformat(timespec="seconds")}">{text}</time>'
