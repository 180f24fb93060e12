"""Memory of training steps by arithmetic against the TPU compiler's, for a dozen configurations.

  python benchmarks/plan_estimates.py [NAME ...]     compiles the cases named (default: all that are not in the results)
  python benchmarks/plan_estimates.py --table        writes results/plan_estimates.md from results/plan_estimates.json

Needs no TPU, but `libtpu`. An entry may also come from `maxllama4 plan` with the same settings, which compiles the same
program; so do those of whole models that searches had compiled already. Cases after `HELD_OUT` were first compiled after the arithmetic had its final form.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SMALL = (
  "model.hidden_size=2048 model.intermediate_size=4096 model.intermediate_size_mlp=8192 model.vocab_size=65536"
  " model.num_attention_heads=16 model.num_hidden_layers=8 model.nope_layer_interval=1 model.bos_token_id=1"
  " model.eos_token_id=2 model.pad_token_id=0"
)
# Name: configuration, topology, settings.
CASES = {
  "small": ("scout", "v5p:2x2x2", f"{SMALL} training.batch_size=8"),
  "small, attention kept": (
    "scout",
    "v5p:2x2x2",
    f"{SMALL} training.batch_size=16 training.remat=attention",
  ),
  "small, matmuls kept": (
    "scout",
    "v6e:2x4",
    f"{SMALL} training.batch_size=8 training.remat=matmuls training.sequence_length=4096",
  ),
  "small, 4 microbatches": (
    "scout",
    "v5p:2x2x2",
    f"{SMALL} training.batch_size=64 training.gradient_accumulation=4",
  ),
  "small, tensor 2": ("scout", "v5p:2x2x2", f"{SMALL} training.batch_size=16 mesh.tensor=2"),
  "small, expert 4": ("scout", "v5p:2x2x2", f"{SMALL} training.batch_size=16 mesh.expert=4"),
  "small, context 4": (
    "scout",
    "v5p:2x2x2",
    f"{SMALL} training.batch_size=2 mesh.context=4 training.sequence_length=32768",
  ),
  "small dense and experts, expert 8": (
    "maverick",
    "tpu7x:2x2x1",
    f"{SMALL} training.batch_size=16 mesh.expert=8",
  ),
  "Scout": ("scout", "v5p:4x4x4", ""),
  "Scout, expert 16": ("scout", "v5p:4x4x4", "mesh.expert=16"),
  "Scout, 262,144 tokens a row, context 16": (
    "scout",
    "v5p:4x4x4",
    "training.sequence_length=262144 training.batch_size=4 mesh.context=16",
  ),
  "Scout, attention kept": (
    "scout",
    "v6e:16x16",
    "training.batch_size=256 training.remat=attention",
  ),
  "Scout, matmuls kept, 2 rows": (
    "scout",
    "tpu7x:4x4x4",
    "training.batch_size=256 training.remat=matmuls",
  ),
  "Maverick, expert 8": ("maverick", "v5p:4x4x8", "mesh.expert=8"),
  "Maverick, layer inputs on the host, 4 rows": (
    "maverick",
    "v5p:4x4x8",
    "training.batch_size=512 training.remat=offload",
  ),
}
HELD_OUT = {
  "small, tensor 2, 2 rows of 16,384": (
    "scout",
    "v6e:2x4",
    f"{SMALL} training.batch_size=4 mesh.tensor=2 training.sequence_length=16384",
  ),
  "small dense and experts, expert 2, attention kept, 2 microbatches": (
    "maverick",
    "v5p:2x2x2",
    f"{SMALL} training.batch_size=32 mesh.expert=2 training.gradient_accumulation=2 training.remat=attention",
  ),
  "Scout, attention kept, 4 rows": (
    "scout",
    "v5p:4x4x4",
    "training.batch_size=256 training.remat=attention",
  ),
}


def run_of(name: str, topology: str, settings: str):
  """A case's configuration and machine."""
  from maxllama4.config import load_config
  from maxllama4.planning.chips import parse_topology

  return load_config(CONFIGS / f"llama4_{name}.yml", settings.split()), parse_topology(topology)


def estimate_case(name: str, topology: str, settings: str) -> dict[str, int]:
  """What arithmetic says of a case's memory."""
  from maxllama4.planning.estimate import estimate

  config, described = run_of(name, topology, settings)
  return estimate(config, config.mesh.resolve(described.devices)).hbm_bytes


def compile_case(name: str, topology: str, settings: str) -> dict:
  """What the compiler says of it, and what arithmetic said then."""
  from maxllama4.planning.compile import compile_train_step

  parts = estimate_case(name, topology, settings)
  compiled, _ = compile_train_step(*run_of(name, topology, settings))
  peak = compiled.peak_hbm_bytes
  return {
    "topology": topology,
    "config": f"llama4_{name}.yml",
    "settings": settings,
    "compile_seconds": round(compiled.seconds),
    "arguments_bytes": compiled.arguments_bytes,
    "compiler_peak_bytes": peak,
    "ratio_when_compiled": round(sum(parts.values()) / peak, 4),
  }


def write_table() -> None:
  """results/plan_estimates.md: one line a case, its estimate by the code as it stands."""
  entries = json.loads((RESULTS / "plan_estimates.json").read_text())
  lines = [
    "| case | topology | compiler GB | estimate GB | ratio | parameters | optimizer | gradients | activations | scratch |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for name, case in {**CASES, **HELD_OUT}.items():
    if name in entries:
      estimate, peak = estimate_case(*case), entries[name]["compiler_peak_bytes"]
      total = sum(estimate.values())
      parts = " | ".join(f"{size / 1e9:.2f}" for size in estimate.values())
      held_out = " (held out)" if name in HELD_OUT else ""
      lines.append(
        f"| {name}{held_out} | {case[1]} | {peak / 1e9:.2f} | {total / 1e9:.2f} | {total / peak:.3f} | {parts} |"
      )
  (RESULTS / "plan_estimates.md").write_text("\n".join(lines) + "\n")
  print("\n".join(lines))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("names", nargs="*")
  parser.add_argument("--table", action="store_true")
  arguments = parser.parse_args()
  if arguments.table:
    write_table()
    return
  path = RESULTS / "plan_estimates.json"
  for name in arguments.names or [*CASES, *HELD_OUT]:
    entries = json.loads(path.read_text()) if path.exists() else {}
    if not arguments.names and name in entries:
      continue
    entry = compile_case(*{**CASES, **HELD_OUT}[name])
    versions = {p: importlib.metadata.version(p) for p in ("jax", "libtpu")}
    entries[name] = {"date": datetime.date.today().isoformat(), **versions, **entry}
    path.write_text(json.dumps(entries, indent=2) + "\n")
    print(name, json.dumps(entry, indent=2), flush=True)


if __name__ == "__main__":
  main()
