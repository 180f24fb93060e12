"""A good configuration, and what can be done to it that no run should start with; each row says what the user must be told.

`WORDS` are `key=value` words on the command line, `EDITS` replace a piece of the file, `FILES` are whole files.
"""

GOOD = """\
model:
  vocab_size: 400
  hidden_size: 16
  intermediate_size: 24
  intermediate_size_mlp: 32
  num_hidden_layers: 4
  num_attention_heads: 4
  num_key_value_heads: 2
  head_dim: 8
  num_local_experts: 4
  num_experts_per_tok: 1
  interleave_moe_layer_step: 2
  moe_layers: null
  nope_layer_interval: 4
  nope_layers: null
  attention_chunk_size: 8
  use_qk_norm: true
  attn_temperature_tuning: true
  floor_scale: 8192
  attn_scale: 0.1
  rope_theta: 10000
  rope_scaling: null
  max_position_embeddings: 256
  rms_norm_eps: 1.0e-5
  initializer_range: 0.02
  tie_word_embeddings: false
  bos_token_id: 1
  eos_token_id: 2
  pad_token_id: 0
dtype: float32
param_dtype: float32
data:
  paths: [texts]
training:
  steps: 10
  batch_size: 8
  sequence_length: 32
"""

_LLAMA3 = "rope_type: llama3, factor: 16, low_freq_factor: 1, high_freq_factor: 4"
_LENGTH = "original_max_position_embeddings: 64"
_TOWER = """{hidden_size: 16, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_channels: 3,
 image_size: 8, patch_size: 2, pixel_shuffle_ratio: 0.5, projector_input_dim: 12, projector_output_dim: 12,
 vision_output_dim: 12, rope_theta: 100}""".replace("\n", "")


def unknown(key: str, nearest: str) -> tuple[str, list[str]]:
  return f"{key}=1", [f"{key} is not a setting; did you mean {nearest}?"]


def typed(key: str, value: str, shown: str, kind: str) -> tuple[str, list[str]]:
  return f"{key}={value}", [f"{key}={shown} must be {kind}"]


def ranged(key: str, value: str, rule: str, shown: str = "") -> tuple[str, list[str]]:
  return f"{key}={value}", [f"{key}={shown or value} {rule}"]


def scaled(*settings: str) -> str:
  return f"model.rope_scaling={{{', '.join(settings)}}}"


GREATER, NOT_NEGATIVE = "must be greater than 0", "must be 0 or greater"
AT_MOST_INT32 = "must be at most 2147483647"
WHOLE, NUMBER, SWITCH, TEXT = "a whole number", "a number", "true or false", "text; quote it"
SECTION, LIST = "a section of settings", "a list"

UNKNOWN = [
  unknown("run_dri", "run_dir"),
  unknown("runs_dir", "run_dir"),
  unknown("dtyp", "dtype"),
  ("trainig.steps=1", ["trainig is not a setting; did you mean training?"]),
  unknown("training.step", "training.steps"),
  unknown("training.batchsize", "training.batch_size"),
  unknown("training.seq_length", "training.sequence_length"),
  unknown("training.eval_evry", "training.eval_every"),
  unknown("training.learning_rate", "optimizer.learning_rate"),  # the right name, the wrong place
  unknown("optimizer.batch_size", "training.batch_size"),
  unknown("model.vocab", "model.vocab_size"),
  unknown("model.num_expert_per_tok", "model.num_experts_per_tok"),
  unknown("model.hiden_size", "model.hidden_size"),
  unknown("mesh.fdsp", "mesh.fsdp"),
  unknown("mesh.tensr", "mesh.tensor"),
  unknown("data.path", "data.paths"),
  unknown("data.tokeniser", "data.tokenizer"),
  unknown("checkpoint.kep", "checkpoint.keep"),
  unknown("checkpoint.keep_evry", "checkpoint.keep_every"),
  unknown("optimizer.lerning_rate", "optimizer.learning_rate"),
  unknown("optimizer.beta1", "optimizer.b1"),
  unknown("distributed.enable", "distributed.enabled"),
  unknown("profile.step", "profile.steps"),
  unknown("reporting.sample_prompt", "reporting.sample_prompts"),
  unknown("vocab_size", "model.vocab_size"),
  unknown("steps", "training.steps"),
  unknown("training.dtype", "dtype"),
  unknown("beta_fast", "model.rope_scaling.beta_fast"),
  unknown("training.Steps", "training.steps"),
  unknown("kernels.atention", "kernels.attention"),
  unknown("training.attention", "kernels.attention"),
  ("mesh.rules.embd=fsdp", ["mesh.rules", "embd", "embed"]),
  ("model.dtype=float32", ["model.dtype is not a setting; say dtype at the top level"]),
  ("training.items=1", ["training.items is not a setting"]),  # what Python's own dictionaries know
  ("lock=1", ["lock is not a setting"]),
  ("training.__class__=1", ["training.__class__ is not a setting"]),
  (scaled(_LLAMA3, _LENGTH, "factr: 2"), ["model.rope_scaling.factr", "model.rope_scaling.factor?"]),
  ("model.vision_config={hiden_size: 2}", ["model.vision_config.hiden_size", "model.vision_config.hidden_size?"]),
]  # fmt: skip

