"""The ring of `ring.py` for rows of codes: both of attention's products are products of whole numbers (`digits.py`).

Codes pass the tensor cores as the bytes they are, or as halves of bytes, so that nothing is widened. What meets them
has more digits than a byte: a query, and a weight times its value's scale, is a high and a low byte, which have a row,
or a column, of their own. A program rotates a row's queries and what is new in the row together. For up to 4 queries
a row, scales of 16 bits, and no compensation, sliding window or newest entries.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from headkv_kernels.digits import (
    MAGIC_BITS,
    MOST_STEPS,
    NIBBLES,
    QUERIES,
    ROWS,
    SIGNED_NIBBLES,
    channels_first,
    entries_first,
    for_each_warp,
    halves_of_bytes,
    halves_of_rows,
    in_order,
    largest_of,
    one_of_two,
    rotated_in_warps,
    scale_of,
    transposed,
    value_layout,
    whole_numbers,
)
from headkv_kernels.quantised import in_steps, nearest, quantised
from headkv_kernels.ring import barrier, block_at, copied_layout, copy, halves, next_block
from headkv_kernels.shares import plan_rows, segment_at, share_of
from headkv_kernels.softmax import base_two

HALF = gl.constexpr(116 * 1024)  # a little more than half of a Hopper multiprocessor's shared memory


@gluon.jit
def store_row(codes, pool, target, row, d, which: gl.constexpr):
    """Of the codes `[QUERIES, D]`, as float32, those of one row into the slot `target` of the pool; `row` and `d` are
    `[QUERIES, D]`, too."""
    D: gl.constexpr = codes.shape[1]
    if pool.dtype.element_ty == gl.uint8:
        low, high = gl.split(gl.reshape(((codes + 15.0) * 0.5).to(gl.uint8), [QUERIES, D // 2, 2]))
        rows_of, unused = gl.split(gl.reshape(row, [QUERIES, D // 2, 2]))
        even, unused = gl.split(gl.reshape(d, [QUERIES, D // 2, 2]))
        gl.store(pool + target * (D // 2) + even // 2, low | (high << 4), mask=rows_of == which)
    else:
        gl.store(pool + target * D + d, codes.to(gl.int8), mask=row == which)


@gluon.jit
def store_queries(queries, query_bytes, steps, sums, PACKED: gl.constexpr):
    """The bytes of `[QUERIES, D]`, their steps, and 15 times the sums of these. Rows 0 to 7 are the high bytes of the
    queries 0 to 3, twice, 8 to 15 the low ones: so logits and weights are there twice, and both bytes of a weight have
    a column of their own."""
    D: gl.constexpr = queries.shape[1]
    extent = largest_of(gl.abs(queries), 1)
    whole = whole_numbers(queries, extent)
    for i in gl.static_range(2):
        # Of what is not finite, steps are no number: then its bytes, which mean nothing, do no harm.
        steps.slice(i * QUERIES, QUERIES).store((extent + extent * 0.0) * (1.0 / MOST_STEPS))
        if PACKED:
            sums.slice(i * QUERIES, QUERIES).store(gl.sum(whole - MAGIC_BITS, 1) * 15)
        for byte in gl.static_range(2):
            digits = (((whole + 128) >> 8) if byte == 0 else whole).to(gl.int8)
            if PACKED:
                even, odd = gl.split(gl.reshape(digits, [QUERIES, D // 2, 2]))
                query_bytes.index(0).slice((2 * byte + i) * QUERIES, QUERIES).store(even)
                query_bytes.index(1).slice((2 * byte + i) * QUERIES, QUERIES).store(odd)
            else:
                query_bytes.index(0).slice((2 * byte + i) * QUERIES, QUERIES).store(digits)


@gluon.jit
def store_new(
    new_turned, pools, target, row, d, SCALE: gl.constexpr, KEYS_PACKED: gl.constexpr, VALUES_PACKED: gl.constexpr
):  # fmt: skip
    """A key and a value, twice, `[QUERIES, D]`, as codes into the slot `target`; returns what these say."""
    KEYS: gl.constexpr = 16 if KEYS_PACKED else 127
    VALUES: gl.constexpr = 16 if VALUES_PACKED else 127
    which = gl.max(row, 1)
    if KEYS_PACKED == VALUES_PACKED:
        codes, scale = quantised(new_turned, SCALE, KEYS)
    else:  # divisions take long: once for both
        most = gl.where(which % 2 == 0, KEYS * 1.0, VALUES * 1.0)
        steps, scale = in_steps(new_turned, SCALE, most)
        codes = gl.where(row % 2 == 0, nearest(steps, KEYS), nearest(steps, VALUES))
    store_row(codes, pools.key, target, row, d, 0)
    store_row(codes, pools.value, target, row, d, 1)
    gl.store(pools.scale + target * 2 + which, scale, mask=which < 2)
    return codes * scale.to(gl.float32)[:, None]


@gluon.jit
def together(x):
    """The number `x`, once all threads of a warp are here: what a loop of unknown length leaves the compiler in doubt
    of, which then cuts what follows at each exchange between threads."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def products_of(operand, k, less, mma: gl.constexpr):
    """Of queries and a block's codes: `[WARPS, 8, N]`, whole numbers."""
    both = gl.zeros([k[0].shape[0], 16, k[0].shape[2]], gl.int32, layout=mma)
    for i in gl.static_range(len(k)):
        both = mma_v2(operand[i], k[i], both)
    high, low = halves(both)
    products = high * 256 + low
    if len(k) == 2:  # a code is twice its bits, less 15
        products = products * 2 - less[:, :, None]
    return products


