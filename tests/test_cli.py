import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from maxllama4 import cli
from maxllama4.config import ConfigError, load_config
from maxllama4.decoding.request import split_overrides

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yml")
MAIN = "import sys; from maxllama4.cli import main; sys.exit(main())"  # what `maxllama4` is
SCOUT, MAVERICK = (str(ROOT / "configs" / f"llama4_{name}.yml") for name in ("scout", "maverick"))


def run(script, *words, **environment):
  """A process of `script` in a shell of its own: exit code, standard output, standard error."""
  done = subprocess.run(
    [sys.executable, *script, *words],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, **environment},
    cwd=ROOT,
  )
  return done.returncode, done.stdout, done.stderr


def command(capsys, *words):
  """`maxllama4 WORDS` in this process: exit code, standard output, standard error."""
  code = cli.main(list(words))
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def one_message(err):
  """The single line on standard error."""
  lines = err.splitlines()
  assert len(lines) == 1 and lines[0].startswith("error: "), err
  return lines[0].removeprefix("error: ")


# Exit codes and messages


def test_a_users_mistake_ends_train_py_with_code_2_and_one_line():
  code, out, err = run(["train.py"], QUICKSTART, "training.step=3")
  assert (code, out) == (2, "")
  assert one_message(err) == "training.step is not a setting; did you mean training.steps?"


def test_a_users_mistake_ends_decode_py_with_code_2_and_one_line(tmp_path):
  code, out, err = run(["decode.py"], f"checkpoint={tmp_path}", "prompt=x")
  assert (code, out) == (2, "")
  assert str(tmp_path) in one_message(err)


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    (
      ["fly"],
      "'fly' is not a command; the commands are train, decode, convert, evaluate, compare, report, plan, show",
    ),
    (["train"], "name a configuration file first"),
    (["train", "training.steps=3"], "name a configuration file first"),
    (["train", QUICKSTART, "fast"], "'fast' is not key=value"),
    (["train", "nothing.yml"], "nothing.yml cannot be read"),
    (["train", QUICKSTART, "mesh.tensor=3"], "mesh.tensor=3"),
    (["train", QUICKSTART, "data.paths=[/no/such/place]", "run_dir={tmp}"], "data.paths[0]="),
    (["show", QUICKSTART, "output=xml"], "output=xml is not one of text, json"),
    (["decode", "prompt=x"], "checkpoint=PATH"),
    (["decode", "checkpoint=x", "prompt=x", "training.steps=3"], "training.steps=3"),
    (["decode", "checkpoint=/no/such/run", "prompt=x"], "/no/such/run"),
    (["decode", QUICKSTART, "run_dir={tmp}", "prompt=x"], "holds no model"),
  ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, words, reason):
  code, out, err = command(capsys, *(word.format(tmp=tmp_path) for word in words))
  assert (code, out) == (2, "")
  assert reason in one_message(err)


def test_a_failure_that_is_nobodys_mistake_ends_with_code_1(capsys, tmp_path):
  (tmp_path / "file").write_text("")
  code, _, err = command(capsys, "train", QUICKSTART, f"run_dir={tmp_path}/file/run")
  assert code == 1
  assert "Not a directory" in one_message(err)


def test_debug_shows_the_traceback_and_keeps_the_code(capsys):
  code, _, err = command(capsys, "train", QUICKSTART, "training.step=3", "--debug")
  assert code == 2
  assert "Traceback" in err and err.splitlines()[-1].endswith("did you mean training.steps?")


def test_help_and_no_words_show_the_usage(capsys):
  code, out, err = command(capsys, "--help")
  assert code == 0 and err == "" and all(name in out for name in cli.COMMANDS)
  assert command(capsys)[0] == 2


def test_a_message_of_several_lines_is_printed_on_one(capsys, monkeypatch):
  def fail(words):
    raise OSError("disk\n  full")

  monkeypatch.setitem(cli.COMMANDS, "train", fail)
  code, _, err = command(capsys, "train")
  assert (code, err) == (1, "error: disk full\n")


def test_the_keyboard_and_a_closed_pipe_end_a_run_without_a_traceback(capsys, monkeypatch):
  for error in (KeyboardInterrupt, BrokenPipeError):

    def fail(words, error=error):
      raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    code, _, err = command(capsys, "train")
    assert code == 1 and "Traceback" not in err


# show