TYPES = [
  typed("training.steps", "many", "'many'", WHOLE),
  typed("training.steps", "1.5", "1.5", WHOLE),
  typed("training.steps", "true", "True", WHOLE),
  typed("training.steps", "null", "None", WHOLE),
  typed("training.steps", "", "None", WHOLE),
  typed("training.steps", "[10]", "[10]", WHOLE),
  typed("training.steps", "{a: 1}", "{'a': 1}", WHOLE),
  typed("training.steps", ".inf", "inf", WHOLE),
  typed("training.steps", ".nan", "nan", WHOLE),
  typed("training.steps", "0o17", "'0o17'", WHOLE),
  typed("training.steps", "2024-01-01", "datetime.date(2024, 1, 1)", WHOLE),
  typed("training.seed", "0.5", "0.5", WHOLE),
  typed("training.batch_size", "'8 rows'", "'8 rows'", WHOLE),
  typed("model.num_hidden_layers", "four", "'four'", WHOLE),
  ("model.moe_layers=[x]", ["model.moe_layers[0]='x' must be a whole number"]),
  typed("model.eos_token_id", "end", "'end'", WHOLE),
  typed("mesh.fsdp", "all", "'all'", WHOLE),
  typed("optimizer.learning_rate", "fast", "'fast'", NUMBER),
  typed("optimizer.learning_rate", "true", "True", NUMBER),
  typed("optimizer.learning_rate", "[1e-3]", "['1e-3']", NUMBER),
  typed("optimizer.learning_rate", "nan", "nan", "finite"),
  typed("optimizer.learning_rate", ".inf", "inf", "finite"),
  typed("optimizer.learning_rate", "-.inf", "-inf", "finite"),
  typed("optimizer.learning_rate", "1e400", "inf", "finite"),
  typed("optimizer.b1", "null", "None", NUMBER),
  typed("model.rope_theta", "1" + 400 * "0", "inf", "finite"),
  typed("model.use_qk_norm", "1", "1", SWITCH),
  typed("model.use_qk_norm", "maybe", "'maybe'", SWITCH),
  typed("model.tie_word_embeddings", "null", "None", SWITCH),
  typed("distributed.enabled", "[true]", "[True]", SWITCH),
  typed("run_dir", "2024", "2024", TEXT),
  typed("run_dir", "[a]", "['a']", TEXT),
  typed("run_dir", "no", "False", TEXT),
  typed("run_dir", '"a\\0b"', r"'a\x00b'", "Unicode text without null characters"),
  typed("dtype", "32", "32", TEXT),
  typed("data.source", "null", "None", TEXT),
  typed("data.paths", "{a: 1}", "{'a': 1}", LIST),
  typed("data.paths", "null", "None", LIST),
  ("data.paths=[texts, 1]", ["data.paths[1]=1 must be text"]),
  ("data.paths=[[texts]]", ["data.paths[0]=['texts'] must be text"]),
  ("data.paths=[{texts: 1}]", ["data.paths[0]={'texts': 1} must be text"]),
  typed("training", "4", "4", SECTION),
  typed("training", "[]", "[]", SECTION),
  typed("mesh", "null", "None", SECTION),
  typed("mesh.rules", "fsdp", "'fsdp'", SECTION),
  typed("model.rope_scaling", "4", "4", SECTION),
  typed("model.vision_config", "true", "True", SECTION),
  typed("model", "3", "3", SECTION),
  typed("model", "[a]", "['a']", SECTION),
  ("mesh.rules.embed=3", ["mesh.rules.embed=3 must be text"]),
  ("profile.steps=[first, last]", ["profile.steps[0]='first' must be a whole number"]),
  ("training.steps=0x" + 5000 * "f", ["training.steps=a number of thousands of digits"]),
  ("training.steps=" + 5000 * "9", ["training.steps=", "is not YAML", "digits"]),
]  # fmt: skip