@gluon.jit
def weights_of(products, factor, scales, here, rule, top, total, SCALE: gl.constexpr):
    """Of a block's entries that are `here` the weights times their values' scales, `[WARPS, 8, N]`, and the largest of
    each query; by what sums so far shrink; and the softmax's new top and total."""
    logits = products.to(gl.float32) * factor[:, :, None] * scale_of(scales, SCALE, 0)[:, None, :]
    if rule.softcap is not None:
        logits = base_two(logits, rule)
    logits = gl.where(here[:, None, :], logits, -float("inf"))
    top_now = gl.maximum(top, gl.max(logits, 2))
    lost = gl.where(top_now == -float("inf"), 0.0, top_now)
    shrink = gl.exp2(top - lost)
    weights = gl.exp2(logits - lost[:, :, None])
    total = total * shrink + gl.sum(weights, 2)
    weights *= scale_of(scales, SCALE, 1)[:, None, :]
    return weights, largest_of(weights, 2), shrink, top_now, total


@gluon.jit
def add_values(v, byte, step, shrink, acc, mma: gl.constexpr):
    """Each of `acc` `[WARPS, BYTES, 8]` and its values times the weights of which these are bytes."""
    columns: gl.constexpr = gl.SliceLayout(1, mma)  # [WARPS, 8]
    weights = gl.convert_layout(entries_first(byte), gl.DotOperandLayout(1, mma, 4))
    shrink = gl.convert_layout(shrink, columns)[:, None, :]
    step = gl.convert_layout(step, columns)[:, None, :]
    for i in gl.static_range(len(v)):
        left = gl.convert_layout(v[i], gl.DotOperandLayout(0, mma, 4))
        found = mma_v2(left, weights, gl.zeros(acc[0].shape, gl.int32, layout=mma))
        acc = acc[1:] + (
            acc[0] * shrink + found.to(gl.float32) * step,
        )  # in the end each is in its place again
    return acc


@gluon.jit
def sum_of_parts(acc, shrink, merged: gl.constexpr):
    """Of `acc` `[WARPS, BYTES, 8]` the sum over warps, and of both bytes of a weight: `[BYTES, QUERIES]`."""
    acc = gl.sum(gl.convert_layout(in_order(acc), merged) * shrink[:, None, :], 0)
    high, low = gl.split(gl.permute(gl.reshape(acc, [acc.shape[0], 2, QUERIES]), (0, 2, 1)))
    return high * 256.0 + low


