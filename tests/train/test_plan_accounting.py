"""What is read off compiled programs, against formulas, the compiler's own counts, and arrays that are there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import operations
from train.config import MeshConfig
from train.plan import accounting
from train.plan.compile import loss_jaxpr
from train.plan.hlo import Program, shapes_of
from train.plan.memory import kept_by_loops, state_bytes
from train.plan.tasks import Sizes, TextShapes
from train.plan.traffic import memory_traffic
from train.sharding import batch_sharding, make_mesh
from train.tasks import make_task
from train.trainer import Trainer


def compiled(f, *arguments):
    made = jax.jit(f).lower(*arguments).compile()
    return Program(made.as_text()), made


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_shapes_of_a_type():
    first, second, third = shapes_of("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0:T(512)(2,1)S(1)}, pred[])")
    assert (first.dims, first.bytes, first.on_chip) == ((2, 3), 24, False)
    assert (second.dims, second.bytes, second.on_chip) == ((4,), 8, True)
    assert (third.dims, third.bytes) == ((), 1)
    assert [shape.bytes for shape in shapes_of("(s4[3], f8e4m3fn[5], u64[2], token[])")] == [2, 5, 16, 0]


def test_products_in_a_loop_count_as_often_as_it_runs():
    def f(x, ws):
        return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    program, _ = compiled(f, f32(16, 32), f32(5, 32, 32))
    assert accounting.flops(program) == 5 * 2 * 16 * 32 * 32
    assert program.loops_of_unknown_length == 0


def test_a_loop_that_counts_by_twos():
    """As XLA writes products that it overlaps with bringing parts of one factor around a ring."""
    program = Program("""
HloModule ring

%body (state: (u32[], f32[8,8])) -> (u32[], f32[8,8]) {
  %state = (u32[], f32[8,8]) parameter(0)
  %two = u32[] constant(2)
  %at = u32[] get-tuple-element(%state), index=0
  %x = f32[8,8] get-tuple-element(%state), index=1
  %next = u32[] add(%at, %two)
  %y = f32[8,8] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %after = (u32[], f32[8,8]) tuple(%next, %y)
}