RANGES = [
  *(ranged(f"model.{name}", "0", GREATER) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")),
  *(ranged(f"model.{name}", "-4", GREATER) for name in ("num_attention_heads", "num_key_value_heads")),
  ranged("model.num_experts_per_tok", "0", GREATER),
  ranged("model.num_local_experts", "-1", NOT_NEGATIVE),
  ranged("model.attention_chunk_size", "0", GREATER),
  ranged("model.rms_norm_eps", "0", GREATER, "0.0"),
  ranged("model.rope_theta", "-1", GREATER, "-1.0"),
  ranged("model.rope_theta", "1e-400", GREATER, "0.0"),
  ranged("model.attn_scale", "-1", NOT_NEGATIVE, "-1.0"),
  ranged("model.nope_layer_interval", "-1", NOT_NEGATIVE),
  ranged("model.num_hidden_layers", "1001", "must be at most 1000"),
  ranged("model.num_hidden_layers", "1000000000", "must be at most 1000"),
  ranged("model.vocab_size", "9223372036854775807", AT_MOST_INT32),
  ranged("model.vocab_size", "9223372036854775808", "must be a number of at most 64 bits"),
  ranged("model.hidden_size", "1e300", "must be a number of at most 64 bits", "'1e300'"),
  ranged("training.steps", "0", GREATER),
  ranged("training.steps", "-10", GREATER),
  ranged("training.steps", "2147483648", AT_MOST_INT32),
  ranged("training.batch_size", "0", GREATER),
  ranged("training.sequence_length", "-1", GREATER),
  ranged("training.gradient_accumulation", "0", GREATER),
  ranged("training.log_every", "0", GREATER),
  ranged("training.eval_every", "-1", NOT_NEGATIVE),
  ranged("training.seed", "-1", NOT_NEGATIVE),
  ranged("training.seed", "4294967296", AT_MOST_INT32),
  ranged("training.z_loss", "-0.1", NOT_NEGATIVE),
  ranged("training.loss_spike_sigmas", "-1", NOT_NEGATIVE, "-1.0"),
  ranged("training.loss_chunk", "0", GREATER),
  ranged("kernels.expert_capacity_factor", "-1", NOT_NEGATIVE, "-1.0"),
  ranged("optimizer.learning_rate", "0", GREATER, "0.0"),
  ranged("optimizer.learning_rate", "-1e-3", GREATER, "-0.001"),
  ranged("optimizer.eps", "0", GREATER, "0.0"),
  ranged("optimizer.b1", "1", "must be at least 0 and below 1", "1.0"),
  ranged("optimizer.b2", "1.5", "must be at least 0 and below 1"),
  ranged("optimizer.weight_decay", "-0.1", NOT_NEGATIVE),
  ranged("optimizer.warmup_steps", "-1", NOT_NEGATIVE),
  ranged("optimizer.decay_fraction", "1.1", "must be between 0 and 1"),
  ranged("optimizer.final_fraction", "-0.1", "must be between 0 and 1"),
  ranged("optimizer.max_gradient_norm", "-1", NOT_NEGATIVE, "-1.0"),
  ranged("checkpoint.keep", "0", GREATER),
  ranged("checkpoint.every", "-1", NOT_NEGATIVE),
  ranged("data.held_out_fraction", "1", "must be at least 0 and below 1", "1.0"),
  ranged("data.held_out_fraction", "-0.5", "must be at least 0 and below 1"),
  ranged("data.prefetch", "-1", NOT_NEGATIVE),
  ranged("data.excerpt_length", "-1", NOT_NEGATIVE),
  ranged("mesh.fsdp", "0", "must be a number of devices, or -1"),
  ranged("mesh.data", "-2", "must be a number of devices, or -1"),
  ranged("reporting.sample_tokens", "0", GREATER),
  ("profile.steps=[0, 3]", ["profile.steps=[0, 3] must be a first and a last step"]),
  ("profile.steps=[3, 1]", ["profile.steps=[3, 1] must be a first and a last step"]),
  ("profile.steps=[3]", ["profile.steps=[3] must be a first and a last step"]),
  *(
    (f"{key}=''", [f"{key}='' is empty"])
    for key in ("run_dir", "data.tokenizer", "data.tfds_dir", "compilation_cache", "reporting.wandb_project")
  ),
  ("data.paths=['']", ["data.paths[0]='' is empty"]),
]  # fmt: skip

CHOICES = [
  ("dtype=float64", ["dtype=float64 is not one of float32, bfloat16, float16"]),
  ("dtype=FLOAT32", ["dtype=FLOAT32 is not one of"]),
  ("param_dtype=fp32", ["param_dtype=fp32 is not one of float32, bfloat16, float16"]),
  ("data.source=txt", ["data.source=txt is not one of text, synthetic, tfds"]),
  ("optimizer.name=adam", ["optimizer.name=adam is not one of adamw, muon"]),
  ("optimizer.state_memory=disk", ["optimizer.state_memory=disk is not one of device, host"]),
  ("optimizer.state_dtype=float16", ["optimizer.state_dtype=float16 is not one of float32, bfloat16"]),
  ("optimizer.schedule=cos", ["optimizer.schedule=cos is not one of cosine, linear, constant, wsd"]),
  ("kernels.attention=flash", ["kernels.attention=flash is not one of auto, splash, cudnn, blockwise, reference"]),
  ("kernels.grouped_matmul=gmm", ["kernels.grouped_matmul=gmm is not one of auto, megablox, ragged_dot, tokamax, blockwise"]),
  ("kernels.experts_dispatch=all", ["kernels.experts_dispatch=all is not one of auto, ring, ragged_all_to_all"]),
  ("training.remat=all", ["training.remat=all is not one of none, full, offload, matmuls, attention"]),
  ("model.rope_scaling={rope_type: ntk}", ["model.rope_scaling.rope_type=ntk is not one of"]),
  ("mesh.rules.embed=model", ["mesh.rules.embed=['model']", "data, fsdp, expert"]),
]  # fmt: skip

# Each value alone would do.
CONTRADICTIONS = [
  ("model.num_attention_heads=5", ["model.num_attention_heads=5", "model.num_key_value_heads=2"]),
  ("model.num_experts_per_tok=5", ["model.num_experts_per_tok=5", "model.num_local_experts=4"]),
  ("model.num_local_experts=0", ["model.num_local_experts=0", "model.interleave_moe_layer_step=0"]),
  ("model.head_dim=7", ["model.head_dim=7 must be even"]),
  ("model.moe_layers=[1, 4]", ["model.moe_layers=[1, 4]", "[4]", "model.num_hidden_layers=4"]),
  ("model.nope_layers=[-1]", ["model.nope_layers=[-1]", "0..3"]),
  ("model.pad_token_id=400", ["model.pad_token_id=400 is outside 0..399", "model.vocab_size=400"]),
  ("model.bos_token_id=-1", ["model.bos_token_id=-1 is outside 0..399"]),
  ("model.eos_token_id=[2, 999]", ["model.eos_token_id=[2, 999] is outside 0..399"]),
  ("model.vocab_size=2", ["model.eos_token_id=2 is outside 0..1"]),
  (f"model.vision_config={_TOWER}", ["model.image_token_index=null must be a token"]),
  (f"model.vision_config={_TOWER.replace('patch_size: 2', 'patch_size: 3')}", ["model.vision_config.image_size=8", "patch_size=3"]),
  (f"model.vision_config={_TOWER.replace('0.5', '0.3')}", ["model.vision_config.pixel_shuffle_ratio=0.3 must be 1 / n"]),
  (f"model.vision_config={_TOWER.replace('hidden_size: 16', 'hidden_size: 12')}", ["model.vision_config.hidden_size=12"]),
  (scaled(_LLAMA3), ["model.rope_scaling.original_max_position_embeddings is missing", "llama3"]),
  (scaled(_LLAMA3.replace("high_freq_factor: 4", "high_freq_factor: 0.5"), _LENGTH), ["low_freq_factor=1.0 exceeds", "high_freq_factor=0.5"]),
  ("model.rope_scaling={rope_type: linear, factor: 2, beta_fast: 3}", ["model.rope_scaling.beta_fast=3.0 is no setting of", "linear"]),
  (scaled("rope_type: longrope, short_factor: [1], long_factor: [1]", _LENGTH), ["model.rope_scaling.short_factor holds 1", "needs 4"]),
  ("training.gradient_accumulation=3", ["training.batch_size=8", "training.gradient_accumulation=3"]),
  ("training.sequence_length=512", ["training.sequence_length=512", "model.max_position_embeddings=256"]),
  ("training.eval_every=5 data.source=synthetic", ["training.eval_every=5", "data.source=synthetic"]),
  ("training.eval_every=5 data.held_out_fraction=0", ["training.eval_every=5", "data.held_out_fraction=0"]),
  ("profile.steps=[10, 13]", ["profile.steps=[10, 13]", "training.steps=10"]),
  ("data.paths=[]", ["data.paths=[]", "data.source=synthetic"]),
  ("data.source=tfds", ["data.tfds_name=null"]),
  ("data.tfds_name=c4", ["data.tfds_name=c4", "data.source=text"]),
  ("checkpoint.keep_every=150", ["checkpoint.keep_every=150", "checkpoint.every=100"]),
  ("checkpoint.keep_every=5 checkpoint.every=0", ["checkpoint.keep_every=5", "checkpoint.every=0"]),
  ("distributed.process_id=2 distributed.num_processes=2", ["process", "2"]),
  ("distributed.coordinator_address=nowhere", ["distributed.coordinator_address=nowhere"]),
  ("distributed.process_id=-1", ["distributed.process_id=-1"]),
  ("distributed.num_processes=0", ["distributed.num_processes=0"]),
  ("optimizer.embedding_learning_rate=1", ["optimizer.embedding_learning_rate=1.0", "optimizer.name=adamw"]),
  ("optimizer.state_dtype=bfloat16 optimizer.b2=0.999", ["optimizer.b2=0.999", "optimizer.state_dtype=bfloat16"]),
  ("dtype=float16", ["dtype=float16 is for inference", "set dtype to bfloat16 or float32"]),
  ("param_dtype=float16", ["optimizer.eps=1e-08 is 0 in param_dtype=float16"]),
  ("training.frozen=[vision]", ["training.frozen=vision is no part", "decoder, embed, head, norm"]),
  ("training.frozen=[embed, '']", ["training.frozen= is no part"]),
  ("training.frozen=[embed, decoder, norm, head]", ["training.frozen=['embed', 'decoder', 'norm', 'head'] leaves nothing to train"]),
  ("mesh.data=-1", ["mesh.data=-1", "mesh.fsdp=-1"]),
  ("mesh.data=3", ["training.batch_size / training.gradient_accumulation=8", "mesh.data=3"]),
  ("mesh.data=8 training.gradient_accumulation=2", ["=4", "mesh.data=8"]),
  ("mesh.fsdp=3 mesh.rules.batch=null", ["model.hidden_size=16", "mesh.fsdp=3"]),
  ("mesh.tensor=4", ["model.num_key_value_heads=2", "mesh.tensor=4"]),
  ("mesh.expert=8", ["model.num_local_experts=4", "mesh.expert=8"]),
  ("mesh.context=5", ["training.sequence_length=32", "mesh.context=5"]),
  ("mesh.tensor=2 model.vocab_size=401", ["model.vocab_size=401", "mesh.tensor=2"]),
  ("mesh.rules.experts=[expert, data]", ["mesh.rules.experts=", "one of"]),
  ("mesh.rules.layers=fsdp", ["mesh.rules: the logical axis=layers is not one of"]),
  ("mesh.rules={embed: fsdp, kv_heads: context}", ["batch and length and kv_heads, which meet", "context"]),
  ("mesh.rules.embed=tensor", ["mesh.rules", "embed", "tensor"]),
]  # fmt: skip

SYNTAX = [
  ("training.steps", ["'training.steps' is not key=value"]),
  ("=3", ["'=3' is not key=value"]),
  ("training..steps=3", ["'training..steps' is no setting's path"]),
  ("training.=3", ["'training.' is no setting's path"]),
  (".=3", ["'.' is no setting's path"]),
  ("training.steps.more=1", ["training.steps.more", "training.steps is a single value"]),
  ("model=nothing.yml", ["nothing.yml cannot be read"]),
  ("data.paths=[a", ["data.paths='[a' is not YAML"]),
  ("data.paths=[2024-99-99]", ["data.paths='[2024-99-99]' is not YAML", "quote"]),
  ("training.steps=!!int x", ["training.steps='!!int x' is not YAML"]),
  ("training.steps=!!timestamp x", ["training.steps='!!timestamp x' is not YAML"]),
  ("training.steps=!!python/object/apply:os.system [echo]", ["training.steps=", "is not YAML", "os.system"]),
  ("training.steps=&a [*a]", ["training.steps=", "*a repeats a value by reference"]),
  ("mesh={fsdp: 1, fsdp: 2}", ["mesh=", "fsdp stands twice"]),
  ("mesh={? [a] : 1}", ["mesh=", "a key is not text"]),
  ("mesh={~: 1}", ["mesh.~ is not a setting"]),
  ("data.paths=" + 3000 * "[", ["data.paths=", "is not YAML"]),
  ("run_dir=caf\udce9", ["run_dir=", "is not YAML"]),
]  # fmt: skip

WORDS = [
  (words.split(" ") if "=" in words.partition(" ")[2] and "{" not in words else [words], told)
  for words, told in UNKNOWN + TYPES + RANGES + CHOICES + CONTRADICTIONS + SYNTAX
]

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
  f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
  for old, new in zip("abcdefghijk", "bcdefghijkl")
)

