"""One more entry of a benchmark's JSON file: its figures, and the machine and versions that they are of."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def keep(script: str, packages: Sequence[str], figures: dict[str, Any]) -> None:
  """Appends to results/SCRIPT.json, and prints what it appends."""
  path = RESULTS / f"{script}.json"
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
  entry = {
    "date": datetime.date.today().isoformat(),
    "command": f"python benchmarks/{script}.py {' '.join(sys.argv[1:])}".strip(),
    "hardware": f"{os.cpu_count()} x {_processor()}, {memory:.0f} GiB",
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
    **figures,
  }
  entries = json.loads(path.read_text()) if path.exists() else []
  RESULTS.mkdir(exist_ok=True)
  path.write_text(json.dumps([*entries, entry], indent=2) + "\n")
  print(json.dumps(entry, indent=2))


def _processor() -> str:
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "processor")
