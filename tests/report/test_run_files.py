import json
import math

import pytest
from plausible_run import write_plausible_run

from maxllama4.report.run_files import display_names, read_run
from maxllama4.report.secrets import HIDDEN, hide_secrets, is_secret_name


def write_lines(path, *lines):
  path.parent.mkdir(exist_ok=True)
  path.write_text(
    "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
  )


def test_a_whole_run_is_read(tmp_path):
  run = read_run(write_plausible_run(tmp_path / "run", lines=120, experts=8, stopped="done"))
  assert (run.name, run.lines, run.step, run.steps, run.problems) == ("run", 120, 1200, 1200, [])
  assert run.last("loss") > 0 and run.last("tokens") == 1200 * 512 * 4096
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  for kind in ("step", "data", "checkpoint", "evaluation", "other"):
    assert run.seconds[kind] == pytest.approx(sum(line[f"seconds/{kind}"] for line in lines))
  assert run.load_maps[-1][0] == 1200 and len(run.load_maps[-1][1]) == 12
  assert run.samples[-1][0] == 1200 and len(run.samples[-1][1]) == 2
  assert [len(run.started), run.stopped["reason"], len(run.marks)] == [2, "done", 3]


def test_an_empty_directory_and_one_that_is_not_there_are_runs_that_say_nothing(tmp_path):
  for path in (tmp_path, tmp_path / "nothing"):
    run = read_run(path)
    assert (run.lines, run.steps, run.updated, run.problems) == (0, None, None, [])


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_before_it_is_told(tmp_path):
  good = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
  write_lines(tmp_path / "metrics.jsonl", good[0], good[1], '{"step": 3, "lo')
  run = read_run(tmp_path)
  assert (run.step, run.last("loss"), run.problems) == (2, 2.0, [])
  write_lines(tmp_path / "metrics.jsonl", good[0], "{nonsense\n", "[1]\n", "\n", good[1])
  run = read_run(tmp_path)
  assert (run.lines, run.problems) == (2, ["2 lines of metrics.jsonl could not be read."])


def test_values_of_a_wrong_kind_are_no_values(tmp_path):
  write_lines(
    tmp_path / "metrics.jsonl",
    {
      "step": 1,
      "loss": "3",
      "mfu": None,
      "tokens": True,
      "x": {},
      "moe/load_by_layer": [[1], [1, 2]],
    },
    {"step": "2", "loss": 1.0},
    {"step": -1, "loss": 1.0},
    {"step": 2.5, "loss": 1.0},
    {"loss": 1.0},
    {"step": 2, "moe/load_by_layer": [], "debug/gradients/mean": [None, "x"]},
    '{"step": 3, "loss": 1' + "0" * 400 + "}\n",
    '{"step": 4, "loss": ' + "[" * 100_000 + "\n",
  )
  write_lines(
    tmp_path / "events.jsonl", {"event": 3}, {"event": "skipped"}, {"event": "skipped", "step": "x"}
  )
  write_lines(tmp_path / "samples.jsonl", {"step": 1}, {"step": 1, "completion": 3})
  run = read_run(tmp_path)
  assert (run.series, run.load_maps, run.by_layer, run.marks, run.samples) == ({}, [], {}, [], [])
  assert run.step == 3


def test_metrics_of_a_diverged_run_are_read(tmp_path):
  text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN, "gradient_norm": Infinity}\n'
  write_lines(tmp_path / "metrics.jsonl", text, {"step": 3, "debug/gradients/max": [1.0, math.nan]})
  run = read_run(tmp_path)
  assert run.series["loss"].unusable == 1 and run.last("loss") == 2.0
  assert run.last("gradient_norm") is None and run.by_layer["debug/gradients/max"][0] == 3


@pytest.mark.parametrize("text", ["", "[", "- 1", "a: &x [*x", "text", "\x00"])
def test_a_configuration_that_is_none_is_told(tmp_path, text):
  (tmp_path / "config.yml").write_text(text)
  run = read_run(tmp_path)
  assert run.settings == {} and len(run.problems) == 1


def test_secrets_are_hidden_and_settings_that_only_sound_like_them_are_not(tmp_path):
  (tmp_path / "config.yml").write_text(
    "wandb: {api_key: abcdefgh, entity: team}\n"
    "data: {paths: ['s3://user:pass@host/x', 'https://h/x?X-Amz-Signature=abcdef&a=1'], tokenizer: t.json}\n"
    "model: {bos_token_id: 1, num_key_value_heads: 2, num_experts_per_tok: 1}\n"
  )
  write_lines(
    tmp_path / "events.jsonl",
    {"event": "stopped", "reason": "failure: token=hf_abcdefghijklmnopqrst"},
  )
  run = read_run(tmp_path)
  assert run.settings["wandb.api_key"] == HIDDEN and run.settings["wandb.entity"] == "team"
  paths = [f"s3://{HIDDEN}@host/x", f"https://h/x?X-Amz-Signature={HIDDEN}&a=1"]
  assert run.settings["data.paths"] == paths and run.settings["data.tokenizer"] == "t.json"
  assert run.settings["model.bos_token_id"] == 1 and run.settings["model.num_key_value_heads"] == 2
  assert "abcdefghij" not in run.stopped["reason"]


@pytest.mark.parametrize(
  "secret",
  ["hf_abcdefghijklmnop", "sk-abcdefghijklmnop", "ghp_abcdefghijklmnop", "AKIAABCDEFGHIJKLMNOP"],
)
def test_keys_of_well_known_kinds_are_hidden_in_any_text(secret):
  assert hide_secrets(f"login with {secret} failed") == f"login with {HIDDEN} failed"


def test_names_of_secrets():
  assert all(
    map(is_secret_name, ["token", "a.hf_token", "wandb.api_key", "x.password", "x.secret"])
  )
  assert not any(
    map(is_secret_name, ["pad_token_id", "tokens", "tokenizer", "key_value", "a.author"])
  )


def test_runs_of_the_same_name_are_told_apart(tmp_path):
  runs = [read_run(tmp_path / name) for name in ("a/run", "b/run")]
  assert display_names(runs) == ["a/run", "b/run"]
  assert display_names([runs[0]]) == ["run"]
  assert len(set(display_names([runs[0], runs[0]]))) == 2
