"""Compilations that were done before, by what they depend on: results as JSON, programs as compressed text."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import zlib
from typing import Any

import maxllama4
from maxllama4.config import Config, config_to_dict
from maxllama4.files import write_whole
from maxllama4.planning.compile import Compiled, libtpu_version
from maxllama4.planning.hlo import Collective, Summary

# Sections of a configuration that no program depends on; but for whether rows of the data are whole.
_ELSEWHERE = (
  "data",
  "checkpoint",
  "distributed",
  "reporting",
  "profile",
  "run_dir",
  "compilation_cache",
)
# What reading a damaged file can raise.
_BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zlib.error)


def default_folder() -> pathlib.Path:
  """`maxllama4/plans` in the user's folder of caches."""
  root = os.environ.get("XDG_CACHE_HOME")
  return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "maxllama4" / "plans"


class Cache:
  """A folder of compilations; what is not whole, or of another form, counts as not there."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder

  def load(self, key: str) -> tuple[dict[str, Compiled], str] | None:
    """Programs by name, and the text of the last."""
    try:
      values = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
      text = gzip.decompress((self._folder / f"{key}.hlo.gz").read_bytes()).decode()
      return {name: _compiled(program) for name, program in values.items()}, text
    except _BROKEN:
      return None

  def last_seconds(self) -> float | None:
    """How long the newest compilation took; None where there is none."""
    with contextlib.suppress(*_BROKEN):
      newest = max(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
      programs = json.loads(newest.read_text(encoding="utf-8")).values()
      return sum(program["seconds"] for program in programs)
    return None

  def save(self, key: str, programs: dict[str, Compiled], text: str) -> None:
    """Keeps them if the disk lets it; a plan needs no cache."""
    values = {name: dataclasses.asdict(program) for name, program in programs.items()}
    with contextlib.suppress(OSError):
      self._folder.mkdir(parents=True, exist_ok=True)
      write_whole(self._folder / f"{key}.hlo.gz", gzip.compress(text.encode(), compresslevel=3))
      write_whole(self._folder / f"{key}.json", json.dumps(values).encode())


def key_of(config: Config, *rest: Any) -> str:
  """A hash of what a compilation depends on: settings, `rest`, the versions of JAX and libtpu, and our own source."""
  settings = {k: v for k, v in config_to_dict(config).items() if k not in _ELSEWHERE}
  versions = [
    importlib.metadata.version("jax"),
    importlib.metadata.version("flax"),
    libtpu_version(),
  ]
  depends_on = [settings, config.data.whole_rows, rest, versions, source_hash()]
  parts = json.dumps(depends_on, sort_keys=True, default=str)
  return hashlib.sha256(parts.encode()).hexdigest()[:32]


@functools.cache
def source_hash() -> str:
  root = pathlib.Path(maxllama4.__file__).parent
  whole = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    whole.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
  return whole.hexdigest()


def _compiled(values: dict[str, Any]) -> Compiled:
  summary = values["summary"]
  if summary is not None:
    collectives = (Collective(**{**c, "axes": tuple(c["axes"])}) for c in summary["collectives"])
    loops = tuple((name, count) for name, count in summary["loops"])
    unknown = tuple(summary["unknown_loops"])
    replaced = {"collectives": tuple(collectives), "loops": loops, "unknown_loops": unknown}
    summary = Summary(**{**summary, **replaced})
  return Compiled(**{**values, "summary": summary})
