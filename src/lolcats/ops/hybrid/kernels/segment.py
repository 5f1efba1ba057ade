"""Forward pass without gradients on Hopper GPUs, in Gluon: the state stays in registers (segment_launch.py: when).

For hedgehog maps with 64 columns, D = Dv = 128, a window of one block of 64 tokens, no sinks. A text is cut into
segments. `sum_pieces` and `scan_pieces` find the state before each (the sums of phi(k) v^T over all keys up to a block
before it), and a program of `segment_forward` walks a segment of a head block by block. Its warps are partitions that
do different things at once and wait for each other at barriers in shared memory:

- `loads` (1 warp): tiles of q, k and v come by the copy engine, ahead of those who read them;
- `keys` (4 warps): hands on the state that a block sees, then adds the block before it: phi(k), and its sums;
- `queries` (4 warps): softmax, phi(q) times the state and where windows slide phi(k) of the block before, the output.

So the products of one partition fill the time in which another waits, and neither states nor features are written to
memory. A block meets two blocks of keys. Where the window slides, their masks fill each other up: a query at column i
of its block has softmax pairs with keys up to column i of its own and after column i of the block before, where the
others are linear pairs. So softmax is over 64 scores, chosen from two products, and so are the weights of the block
before. A terraced window holds all of the block before: there softmax is over two blocks, and only the state is linear.

Rings: slot n of keys and values holds block first - 1 + n of the text, modulo the slots; iteration i answers block
first + i. A barrier `x_full` says that x can be read, `x_empty` that it can be written anew.
Shapes: q, out [B, H, N, 128]; k, v [B, KV, N, 128]; maps [heads 128, 64]; states as in `scan_pieces`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

from typing import Any

import triton
import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
import triton.experimental.gluon.language.nvidia.hopper as hopper
import triton.experimental.gluon.nvidia.hopper as host
import triton.language as tl

fence_async_shared, mbarrier, tma = hopper.fence_async_shared, hopper.mbarrier, hopper.tma
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
# The names of Triton 3.6, or later ones.
meet = getattr(gl, "thread_barrier", None) or gl.barrier
fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
put = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

LOG2E = gl.constexpr(1.4426950408889634)
Q_SLOTS, K_SLOTS, V_SLOTS = gl.constexpr(2), gl.constexpr(3), gl.constexpr(3)
SUM_SLOTS = gl.constexpr(2)
MOST_PIECES = gl.constexpr(5)
"""Pieces of a segment whose sums are found apart, at most."""

# Results of products [64, columns], four warps of 16 rows each; left operands that come from registers.
NARROW = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
WIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
LEAST = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
LEFT_NARROW = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), 2))
LEFT_WIDE = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]), 2))
# Tiles in shared memory.
TOKENS = gl.constexpr(gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16))
MAP = gl.constexpr(gl.NVMMASharedLayout.get_default_for([128, 64], gl.bfloat16))
ONES = gl.constexpr(gl.NVMMASharedLayout.get_default_for([8, 64], gl.bfloat16))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
FILL = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


def described(x: Any, block: list[int]) -> Any:
    """A descriptor of x for tiles of the shape `block`; Gluon wants to know how they lie in shared memory."""
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return host.TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def note(bar):
    """All warps of the partition have come here: tell it."""
    meet()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def tile_of(x):
    """A tile [64, 128] as the copy engine sees it."""
    return x.reshape([1, 1, 64, 128])


@gluon.jit
def packed(x):
    """fp32 as bf16, two numbers an instruction (the compiler may take one each, on a slow unit)."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def half_map(y, scale, POSITIVE: gl.constexpr):
    """scale softmax(y), or scale softmax(-y), over the columns."""
    if POSITIVE:
        e = gl.exp2(y * LOG2E - (gl.max(y, 1) * LOG2E)[:, None])
    else:
        e = gl.exp2((gl.min(y, 1) * LOG2E)[:, None] - y * LOG2E)
    return gl.maximum(e * (scale / gl.sum(e, 1))[:, None], 1e-12 * scale)