%condition (state.1: (u32[], f32[8,8])) -> pred[] {
  %state.1 = (u32[], f32[8,8]) parameter(0)
  %eight = u32[] constant(8)
  %at.1 = u32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%at.1, %eight), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> (u32[], f32[8,8]) {
  %zero = u32[] constant(0)
  %x.1 = f32[8,8] parameter(0)
  %start = (u32[], f32[8,8]) tuple(%zero, %x.1)
  ROOT %loop = (u32[], f32[8,8]) while(%start), condition=%condition, body=%body
}
""")
    assert program.loops_of_unknown_length == 0
    assert accounting.flops(program) == 4 * 2 * 8**3


def test_a_loop_whose_length_the_run_decides_counts_once_and_is_told():
    def f(x, w):
        return lax.while_loop(lambda x: x[0, 0] < 10, lambda x: x @ w, x)

    program, _ = compiled(f, f32(64, 64), f32(64, 64))
    assert accounting.flops(program) == 2 * 64**3
    assert program.loops_of_unknown_length == 1


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": "VALID"},
        {"window_strides": (1, 1), "padding": ((2, 0), (1, 3)), "lhs_dilation": (2, 1), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
        {"window_strides": (1, 1), "padding": "SAME", "batch_group_count": 2},
    ],
)
def test_convolutions_count_as_the_compiler_counts_them(options):
    features = 8 // options.get("feature_group_count", 1)
    f = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    program, made = compiled(f, f32(4, 12, 10, 8), f32(3, 3, features, 16))
    assert accounting.flops(program) == made.cost_analysis()["flops"]


def test_the_traced_step_counts_loops_recomputation_and_the_dearest_branch():
    layers, width = 4, 8
    square = 2 * width**3

    def loss(ws, x):
        body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
        return lax.scan(body, x, ws)[0].sum()

    shapes = (f32(layers, width, width), f32(width, width))
    assert operations.flops(jax.make_jaxpr(loss)(*shapes)) == layers * square
    # Forward, the product again, and one product each for the two gradients.
    assert operations.flops(jax.make_jaxpr(jax.grad(loss))(*shapes)) == pytest.approx(layers * 4 * square, abs=layers * square)

    def branches(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert operations.flops(jax.make_jaxpr(branches)(shapes[1])) == 2 * square


def double(cost):
    """x -> 2 x as a kernel."""

    def kernel(x, y):
        y[...] = 2 * x[...]

    return lambda x: pl.pallas_call(kernel, out_shape=x, cost_estimate=cost, name="double")(x)


def test_what_is_not_counted_is_named():
    square, key = f32(8, 8), operations.uncounted
    assert key(jax.make_jaxpr(lambda x: jnp.sin(x @ x))(square)) == ()
    assert key(jax.make_jaxpr(double(pl.CostEstimate(flops=64, transcendentals=0, bytes_accessed=0)))(square)) == ()

    def f(x):
        x = lax.scan(lambda x, _: (jax.jit(double(None))(x), None), x, length=3)[0]
        x = lax.while_loop(lambda x: x[0, 0] < 10, lambda x: x + 1, x)  # arithmetic per element, which no count has
        return jnp.linalg.inv(lax.while_loop(lambda x: x[0, 0] < 10, lambda x: x @ x, x))

    named = key(jax.make_jaxpr(f)(square))
    assert {"the kernel double", "products in a loop whose length only the run decides", "lu"} <= set(named)
    assert len(named) == len(set(named))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


def test_work_of_each_device_is_counted_for_all(mesh):
    split = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"))
    assert operations.flops(jax.make_jaxpr(split)(f32(16, 8), f32(8, 8))) == 2 * 16 * 8 * 8


# name -> what a device does with its part [64], in a loop of three turns; (group, bytes, received) of one turn in parts
COLLECTIVES = {
    "all-gather": (lambda x: lax.all_gather(x, "fsdp").sum(0), 4, 4.0, 3.0),
    "all-reduce": (lambda x: lax.psum(x, "fsdp") / 4, 4, 1.0, 1.5),
    "reduce-scatter": (lambda x: jnp.tile(lax.psum_scatter(x, "fsdp", tiled=True), 4), 4, 1.0, 0.75),
    "all-to-all": (lambda x: lax.all_to_all(x.reshape(4, 16), "fsdp", 0, 0).reshape(64), 4, 1.0, 0.75),
    "collective-permute": (lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), 2, 1.0, 1.0),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_by_kind_group_and_bytes(kind, mesh):
    f, group, moved, received = COLLECTIVES[kind]

    def local(x):
        return lax.fori_loop(0, 3, lambda _, x: jnp.sin(f(x)), x)

    split = jax.shard_map(local, mesh=mesh, in_specs=P(("fsdp", "tensor")), out_specs=P(("fsdp", "tensor")), check_vma=False)
    program, _ = compiled(split, f32(8 * 64))
    (found,) = [c for c in accounting.collectives(program, 8) if c.kind == kind]
    assert (found.group, found.count) == (group, 3)
    assert found.bytes == 3 * moved * 64 * 4
    assert found.received == 3 * received * 64 * 4


OVERLAPPED = """
HloModule overlapped

