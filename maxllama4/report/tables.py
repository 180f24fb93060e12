"""What a report says in tables: time, events, the machine, settings, and runs beside each other."""

import json
from collections.abc import Sequence
from typing import Any

from maxllama4.report.figures import kinds_of_time
from maxllama4.report.run_files import Run
from maxllama4.report.summary import State, best_value, goodput, seconds_spent, start_seconds
from maxllama4.report.text import UNKNOWN, count, duration, escape, percent, plain, short

# Settings that say where a run lives, not what it is.
_OWN = {"run_dir"}
_SHOWN_IN_EVENTS = {"time", "event", "step"}
_SHOWN_IN_MACHINE = {
  "devices", "device_kind", "hosts", "mesh", "parameters", "active_parameters", "compile_seconds",
  "startup_seconds", "jax", "flax", "python", "maxllama4",
}  # fmt: skip


def time_table(run: Run) -> str:
  """Time by kind, starts included, as a bar and in figures."""
  parts = [(i, kind, run.seconds[kind]) for i, kind in enumerate(kinds_of_time(run))]
  starts = start_seconds(run)
  if starts:
    parts.append(
      (len(parts), "starting" if len(run.started) < 2 else f"{len(run.started)} starts", starts)
    )
  total = sum(seconds for _, _, seconds in parts)
  if total <= 0:
    return ""
  bar = "".join(
    f'<b class="t{i}" style="flex:{seconds / total:.5f}"></b>' for i, _, seconds in parts if seconds
  )
  rows = "".join(
    f'<tr><th><b class="key t{i} before"></b>{escape(kind)}</th>'
    f"<td>{duration(seconds)}</td><td>{percent(seconds / total)}</td></tr>"
    for i, kind, seconds in parts
  )
  rows += f"<tr><th>all</th><td>{duration(total)}</td><td></td></tr>"
  return (
    '<div class="card"><h3>Total time</h3><p class="note">Goodput, the share of steps:'
    f' {percent(goodput(run))}.</p><div class="share" aria-hidden="true">{bar}</div><table>{rows}</table></div>'
  )


def events_table(run: Run) -> str:
  """The newest events, newest first, with a count of each kind before them."""
  if not run.events:
    return ""
  counts = ", ".join(f"{name} {count:,}" for name, count in run.num_events.items())
  rows = "".join(_event_row(event) for event in reversed(run.events))
  hidden = sum(run.num_events.values()) - len(run.events)
  before = f" The newest {len(run.events)} are shown." if hidden else ""
  return f'<p class="quiet">{escape(counts)}.{before}</p><div class="scroll" tabindex="0"><table class="events">{rows}</table></div>'


def _event_row(event: dict[str, Any]) -> str:
  step = event.get("step")
  details = ", ".join(
    _value(value) if name == "reason" else f"{name.replace('_', ' ')} {_value(value)}"
    for name, value in event.items()
    if name not in _SHOWN_IN_EVENTS | _SHOWN_IN_MACHINE
  )
  moment = str(event.get("time", "")).replace("T", " ").removesuffix("Z")[:19]
  place = f"step {step:,}" if type(step) is int else ""
  return (
    f"<tr><th>{escape(moment)}</th><td>{escape(place)}</td>"
    f"<td>{escape(event['event'])}</td><td>{escape(details)}</td></tr>"
  )


def machine_table(run: Run) -> str:
  """Devices, mesh, size of the model and versions, of the newest start."""
  if not run.started:
    return ""
  event = run.started[-1]
  devices, mesh = event.get("devices"), event.get("mesh")
  if isinstance(mesh, dict):
    mesh = " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "one device"
  rows = [
    ("devices", f"{_value(devices)} × {event.get('device_kind', 'unknown')}" if devices else None),
    ("hosts", event.get("hosts")),
    ("mesh", mesh),
    ("parameters", _count(event.get("parameters"))),
    ("active for a token", _count(event.get("active_parameters"))),
    ("compilation", _seconds(event.get("compile_seconds"))),
    ("start to first step", _seconds(event.get("startup_seconds"))),
    ("JAX, Flax", _versions(event)),
    ("Python", event.get("python")),
    ("maxllama4", event.get("maxllama4")),
  ]
  cells = "".join(
    f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in rows if value is not None
  )
  return f'<table class="narrow">{cells}</table>'