EDITS = [
  ("param_dtype: float32\n", "dtype: float32\n", ["run.yml", "dtype stands twice"]),
  ("  steps: 10\n", "  steps: 10\n  steps: 20\n", ["run.yml", "steps stands twice"]),
  ("  steps: 10\n", "\tsteps: 10\n", ["run.yml is not valid YAML", "line"]),
  ("  steps: 10\n", "   steps: 10\n", ["run.yml is not valid YAML"]),
  ("  steps: 10\n", "  steps 10\n", ["run.yml is not valid YAML"]),
  ("  steps: 10\n", "  steps: [10\n", ["run.yml is not valid YAML"]),
  ("  steps: 10\n", "  steps: *ten\n", ["run.yml is not valid YAML", "*ten repeats a value by reference"]),
  ("  steps: 10\n", "  <<: {steps: 10}\n", ["training.<< is not a setting"]),
  ("  steps: 10\n", "", ["training.steps is missing; set it"]),
  ("training:\n", "training.steps: 5\ntraining:\n", ["run.yml", "training.steps holds a dot"]),
  ("training:\n", "on: 5\ntraining:\n", ["on is not a setting"]),
  ("training:\n", "7: 5\ntraining:\n", ["7 is not a setting"]),
  ("training:\n", "trainin:\n", ["trainin is not a setting; did you mean training?"]),
  ("data:\n  paths: [texts]\n", "", ["data is missing; set it"]),
  ("  paths: [texts]\n", "", ["data=None must be a section of settings"]),
  ("  paths: [texts]\n", "  paths: []\n", ["data.paths=[]"]),
  ("  rope_scaling: null\n", "", ["model.rope_scaling is missing"]),
  ("  head_dim: 8\n", "  head_dim: null\n", ["model.head_dim=None must be a whole number"]),
  ("  head_dim: 8\n", "head_dim: 8\n", ["run.yml is not valid YAML"]),
  ("param_dtype: float32\n", "", ["param_dtype is missing; set it to one of"]),
  ("dtype: float32\nparam", "param", ["dtype is missing; set it to one of"]),
  ("data:\n", "steps: 10\ndata:\n", ["steps is not a setting; did you mean training.steps?"]),
  ("data:\n", "learning_rate: 3\ndata:\n", ["did you mean optimizer.learning_rate?"]),
]  # fmt: skip

