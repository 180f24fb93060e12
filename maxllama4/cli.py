"""The commands: parse, call, and one clear sentence when something is wrong."""

import dataclasses
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Sequence

import yaml

from maxllama4.config import (
  Config,
  ConfigError,
  config_from_section,
  config_to_dict,
  load_config,
  parse_override,
  resolve_config,
)
from maxllama4.settings import flatten

USAGE = """usage: maxllama4 COMMAND [CONFIG.yml] [key=value ...] [--debug]

  train   CONFIG.yml [key=value ...]                        train, or go on from the newest checkpoint
  decode  [CONFIG.yml] checkpoint=PATH prompt=TEXT [...]    sample from a model
  convert SOURCE DESTINATION to=hf|maxllama4 [dry_run=true]  from one format to another; what was stopped goes on
  evaluate CHECKPOINT data.paths=[...] [key=value ...]      loss and bits per byte; without data, on what its run held out
  compare A B prompt=TEXT                                   two checkpoints, layer by layer: where they first depart
  report  RUN [RUN ...] [output=FILE]                       one page about a run, or about several beside each other
  replay  RUN/failures/step-N [key=value ...]               the step that stopped a run, again: numbers layer by layer
  plan    CONFIG.yml topology=v5p:4x4x4 [key=value ...]     memory, speed and cost on TPUs that need not be there
  show    CONFIG.yml [key=value ...] [output=json]          the whole configuration, sizes and costs; needs no device

Settings are dotted paths (training.steps=200), values are YAML. --debug shows the traceback of a failure.
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command. Returns the exit code: 0, 2 for a user's mistake, 1 for any other failure."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  debug = "--debug" in arguments
  words = [word for word in arguments if word != "--debug"]
  if not words or words[0] in ("-h", "--help", "help"):
    print(USAGE)
    return 0 if words else 2
  try:
    command = COMMANDS.get(words[0])
    if command is None:
      raise ConfigError(f"{words[0]!r} is not a command; the commands are {', '.join(COMMANDS)}.")
    command(words[1:])
  except KeyboardInterrupt:
    print("stopped by the keyboard", file=sys.stderr)
    return 1
  except BrokenPipeError:
    return 1
  except Exception as error:
    if debug:
      traceback.print_exc()
    else:
      message = " ".join(_words_of(error).split()) or type(error).__name__
      # A word that is not UTF-8 may be named in it.
      print(f"error: {message.encode(errors='backslashreplace').decode()}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1
  return 0


def _words_of(error: Exception) -> str:
  """The operating system's words begin with a number and end with the file."""
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    return f"{error.filename}: {error.strerror}"
  return str(error)


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
  """The configuration's path, if the first word is one, and the `key=value` words."""
  path = words[0] if words and "=" not in words[0] else None
  overrides = list(words if path is None else words[1:])
  for word in overrides:
    if "=" not in word:
      raise ConfigError(f"{word!r} is not key=value; write a setting's path, =, and its value.")
  return path, overrides