%start (p.0: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p.0), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %cc.1 = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.1: bf16[8,16], p.2: bf16[32,16], p.3: bf16[64,64]) -> (bf16[64,64], bf16[8,16], bf16[32,16]) {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %p.2 = bf16[32,16]{1,0} parameter(1)
  %p.3 = bf16[64,64]{1,0} parameter(2)
  %dot.1 = bf16[64,64]{1,0} dot(%p.3, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=6, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  ROOT %tuple.1 = (bf16[64,64]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) tuple(%dot.1, %p.1, %p.2)
}

%all-reduce-scatter.1 (p.4: bf16[64,64]) -> bf16[32,64] {
  %p.4 = bf16[64,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = bf16[64,64]{1,0} all-reduce(%p.4), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %slice.1 = bf16[32,64]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={32,64}
}

ENTRY %main (a: bf16[8,16], b: bf16[64,64]) -> bf16[32,64] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %async-collective-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %g.0 = bf16[8,16]{1,0} get-tuple-element(%async-collective-start), index=0
  %g.1 = bf16[32,16]{1,0} get-tuple-element(%async-collective-start), index=1
  %f = (bf16[64,64]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}) fusion(%g.0, %g.1, %b), calls=%async_collective_fusion.1
  %g.2 = bf16[64,64]{1,0} get-tuple-element(%f), index=0
  ROOT %s = bf16[32,64]{1,0} fusion(%g.2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_collective_that_overlaps_arithmetic_counts_once():
    """As TPU programs write them: spread over fusions that share a channel; an all-reduce of which a part is kept."""
    program = Program(OVERLAPPED)
    scattered, gathered = accounting.collectives(program, 8)
    assert (gathered.kind, gathered.group, gathered.count) == ("all-gather", 4, 1)
    assert (gathered.bytes, gathered.received) == (32 * 16 * 2, 24 * 16 * 2)
    assert (scattered.kind, scattered.group, scattered.count) == ("reduce-scatter", 2, 1)
    assert (scattered.bytes, scattered.received) == (64 * 64 * 2, 32 * 64 * 2)
    assert accounting.flops(program) == 2 * 64**3
    # The gather's operand and result; the product's (whose operand is read once) and its result; what the scatter reads, keeps.
    assert memory_traffic(program) == (8 + 32) * 16 * 2 + 2 * 64 * 64 * 2 + (64 + 32) * 64 * 2


def test_fsdp_gathers_each_weight_once_forward(mesh):
    """x by rows and w by its first axis over the same devices: each device gets the rest of w, (n - 1) / n of its bytes."""
    x = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    program, _ = compiled(lambda x, w: jnp.tanh(x @ w), x, w)
    (found,) = accounting.collectives(program, 8)
    assert (found.kind, found.group, found.count) == ("all-gather", 4, 1)
    assert found.bytes == 64 * 32 * 4
    assert found.received == 64 * 32 * 4 * 3 // 4


def test_memory_traffic_is_operands_and_result():
    size = 4 * 1024 * 1024
    program, _ = compiled(lambda x, y: jnp.sin(x) + y, f32(1024, 1024), f32(1024, 1024))
    assert memory_traffic(program) == 3 * size


def test_a_loop_over_stacked_weights_reads_each_once():
    def f(x, ws):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, ws)[0]

    program, _ = compiled(f, f32(8, 128), f32(16, 128, 128))
    stack = 16 * 128 * 128 * 4
    assert stack <= memory_traffic(program) < 4 * stack


def test_what_a_loop_keeps_for_the_backward_pass(tiny, replaced):
    """One input [rows, T, D] per layer under full rematerialisation; all of a layer's without."""
    small = {"model.num_layers": 3, "model.scan_layers": True, "batch": 2}
    kept = {}
    for remat in ("full", "none"):
        config = replaced(tiny, {**small, "model.remat": remat})
        task = TextShapes(config, Sizes(vocab_size=64))
        trainer = Trainer(task, config, make_mesh(MeshConfig()))
        program = Program(trainer.trace(task.batch()).lower().compile().as_text())
        kept[remat] = kept_by_loops(program)
    assert kept["full"] == 3 * 2 * 32 * 16 * 4
    assert kept["none"] > 5 * kept["full"]


def test_state_bytes_are_those_of_the_arrays_on_a_device(tiny):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    task = make_task(tiny)
    trainer = Trainer(task, tiny, mesh)
    batch = next(iter(task.batches()))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    placed = {name: batch_sharding(name, task.sequence, mesh) for name in batch}
    expected = state_bytes(trainer, shapes, trainer.shardings, placed)
    state, put = trainer.init(), trainer.put(batch)

    def here(tree):
        arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
        data = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in arrays]
        return sum(np.asarray(x.addressable_shards[0].data).nbytes for x in data)

    assert expected.parameters == here(state.params)
    assert expected.optimizer == here(state.opt_state)
    assert expected.other == here((state.rest, state.step))
    assert expected.batch == here(put)


def test_the_model_s_own_operations_follow_the_formula(tiny, replaced):
    """2 per token and weight of a matrix (the table once, as readout), and 4 T D per token and layer for attention."""
    config = replaced(tiny, {"model.num_layers": 2, "model.scan_layers": True, "model.remat": "full"})
    task = TextShapes(config, Sizes(vocab_size=64))
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    matrices = sum(x.size for x in jax.tree.leaves(trainer.abstract.params) if x.ndim > 2)
    table = 64 * 16
    tokens = 8 * 32
    assert operations.flops(loss_jaxpr(trainer, task.batch())) == 2 * tokens * (matrices + table) + 4 * tokens * 32 * 16 * 2
