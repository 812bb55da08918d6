"""Steps on spheres in Triton: what kernel.c does for the CPU, for vectors that lie contiguously.

A program holds tiles of ``WIDTH`` vectors by ``BLOCK`` entries in float32. A vector that fits a
tile goes through reduce, plan and apply without leaving the registers (:func:`turn`); a longer one
is read twice, by one program where there are many of them (:func:`turn_long`), otherwise by
programs that take chunks of it (:func:`reduce`, :func:`plan`, :func:`apply`). Tiles are summed as
trees and added to each other in float64, in an order that depends on the shape alone: no float
atomics, so a result is the same in every run.

Where the tensors lie is read from a table of integers, ``COLUMNS`` per tensor, so that one launch
serves many of them; ``factors`` holds eight numbers that all share and then eight per tensor.
``FLAGS`` is a sum of the constants below and known when a kernel is compiled.
"""

import triton
import triton.language as tl

from onsphere.optim.kernels.triton.coefficients import (
    ALIGNED,
    BFLOAT16,
    COLUMNS,
    DIAGONAL,
    LENGTH,
    MOMENTUM,
    MOVING,
    POINT,
    RESTORE,
    SLOPE,
    SQUARE,
    TASK,
    TINY,
    VECTOR,
    VECTORS,
    factors_of,
    plan_of,
)

NUMBERS = tl.constexpr(6)
COEFFICIENTS = tl.constexpr(6)
CHUNK = tl.constexpr(1 << 14)
NEVER = tl.constexpr(1 << 62)


@triton.jit
def _find(table, begin, count, task, column: tl.constexpr, SLOTS: tl.constexpr):
    """Which tensor a task belongs to, and its number among that tensor's tasks."""
    i = tl.arange(0, SLOTS)
    first = tl.load(table + (begin + i) * COLUMNS + column, mask=i < count, other=NEVER)
    number = begin + tl.sum((first <= task).to(tl.int32), 0) - 1
    return number, task - tl.load(table + number * COLUMNS + column)


@triton.jit
def _length(table, number, FLAGS: tl.constexpr):
    length = tl.load(table + number * COLUMNS + LENGTH)
    if ALIGNED & FLAGS:
        length = tl.multiple_of(length, 8)
    return length


@triton.jit
def _array(table, number, column: tl.constexpr, FLAGS: tl.constexpr):
    address = tl.load(table + number * COLUMNS + column)
    if BFLOAT16 & FLAGS:
        array = address.to(tl.pointer_type(tl.bfloat16))
    else:
        array = address.to(tl.pointer_type(tl.float32))
    if ALIGNED & FLAGS:
        array = tl.multiple_of(array, 16)
    return array


@triton.jit
def _read(table, number, at, inside, FLAGS: tl.constexpr):
    """Point, slope, momentum and moment of a tile, in float32."""
    p = tl.load(_array(table, number, POINT, FLAGS) + at, mask=inside, other=0.0).to(tl.float32)
    g, m, v = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
    if not (RESTORE & FLAGS):
        g = tl.load(_array(table, number, SLOPE, FLAGS) + at, mask=inside, other=0.0)
    if MOVING & FLAGS:
        m = tl.load(_array(table, number, MOMENTUM, FLAGS) + at, mask=inside, other=0.0)
    if DIAGONAL & FLAGS:
        v = tl.load(_array(table, number, SQUARE, FLAGS) + at, mask=inside, other=1.0)
    return p, g.to(tl.float32), m.to(tl.float32), v.to(tl.float32)


@triton.jit
def _write(table, number, at, inside, x, FLAGS: tl.constexpr):
    kind = tl.bfloat16 if BFLOAT16 & FLAGS else tl.float32
    tl.store(_array(table, number, POINT, FLAGS) + at, x[0].to(kind), mask=inside)
    if MOVING & FLAGS:
        tl.store(_array(table, number, MOMENTUM, FLAGS) + at, x[1].to(kind), mask=inside)
    if DIAGONAL & FLAGS:
        tl.store(_array(table, number, SQUARE, FLAGS) + at, x[2].to(kind), mask=inside)


