"""What is read from a compiled program is what the program does: against programs whose numbers one can work out."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxllama4.planning.chips import parse_topology
from maxllama4.planning.flops import _splash_flops
from maxllama4.planning.groups import Devices, permutation, replica_group
from maxllama4.planning.hlo import Collective, summarize
from maxllama4.planning.hlo_text import Instruction, bytes_of, dims_of, parse_module

LAYERS, ROWS, DIM = 5, 512, 1024


@pytest.fixture(scope="module")
def program():
  """A scan over layers on 2 x 4 described chips: a gather, a product, a sum and a scatter each; then two exchanges."""
  pytest.importorskip("libtpu")
  from maxllama4.planning.compile import described_devices

  devices = described_devices(parse_topology("v5p:2x2x2"))
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ("x", "y"), devices=devices, axis_types=auto)

  def layer(x, w):
    w = jax.lax.all_gather(w, "y", axis=0, tiled=True)
    x = jax.lax.psum(x @ w, "x")
    return x, jax.lax.psum_scatter(x, "y", scatter_dimension=0, tiled=True)

  def run(w, x):
    x, scattered = jax.lax.scan(layer, x, w)
    x = jax.lax.ppermute(x, "x", [(0, 1), (1, 0)])
    return scattered, jax.lax.all_to_all(x, "y", 0, 1, tiled=True)

  in_specs = (P(None, "y", None), P(("x", "y"), None))
  out_specs = (P(None, ("x", "y")), P(("x", "y")))
  mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
  shapes = [(LAYERS, DIM, DIM), (8 * ROWS, DIM)]
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    for shape, spec in zip(shapes, in_specs)
  ]
  text = jax.jit(mapped).lower(*arguments).compile().as_text()
  return summarize(text, mesh)


def test_bytes_on_the_wire_are_worked_out_by_kind_and_axis(program):
  x, w = ROWS * DIM * 2, DIM * DIM * 2  # bytes, whole in a group
  found = {(c.kind, c.axes): (c.count, c.bytes, c.dtype) for c in program.collectives}
  assert found == {
    ("all-gather", ("y",)): (LAYERS, LAYERS * w * 3 // 4, "bf16"),
    ("all-reduce", ("x",)): (LAYERS, LAYERS * 2 * x // 2, "bf16"),
    ("reduce-scatter", ("y",)): (LAYERS, LAYERS * x * 3 // 4, "bf16"),
    ("collective-permute", ("x",)): (1, x, "bf16"),
    ("all-to-all", ("y",)): (1, x * 3 // 4, "bf16"),
  }


def test_products_in_a_loop_count_as_often_as_it_runs(program):
  assert program.executed_flops == program.matmul_flops == LAYERS * 2 * ROWS * DIM * DIM
  assert dict(program.loops).popitem()[1] == LAYERS and not program.unknown_loops


def test_cycles_and_traffic_are_counted(program):
  assert program.estimated_cycles == sum(program.cycles_by_kind.values()) > 0
  assert program.cycles_by_kind["matmul"] * 459e12 / 1.75e9 > program.matmul_flops
  assert program.hbm_traffic_bytes > LAYERS * DIM * DIM * 2


def test_what_leaves_a_slice_is_found_in_the_hands_of_the_host():
  """A gradient over two slices: gathered and scattered inside each, and its shards summed between them."""
  pytest.importorskip("libtpu")
  from maxllama4.planning.compile import described_devices

  devices = described_devices(parse_topology("v5p:2x2x1", slices=2))
  placed = mesh_utils.create_hybrid_device_mesh((1, 4), (2, 1), devices)
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.sharding.Mesh(placed, ("data", "fsdp"), axis_types=auto)

  def loss(w, x):
    return (x @ w).astype(jnp.float32).sum()

  w, x = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    for shape, spec in (((DIM, DIM), P("fsdp")), ((8 * ROWS, DIM), P(("data", "fsdp"))))
  )
  gradient = jax.jit(jax.grad(lambda w, x: loss(jnp.tanh(w), x)), out_shardings=w.sharding)
  found = summarize(gradient.lower(w, x).compile().as_text(), mesh).collectives
  between = [collective for collective in found if collective.dcn]
  assert [(c.kind, c.axes) for c in between] == [("all-reduce", ("data",))]
  assert between[0].bytes <= DIM * DIM * 2 and between[0].asynchronous
  assert all(c.axes == ("fsdp",) for c in found if not c.dcn)


def loop_program(condition: str, start: int, step: int) -> str:
  return f"""HloModule m, num_partitions=4

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %c = s32[] constant({step})
  %n = s32[] add(%i, %c)
  %r = f32[8]{{0}} all-reduce(%x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%sum
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%n, %r)
}}, execution_thread="main"