@pytest.mark.parametrize(("path", "billions"), [(SCOUT, "107.77B"), (MAVERICK, "400.71B")])
def test_show_prints_settings_sizes_and_costs_of_the_released_models(capsys, path, billions):
  code, out, err = command(capsys, "show", path, "training.sequence_length=8192")
  assert (code, err) == (0, "")
  assert billions in out
  assert abs(float(re.search(r"training +([\d.]+) GFLOP a token", out)[1]) - 108.9) <= 0.1
  line = next(line for line in out.splitlines() if line.startswith("training.sequence_length"))
  assert line.split() == ["training.sequence_length", "8192", "command", "line"]


def test_show_json_holds_every_setting_with_its_origin(capsys):
  code, out, _ = command(capsys, "show", SCOUT, "mesh.fsdp=16", "mesh.tensor=4", "output=json")
  assert code == 0
  shown = json.loads(out)
  assert round(shown["parameters"]["total"] / 1e9, 2) == 107.77
  assert round(shown["train_flops_per_token"] / 1e9, 1) == 108.9
  settings = shown["settings"]
  assert settings["mesh.tensor"] == {"value": 4, "origin": "command line"}
  assert settings["model.num_local_experts"]["origin"].endswith("models/llama4_scout.yml")
  assert settings["optimizer.eps"]["origin"] == "default"
  assert len(shown["layers"]) == 48
  assert [layer["attention"] for layer in shown["layers"][:4]] == ["chunked, RoPE"] * 3 + [
    "global, NoPE"
  ]
  devices = shown["devices"]
  assert devices["devices"] == 64
  one_share = shown["parameters"]["total"] * 4 / 64
  assert one_share <= devices["parameters_bytes"] < 1.3 * one_share  # what the mesh cannot split
  assert devices["gradients_bytes"] <= devices["parameters_bytes"]
  assert devices["optimizer_bytes"] == pytest.approx(2 * devices["gradients_bytes"], rel=1e-3)


def test_what_show_prints_as_settings_loads_to_the_same_configuration(capsys):
  _, out, _ = command(capsys, "show", QUICKSTART, "output=json")
  settings = json.loads(out)["settings"]
  overrides = [f"{key}={json.dumps(entry['value'])}" for key, entry in settings.items()]
  assert load_config(QUICKSTART, overrides) == load_config(QUICKSTART)


def test_show_touches_no_device():
  """A backend that does not exist would be an error as soon as JAX looked for devices."""
  code, out, err = run(["-c", MAIN], "show", SCOUT, JAX_PLATFORMS="no_such_backend")
  assert (code, err) == (0, "") and "107.77B" in out


def test_a_mistake_in_the_mesh_is_found_before_a_device_is_touched():
  words = (QUICKSTART, "mesh.expert=3")
  code, _, err = run(["train.py"], *words, JAX_PLATFORMS="no_such_backend")
  assert code == 2 and "mesh.expert=3" in one_message(err)


# decode's requests


def request(*words):
  return split_overrides(words)[0]


def test_a_request_is_parted_from_the_settings_of_the_configuration():
  words = ("prompt=x", "training.steps=3", "temperature=0", "top_k=5", "seed=7", "dtype=bfloat16")
  request, rest = split_overrides(words)
  assert rest == ["training.steps=3", "dtype=bfloat16"]
  assert (request.prompt, request.temperature, request.top_k, request.seed) == ("x", 0.0, 5, 7)


@pytest.mark.parametrize("text", ["3", "null", "yes", "[a]", "a: b", "a=b", " x ", "# no", "{", ""])
def test_a_prompt_is_taken_as_it_stands(text):
  assert request(f"prompt={text}").prompts() == [text]


@pytest.mark.parametrize(
  ("word", "reason"),
  [
    ("max_new_tokens=0", "max_new_tokens=0 must be at least 1"),
    ("max_new_tokens=many", "max_new_tokens='many' must be a whole number"),
    ("num_samples=0", "num_samples=0 must be at least 1"),
    ("temperature=-1", "temperature=-1.0 must be 0"),
    ("temperature=nan", "temperature=nan must be finite"),
    ("top_k=-1", "top_k=-1 must be 0"),
    ("top_p=0", "top_p=0.0 must be greater than 0"),
    ("top_p=1.5", "top_p=1.5 must be greater than 0 and at most 1"),
    ("output=yaml", "output=yaml is not one of text, json"),
    ("logprobs=maybe", "logprobs='maybe' must be true or false"),
    ("stop=[1]", "stop[0]=1 must be text"),
    ("prompts_file=x", "give one of prompt=TEXT, prompts_file=PATH and chat=true"),
  ],
)
def test_a_wrong_request_is_told_what_to_change(word, reason):
  with pytest.raises(ConfigError) as error:
    request("prompt=x", word)
  assert reason in str(error.value)