@triton.jit
def _weighted(x, a):
    r"""AdamW's momentum ``h``, second moment ``v'`` and weight ``1 / (s sqrt(v') + e)``."""
    h = a[0] * x[2] + a[1] * x[1]
    moment = a[2] * x[3] + a[3] * (x[1] * x[1])
    return h, moment, 1.0 / (a[4] * tl.sqrt(tl.maximum(moment, TINY)) + a[5])


@triton.jit
def _terms(x, a, FLAGS: tl.constexpr):
    """What each entry adds to the sums of its vector, in the order of linear.py and diagonal.py."""
    p, g, m = x[0], x[1], x[2]
    if RESTORE & FLAGS:
        return p * p, p
    elif DIAGONAL & FLAGS:  # noqa: RET505 - what is left out is not compiled
        h, _, w = _weighted(x, a)
        u, news = h * w, a[1] * g * w
        return p * p, p * u, u * u, g * g, news * news
    else:
        return p * p, p * g, p * m, g * g, g * m, m * m


@triton.jit
def _moved(x, a, c, FLAGS: tl.constexpr):
    """The new point, momentum and moment of a tile."""
    p, g, m = x[0], x[1], x[2]
    if RESTORE & FLAGS:
        return tl.where(c[0] == 0, 0.0, c[0] * p + c[1]), m, m
    elif DIAGONAL & FLAGS:  # noqa: RET505
        h, moment, w = _weighted(x, a)
        return c[0] * p + c[1] * (h * w), h, moment
    else:
        return c[0] * p + c[1] * g + c[2] * m, c[3] * p + c[4] * g + c[5] * m, m


@triton.jit
def _plus(x, y):
    z = ()
    for i in tl.static_range(len(x)):
        z += (x[i] + y[i],)
    return z


# ---- ranges of one vector, tile by tile ----


