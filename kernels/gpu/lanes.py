"""Products of quantised queries with the keys' codes: bits with bits, on the tensor cores.

A code is a key's signs. A query's channel is a whole number of steps, in two's complement: a sum of
`PLANES` bits of which each counts twice the one before, and the last is taken away. So a product of
both is twice the sum over the channels where the key's sign is set, less the sum over all, and the
first is in how many channels two bits are set, plane by plane: that is what tensor cores count,
without a bit being unpacked (PTX `mma.m16n8k128` with `and.popc`).

Such a product's operands lie where the hardware wants them, so a kernel is written in tensors of as
many numbers as it has lanes, 32 a warp, and each warp has products of its own. Lane 4 g + t has key
g of eight, and head t of four: its products of 128 bits take word t of the keys' codes, and leave
head t's counts of key g in the same lane.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

WORD = tl.constexpr(32)
"""Bits of a code that a lane brings to a product."""
HEADS = 4
"""Query heads that are multiplied at once, a lane's t each."""
PLANES = tl.constexpr(4)
"""Bits of a query's channel: what they round away adds 2% to the variance of an estimate."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter has no assembler."""


def inlined(function):
    """`triton.jit` for a small function; in the interpreter the function itself.

    A call of a compiled function costs the interpreter a thousand times what an operation does.
    """
    return function if INTERPRETED.value else triton.jit(function)


@inlined
def _count(low, high, plane):
    """In how many channels keys and planes both have a bit, four int32 [lanes].

    Word t of key g is in `low`, of key 8 + g in `high`, of plane g % 2 of head g // 2 in `plane`,
    int32 [lanes] each. Counts are of key g with the first and the second plane of head t, and of
    8 + g.
    """
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc"
        " {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $7, $7, $7};",
        "=r,=r,=r,=r,r,r,r,r",
        [low, high, plane, 0],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@inlined
def add_heads(low, high, chosen, sums):
    """`sums` and the four heads' sums of chosen keys.

    Args:
        low: float32 [lanes], of key g and head t; its last 13 bits are lost.
        high: likewise of key 8 + g.
        chosen: float32 [lanes], 1 where g // 2 names the t that takes the sums, else 0.
        sums: four float32 [lanes]: lane (g, t) has twice the sum of key g, and twice that of 8 + g.
    """
    if INTERPRETED:
        columns, keys = tl.trans(_of_warp(chosen)), low.shape[0] // 4
        a, b = tl.split(tl.reshape(tl.dot(tl.reshape(low, (keys, 4)), columns), (keys, 4, 2)))
        c, d = tl.split(tl.reshape(tl.dot(tl.reshape(high, (keys, 4)), columns), (keys, 4, 2)))
        sums = tuple(
            one + tl.reshape(more, low.shape) for one, more in zip(sums, (a, b, c, d), strict=True)
        )
    else:
        sums = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32"
            " {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
            "=f,=f,=f,=f,r,r,r,f,f,f,f",
            [
                low.to(tl.int32, bitcast=True),
                high.to(tl.int32, bitcast=True),
                chosen.to(tl.int32, bitcast=True),
                sums[0], sums[1], sums[2], sums[3],
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )  # fmt: skip
    return sums


BFLOAT_PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
HALF_PRODUCT = tl.constexpr(BFLOAT_PRODUCT.value.replace(".bf16", ".f16"))


@inlined
def multiply(low, high, columns, sums, BFLOAT: tl.constexpr):
    """Add products of rows of 16-bit numbers with columns, on the tensor cores.

    Which channels a lane has does not matter, as long as rows and columns have the same there.

    Args:
        low: int32 [lanes] each, two channels; an even number of them, of row g.
        high: likewise of row 8 + g.
        columns: likewise of column g.
        sums: four float32 [lanes], of row g with columns 2 t and 2 t + 1, and of row 8 + g.
        BFLOAT: whether they are bfloat16, else float16.

    Returns:
        `sums` with the products.
    """
    if INTERPRETED:
        products = _products(low, high, columns, BFLOAT)
        sums = tuple(one + more for one, more in zip(sums, products, strict=True))
    else:
        product: tl.constexpr = BFLOAT_PRODUCT if BFLOAT else HALF_PRODUCT
        for place in tl.static_range(0, len(low), 2):
            sums = tl.inline_asm_elementwise(
                product,
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [low[place], high[place], low[place + 1], high[place + 1],
                 columns[place], columns[place + 1], sums[0], sums[1], sums[2], sums[3]],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )  # fmt: skip
    return sums


