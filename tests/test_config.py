import dataclasses
import re

import pytest
import yaml

from maxllama4.config import (
  ConfigError,
  DataConfig,
  ModelConfig,
  RopeScaling,
  config_from_dict,
  config_to_dict,
  determine_is_moe_layer,
  determine_is_nope_layer,
  load_config,
  resolve_config,
)

MODEL = {
  "vocab_size": 128,
  "hidden_size": 16,
  "intermediate_size": 24,
  "intermediate_size_mlp": 32,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "num_local_experts": 4,
  "num_experts_per_tok": 1,
  "interleave_moe_layer_step": 2,
  "moe_layers": None,
  "nope_layer_interval": 4,
  "nope_layers": None,
  "attention_chunk_size": 8,
  "use_qk_norm": True,
  "attn_temperature_tuning": True,
  "floor_scale": 8192,
  "attn_scale": 0.1,
  "rope_theta": 10000,
  "rope_scaling": None,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
RUN = {
  "model": "models/small.yml",
  "dtype": "float32",
  "param_dtype": "float32",
  "data": {"paths": ["stdlib:*.py"]},
  "training": {"steps": 10, "batch_size": 8, "sequence_length": 32},
}
ROPE_SCALING = {
  "rope_type": "llama3",
  "factor": 16,
  "low_freq_factor": 1,
  "high_freq_factor": 1,
  "original_max_position_embeddings": 64,
}


@pytest.fixture
def path(tmp_path):
  """A run that refers to a model file beside it."""
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "small.yml").write_text(yaml.safe_dump(MODEL))
  (tmp_path / "run.yml").write_text(yaml.safe_dump(RUN))
  return tmp_path / "run.yml"


def mistake(path, *overrides):
  """The message of the ConfigError that the overrides cause: one sentence, on one line."""
  with pytest.raises(ConfigError) as error:
    load_config(path, overrides)
  message = str(error.value)
  assert "\n" not in message and message.endswith((".", "?")), message
  assert not re.search(r"[.?] [A-Z]", message), f"more than one sentence: {message}"
  return message


# Unknown keys


@pytest.mark.parametrize(
  ("override", "nearest"),
  [
    ("run_dri=x", "run_dir"),
    ("training.step=5", "training.steps"),
    ("model.num_expert_per_tok=2", "model.num_experts_per_tok"),
    ("model.hiden_size=2", "model.hidden_size"),
    ("mesh.fdsp=2", "mesh.fsdp"),
    ("data.path=[x]", "data.paths"),
    ("checkpoint.kep=2", "checkpoint.keep"),
    ("optimizer.lerning_rate=1", "optimizer.learning_rate"),
    ("learning_rate=1", "optimizer.learning_rate"),  # the right name in the wrong place
    ("training.learning_rate=1", "optimizer.learning_rate"),
    ("num_local_experts=2", "model.num_local_experts"),
  ],
)
def test_an_unknown_key_is_told_its_nearest_setting(path, override, nearest):
  key = override.partition("=")[0]
  assert mistake(path, override) == f"{key} is not a setting; did you mean {nearest}?"


def test_an_unknown_section_is_told_its_nearest(path):
  assert mistake(path, "trainig.steps=5") == "trainig is not a setting; did you mean training?"


def test_an_unknown_key_inside_rope_scaling_is_told_its_nearest_setting(path):
  scaling = yaml.safe_dump({**ROPE_SCALING, "factr": 2}, default_flow_style=True).strip()
  assert mistake(path, f"model.rope_scaling={scaling}") == (
    "model.rope_scaling.factr is not a setting; did you mean model.rope_scaling.factor?"
  )


def test_an_unknown_logical_axis_is_told_the_axes(path):
  message = mistake(path, "mesh.rules.embd=fsdp")
  assert "embd" in message and "embed" in message


def test_a_dtype_inside_the_model_section_is_sent_to_the_top(path):
  assert mistake(path, "model.dtype=bfloat16") == (
    "model.dtype is not a setting; say dtype at the top level."
  )


# Types, presence, ranges