@triton.jit
def _sums_of(table, factors, number, k, start, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the chunk of vector ``k`` that begins at ``start``."""
    length = _length(table, number, FLAGS)
    stop = tl.minimum(start + CHUNK, length)
    a = [y.to(tl.float32) for y in factors_of(factors, number)]
    e = tl.arange(0, BLOCK)[None, :]
    o = tl.zeros([1, BLOCK], tl.float32)
    sums = _terms((o, o, o, o + 1), a, FLAGS)
    for tile in range(start, stop, BLOCK):
        here = tile + e
        x = _read(table, number, k[:, None] * length + here, here < stop, FLAGS)
        sums = _plus(sums, _terms(x, a, FLAGS))
    return [tl.sum(y, 1).to(tl.float64) for y in sums]


@triton.jit
def _follow(table, factors, number, k, start, c, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the chunk of vector ``k`` that begins at ``start``."""
    length = _length(table, number, FLAGS)
    stop = tl.minimum(start + CHUNK, length)
    a = [y.to(tl.float32) for y in factors_of(factors, number)]
    own = [y.to(tl.float32)[:, None] for y in c]
    e = tl.arange(0, BLOCK)[None, :]
    written = own[0] == own[0]
    for tile in range(start, stop, BLOCK):
        here = tile + e
        at, inside = k[:, None] * length + here, (here < stop) & written
        x = _read(table, number, at, inside, FLAGS)
        _write(table, number, at, inside, _moved(x, a, own, FLAGS), FLAGS)


# ---- kernels ----


@triton.jit
def touch(x):
    """Do as little as a kernel can, to see whether kernels can be compiled at all."""
    tl.store(x, tl.load(x))


@triton.jit(do_not_specialize=["begin", "count"])
def turn(
    table,
    factors,
    counts,
    begin,
    count,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a step with ``WIDTH`` vectors that fit a tile."""
    number, task = _find(table, begin, count, tl.program_id(0), TASK, SLOTS)
    k, e = task * WIDTH + tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    length = _length(table, number, FLAGS)
    vectors = tl.load(table + number * COLUMNS + VECTORS)
    at = k[:, None] * length + e[None, :]
    inside = (k < vectors)[:, None] & (e < length)[None, :]
    x = _read(table, number, at, inside, FLAGS)
    a = [y.to(tl.float32) for y in factors_of(factors, number)]
    sums = [tl.sum(y, 1).to(tl.float64) for y in _terms(x, a, FLAGS)]
    c = plan_of(table, factors, counts, number, k, sums, FLAGS)
    own = [y.to(tl.float32)[:, None] for y in c]
    _write(table, number, at, inside & (own[0] == own[0]), _moved(x, a, own, FLAGS), FLAGS)


@triton.jit(do_not_specialize=["begin", "count"])
def turn_long(
    table,
    factors,
    counts,
    begin,
    count,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take a step with one vector, reading it twice."""
    number, task = _find(table, begin, count, tl.program_id(0), TASK, SLOTS)
    k, length = task + tl.arange(0, 1), _length(table, number, FLAGS)
    sums = _sums_of(table, factors, number, k, 0, FLAGS, BLOCK)
    for start in range(CHUNK, length, CHUNK):
        sums = _plus(sums, _sums_of(table, factors, number, k, start, FLAGS, BLOCK))
    c = plan_of(table, factors, counts, number, k, sums, FLAGS)
    for start in range(0, length, CHUNK):
        _follow(table, factors, number, k, start, c, FLAGS, BLOCK)


@triton.jit(do_not_specialize=["begin", "count"])
def reduce(
    table,
    factors,
    partial,
    begin,
    count,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over one chunk of one vector."""
    number, task = _find(table, begin, count, tl.program_id(0), TASK, SLOTS)
    chunks = tl.cdiv(tl.load(table + number * COLUMNS + LENGTH), CHUNK)
    k, start = task // chunks + tl.arange(0, 1), task % chunks * CHUNK
    sums = _sums_of(table, factors, number, k, start, FLAGS, BLOCK)
    for i in tl.static_range(len(sums)):
        tl.store(partial + tl.program_id(0) * NUMBERS + i + tl.arange(0, 1), sums[i])


@triton.jit(do_not_specialize=["begin", "count"])
def plan(
    table,
    factors,
    counts,
    partial,
    coefficients,
    begin,
    count,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the chunks of one vector and plan its step."""
    number, task = _find(table, begin, count, tl.program_id(0), VECTOR, SLOTS)
    chunks = tl.cdiv(tl.load(table + number * COLUMNS + LENGTH), CHUNK)
    first = tl.load(table + number * COLUMNS + TASK) + task * chunks
    i = tl.arange(0, BLOCK)[None, :]
    sums = _partials(partial, first, i, i < chunks, FLAGS)
    for tile in range(BLOCK, chunks, BLOCK):
        sums = _plus(sums, _partials(partial, first + tile, i, tile + i < chunks, FLAGS))
    k = task + tl.arange(0, 1)
    c = plan_of(table, factors, counts, number, k, [tl.sum(y, 1) for y in sums], FLAGS)
    for j in tl.static_range(len(c)):
        tl.store(coefficients + tl.program_id(0) * COEFFICIENTS + j + tl.arange(0, 1), c[j])


@triton.jit
def _partials(partial, first, i, inside, FLAGS: tl.constexpr):
    at = partial + (first + i) * NUMBERS
    if RESTORE & FLAGS:
        return [tl.load(at + j, mask=inside, other=0.0) for j in (0, 1)]
    elif DIAGONAL & FLAGS:  # noqa: RET505
        return [tl.load(at + j, mask=inside, other=0.0) for j in (0, 1, 2, 3, 4)]
    else:
        return [tl.load(at + j, mask=inside, other=0.0) for j in (0, 1, 2, 3, 4, 5)]


@triton.jit(do_not_specialize=["begin", "count"])
def apply(
    table,
    factors,
    coefficients,
    begin,
    count,
    FLAGS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one chunk of one vector; last chunks first, which the cache may still hold."""
    mine = tl.num_programs(0) - 1 - tl.program_id(0)
    number, task = _find(table, begin, count, mine, TASK, SLOTS)
    chunks = tl.cdiv(tl.load(table + number * COLUMNS + LENGTH), CHUNK)
    vector, start = task // chunks, task % chunks * CHUNK
    at = (tl.load(table + number * COLUMNS + VECTOR) + vector) * COEFFICIENTS + tl.arange(0, 1)
    c = [tl.load(coefficients + at + j) for j in (0, 1, 2, 3, 4, 5)]
    _follow(table, factors, number, vector + tl.arange(0, 1), start, c, FLAGS, BLOCK)