def settings_tables(run: Run) -> str:
  """All settings, a table for each section."""
  sections: dict[str, list[tuple[str, Any]]] = {}
  for path, value in run.settings.items():
    section, _, name = path.partition(".")
    sections.setdefault(section if name else "", []).append((name or section, value))
  tables = []
  for section, entries in sorted(sections.items()):
    rows = "".join(
      f"<tr><th>{escape(name)}</th><td><code>{escape(_value(value))}</code></td></tr>"
      for name, value in entries
    )
    heading = f"<h3>{escape(section)}</h3>" if section else ""
    tables.append(f"<section>{heading}<table>{rows}</table></section>")
  return f'<div class="settings">{"".join(tables)}</div>' if tables else ""


# Columns of a comparison: heading, value, how it is written, and which of several is the best, if any is.
_COLUMNS = (
  ("loss", lambda run: run.last("loss"), plain, min),
  ("held-out loss", lambda run: run.last("eval/loss"), plain, min),
  ("bits per byte", lambda run: run.last("eval/bits_per_byte"), plain, min),
  ("its lowest", lambda run: best_value(run, "eval/bits_per_byte"), plain, min),
  ("tokens", lambda run: run.last("tokens"), count, None),
  ("tokens/s", lambda run: run.last("tokens_per_second"), count, max),
  ("MFU", lambda run: run.last("mfu"), percent, max),
  ("goodput", goodput, percent, max),
  ("time", seconds_spent, duration, None),
)


def comparison_sections(
  runs: Sequence[Run], names: Sequence[str], states: Sequence[State]
) -> tuple[str, str]:
  """Tables of the newest figures, the best of each marked, and of the settings that are not the same in all runs."""
  head = "".join(f'<th class="right">{name}</th>' for name, *_ in _COLUMNS)
  columns = [_column(runs, *column[1:]) for column in _COLUMNS]
  rows = [f'<tr><th></th><th>state</th><th class="right">step</th>{head}</tr>']
  for i, (run, name, state) in enumerate(zip(runs, names, states)):
    step = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
    rows.append(
      f'<tr><th>{_key(i)}{escape(name)}</th><td class="{state.kind}">{escape(state.words)}</td>'
      f'<td class="right">{step}</td>{"".join(column[i] for column in columns)}</tr>'
    )
  return _scrolled("".join(rows)), _differing(runs, names)


def _column(runs: Sequence[Run], value_of, written, best_of) -> list[str]:
  values = [value_of(run) for run in runs]
  known = [value for value in values if value is not None]
  best = best_of(known) if best_of and len(set(known)) > 1 else None
  return [
    f'<td class="right{" best" * (value is not None and value == best)}">{escape(written(value))}</td>'
    for value in values
  ]


def _differing(runs: Sequence[Run], names: Sequence[str]) -> str:
  paths = dict.fromkeys(path for run in runs for path in run.settings)
  rows = []
  for path in paths:
    values = [_value(run.settings[path]) if path in run.settings else UNKNOWN for run in runs]
    if path not in _OWN and len(set(values)) > 1:
      cells = "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
      rows.append(f"<tr><th>{escape(path)}</th>{cells}</tr>")
  if not rows:
    return '<p class="quiet">None: all runs have the same settings.</p>'
  head = "".join(f"<th>{_key(i)}{escape(name)}</th>" for i, name in enumerate(names))
  return _scrolled(f"<tr><th></th>{head}</tr>{''.join(rows)}")


def _key(index: int) -> str:
  return f'<b class="key k{index % 8} before"></b>'


def _scrolled(rows: str) -> str:
  return f'<div class="scroll" tabindex="0"><table class="wide-table">{rows}</table></div>'


def _value(value: Any) -> str:
  """A setting or a detail as YAML would show it, on one line."""
  if isinstance(value, str):
    return value
  return json.dumps(value, ensure_ascii=False, default=str)


def _versions(event: dict[str, Any]) -> str | None:
  known = [str(event[name]) for name in ("jax", "flax") if name in event]
  return ", ".join(known) or None


def _count(value: Any) -> str | None:
  return short(value) if type(value) in (int, float) else None


def _seconds(value: Any) -> str | None:
  return duration(value) if type(value) in (int, float) else None