@pytest.mark.parametrize(
  ("override", "reason"),
  [
    ("training.steps=many", "training.steps='many' must be a whole number."),
    ("training.steps=1.5", "training.steps=1.5 must be a whole number."),
    ("training.steps=true", "training.steps=True must be a whole number."),
    ("training.steps=null", "training.steps=None must be a whole number."),
    ("training.steps=[1]", "training.steps=[1] must be a whole number."),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be a number."),
    ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf must be finite."),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan must be finite."),
    ("model.use_qk_norm=1", "model.use_qk_norm=1 must be true or false."),
    ("model.use_qk_norm=maybe", "model.use_qk_norm='maybe' must be true or false."),
    ("run_dir=2024", "run_dir=2024 must be text; quote it."),
    ("data.paths=[a, 1]", "data.paths[1]=1 must be text; quote it."),
    ("data.paths={a: 1}", "data.paths={'a': 1} must be a list."),
    ("model.moe_layers=[1, x]", "model.moe_layers[1]='x' must be a whole number."),
    ("model.rope_scaling=4", "model.rope_scaling=4 must be a section of settings."),
    ("training=4", "training=4 must be a section of settings."),
    ("mesh.rules=fsdp", "mesh.rules='fsdp' must be a section of settings."),
    ("mesh=null", "mesh=None must be a section of settings."),
  ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_type_it_must_have(path, override, reason):
  assert mistake(path, override) == reason


def test_a_key_below_a_single_value_is_refused(path):
  assert mistake(path, "training.steps.more=1").startswith(
    "training.steps.more: training.steps is a single value, not a section"
  )


@pytest.mark.parametrize("key", ["training.batch_size", "data", "dtype", "param_dtype", "model"])
def test_a_setting_without_a_default_must_be_there(path, key):
  tree = yaml.safe_load(path.read_text())
  *parents, name = key.split(".")
  section = tree
  for parent in parents:
    section = section[parent]
  del section[name]
  path.write_text(yaml.safe_dump(tree))
  assert mistake(path).startswith(f"{key} is missing; set it")


@pytest.mark.parametrize("name", MODEL)
def test_no_field_of_the_model_has_a_default(path, name):
  rest = {key: value for key, value in MODEL.items() if key != name}
  (path.parent / "models" / "small.yml").write_text(yaml.safe_dump(rest))
  assert mistake(path).startswith(f"model.{name} is missing")


@pytest.mark.parametrize(
  "override",
  [
    "model.vocab_size=0",
    "model.num_hidden_layers=-1",
    "model.num_experts_per_tok=0",
    "model.attention_chunk_size=0",
    "model.rms_norm_eps=0",
    "model.nope_layer_interval=-1",
    "model.interleave_moe_layer_step=-2",
    "training.steps=0",
    "training.batch_size=-8",
    "training.gradient_accumulation=0",
    "training.log_every=0",
    "training.eval_every=-1",
    "training.seed=-1",
    "training.z_loss=-0.1",
    "training.loss_chunk=0",
    "optimizer.learning_rate=0",
    "optimizer.warmup_steps=-1",
    "optimizer.b2=1.5",
    "optimizer.final_fraction=-0.1",
    "checkpoint.keep=0",
    "checkpoint.every=-1",
    "data.held_out_fraction=1",
    "data.held_out_fraction=-0.5",
    "data.prefetch=-1",
    "mesh.fsdp=0",
    "mesh.data=-2",
  ],
)
def test_a_number_out_of_range_is_named_with_its_value(path, override):
  key, _, value = override.partition("=")
  message = mistake(path, override)
  assert re.match(rf"{re.escape(key)}={re.escape(value)}(\.0)? must be ", message), message


@pytest.mark.parametrize(
  ("override", "choices"),
  [
    ("dtype=float64", "float32, bfloat16, float16"),
    ("param_dtype=fp32", "float32, bfloat16, float16"),
    ("data.source=txt", "text, synthetic, tfds"),
    ("optimizer.schedule=cos", "cosine, linear, constant, wsd"),
    ("optimizer.name=adam", "adamw"),
    ("training.remat=all", "none, full, offload, matmuls, attention"),
  ],
)
def test_a_value_outside_its_choices_is_told_them(path, override, choices):
  assert f"{override} is not one of {choices}" in mistake(path, override)


def test_an_option_of_the_compiler_is_a_number_a_truth_or_a_text(path):
  for value in ("3", "0.5", "true", "fast"):
    options = load_config(path, [f"compiler_options={{xla_a: {value}}}"]).compiler_options
    assert options == {"xla_a": yaml.safe_load(value)}
  assert "compiler_options.xla_a=[1] must be" in mistake(path, "compiler_options={xla_a: [1]}")


# Contradictions


@pytest.mark.parametrize(
  ("overrides", "named"),
  [
    (["model.num_attention_heads=5"], ["num_attention_heads=5", "num_key_value_heads=2"]),
    (["model.num_experts_per_tok=5"], ["num_experts_per_tok=5", "num_local_experts=4"]),
    (["model.num_local_experts=0"], ["num_local_experts=0", "interleave_moe_layer_step=0"]),
    (["model.head_dim=7"], ["head_dim=7", "even"]),
    (["model.moe_layers=[1, 4]"], ["model.moe_layers=[1, 4]", "[4]", "num_hidden_layers=4"]),
    (["model.nope_layers=[-1]"], ["model.nope_layers=[-1]", "0..3"]),
    (["training.gradient_accumulation=3"], ["batch_size=8", "gradient_accumulation=3"]),
    (["training.sequence_length=512"], ["sequence_length=512", "max_position_embeddings=256"]),
    (
      ["data.source=synthetic", "training.eval_every=5"],
      ["training.eval_every=5", "data.source=synthetic"],
    ),
    (["data.paths=[]"], ["data.paths=[]", "data.source=synthetic"]),
    (["data.source=tfds"], ["data.tfds_name=null"]),
    (["mesh.data=-1"], ["mesh.data=-1", "mesh.fsdp=-1"]),
    (["mesh.data=3"], ["batch_size / training.gradient_accumulation=8", "3 parts", "mesh.data=3"]),
    (["mesh.data=8", "training.gradient_accumulation=2"], ["=4", "8 parts", "mesh.data=8"]),
    (["mesh.fsdp=3", "mesh.rules.batch=null"], ["model.hidden_size=16", "mesh.fsdp=3"]),
    (["mesh.tensor=4"], ["model.num_key_value_heads=2", "mesh.tensor=4"]),
    (["mesh.expert=8"], ["model.num_local_experts=4", "mesh.expert=8"]),
    (["mesh.context=5"], ["training.sequence_length=32", "mesh.context=5"]),
    (["model.vocab_size=129", "mesh.tensor=2"], ["model.vocab_size=129", "mesh.tensor=2"]),
    (["model.intermediate_size=25", "mesh.tensor=2"], ["intermediate_size=25", "mesh.tensor=2"]),
    (["model.intermediate_size_mlp=9", "mesh.tensor=2"], ["intermediate_size_mlp=9"]),
    (["mesh.rules.embed=model"], ["mesh.rules.embed=['model']", "data, fsdp, expert"]),
    (["mesh.rules.experts=[expert, data]"], ["mesh.rules.experts=", "one of"]),
    (["mesh.rules.embed=tensor"], ["mesh.rules", "embed", "tensor"]),
  ],
)
def test_settings_that_contradict_each_other_are_named_together(path, overrides, named):
  message = mistake(path, *overrides)
  for part in named:
    assert part in message, message


def test_a_rope_scaling_with_its_factors_swapped_is_refused(path):
  scaling = {**ROPE_SCALING, "low_freq_factor": 4}
  text = yaml.safe_dump(scaling, default_flow_style=True).strip()
  message = mistake(path, f"model.rope_scaling={text}")
  assert "low_freq_factor=4.0 exceeds" in message and "high_freq_factor=1.0" in message


def test_a_run_may_be_cut_short_by_its_steps_alone(path):
  overrides = ["optimizer.warmup_steps=100", "optimizer.schedule=wsd", "training.steps=2"]
  assert load_config(path, overrides).training.steps == 2


def test_a_dimension_that_no_layer_has_need_not_divide(path):
  everywhere = ["model.interleave_moe_layer_step=1", "mesh.tensor=2"]
  load_config(path, [*everywhere, "model.intermediate_size_mlp=33"])
  nowhere = ["model.interleave_moe_layer_step=0", "mesh.tensor=2", "mesh.expert=8"]
  load_config(path, [*nowhere, "model.intermediate_size=25", "model.num_local_experts=0"])


@pytest.mark.parametrize(
  ("overrides", "devices", "expected"),
  [
    ([], 8, {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}),
    (["mesh.expert=2", "mesh.tensor=2"], 8, {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}),
    (["mesh.fsdp=1", "mesh.data=-1"], 4, {"data": 4, "fsdp": 1}),
    (["mesh.fsdp=2", "mesh.data=2"], 4, {"data": 2, "fsdp": 2}),
  ],
)
def test_an_axis_of_minus_one_takes_the_devices_that_are_left(path, overrides, devices, expected):
  sizes = load_config(path, overrides).mesh.resolve(devices)
  assert sizes == {**dict.fromkeys(sizes, 1), **expected}


@pytest.mark.parametrize(
  ("overrides", "devices"), [(["mesh.tensor=2"], 3), (["mesh.fsdp=2"], 4), (["mesh.expert=4"], 2)]
)
def test_a_mesh_that_does_not_fit_the_devices_names_both_numbers(path, overrides, devices):
  mesh = load_config(path, overrides).mesh
  with pytest.raises(ConfigError, match=rf"mesh .* over {devices} devices: .* multiply to \d;"):
    mesh.resolve(devices)


# Overrides, files, YAML


def test_the_later_of_two_overrides_wins(path):
  assert load_config(path, ["training.steps=20", "training.steps=30"]).training.steps == 30


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("training.steps", "is not key=value"),
    ("=3", "is not key=value"),
    ("data.paths=[a", "is not YAML"),
    ("mesh={fsdp: 1, fsdp: 2}", "fsdp stands twice"),
  ],
)
def test_an_override_that_cannot_be_read_is_shown(path, text, reason):
  assert reason in mistake(path, text)