def split_paths(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
  """The leading paths that `names` stand for, and the `key=value` words."""
  paths, overrides = list(words[: len(names)]), list(words[len(names) :])
  if len(paths) < len(names) or any("=" in path and not os.path.exists(path) for path in paths):
    raise ConfigError(f"name {' and '.join(names)} first, then key=value settings.")
  return paths, split_words(["", *overrides])[1]


def split_output(overrides: Sequence[str]) -> tuple[str, list[str]]:
  """What the last `output=` asks for, text by default, and the other words."""
  output = [word.partition("=")[2] for word in overrides if word.startswith("output=")] or ["text"]
  if output[-1] not in ("text", "json"):
    raise ConfigError(f"output={output[-1]} is not one of text, json.")
  return output[-1], [word for word in overrides if not word.startswith("output=")]


def need_config(words: Sequence[str]) -> tuple[str, list[str]]:
  path, overrides = split_words(words)
  if path is None:
    raise ConfigError("name a configuration file first, such as configs/quickstart.yml.")
  return path, overrides


def train_command(words: Sequence[str]) -> None:
  path, overrides = need_config(words)
  config = load_config(path, overrides)
  from maxllama4.decoding.request import continuations
  from maxllama4.report import write_report
  from maxllama4.training.loop import Extras, train  # late: `show` and `--help` should not wait

  def report(run_dir: pathlib.Path) -> None:
    write_report([run_dir], run_dir / "report.html")

  train(config, Extras(report=report, sample=continuations))


def replay_command(words: Sequence[str]) -> None:
  from maxllama4.training.failure import print_replay, replay

  (folder,), overrides = split_paths(words, ("FAILURE",))
  output, overrides = split_output(overrides)
  found = replay(folder, overrides)
  if output == "json":
    print(json.dumps(found))
  else:
    print_replay(found)


def decode_command(words: Sequence[str]) -> None:
  from maxllama4.checkpoint.folders import load_model, open_source
  from maxllama4.data.tokenizer import load_tokenizer
  from maxllama4.decoding.request import answer, split_overrides

  path, overrides = split_words(words)
  request, overrides = split_overrides(overrides)
  config = None if path is None else load_config(path, overrides)
  if config is None and overrides:
    raise ConfigError(f"{overrides[0]} is a setting of a configuration file, and none is given.")
  checkpoint = request.checkpoint or (config and config.run_dir)
  if not checkpoint:
    raise ConfigError("name a model: checkpoint=PATH, or a configuration whose run_dir holds one.")
  source = open_source(checkpoint)
  tokenizer = load_tokenizer((config and config.data.tokenizer) or source.folder)
  model = load_model(checkpoint, dtype="float32" if config is None else config.model.dtype)
  answer(model, tokenizer, request)


def convert_command(words: Sequence[str]) -> None:
  from maxllama4.checkpoint.convert import Conversion, convert, describe
  from maxllama4.checkpoint.folders import open_source

  (source, destination), overrides = split_paths(words, ("SOURCE", "DESTINATION"))
  asked = config_from_section(Conversion, dict(map(parse_override, overrides)), "")
  if asked.dry_run:
    describe(open_source(source), asked, sys.stdout)
  else:
    convert(open_source(source), pathlib.Path(destination), asked)


def evaluate_command(words: Sequence[str]) -> None:
  from maxllama4.training.evaluate import evaluate_checkpoint

  (checkpoint,), overrides = split_paths(words, ("CHECKPOINT",))
  output, overrides = split_output(overrides)
  score = evaluate_checkpoint(checkpoint, overrides)
  if output == "json":
    print(json.dumps(dataclasses.asdict(score)))
  else:
    print(
      f"loss {score.loss:.4f} nats a token, {score.bits_per_byte:.4f} bits per byte"
      f" ({score.tokens:,} tokens, {score.bytes:,} bytes)"
    )


def compare_command(words: Sequence[str]) -> None:
  from maxllama4.checkpoint.compare import CompareRequest, compare_models, print_comparison
  from maxllama4.checkpoint.folders import load_model, open_source
  from maxllama4.data.tokenizer import load_tokenizer

  paths, overrides = split_paths(words, ("A", "B"))
  values = dict(map(parse_override, (word for word in overrides if not word.startswith("prompt="))))
  for word in overrides:
    if word.startswith("prompt="):
      values["prompt"] = word.partition("=")[2]  # as it stands, never YAML
  request = config_from_section(CompareRequest, values, "")
  tokens = list(request.tokens)
  if request.prompt is not None:
    tokenizer = load_tokenizer(request.tokenizer or open_source(paths[0]).folder)
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(request.prompt)]
  models = [load_model(path) for path in paths]
  comparison = compare_models(*models, tokens, request.tolerance)
  if request.output == "json":
    print(json.dumps(dataclasses.asdict(comparison)))
  else:
    print_comparison(comparison, request.tolerance)