FILES = [
  ("empty", b"", ["run.yml holds no settings"]),
  ("blank", b" \n\n", ["run.yml holds no settings"]),
  ("a comment", b"# nothing\n", ["run.yml holds no settings"]),
  ("a list", b"- a\n- b\n", ["run.yml holds no settings", "mapping"]),
  ("a word", b"hello\n", ["run.yml holds no settings"]),
  ("a number", b"42", ["run.yml holds no settings"]),
  ("null", b"null\n", ["run.yml holds no settings"]),
  ("two documents", b"a: 1\n---\nb: 2\n", ["run.yml is not valid YAML"]),
  ("binary", bytes(range(256)), ["run.yml is not valid YAML"]),
  ("zeros", bytes(4096), ["run.yml is not valid YAML"]),
  ("latin 1", "run_dir: café\n".encode("latin-1"), ["run.yml is not valid YAML", "utf-8"]),
  ("utf 16", GOOD.encode("utf-16"), ["run.yml is not valid YAML"]),
  ("cut in a list", GOOD[: GOOD.index("texts") + 2].encode(), ["run.yml is not valid YAML"]),
  ("cut after the model", GOOD[: GOOD.index("dtype")].encode(), ["dtype is missing"]),
  ("an object of Python", b"run_dir: !!python/object/apply:os.getcwd []\n", ["run.yml is not valid YAML", "os.getcwd"]),
  ("a billion laughs", _BOMB.encode(), ["run.yml is not valid YAML", "*a repeats a value by reference"]),
  ("a file in itself", b"a: &a [*a]\n", ["run.yml is not valid YAML", "*a repeats a value by reference"]),
  ("ten thousand levels", b"a: " + 10_000 * b"[", ["run.yml is not valid YAML"]),
  ("a sum of itself", b"a: &a {<<: *a}\n", ["run.yml is not valid YAML", "*a repeats a value by reference"]),
  ("JSON cut short", b'{"model": {"vocab_size": 4', ["run.yml is not valid YAML"]),
  ("a model in another file that is missing", b"model: models/none.yml\n", ["models/none.yml cannot be read"]),
  ("a model in itself", b"dtype: float32\nparam_dtype: float32\nmodel: run.yml\n", ["model.dtype is not a setting"]),
  ("a model in a folder", b"model: texts\n", ["texts cannot be read"]),
]  # fmt: skip