@pytest.mark.parametrize(
  ("text", "expected"), [("3e-4", 3e-4), ("1e-3", 1e-3), ("1", 1.0), ("2.5E-3", 2.5e-3)]
)
def test_a_number_may_be_written_in_any_usual_way(path, text, expected):
  assert load_config(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == expected


@pytest.mark.parametrize("text", ["100000", "1e5", "1.0e+5", "100000.0", "100_000"])
def test_a_whole_number_may_be_written_as_a_float_without_a_fraction(path, text):
  assert load_config(path, [f"training.steps={text}"]).training.steps == 100_000


@pytest.mark.parametrize(
  ("text", "expected"), [("true", True), ("on", True), ("off", False), ("no", False)]
)
def test_switches_may_be_written_as_yaml_has_them(path, text, expected):
  assert load_config(path, [f"model.use_qk_norm={text}"]).model.use_qk_norm is expected


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_switches_an_optional_setting_off(path, text):
  assert (
    load_config(path, [f"model.attention_chunk_size={text}"]).model.attention_chunk_size is None
  )


def test_one_entry_of_a_list_may_stand_without_brackets(path):
  config = load_config(path, ["data.paths=a.txt", "model.eos_token_id=[3, 4]"])
  assert config.data.paths == ("a.txt",)
  assert config.model.eos_token_id == (3, 4) and config.model.stop_token_ids == (3, 4)


def test_a_section_that_is_null_can_be_filled_from_the_command_line(path):
  overrides = [f"model.rope_scaling.{name}={value}" for name, value in ROPE_SCALING.items()]
  assert load_config(path, overrides).model.rope_scaling == RopeScaling(**ROPE_SCALING)


def test_one_rule_of_the_mesh_can_be_changed_without_naming_the_others(path):
  mesh = load_config(path, ["mesh.rules.vocab=null"]).mesh
  assert mesh.axes_of("vocab") == () and mesh.axes_of("heads") == ("tensor",)


def test_the_models_file_is_found_beside_the_run_and_can_be_replaced(path, tmp_path, monkeypatch):
  (tmp_path / "other.yml").write_text(yaml.safe_dump({**MODEL, "num_hidden_layers": 3}))
  monkeypatch.chdir(tmp_path)  # where a path on the command line starts
  assert load_config(path).model.num_hidden_layers == 4
  overrides = ["model.head_dim=4", "model=other.yml"]
  model = load_config(path, overrides).model
  assert (model.num_hidden_layers, model.head_dim) == (3, 4)
  assert resolve_config(path, overrides)[1]["model.num_hidden_layers"] == "other.yml"


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    ("training: [", "is not valid YAML"),
    ("training.steps: 3", "holds a dot"),
    ("dtype: float32\ndtype: bfloat16", "dtype stands twice"),
    ("training: {steps: 1, steps: 2}", "steps stands twice"),
    ("- a", "must be a YAML mapping"),
    ("", "must be a YAML mapping"),
    ("model: missing.yml", "missing.yml cannot be read"),
    ("on: 3", "on is not a setting"),
  ],
)
def test_a_file_that_cannot_be_used_is_named(path, content, reason):
  path.write_text(content)
  message = mistake(path)
  assert reason in message
  assert "run.yml" in message or "missing.yml" in message or "not a setting" in message