@inlined
def _products(low, high, columns, BFLOAT: tl.constexpr):
    """What `multiply` adds, without tensor cores."""
    every, shape = 0.0, low[0].shape
    warps = shape[0] // 32
    for one, other, column in zip(low, high, columns, strict=True):
        rows = tl.join(*_halves(tl.join(one, other), BFLOAT))
        rows = tl.permute(tl.reshape(rows, (warps, 8, 4, 2, 2)), (0, 3, 1, 2, 4))
        turned = tl.reshape(tl.join(*_halves(column, BFLOAT)), (warps, 8, 8))
        every += tl.dot(tl.reshape(rows, (warps, 16, 8)), tl.permute(turned, (0, 2, 1)))
    every = tl.permute(tl.reshape(every, (warps, 2, 8, 4, 2)), (0, 2, 3, 4, 1))
    return tuple(tl.reshape(part, shape) for half in tl.split(every) for part in tl.split(half))


@inlined
def turn(words):
    """Of 8 x 8 16-bit numbers, columns 2 t and 2 t + 1 of row g: rows 2 t and 2 t + 1 of column g.

    `words` are int32 [lanes].
    """
    if INTERPRETED:
        warps = words.shape[0] // 32
        square = tl.reshape(tl.join(words & 65535, (words >> 16) & 65535), (warps, 8, 8))
        low, high = tl.split(tl.reshape(tl.permute(square, (0, 2, 1)), (warps, 8, 4, 2)))
        turned = tl.reshape(low | (high << 16), words.shape)
    else:
        turned = tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [words],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return turned