%condition (q: (s32[], f32[8])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(12)
  ROOT %l = pred[] compare(%j, %limit), direction={condition}
}}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {{
  %a = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copy = s32[] copy(%zero)
  %in = (s32[], f32[8]{{0}}) tuple(%copy, %a)
  ROOT %w = (s32[], f32[8]{{0}}) while(%in), condition=%condition, body=%body
}}
"""


class Mesh:
  """As much of a mesh as the reader looks at."""

  def __init__(self, **axes: int):
    import numpy as np

    self.axis_names = tuple(axes)
    self.devices = np.empty(tuple(axes.values()), object)


@pytest.mark.parametrize(
  ("condition", "start", "step", "trips"),
  [("LT", 0, 1, 12), ("LT", 2, 5, 2), ("LE", 0, 1, 13), ("GT", 20, -1, 8), ("NE", 0, 3, 4)],
)
def test_a_loop_is_counted_from_its_counter(condition, start, step, trips):
  found = summarize(loop_program(condition, start, step), Mesh(a=2, b=2))
  assert found.loops == (("body", trips),) and not found.unknown_loops
  # Groups {0, 2}, {1, 3}: along the first axis, 2 (n - 1) / n of 32 bytes each.
  assert found.collectives == (Collective("all-reduce", ("a",), trips, trips * 32, "f32", False),)


def test_a_loop_that_does_not_say_is_counted_once_and_named():
  text = loop_program("LT", 0, 1).replace("constant(0)", "custom-call()")
  found = summarize(text, Mesh(a=2, b=2))
  assert found.unknown_loops == ("body",) and found.collectives[0].count == 1
  named = text.replace("body=%body", 'body=%body, metadata={op_name="jit(step)/seldom/while"}')
  found = summarize(named, Mesh(a=2, b=2))
  assert not found.unknown_loops and not found.collectives


@pytest.mark.parametrize(
  ("groups", "first"),
  [
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", [0, 4]),
    ("replica_groups={}, x", list(range(8))),
    ("replica_groups=[4,2]<=[8], x", [0, 1]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", [0, 1, 2, 3]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", [0, 4]),
    ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0':(2)2}, x", [0, 2]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, x", list(range(8))),
  ],
)
def test_groups_are_read_in_every_notation(groups, first):
  assert sorted(replica_group(groups, Devices(("a",), (8,), (0,) * 8))) == first


def test_a_group_over_slices_is_known():
  devices = Devices(("data", "fsdp"), (2, 4), (0,) * 4 + (1,) * 4)
  assert devices.leaves_slice([0, 4]) and not devices.leaves_slice([0, 1, 2, 3])
  assert devices.axes_of([0, 4]) == ("data",) and devices.axes_of([0, 1, 4, 5]) == ("data", "fsdp")
  pairs = "source_target_pairs={{0,4},{1,5},{2,2}}, x"
  assert permutation(pairs, devices) == ([0, 4], 0.25)


def test_what_is_gathered_through_several_fusions_counts_once():
  config = '"async_collective_fusion_config":{"flag_end":"15","flag_start":"%s"}'
  parts = [
    f"""%part.{i} (p: f32[8]) -> f32[32] {{
  %p.{i} = f32[8]{{0}} parameter(0)
  ROOT %g.{i} = f32[32]{{0}} all-gather(%p.{i}), replica_groups={{}}, backend_config={{{config % flag}}}
}}
"""
    for i, flag in enumerate(("-1", "2", "2"))
  ]
  calls = "\n".join(
    f"  %f.{i} = f32[32]{{0}} fusion(%a), kind=kCustom, calls=%part.{i}" for i in range(3)
  )
  text = f"HloModule m\n\n{''.join(parts)}\nENTRY %main (a: f32[8]) -> f32[32] {{\n  %a = f32[8]{{0}} parameter(0)\n{calls}\n}}\n"
  (found,) = summarize(text, Mesh(a=4)).collectives
  assert found == Collective("all-gather", ("a",), 1, 96, "f32", True)


def test_attributes_over_several_lines_belong_to_their_instruction():
  text = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %k = (f32[8]{0}, /*index=1*/s32[]) custom-call(%a), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"bytes_accessed":"8","flops":"77"}}}
}
"""
  module = parse_module(text)
  kernel = module.computations["main"].instructions["k"]
  assert kernel.op == "custom-call" and kernel.operands == ["a"] and len(kernel.shapes()) == 2
  assert summarize(text, Mesh(a=1)).executed_flops == 77


def test_bytes_and_sizes_of_arrays():
  assert bytes_of("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == 12 and bytes_of("pred[]") == 1
  assert bytes_of("s4[16]") == 8 and bytes_of("f8e4m3fn[16]") == 16 and bytes_of("token[]") == 0
  assert dims_of("s32[<=5,2]") == [5, 2]


def test_attention_counts_the_blocks_that_its_mask_leaves():
  blocks = {"block_q": 512, "block_kv": 512}
  metadata = json.dumps(json.dumps(blocks))
  kernel = Instruction(
    "splash_mha_fwd.1", "", "custom-call", "", f'x={{"xprof_metadata":{metadata}}}'
  )
  operands = ["s8[1,8,2]", "bf16[4,4096,64]"]
  # 8 rows of 2 blocks, of which a causal mask leaves 1.5 on average; 2 products.
  assert _splash_flops(kernel, operands, 2) == 2 * 2 * 4 * 64 * 512 * 512 * 8 * 1.5