@gluon.jit
def queries(
    q_s, k_s, v_s, wq_s, p_s, s_s, z_s, bars, out, first, count, row, head, log_gate, phi_scale, score_scale,
    TERRACED: gl.constexpr,
):  # fmt: skip
    """The partition that answers the queries."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, s_full, s_empty, p_full, p_empty, w_full = bars
    ROW: gl.constexpr = gl.SliceLayout(1, NARROW)
    COLUMN: gl.constexpr = gl.SliceLayout(0, NARROW)
    zero_narrow = gl.zeros([64, 64], gl.float32, NARROW)
    zero_wide = gl.zeros([64, 128], gl.float32, WIDE)
    later = gl.arange(0, 64, COLUMN)[None, :] > gl.arange(0, 64, ROW)[:, None]
    mbarrier.wait(w_full, 0)
    for i in range(count):
        q = q_s.index(i % Q_SLOTS)
        before = i % K_SLOTS
        now = (i + 1) % K_SLOTS
        v_before = v_s.index(i % V_SLOTS)
        v_now = v_s.index((i + 1) % V_SLOTS)
        mbarrier.wait(q_full.index(i % Q_SLOTS), (i // Q_SLOTS) & 1)
        # features, and scores of two blocks
        y = warpgroup_mma(q, wq_s, zero_narrow, use_acc=False, is_async=True)
        mbarrier.wait(k_full.index(before), (i // K_SLOTS) & 1)
        # no block before the first one of the text
        low = gl.full([64, 64], gl.where(first + i > 0, 0.0, -float("inf")), gl.float32, NARROW)
        s0 = warpgroup_mma(q, k_s.index(before).permute((1, 0)), low, is_async=True)
        mbarrier.wait(k_full.index(now), ((i + 1) // K_SLOTS) & 1)
        s1 = warpgroup_mma(q, k_s.index(now).permute((1, 0)), zero_narrow, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(2, deps=(y,))
        if i >= 1:
            # the last output has been read from where queries will go
            tma.store_wait(0)
            note(q_empty.index((i - 1) % Q_SLOTS))
        phi0 = packed(half_map(y, phi_scale, True))
        phi1 = packed(half_map(y, phi_scale, False))
        s0, s1 = warpgroup_mma_wait(0, deps=(s0, s1))
        meet()
        mbarrier.arrive(k_empty.index(before), count=1)
        mbarrier.arrive(k_empty.index(now), count=1)

        if TERRACED:
            s1 = gl.where(later, -float("inf"), s1)
            top = gl.maximum(gl.max(s0, 1), gl.max(s1, 1)) * score_scale - log_gate
        else:
            # linear pairs with the block before, softmax beside them
            mbarrier.wait(p_full, i & 1)
            b0 = gl.convert_layout(phi0, LEFT_NARROW)
            b1 = gl.convert_layout(phi1, LEFT_NARROW)
            pairs = warpgroup_mma(b0, p_s.index(0).permute((1, 0)), zero_narrow, use_acc=False, is_async=True)
            pairs = warpgroup_mma(b1, p_s.index(1).permute((1, 0)), pairs, is_async=True)
            s = gl.where(later, s0, s1)
            top = gl.max(s, 1) * score_scale - log_gate
            s = gl.exp2(s * score_scale - top[:, None])
            pairs, b0, b1 = warpgroup_mma_wait(0, deps=(pairs, b0, b1))
            note(p_empty)

        # the state, sums beside it
        mbarrier.wait(s_full, i & 1)
        a0 = gl.convert_layout(phi0, LEFT_WIDE)
        a1 = gl.convert_layout(phi1, LEFT_WIDE)
        acc = warpgroup_mma(a0, s_s.index(0), zero_wide, use_acc=False, is_async=True)
        acc = warpgroup_mma(a1, s_s.index(1), acc, is_async=True)
        if TERRACED:
            with_before = gl.exp2(s0 * score_scale - top[:, None])
            with_now = gl.exp2(s1 * score_scale - top[:, None])
        else:
            with_before = gl.where(later, s, pairs)
            with_now = gl.where(later, 0.0, s)
        left0 = gl.convert_layout(packed(with_before), LEFT_WIDE)
        left1 = gl.convert_layout(packed(with_now), LEFT_WIDE)
        total = with_before + with_now
        total += phi0.to(gl.float32) * z_s.index(0).load(COLUMN)[None, :]
        total += phi1.to(gl.float32) * z_s.index(1).load(COLUMN)[None, :]
        total = gl.sum(total, 1)
        acc, a0, a1 = warpgroup_mma_wait(0, deps=(acc, a0, a1))
        note(s_empty)

        # values
        mbarrier.wait(v_full.index(i % V_SLOTS), (i // V_SLOTS) & 1)
        mbarrier.wait(v_full.index((i + 1) % V_SLOTS), ((i + 1) // V_SLOTS) & 1)
        acc = warpgroup_mma(left0, v_before, acc, is_async=True)
        acc = warpgroup_mma(left1, v_now, acc, is_async=True)
        acc, left0, left1 = warpgroup_mma_wait(0, deps=(acc, left0, left1))
        meet()
        mbarrier.arrive(v_empty.index(i % V_SLOTS), count=1)
        mbarrier.arrive(v_empty.index((i + 1) % V_SLOTS), count=1)

        # the output, by way of where the queries were
        inverse = gl.where(total != 0.0, 1.0 / total, 0.0)
        q.store(packed(acc * gl.convert_layout(inverse, gl.SliceLayout(1, WIDE))[:, None]))
        fence_async_shared()
        meet()
        put(out, [row, head, (first + i) * 64, 0], tile_of(q))
    tma.store_wait(0)


@gluon.jit
def keys(k_s, v_s, wk_s, p_s, s_s, z_s, ones_s, bars, before, before_sum, first, count, TERRACED: gl.constexpr):
    """The partition that has the state [128, 128] in registers, in two halves, and its sums [128]."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, s_full, s_empty, p_full, p_empty, w_full = bars
    zero_narrow = gl.zeros([64, 64], gl.float32, NARROW)
    ones_s.store(gl.full([8, 64], 1.0, gl.bfloat16, FILL))
    ones = ones_s.permute((1, 0))
    f = gl.arange(0, 64, gl.SliceLayout(1, WIDE))[:, None]
    d = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    kv0 = gl.load(before + f * 128 + d).to(gl.float32)
    kv1 = gl.load(before + 64 * 128 + f * 128 + d).to(gl.float32)
    # sums of the features come as products with columns of ones
    z_row = gl.arange(0, 64, gl.SliceLayout(1, LEAST))[:, None]
    z_column = gl.arange(0, 8, gl.SliceLayout(0, LEAST))[None, :]
    z0 = gl.load(before_sum + z_row + z_column * 0)
    z1 = gl.load(before_sum + 64 + z_row + z_column * 0)
    mbarrier.wait(w_full, 0)
    for i in range(count):
        # the state that block i of the segment sees
        mbarrier.wait(s_empty, (i & 1) ^ 1)
        s_s.index(0).store(packed(kv0))
        s_s.index(1).store(packed(kv1))
        z_s.index(0).store(gl.max(z0, 1))
        z_s.index(1).store(gl.max(z1, 1))
        fence_async_shared()
        note(s_full)

        # features of the block before; none before the text
        mbarrier.wait(k_full.index(i % K_SLOTS), (i // K_SLOTS) & 1)
        y = warpgroup_mma(k_s.index(i % K_SLOTS), wk_s, zero_narrow, use_acc=False)
        note(k_empty.index(i % K_SLOTS))
        weight = gl.where(first + i > 0, 1.0, 0.0)
        if not TERRACED:
            mbarrier.wait(p_empty, (i & 1) ^ 1)
        p_s.index(0).store(packed(half_map(y, weight, True)))
        p_s.index(1).store(packed(half_map(y, weight, False)))
        fence_async_shared()
        if TERRACED:
            meet()
        else:
            note(p_full)

        mbarrier.wait(v_full.index(i % V_SLOTS), (i // V_SLOTS) & 1)
        kv0, kv1, z0, z1 = add_block(p_s, v_s.index(i % V_SLOTS), ones, kv0, kv1, z0, z1)
        note(v_empty.index(i % V_SLOTS))


@gluon.jit
def add_block(p_s, v, ones, kv0, kv1, z0, z1):
    """The state with the features [2, 64, 64] of a block and its values [64, 128]."""
    phi0 = p_s.index(0).permute((1, 0))
    phi1 = p_s.index(1).permute((1, 0))
    kv0 = warpgroup_mma(phi0, v, kv0, is_async=True)
    kv1 = warpgroup_mma(phi1, v, kv1, is_async=True)
    z0 = warpgroup_mma(phi0, ones, z0, is_async=True)
    z1 = warpgroup_mma(phi1, ones, z1, is_async=True)
    return warpgroup_mma_wait(0, deps=(kv0, kv1, z0, z1))


@gluon.jit
def loads(q, k, v, wq, wk, q_s, k_s, v_s, wq_s, wk_s, bars, first, count, row, head, kv_head, map_head):
    """The partition that brings tiles; what lies outside the text comes as zeros."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, s_full, s_empty, p_full, p_empty, w_full = bars
    mbarrier.expect(w_full, 2 * 128 * 64 * 2)
    fetch(wq, [head * 128, 0], w_full, wq_s)
    fetch(wk, [map_head * 128, 0], w_full, wk_s)
    for n in range(count + 1):
        token = (first - 1 + n) * 64
        full = k_full.index(n % K_SLOTS)
        mbarrier.wait(k_empty.index(n % K_SLOTS), ((n // K_SLOTS) & 1) ^ 1)
        mbarrier.expect(full, 64 * 128 * 2)
        fetch(k, [row, kv_head, token, 0], full, tile_of(k_s.index(n % K_SLOTS)))
        full = v_full.index(n % V_SLOTS)
        mbarrier.wait(v_empty.index(n % V_SLOTS), ((n // V_SLOTS) & 1) ^ 1)
        mbarrier.expect(full, 64 * 128 * 2)
        fetch(v, [row, kv_head, token, 0], full, tile_of(v_s.index(n % V_SLOTS)))
        # last, for the queries of one block more wait here until keys of this one are there
        if n < count:
            full = q_full.index(n % Q_SLOTS)
            mbarrier.wait(q_empty.index(n % Q_SLOTS), ((n // Q_SLOTS) & 1) ^ 1)
            mbarrier.expect(full, 64 * 128 * 2)
            fetch(q, [row, head, token + 64, 0], full, tile_of(q_s.index(n % Q_SLOTS)))


@gluon.jit
def ring(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Barriers of a ring of tiles, full and empty."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for j in gl.static_range(SLOTS):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=READERS)
    return full, empty


@gluon.jit
def single():
    """One barrier."""
    bar = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(bar, count=1)
    return bar


@gluon.jit(do_not_specialize=["tokens", "segments", "segment_blocks"])
def segment_forward(
    q, k, v, wq, wk, out, window_factor, factor, before, before_sum, tokens, segments, segment_blocks, scale,
    KV_GROUP: gl.constexpr, MAP_GROUP: gl.constexpr, TERRACED: gl.constexpr,
):  # fmt: skip
    """Grid: (heads, segments, rows)."""
    head = gl.program_id(0)
    segment = gl.program_id(1)
    row = gl.program_id(2)
    first = segment * segment_blocks
    count = gl.minimum(segment_blocks, gl.cdiv(tokens, 64) - first)
    map_head = head // MAP_GROUP
    at = (row.to(gl.int64) * (gl.num_programs(0) // MAP_GROUP) + map_head) * segments + segment
    before += at * 128 * 128
    before_sum += at * 128
    log_gate = -gl.log2(1.0 + gl.exp(-gl.load(window_factor + head)))
    phi_scale = gl.exp(gl.load(factor + head).to(gl.float32))
    q_s = gl.allocate_shared_memory(gl.bfloat16, [Q_SLOTS, 64, 128], TOKENS)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [K_SLOTS, 64, 128], TOKENS)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [V_SLOTS, 64, 128], TOKENS)
    wq_s = gl.allocate_shared_memory(gl.bfloat16, [128, 64], MAP)
    wk_s = gl.allocate_shared_memory(gl.bfloat16, [128, 64], MAP)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], MAP)
    s_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], TOKENS)
    ones_s = gl.allocate_shared_memory(gl.bfloat16, [8, 64], ONES)
    z_s = gl.allocate_shared_memory(gl.float32, [2, 64], LINE)
    q_full, q_empty = ring(Q_SLOTS, 1)
    k_full, k_empty = ring(K_SLOTS, 3)  # the queries of two blocks, and the state
    v_full, v_empty = ring(V_SLOTS, 3)
    s_full, p_full, s_empty, p_empty, w_full = single(), single(), single(), single(), single()
    fence_async_shared()
    meet()
    # No query of the segment has the block before it as its own: that reader will not come.
    mbarrier.arrive(k_empty.index(0), count=1)
    mbarrier.arrive(v_empty.index(0), count=1)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, s_full, s_empty, p_full, p_empty, w_full)
    gl.warp_specialize(
        [
            (queries, (q_s, k_s, v_s, wq_s, p_s, s_s, z_s, bars, out, first, count, row, head, log_gate, phi_scale,
                       scale * LOG2E, TERRACED)),
            (keys, (k_s, v_s, wk_s, p_s, s_s, z_s, ones_s, bars, before, before_sum, first, count, TERRACED)),
            (loads, (q, k, v, wq, wk, q_s, k_s, v_s, wq_s, wk_s, bars, first, count, row, head, head // KV_GROUP,
                     map_head)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def piece_keys(k_s, v_s, wk_s, p_s, ones_s, bars, sums, first, count):
    """The sums of one head over blocks first .. first + count - 1, in registers."""
    k_full, k_empty, v_full, v_empty, w_full = bars
    zero_narrow = gl.zeros([64, 64], gl.float32, NARROW)
    kv0 = gl.zeros([64, 128], gl.float32, WIDE)
    kv1 = gl.zeros([64, 128], gl.float32, WIDE)
    z0 = gl.zeros([64, 8], gl.float32, LEAST)
    z1 = gl.zeros([64, 8], gl.float32, LEAST)
    ones = ones_s.permute((1, 0))
    mbarrier.wait(w_full, 0)
    for i in range(count):
        slot = i % SUM_SLOTS
        phase = (i // SUM_SLOTS) & 1
        mbarrier.wait(k_full.index(slot), phase)
        y = warpgroup_mma(k_s.index(slot), wk_s, zero_narrow, use_acc=False)
        note(k_empty.index(slot))
        weight = gl.where(first + i >= 0, 1.0, 0.0)
        p_s.index(0).store(packed(half_map(y, weight, True)))
        p_s.index(1).store(packed(half_map(y, weight, False)))
        fence_async_shared()
        meet()
        mbarrier.wait(v_full.index(slot), phase)
        kv0, kv1, z0, z1 = add_block(p_s, v_s.index(slot), ones, kv0, kv1, z0, z1)
        note(v_empty.index(slot))
    f = gl.arange(0, 64, gl.SliceLayout(1, WIDE))[:, None]
    d = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    gl.store(sums + f * 128 + d, kv0)
    gl.store(sums + 64 * 128 + f * 128 + d, kv1)
    z_row = gl.arange(0, 64, gl.SliceLayout(1, LEAST))
    gl.store(sums + 128 * 128 + z_row, gl.max(z0, 1))
    gl.store(sums + 128 * 128 + 64 + z_row, gl.max(z1, 1))


@gluon.jit
def piece_loads(k, v, wk, k_s, v_s, wk_s, bars, first, count, row, kv_head, map_head):
    """The partition that brings tiles of keys and values."""
    k_full, k_empty, v_full, v_empty, w_full = bars
    mbarrier.expect(w_full, 128 * 64 * 2)
    fetch(wk, [map_head * 128, 0], w_full, wk_s)
    for n in range(count):
        slot = n % SUM_SLOTS
        phase = ((n // SUM_SLOTS) & 1) ^ 1
        token = (first + n) * 64
        mbarrier.wait(k_empty.index(slot), phase)
        mbarrier.expect(k_full.index(slot), 64 * 128 * 2)
        fetch(k, [row, kv_head, token, 0], k_full.index(slot), tile_of(k_s.index(slot)))
        mbarrier.wait(v_empty.index(slot), phase)
        mbarrier.expect(v_full.index(slot), 64 * 128 * 2)
        fetch(v, [row, kv_head, token, 0], v_full.index(slot), tile_of(v_s.index(slot)))


@gluon.jit(do_not_specialize=["segment_blocks", "split"])
def sum_pieces(k, v, wk, sums, segment_blocks, split, KV_GROUP: gl.constexpr):
    """Grid: (map heads, pieces, rows). Each segment but the last is cut into `split` pieces.

    Each ends a block before its end: what the block before the next segment adds is found there. `sums` [rows, map
    heads, pieces, 128 129]: kv, then the sums of phi(k). KV_GROUP: maps of a key head.
    """
    map_head = gl.program_id(0)
    piece = gl.program_id(1)
    row = gl.program_id(2)
    length = (segment_blocks + split - 1) // split
    offset = piece % split * length
    first = piece // split * segment_blocks - 1 + offset
    count = gl.minimum(length, segment_blocks - offset)
    at = (row.to(gl.int64) * gl.num_programs(0) + map_head) * gl.num_programs(1) + piece
    k_s = gl.allocate_shared_memory(gl.bfloat16, [SUM_SLOTS, 64, 128], TOKENS)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [SUM_SLOTS, 64, 128], TOKENS)
    wk_s = gl.allocate_shared_memory(gl.bfloat16, [128, 64], MAP)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], MAP)
    ones_s = gl.allocate_shared_memory(gl.bfloat16, [8, 64], ONES)
    ones_s.store(gl.full([8, 64], 1.0, gl.bfloat16, FILL))
    k_full, k_empty = ring(SUM_SLOTS, 1)
    v_full, v_empty = ring(SUM_SLOTS, 1)
    w_full = single()
    fence_async_shared()
    meet()
    bars = (k_full, k_empty, v_full, v_empty, w_full)
    gl.warp_specialize(
        [
            (piece_keys, (k_s, v_s, wk_s, p_s, ones_s, bars, sums + at * 128 * 129, first, count)),
            (piece_loads, (k, v, wk, k_s, v_s, wk_s, bars, first, count, row, map_head // KV_GROUP, map_head)),
        ],
        [1],
        [24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["segments", "split"])
def scan_pieces(sums, before, before_sum, segments, split, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (rows x map heads, 128 129 / BLOCK). Sums of pieces -> the state before each segment.

    before [rows, map heads, segments, 128 128] bf16; before_sum [rows, map heads, segments, 128] fp32.
    """
    head = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < 128 * 129
    carry = tl.zeros((BLOCK,), tl.float32)
    for segment in range(segments):
        at = head * segments + segment
        tl.store(before + at * 128 * 128 + index, carry.to(tl.bfloat16), mask=index < 128 * 128)
        tl.store(before_sum + at * 128 + index - 128 * 128, carry, mask=inside & (index >= 128 * 128))
        if segment < segments - 1:
            for j in tl.static_range(MOST):
                piece = (head * (segments - 1) + segment) * split + j
                carry += tl.load(
                    sums + piece * 128 * 129 + index, mask=index < tl.where(j < split, 128 * 129, 0), other=0.0
                )