def test_a_missing_file_is_the_users_mistake(tmp_path):
  assert "nothing.yml cannot be read" in mistake(tmp_path / "nothing.yml")
  assert "cannot be read" in mistake(tmp_path)  # a folder


def test_the_run_directory_is_named_after_the_file(path):
  assert load_config(path).run_dir == "runs/run"
  assert load_config(path, ["run_dir=elsewhere/x"]).run_dir == "elsewhere/x"


# Round trips and origins


def test_a_configuration_survives_the_way_to_plain_values_and_back(path):
  scaling = [f"model.rope_scaling.{name}={value}" for name, value in ROPE_SCALING.items()]
  config = load_config(path, [*scaling, "model.eos_token_id=[2, 3]", "model.moe_layers=[0, 3]"])
  tree = config_to_dict(config)
  assert config_from_dict(tree) == config
  assert config_from_dict(yaml.safe_load(yaml.safe_dump(tree))) == config
  assert hash(config.model) == hash(config_from_dict(tree).model)


def test_the_resolved_file_of_a_run_gives_the_same_configuration(path, tmp_path):
  config = load_config(path, ["mesh.tensor=2", "optimizer.learning_rate=1e-3"])
  resolved = tmp_path / "somewhere" / "config.yml"
  resolved.parent.mkdir()
  resolved.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
  assert load_config(resolved) == config