def report_command(words: Sequence[str]) -> None:
  from maxllama4.report import write_report

  runs = [word for word in words if "=" not in word or os.path.isdir(word)]
  outputs = [word for word in words if word not in runs]
  if not runs:
    raise ConfigError(
      "name a run's directory first, such as runs/quickstart; several are compared."
    )
  for run in runs:
    if not any(os.path.isfile(os.path.join(run, name)) for name in ("config.yml", "metrics.jsonl")):
      raise ConfigError(f"{run} is no run; name a folder that holds a config.yml or metrics.jsonl.")
  for word in outputs:
    if not word.startswith("output=") or word == "output=":
      raise ConfigError(f"{word} is not a setting of report; the only one is output=FILE.")
  folder = pathlib.Path(runs[0] if len(runs) == 1 else ".")
  path = pathlib.Path(outputs[-1].partition("=")[2]) if outputs else folder / "report.html"
  if path.is_dir() or not path.parent.is_dir():
    raise ConfigError(f"output={path} is no place for a file; name a file in a folder that exists.")
  write_report([pathlib.Path(run) for run in runs], path)
  print(path)


def show_command(words: Sequence[str]) -> None:
  path, overrides = need_config(words)
  output, overrides = split_output(overrides)
  config, origins = resolve_config(path, overrides)
  description = describe(config, origins)
  if output == "json":
    print(json.dumps(description))
  else:
    print_description(description)


def plan_command(words: Sequence[str]) -> None:
  from maxllama4.planning.plan import make_plan
  from maxllama4.planning.table import plan_text, ranking

  path, overrides = need_config(words)
  answer = make_plan(path, overrides)
  if answer.request.output == "json":
    print(json.dumps(answer.to_json()))
    return
  print(plan_text(answer.plans[0]))
  if answer.request.search:
    print(ranking(answer.plans, answer.descriptions))


def describe(config: Config, origins: dict[str, str]) -> dict:
  """Settings with their origins, and what the model costs; counts, FLOPs, bytes a device."""
  from maxllama4.model.llama4 import count_parameters, train_flops_per_token
  from maxllama4.training.footprint import bytes_per_device

  total, active = count_parameters(config.model)
  return {
    "settings": {
      key: {"value": value, "origin": origins[key]}
      for key, value in flatten(config_to_dict(config)).items()
    },
    "parameters": {"total": total, "active": active},
    "train_flops_per_token": train_flops_per_token(config.model, config.training.sequence_length),
    "layers": [
      {
        "attention": "chunked, RoPE" if kind.uses_rope else "global, NoPE",
        "feed_forward": "experts" if kind.is_moe else "dense",
      }
      for kind in config.model.layer_kinds
    ],
    "devices": bytes_per_device(config),
  }


def print_description(description: dict) -> None:
  settings = description["settings"]
  width = max(map(len, settings))
  for key, setting in settings.items():
    value = yaml.safe_dump(setting["value"], default_flow_style=True).strip().removesuffix("\n...")
    print(f"{key:<{width}}  {value:<28}  {setting['origin']}")
  total, active = (_in_words(description["parameters"][name]) for name in ("total", "active"))
  devices = description["devices"]
  print(f"\nparameters        {total}, {active} active for a token")
  print(f"training          {description['train_flops_per_token'] / 1e9:,.4g} GFLOP a token")
  print(f"devices           {devices['devices']} (mesh axes of -1 counted as 1)")
  for name in ("parameters", "optimizer", "gradients"):
    print(f"{name:<16}  {devices[f'{name}_bytes'] / 1e9:,.4g} GB a device")


def _in_words(count: int) -> str:
  return f"{count / 1e9:,.2f}B" if count >= 1e9 else f"{count / 1e6:,.2f}M"


COMMANDS = {
  "train": train_command,
  "decode": decode_command,
  "convert": convert_command,
  "evaluate": evaluate_command,
  "compare": compare_command,
  "report": report_command,
  "plan": plan_command,
  "show": show_command,
  "replay": replay_command,
}
