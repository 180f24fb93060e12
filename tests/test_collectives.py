"""What the training step exchanges, over which mesh axes and how many bytes: read from what the compiler for TPUs made of
it, for chips that are only described. Each mesh's table is whole: another collective, another dtype, a gather or a sum
more than it says, and the test fails.
"""

import functools
import importlib.util

import pytest
from tiny import tiny_config, tiny_run

from maxllama4.config import MeshConfig
from maxllama4.planning.chips import parse_topology
from maxllama4.planning.compile import compile_train_step

# Sizes that fill a TPU's tiles: two layers, one dense and chunked, one with experts and NoPE.
MODEL = tiny_config(
  vocab_size=1024,
  hidden_size=512,
  intermediate_size=512,
  intermediate_size_mlp=1024,
  num_attention_heads=8,
  num_key_value_heads=8,
  head_dim=128,
  num_local_experts=8,
  attention_chunk_size=128,
  max_position_embeddings=1024,
  dtype="bfloat16",
)
ROWS, LENGTH = 8, 1024  # a chunk for each of 8 devices along the length
# Bytes in bfloat16: the weights outside of the embedding and the experts, those of the experts, the embedding, all keys
# or values of a layer, and the residual stream.
DENSE = 2 * 512 * (2 * 4 * 8 * 128 + 3 * 1024 + 3 * 512 + 1024)
EXPERTS = 2 * 8 * 3 * 512 * 512
TABLE = 2 * 1024 * 512
KEYS = 2 * ROWS * LENGTH * 8 * 128
STREAM = 2 * ROWS * LENGTH * 512
WEIGHTS = DENSE + EXPERTS
SMALL = 0.02 * WEIGHTS  # norms and routers, tokens' ids, statistics
# What leaves a device, by kind, axes and whether it leaves the slice too. A gather of an array over n devices sends
# (n - 1) / n of it, and a sum twice that. The forward and the backward pass share one gather of each weight, for nothing
# is rematerialized.
MESHES = {
  "fsdp": (
    {"fsdp": 8},
    {
      "all-gather fsdp": 7 / 8 * WEIGHTS,
      "reduce-scatter fsdp": 7 / 8 * WEIGHTS,
      "all-to-all fsdp": 2 * 7 / 8 * STREAM / 8,  # vectors of tokens, and their gradients
    },
  ),
  "data": ({"data": 8}, {"all-reduce data": 2 * 7 / 8 * (WEIGHTS + TABLE)}),
  # Each way, once in the embedding or the head, and twice in each layer.
  "tensor": ({"tensor": 8}, {"all-reduce tensor": 10 * 2 * 7 / 8 * STREAM}),
  # Rows to their experts, and back in blocks with a quarter to spare; and so their gradients. The loop over further blocks
  # counts as never run.
  "expert": (
    {"expert": 8},
    {
      "all-gather expert": 7 / 8 * DENSE,
      "reduce-scatter expert": 7 / 8 * DENSE,
      "all-to-all expert": 2 * 7 / 8 * STREAM / 8,
      "ragged-all-to-all expert": (2 + 2 * 1.25) * 7 / 8 * STREAM / 8,
    },
  ),
  # Of the chunked layer, no keys and values; of the other, both, and their gradients.
  "context": (
    {"context": 8},
    {
      "all-gather context": 7 / 8 * (WEIGHTS + 2 * KEYS),
      "reduce-scatter context": 7 / 8 * (WEIGHTS + 2 * KEYS),
      "all-to-all context": 2 * 7 / 8 * STREAM / 8,
    },
  ),
  "fsdp and context": (
    {"fsdp": 2, "context": 4},
    {
      "all-gather context": 3 / 4 * (WEIGHTS / 2 + 2 * KEYS / 2),
      "all-gather fsdp": 1 / 2 * WEIGHTS,
      "reduce-scatter context": 3 / 4 * (WEIGHTS / 2 + 2 * KEYS / 2),
      "reduce-scatter fsdp": 1 / 2 * WEIGHTS,
      "all-to-all fsdp context": 2 * 7 / 8 * STREAM / 8,
    },
  ),
  "fsdp and tensor": (
    {"fsdp": 4, "tensor": 2},
    {
      "all-gather fsdp": 3 / 4 * WEIGHTS / 2,
      # Of one array, half as large as the table, XLA makes a sum.
      "reduce-scatter fsdp": 3 / 4 * (WEIGHTS - TABLE) / 2,
      "all-reduce fsdp": 2 * 3 / 4 * TABLE / 2,
      "all-to-all fsdp": 2 * 3 / 4 * STREAM / 4,
      "all-reduce tensor": 10 * 2 * 1 / 2 * STREAM / 4,
    },
  ),
  "slices": (
    {"dcn_data": 2, "fsdp": 4},
    {
      "all-gather fsdp": 3 / 4 * WEIGHTS,
      "reduce-scatter fsdp": 3 / 4 * WEIGHTS,
      "all-to-all fsdp": 2 * 3 / 4 * STREAM / 8,
      "all-reduce data between slices": 2 * 1 / 2 * (WEIGHTS + TABLE) / 4,
    },
  ),
  "fsdp over slices": (
    {"dcn_fsdp": 2, "fsdp": 4},
    {
      "all-gather fsdp": 3 / 4 * WEIGHTS,
      "reduce-scatter fsdp": 3 / 4 * WEIGHTS,
      "all-gather fsdp between slices": 1 / 8 * WEIGHTS,
      # Parts of 64 columns, half a tile, are filled up where columns are what is scattered.
      "reduce-scatter fsdp between slices": 1 / 8 * WEIGHTS + 655360,
      "all-to-all fsdp between slices": 2 * 1 / 2 * STREAM / 8,
    },
  ),
}

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, which compiles for TPUs, is not there",
)