@pytest.mark.parametrize("word", ["num_samples=2", "output=json", "stop=['x']"])
def test_what_cannot_be_streamed_is_refused(word):
  with pytest.raises(ConfigError, match="stream=true"):
    request("prompt=x", "stream=true", word)


def test_a_request_needs_a_prompt():
  with pytest.raises(ConfigError, match="give one of prompt=TEXT, prompts_file=PATH and chat=true"):
    request("temperature=0")


def test_prompts_are_read_a_json_object_a_line(tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text('{"prompt": "one\\ntwo"}\n{"prompt": "é", "id": 3}\n', encoding="utf-8")
  assert request(f"prompts_file={path}").prompts() == ["one\ntwo", "é"]


@pytest.mark.parametrize("line", ["{", "3", '"x"', "{}", '{"prompt": 3}', '{"prompt": null}'])
def test_a_prompt_that_is_none_is_named_by_its_line(tmp_path, line):
  path = tmp_path / "prompts.jsonl"
  path.write_text(f'{{"prompt": "fine"}}\n{line}\n{{"prompt": "fine"}}\n')
  with pytest.raises(ConfigError, match=r"prompts_file=.*, line 2: ") as error:
    request(f"prompts_file={path}").prompts()
  assert "\n" not in str(error.value)


def test_a_file_of_prompts_that_cannot_be_read_or_is_empty_is_named(tmp_path):
  (tmp_path / "empty").write_text("")
  (tmp_path / "latin").write_bytes(b"\xe9")
  for name, reason in (
    ("empty", "is empty"),
    ("latin", "cannot be read"),
    ("no", "cannot be read"),
  ):
    with pytest.raises(ConfigError, match=f"prompts_file=.*{name} {reason}"):
      request(f"prompts_file={tmp_path / name}").prompts()


# From text to an answer

TINY = [
  *("model.hidden_size=16", "model.intermediate_size=8", "model.intermediate_size_mlp=8"),
  *("model.num_hidden_layers=1", "model.num_attention_heads=4", "model.head_dim=4"),
  *("model.num_local_experts=2", "model.vocab_size=400", "model.attention_chunk_size=8"),
  *("mesh.fsdp=1", "mesh.data=8", "training.steps=2", "training.batch_size=8"),
  *("training.sequence_length=16", "training.eval_every=0"),
  *("data.exclude=[]", "data.held_out_fraction=0"),
]


def test_a_run_trains_and_its_model_answers(capsys, tmp_path):
  (tmp_path / "text.txt").write_text("def add(a, b):\n  return a + b\n" * 40)
  run_dir = tmp_path / "run"
  words = (*TINY, f"data.paths=[{tmp_path}/text.txt]", f"run_dir={run_dir}")
  code, out, err = command(capsys, "train", QUICKSTART, *words)
  assert (code, err) == (0, "") and "step 2/2" in out
  assert command(capsys, "train", str(run_dir / "config.yml"))[1].count("nothing to do") == 1

  (tmp_path / "prompts.jsonl").write_text('{"prompt": "def"}\n{"prompt": "return a"}\n')
  request = ("max_new_tokens=3", "output=json", "logprobs=true", "num_samples=2")
  prompts = f"prompts_file={tmp_path}/prompts.jsonl"
  by_config = command(capsys, "decode", str(run_dir / "config.yml"), prompts, *request)
  code, out, err = command(capsys, "decode", f"checkpoint={run_dir}", prompts, *request)
  assert (code, out, err) == by_config and (code, err) == (0, "")
  answers = [json.loads(line) for line in out.splitlines()]
  assert [answer["prompt"] for answer in answers] == ["def", "def", "return a", "return a"]
  for answer in answers:
    assert answer["finish_reason"] in ("stop", "length")
    assert len(answer["tokens"]) == len(answer["logprobs"]) <= 3
    assert isinstance(answer["completion"], str) and len(answer["prompt_tokens"]) > 1