def test_every_value_says_where_it_came_from(path):
  model_file = str(path.parent / "models" / "small.yml")
  overrides = ["training.steps=20", "model.num_local_experts=8", "model.rope_scaling.factor=2"]
  overrides += [f"model.rope_scaling.{k}={v}" for k, v in ROPE_SCALING.items() if k != "factor"]
  config, origins = resolve_config(path, overrides)
  assert config.training.steps == 20
  assert origins["training.steps"] == "command line"
  assert origins["model.num_local_experts"] == "command line"
  assert origins["model.rope_scaling.factor"] == "command line"
  assert origins["model.hidden_size"] == model_file
  assert origins["dtype"] == origins["training.batch_size"] == origins["data.paths"] == str(path)
  assert origins["training.seed"] == origins["mesh.fsdp"] == origins["run_dir"] == "default"
  assert origins["mesh.rules.embed"] == "default"


def test_a_section_that_is_replaced_as_a_whole_comes_from_the_command_line(path):
  path.write_text(yaml.safe_dump({**RUN, "mesh": {"fsdp": 2}}))
  origins = resolve_config(path, ["mesh={tensor: 2}"])[1]
  assert origins["mesh.tensor"] == "command line"
  config, origins = resolve_config(path)
  assert (config.mesh.fsdp, origins["mesh.fsdp"]) == (2, str(path))


def test_a_configuration_cannot_be_changed_afterwards(path):
  with pytest.raises(dataclasses.FrozenInstanceError):
    load_config(path).training.steps = 3


# What the architecture says of its layers


def model(**changes):
  return ModelConfig(**MODEL | {"dtype": "float32", "param_dtype": "float32"} | changes)


@pytest.mark.parametrize(
  ("changes", "nope", "moe"),
  [
    ({}, [3], [1, 3]),
    ({"num_hidden_layers": 6, "interleave_moe_layer_step": 1}, [3], [0, 1, 2, 3, 4, 5]),
    ({"nope_layer_interval": 0, "interleave_moe_layer_step": 0}, [], []),
    ({"nope_layers": (0,), "moe_layers": (2,)}, [0], [2]),
    ({"nope_layers": (), "moe_layers": ()}, [], []),
  ],
)
def test_layers_are_global_or_have_experts_by_interval_or_by_list(changes, nope, moe):
  config = model(**changes)
  layers = range(config.num_hidden_layers)
  assert [i for i in layers if determine_is_nope_layer(config, i)] == nope
  assert [i for i in layers if determine_is_moe_layer(config, i)] == moe
  assert [kind.uses_rope for kind in config.layer_kinds] == [i not in nope for i in layers]
  assert [kind.is_moe for kind in config.layer_kinds] == [i in moe for i in layers]


@pytest.mark.parametrize(
  ("changes", "period", "cycles"),
  [
    ({"num_hidden_layers": 48}, 4, 12),
    ({"num_hidden_layers": 12, "interleave_moe_layer_step": 3}, 12, 0),
    ({"num_hidden_layers": 24, "interleave_moe_layer_step": 3}, 12, 2),
    ({"num_hidden_layers": 10}, 4, 2),  # two layers are left over
    ({"nope_layer_interval": 0, "interleave_moe_layer_step": 1}, 1, 4),
    ({"num_hidden_layers": 5, "moe_layers": (0, 1, 3)}, 5, 0),
    ({"num_hidden_layers": 1}, 1, 0),
  ],
)
def test_the_cycle_is_the_shortest_period_of_the_layers(changes, period, cycles):
  config = model(**changes)
  assert config.inhomogeneous_layer_cycle_interval == period
  assert config.num_cycles == cycles


def test_a_section_may_be_built_in_python_and_is_checked_alike():
  with pytest.raises(ConfigError, match=r"data\.source=books is not one of"):
    DataConfig(source="books")