def each(*names):
  """Meshes as parameters; a minute of one core for each, so all but `fsdp` are slow."""
  return [pytest.param(name, marks=[pytest.mark.slow] * (name != "fsdp")) for name in names]


@functools.cache
def compiled(name):
  sizes, _ = MESHES[name]
  mesh = MeshConfig(**{"fsdp": 1} | sizes)
  topology = parse_topology("v5p:2x2x1" if mesh.num_slices > 1 else "v5p:2x2x2", mesh.num_slices)
  run = tiny_run(MODEL, mesh=mesh, batch_size=ROWS, sequence_length=LENGTH, loss_chunk=512)
  return compile_train_step(run, topology)[0]


def sent(name, dtype="bf16"):
  """Bytes that leave a device, of what is more than `SMALL`."""
  found = {}
  for c in compiled(name).summary.collectives:
    if c.dtype == dtype:
      key = " ".join((c.kind, *c.axes)) + " between slices" * c.dcn
      found[key] = found.get(key, 0) + c.bytes
  return {key: size for key, size in found.items() if size > SMALL}


@pytest.mark.parametrize("name", each(*MESHES))
def test_a_step_sends_what_its_mesh_needs_and_nothing_else(name):
  assert sent(name) == pytest.approx(MESHES[name][1], rel=0.01)
  others = {c.dtype for c in compiled(name).summary.collectives} - {"bf16"}
  assert sum(sum(sent(name, dtype).values()) for dtype in others) == 0


@pytest.mark.parametrize("name", each("fsdp", "context", "expert", "fsdp and context"))
def test_weights_and_moments_are_split_alike(name):
  state = 12 / 8 * (WEIGHTS + TABLE) / 2  # a weight and two moments in float32
  assert state <= compiled(name).arguments_bytes <= 1.02 * state


def test_gathers_and_scatters_of_weights_are_started_early():
  early = {c.kind for c in compiled("fsdp").summary.collectives if c.asynchronous}
  assert {"all-gather", "reduce-scatter"} <= early
  assert not [
    c
    for c in compiled("fsdp").summary.collectives
    if c.kind in early and c.bytes > SMALL and not c.asynchronous
  ]