@inlined
def of_pairs(x):
    """What lanes of g = 2 t, and of g = 2 t + 1, have: int32 [lanes] each.

    `x`, int32 [lanes], is the same in lanes of the same g.
    """
    if INTERPRETED:
        warps = x.shape[0] // 32
        pairs = tl.split(tl.reshape(tl.max(tl.reshape(x, (warps, 8, 4)), 2), (warps, 4, 2)))
        even, odd = (
            tl.reshape(tl.broadcast_to(pair[:, None], (warps, 8, 4)), x.shape) for pair in pairs
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .u32 l; mov.u32 l, %laneid; shl.b32 l, l, 3; and.b32 l, l, 31;"
            " shfl.sync.idx.b32 $0, $2, l, 31, -1; add.u32 l, l, 4;"
            " shfl.sync.idx.b32 $1, $2, l, 31, -1; }",
            "=&r,=r,r", [x], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return even, odd


@inlined
def of_lane(x, lane):
    """What a lane of a warp has, int32 [lanes]: `lane` says of which, counted around."""
    if INTERPRETED:
        warps = tl.reshape(x, (x.shape[0] // 32, 1, 32))
        lane = tl.broadcast_to(lane, x.shape) % 32
        wanted = tl.reshape(lane, (x.shape[0] // 32, 32, 1)) == tl.arange(0, 32)
        found = tl.reshape(tl.sum(tl.where(wanted, warps, 0), 2), x.shape)
    else:
        found = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [x, lane],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return found


@inlined
def pack(low, high, BFLOAT: tl.constexpr):
    """Two float32 [lanes] as 16-bit numbers in one int32 [lanes], `low` in the lower half."""
    if INTERPRETED:
        dtype = tl.bfloat16 if BFLOAT else tl.float16
        parts = [x.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) for x in (low, high)]
        words = (parts[0] & 65535) | (parts[1] << 16)
    elif BFLOAT:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        words = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return words


@inlined
def lower_halves(low, high):
    """The lower 16 bits of two int32 [lanes] in one, those of `low` in the lower half."""
    return (low & 65535) | (high << 16)


@inlined
def upper_halves(low, high):
    """Likewise of the upper 16 bits."""
    return ((low >> 16) & 65535) | (high & -65536)


MOST_OF_ROWS = tl.constexpr(
    "{ .reg .f32 t, u; shfl.sync.bfly.b32 t, $1, 4, 31, -1; max.f32 u, $1, t;"
    " shfl.sync.bfly.b32 t, u, 8, 31, -1; max.f32 u, u, t;"
    " shfl.sync.bfly.b32 t, u, 16, 31, -1; max.f32 $0, u, t; }"
)
SUM_OF_ROWS = tl.constexpr(MOST_OF_ROWS.value.replace("max.f32", "add.f32"))


@inlined
def over_rows(x, SUM: tl.constexpr):
    """The greatest or the sum over the lanes of the same t of a warp, float32 [lanes], in each."""
    if INTERPRETED:
        rows = tl.reshape(x, (x.shape[0] // 32, 8, 4))
        one = tl.sum(rows, 1) if SUM else tl.max(rows, 1)
        one = tl.reshape(tl.broadcast_to(one[:, None], rows.shape), x.shape)
    else:
        how: tl.constexpr = SUM_OF_ROWS if SUM else MOST_OF_ROWS
        one = tl.inline_asm_elementwise(how, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return one


@inlined
def _halves(words, BFLOAT: tl.constexpr):
    """The two 16-bit numbers of int32 [lanes], float32 each."""
    dtype = tl.bfloat16 if BFLOAT else tl.float16
    halves = (words.to(tl.int16), (words >> 16).to(tl.int16))
    return tuple(half.to(dtype, bitcast=True).to(tl.float32) for half in halves)


@inlined
def half_numbers(word, BFLOAT: tl.constexpr):
    """Two 16-bit numbers of an int32 [lanes] as float16; what it has no number for is infinite."""
    if BFLOAT:
        low, high = word << 16, word & -65536
        word = pack(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True), False)
    return word


@inlined
def load_planes(planes, lane, STEPS: tl.constexpr):
    """Four heads' queries as `signed_sums` takes them: `STEPS * 2` int32 [lanes].

    Args:
        planes: where they begin: int32 [STEPS, 2, 32], of each step the planes that count 1 and 4,
            side by side for each head, then those that count 2 and -8; lanes.
        lane: int32 [lanes], of a warp.
    """
    words = ()
    for number in tl.static_range(STEPS * 2):
        words += (tl.load(planes + number * 32 + lane),)  # type: ignore[assignment]
    return words


@inlined
def signed_sums(low, high, planes, STEPS: tl.constexpr):
    """Sums of a query's steps over the channels where a key's sign is set.

    Args:
        low: `STEPS` int32 [lanes], every fourth word from word t on of key g.
        high: likewise of key 8 + g.
        planes: see `load_planes`.

    Returns:
        float32 [lanes] and [lanes], of key g and key 8 + g with head t.
    """
    first, second = tl.zeros_like(low[0]), tl.zeros_like(low[0])
    for step in tl.static_range(STEPS):
        if INTERPRETED:
            sums = (
                _sums(low[step], planes, step).to(tl.int32),
                _sums(high[step], planes, step).to(tl.int32),
            )
        else:
            odd = _count(low[step], high[step], planes[step * 2])
            even = _count(low[step], high[step], planes[step * 2 + 1])
            sums = (
                odd[0] + odd[1] * 4 + (even[0] * 2 - even[1] * 8),
                odd[2] + odd[3] * 4 + (even[2] * 2 - even[3] * 8),
            )
        first, second = first + sums[0], second + sums[1]
    return first.to(tl.float32), second.to(tl.float32)


@inlined
def _sums(words, planes, step):
    """What `signed_sums` says of one key a lane and step, without tensor cores."""
    keys = words.shape[0] // 4
    signs, total = _bits(tl.reshape(words, (keys, 4))), 0.0  # [keys, 128]
    for pair in range(2):
        plane = _bits(_of_warp(planes[step * 2 + pair]))  # [2 * heads, 128]
        counts = tl.dot(signs, tl.trans(plane))
        first, second = tl.split(tl.reshape(counts, (keys, 4, 2)))
        total += first + second * 4.0 if pair == 0 else first * 2.0 - second * 8.0
    return tl.reshape(total, words.shape)


@inlined
def _bits(words):
    """int32 [n, 4] as float32 [n, 128]."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None]) & 1
    return tl.reshape(bits.to(tl.float32), (words.shape[0], 128))


@inlined
def _of_warp(lanes):
    """What all warps have alike, [lanes]: [8, 4], by g and t."""
    return tl.max(tl.reshape(lanes, (lanes.shape[0] // 32, 8, 4)), 0)


@inlined
def running_sum(x, WARPS: tl.constexpr):
    """Sums of the lanes up to each, int32 [lanes]."""
    if INTERPRETED or WARPS > 1:
        sums = tl.cumsum(x, 0)
    else:  # a compiler's own scan asks each lane each time whether it has a neighbour
        sums = tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 t; mov.b32 $0, $1;"
            " shfl.sync.up.b32 t|p, $0, 1, 0, -1; @p add.s32 $0, $0, t;"
            " shfl.sync.up.b32 t|p, $0, 2, 0, -1; @p add.s32 $0, $0, t;"
            " shfl.sync.up.b32 t|p, $0, 4, 0, -1; @p add.s32 $0, $0, t;"
            " shfl.sync.up.b32 t|p, $0, 8, 0, -1; @p add.s32 $0, $0, t;"
            " shfl.sync.up.b32 t|p, $0, 16, 0, -1; @p add.s32 $0, $0, t; }",
            "=&r,r",
            [x],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return sums


@inlined
def log2(x):
    """Base-2 logs by the GPU's own instruction: `tl.log2` is a polynomial, and forty of them."""
    if INTERPRETED:
        log = tl.log2(x)
    else:
        log = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return log


@inlined
def load_four(pointers, OFFSET: tl.constexpr):
    """Four int32 on end, 16 bytes at once, from `OFFSET` behind each of `pointers` [lanes] on.

    They are int32 [lanes] each.
    """
    if INTERPRETED:
        words = tuple(tl.load(pointers + OFFSET + number) for number in range(4))
    else:
        words = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4 + $5];",
            "=r,=r,=r,=r,l,n",
            [pointers.to(tl.int64), 4 * OFFSET],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return words


@inlined
def load_two(pointers):
    """Two int32 on end from each of `pointers` [lanes]: int32 [lanes] each."""
    if INTERPRETED:
        words = tuple(tl.load(pointers + number) for number in range(2))
    else:
        words = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointers.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return words


@inlined
def own_word(member, WORDS: tl.constexpr):
    """Where in codes of four keys lane t's first word is; the last one's, where they have none."""
    return tl.minimum(member, WORDS - 1) * 4


@inlined
def load_words(
    codes, member, OFFSET: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Of four keys word t of each step (`kernels.codes`): four int32 [lanes], step by step.

    Args:
        codes: where the lanes' own words are, less `OFFSET`, [lanes].
        member: t.
    """
    words = ()
    for step in tl.static_range(STEPS):
        four = load_four(codes, OFFSET + step * 16)
        for key in tl.static_range(4):
            if WORDS % 4 == 0:
                words += (four[key],)  # type: ignore[assignment]
            else:
                words += (tl.where(step * 4 + member < WORDS, four[key], 0),)  # type: ignore[assignment]
    return words


@inlined
def store_four(pointers, words, there):
    """Four int32 [lanes] on end to each of `pointers` [lanes], 16 bytes at once, where `there`."""
    if INTERPRETED:
        for number, word in enumerate(words):
            tl.store(pointers + number, word, there)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $6, 0;"
            " @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; } // $0",
            "=r,l,r,r,r,r,r",
            [pointers.to(tl.int64), words[0], words[1], words[2], words[3], there.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@inlined
def load_factors(factors, line, member, PADDED: tl.constexpr, SET: tl.constexpr):
    """Head t's factors of a sum, of a code's scale and of its square: float32 [lanes] each.

    `member` is t.
    """
    head = SET * 4 + member
    place, there = factors + line * (3 * PADDED) + head, head < PADDED
    return (
        tl.load(place, there, 0.0),
        tl.load(place + PADDED, there, 0.0),
        tl.load(place + 2 * PADDED, there, 0.0),
    )


@inlined
def estimate(sums, size, factors, centre):
    """Base-2 logs of masses from the sums, the keys' scales and the scores of their centres."""
    return size * (sums * factors[0] + (factors[1] - factors[2] * size)) + centre