@gluon.jit
def places_of(LAYOUT: gl.constexpr, WARPS: gl.constexpr, N: gl.constexpr, BYTES: gl.constexpr):
    """Of a block's entries `[WARPS, N]` numbers in two parts, where the bytes of the first lie behind the block's first
    `[WARPS, N, BYTES]`, and the second, which is known to the compiler: so it takes no registers, of which the products
    want many."""
    KNOWN: gl.constexpr = max(8, 512 // BYTES)  # a warp copies 512 bytes at once
    pairs: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    part = gl.arange(0, WARPS, layout=gl.SliceLayout(1, pairs))[:, None]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, pairs))[None, :]
    d = gl.arange(0, BYTES, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    near = part * N + n % KNOWN
    return near, near[:, :, None] * BYTES + d[None, None, :], part * 0 + n // KNOWN * KNOWN


@gluon.jit
def copy_codes(slot, pool, begin, number, places, BYTES: gl.constexpr):
    """Begin to copy `number` entries of a block, at their `places`, and zeros behind these."""
    near, offsets, far = places
    pointers = pool.to(gl.pointer_type(gl.int8)) + begin * BYTES + offsets
    copy(slot, pointers + (far * BYTES)[:, :, None], mask=(near < number - far)[:, :, None])


@gluon.jit
def fetch(
    k_slot, v_slot, scale_slot, begin, number, keys, values, scale_n, pools,
    KEY_BYTES: gl.constexpr, VALUE_BYTES: gl.constexpr,
):  # fmt: skip
    """Begin to copy the block at the slot `begin`, of which there are `number` entries."""
    copy_codes(k_slot, pools.key, begin, number, keys, KEY_BYTES)
    copy_codes(v_slot, pools.value, begin, number, values, VALUE_BYTES)
    pairs = pools.scale.to(gl.pointer_type(gl.int32)) + begin
    copy(scale_slot, pairs + scale_n, mask=scale_n < number)
    async_copy.commit_group()


@gluon.jit
def ring_codes(
    q, query_positions, rows, pools, new, rule, gap, partial,
    PAD: gl.constexpr, G: gl.constexpr, G_PAD: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, OPERAND: gl.constexpr, EARLY: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """`shares.decode_shares`, whose arguments these are, with a ring of `STAGES` blocks of codes."""
    WARPS: gl.constexpr = gl.num_warps()
    N: gl.constexpr = BLOCK // WARPS
    MAGICS: gl.constexpr = (N * MAGIC_BITS + 2**31) % 2**32 - 2**31  # what N of them add to a sum of 32 bits
    SCALE: gl.constexpr = pools.scale.dtype.element_ty
    KEYS_PACKED: gl.constexpr = pools.key.dtype.element_ty == gl.uint8
    VALUES_PACKED: gl.constexpr = pools.value.dtype.element_ty == gl.uint8
    KEY_BYTES: gl.constexpr = D // 2 if KEYS_PACKED else D
    VALUE_BYTES: gl.constexpr = D // 2 if VALUES_PACKED else D
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    keys_copied: gl.constexpr = copied_layout(WARPS, KEY_BYTES, 16)
    values_copied: gl.constexpr = copied_layout(WARPS, VALUE_BYTES, 16)
    scales_copied: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    # A warp has all channels of a query and of one vector that is new or nothing.
    wide: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [4, WARPS // 4], [1, 0])
    # A thread holds all parts of a number, and both of its bytes: sums over these stay inside of it.
    merged: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 32, 1], [1, WARPS // 4, 4], [1, 2, 0])
    result: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS // 4, 4], [0, 1])  # [D, QUERIES]
    if D > 128 or D_PAD != D or G > QUERIES:
        gl.static_assert(False, "D must be 64 or 128, and at most 4 queries share a row")

    program, programs = gl.program_id(0), gl.num_programs(0)
    lse = partial + (programs + rows.number) * G * D
    keys_at: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // KEY_BYTES, KEY_BYTES // 16, [2, 1, 0])
    values_at: gl.constexpr = gl.SwizzledSharedLayout(16, 128 // VALUE_BYTES, VALUE_BYTES // 16, [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    k_ring = gl.allocate_shared_memory(gl.int8, [STAGES, WARPS, N, KEY_BYTES], keys_at)
    v_ring = gl.allocate_shared_memory(gl.int8, [STAGES, WARPS, N, VALUE_BYTES], values_at)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, WARPS, N], plain)
    values_loaded: gl.constexpr = value_layout(WARPS, N, VALUE_BYTES)
    PARTS: gl.constexpr = 2 if KEYS_PACKED else 1  # even and odd channels
    # With more than half of the memory a multiprocessor has one program: where the next launch finds room for two, it
    # begins two on some and none on others.
    RING: gl.constexpr = STAGES * BLOCK * (KEY_BYTES + VALUE_BYTES + 4)
    SPARE: gl.constexpr = max(0, HALF - RING) // (16 * KEY_BYTES)
    bytes_at: gl.constexpr = gl.SwizzledSharedLayout(16, 1, min(KEY_BYTES // 16, 4), [1, 0])
    query_bytes = gl.allocate_shared_memory(gl.int8, [PARTS + SPARE, 16, KEY_BYTES], bytes_at)
    steps = gl.allocate_shared_memory(gl.float32, [2 * QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sums = gl.allocate_shared_memory(gl.int32, [2 * QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turned = gl.allocate_shared_memory(gl.float32, [ROWS, D], plain)

    if EARLY and not AHEAD:
        tl.extra.cuda.gdc_wait()
    plan = plan_rows(gl.arange(0, PAD, layout=flat), rows, rule, gap)
    unit, stop, share = share_of(program, programs, plan.ends)
    segment = segment_at(unit, stop, plan, rows, rule)
    unit = segment.unit

    keys = places_of(keys_copied, WARPS, N, KEY_BYTES)
    values = places_of(values_copied, WARPS, N, VALUE_BYTES)
    part = gl.arange(0, WARPS, layout=gl.SliceLayout(1, scales_copied))[:, None]
    scale_n = part * N + gl.arange(0, N, layout=gl.SliceLayout(0, scales_copied))[None, :]
    cursor, cursor_at, left_there, begin = next_block(segment, segment.begin, stop, plan, rows, rule)
    for ahead in range(STAGES - 1):
        fetch(
            k_ring.index(ahead), v_ring.index(ahead), scale_ring.index(ahead), begin, left_there,
            keys, values, scale_n, pools, KEY_BYTES, VALUE_BYTES,
        )  # fmt: skip
        cursor_at += gl.minimum(left_there, BLOCK)
        cursor, cursor_at, left_there, begin = next_block(cursor, cursor_at, stop, plan, rows, rule)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))[:, None]
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, wide))[None, :]
    none = gl.zeros([WARPS, 16, N], gl.int32, layout=mma)
    high, low = halves(none)
    by_entry: gl.constexpr = gl.SliceLayout(1, high.type.layout)  # [WARPS, N] of [WARPS, 8, N]
    one_query: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, high.type.layout))  # [8]
    first = gl.arange(0, 8, layout=one_query)[None, :, None] < QUERIES
    part_l = gl.arange(0, WARPS, layout=gl.SliceLayout(1, by_entry))[:, None]
    n_logit = part_l * N + gl.arange(0, N, layout=gl.SliceLayout(0, by_entry))[None, :]
    g = gl.arange(0, QUERIES, layout=gl.SliceLayout(0, result))
    d = gl.arange(0, D, layout=gl.SliceLayout(1, result))
    slot = 0
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    while unit < stop:
        batch, head = (segment.row // rows.heads).to(gl.int64), segment.row % rows.heads
        query = q.data + batch * q.batch + head * G * q.head
        x = gl.load(query + (row * q.head + channel), mask=row < G, other=0.0).to(gl.float32)
        grows = False
        if new is not None:
            grows = (segment.unit_end == segment.row_end) & (segment.grows > 0)
            key = new.key.data + batch * new.key.batch + head * new.key.head + (row * 0 + channel)
            added = grows & (row >= QUERIES)
            x += gl.load(key, mask=added & (row % 2 == 0), other=0.0).to(gl.float32)
            value = new.value.data + batch * new.value.batch + head * new.value.head + (row * 0 + channel)
            x += gl.load(value, mask=added & (row % 2 == 1), other=0.0).to(gl.float32)
        queries, new_turned = halves_of_rows(rotated_in_warps(x, channel, wide))
        store_queries(queries, query_bytes, steps, sums, KEYS_PACKED)
        if new is not None:  # noqa: SIM102 (known to the compiler)
            if grows:
                target = segment.base + segment.entries - 1
                row_of, unused = halves_of_rows(row + channel * 0)
                channel_of, unused = halves_of_rows(channel + row * 0)
                held = store_new(
                    new_turned, pools, target, row_of, channel_of, SCALE, KEYS_PACKED, VALUES_PACKED
                )
                gl.store(pools.position + target, gl.load(new.seen).to(gl.int32))
                turned.slice(0, QUERIES).store(queries)
                turned.slice(QUERIES, QUERIES).store(held)
        barrier()  # the merge below has some, too, after which these buffers are free
        total = gl.max(halves(none)[0].to(gl.float32), 2)
        top = total - float("inf")
        factor = steps.slice(0, 8).load(one_query)[None, :] * rule.scale
        if rule.softcap is None:
            factor = base_two(factor, rule)
        less = sums.slice(0, 8).load(one_query)[None, :]
        even = for_each_warp(query_bytes.index(0).slice(0, 16).load(gl.SliceLayout(0, left)), WARPS)
        odd = for_each_warp(query_bytes.index(PARTS - 1).slice(0, 16).load(gl.SliceLayout(0, left)), WARPS)
        operand = (even, odd) if KEYS_PACKED else (even,)
        share_sum = total  # sums of what stands for weights
        empty = gl.zeros([WARPS, VALUE_BYTES, 8], gl.float32, layout=mma)
        acc = (empty, empty) if VALUES_PACKED else (empty,)
        at = segment.begin
        while at < segment.end:
            async_copy.wait_group(STAGES - 2)  # this block has come
            barrier()  # to all warps, and all have done with the block before it, whose place is next
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            fetch(
                k_ring.index(free), v_ring.index(free), scale_ring.index(free), begin, left_there,
                keys, values, scale_n, pools, KEY_BYTES, VALUE_BYTES,
            )  # fmt: skip
            if EARLY:  # noqa: SIM102
                if cursor.unit >= stop:  # all is asked for: the next launches may begin
                    tl.extra.cuda.gdc_launch_dependents()
            number = gl.minimum(block_at(at, segment), BLOCK)
            scales = scale_ring.index(slot).load(by_entry)
            k = k_ring.index(slot).permute((0, 2, 1)).load(right)  # [WARPS, KEY_BYTES, N]
            products = products_of(operand, halves_of_bytes(k, NIBBLES) if KEYS_PACKED else (k,), less, mma)
            # The loop in this parts the products from what follows: among that, the compiler would take them one column
            # after another, each of which waits for itself.
            cursor_at += gl.minimum(left_there, BLOCK)
            cursor, cursor_at, left_there, begin = next_block(cursor, cursor_at, stop, plan, rows, rule)
            slot = together(slot)
            weights, largest, shrink, top, total = weights_of(
                products, factor, scales, n_logit < number, rule, top, total, SCALE
            )
            whole = whole_numbers(weights, largest)
            byte = gl.where(first, (whole + 128) >> 8, whole).to(gl.int8)  # [WARPS, 8, N]
            step = largest * (1.0 / MOST_STEPS)
            v = channels_first(transposed(v_ring.index(slot).load(values_loaded)))  # [WARPS, VALUE_BYTES, N]
            if VALUES_PACKED:
                share_sum = share_sum * shrink + (gl.sum(whole, 2) - MAGICS).to(gl.float32) * step
            v = halves_of_bytes(v, SIGNED_NIBBLES) if VALUES_PACKED else (v,)
            acc = add_values(v, byte, step, shrink, acc, mma)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            at += number

        # One softmax out of all parts, in base two like every part.
        parts: gl.constexpr = gl.SliceLayout(1, merged)
        top = gl.convert_layout(top, parts)
        top_all = gl.max(top, 0)
        lost = gl.where(top_all == -float("inf"), 0.0, top_all)
        shrink = gl.exp2(top - lost[None, :])
        total_all = gl.sum(gl.convert_layout(total, parts) * shrink, 0)
        acc_all = sum_of_parts(acc[0], shrink, merged)
        if VALUES_PACKED:
            # A code is twice its low bits, less 15, or an eighth of what its high bits are, and 1.
            share_sums = one_of_two(gl.sum(gl.convert_layout(share_sum, parts) * shrink, 0))
            share_sums = gl.convert_layout(share_sums, gl.SliceLayout(0, acc_all.type.layout))[None, :]
            odd = sum_of_parts(acc[-1], shrink, merged) * 0.125 + share_sums
            acc_all = gl.join(acc_all * 2.0 - 15.0 * share_sums, odd)
            acc_all = gl.reshape(gl.permute(acc_all, (0, 2, 1)), [D, QUERIES])
        out = gl.convert_layout(acc_all, result)  # [D, QUERIES]
        of_query: gl.constexpr = gl.SliceLayout(0, result)
        top_all = gl.convert_layout(one_of_two(top_all), of_query)
        total_all = gl.convert_layout(one_of_two(total_all), of_query)
        if new is not None:
            against = turned.slice(0, QUERIES).permute((1, 0)).load(result)
            new_key = turned.slice(QUERIES, 1).permute((1, 0)).load(result)  # [D, 1]
            new_value = gl.where(grows, turned.slice(QUERIES + 1, 1).permute((1, 0)).load(result), 0.0)
            logit = base_two(gl.sum(against * new_key, 0) * rule.scale, rule)
            logit = gl.where(grows, logit, -float("inf"))
            top_now = gl.maximum(top_all, logit)
            lost = gl.where(top_now == -float("inf"), 0.0, top_now)
            shrink, weight = gl.exp2(top_all - lost), gl.exp2(logit - lost)
            total_all, top_all = total_all * shrink + weight, top_now
            out = out * shrink[None, :] + new_value * weight[None, :]

        place = (program + segment.row) * G + g
        weight = gl.where(total_all > 0, total_all, 1.0)
        gl.store(lse + place, gl.where(total_all > 0, top_all + gl.log2(weight), -float("inf")), mask=g < G)
        gl.store(
            partial + place[None, :] * D + d[:, None],
            out / weight[None, :],
            mask=(g < G)[None, :],
        )
        unit = segment.unit_end
        if unit < stop:
            segment = segment_at(unit, stop, plan, rows, rule)
            unit = segment.unit
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    async_copy.wait_group(0)
