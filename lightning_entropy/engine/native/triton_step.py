"""An inner step of every parameter, as one Triton kernel. ``cuda.py`` launches it and has the reasons.

Imported where ``compile=True`` meets a parameter on a GPU, and not before: a torch without CUDA comes without Triton.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# pyright: reportArgumentType=false
# The arguments' types are Triton's own, and it reads annotations itself.

import triton
import triton.language as tl

WORDS = tl.constexpr(11)  # of 8 bytes in a row of the table, as cuda.py packs it
FIRST_NUMBER = tl.constexpr(14)  # of 4 bytes, in a row


@triton.jit
def _normal_pair(a, b):
    """Return two independent numbers N(0, 1) of two random words, as step.cpp does: within +-5.9.

    Box and Muller's transform (1958): a radius, and an angle as an octant's, a swap and a sign. Triton's cosine is
    for angles of any size, and spills registers for the large ones.
    """
    u = (a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08  # 2^-24, 2^-25
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
    angle = (b.to(tl.int32, bitcast=True) >> 2).to(tl.float32) * 1.4629180792671596e-09  # 2^-29 pi / 4
    q = angle * angle
    cosine = ((-0.0013585779 * q + 0.041655015) * q - 0.49999856) * q + 1.0
    sine = (((-0.00019503904 * q + 0.008332036) * q - 0.16666651) * q + 1.0) * angle
    cosine = tl.where((b & 1) != 0, -cosine, cosine)
    swap = (b & 2) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _advance(y, x, z, m, g, at, here, lr, weight_decay, momentum, nesterov, pull, shift, average):
    """Move the weights ``at`` that are ``here``, by ``shift`` after the pull; z, m and g may be null."""
    has_z, has_m, has_g = z.to(tl.int64) != 0, m.to(tl.int64) != 0, g.to(tl.int64) != 0
    old = tl.load(y + at, mask=here)
    # torch.optim.SGD
    direction = tl.load(g + at, mask=here & has_g, other=0.0) + weight_decay * old
    new_momentum = momentum * tl.load(m + at, mask=here & has_m, other=0.0) + direction
    tl.store(m + at, new_momentum, mask=here & has_m)
    followed = tl.where(nesterov != 0, direction + momentum * new_momentum, new_momentum)
    value = tl.where(has_g, old - lr * tl.where(has_m, followed, direction), old)
    value += pull * (tl.load(x + at, mask=here) - value) + shift
    tl.store(y + at, value, mask=here)
    mean = tl.load(z + at, mask=here & has_z, other=0.0)
    tl.store(z + at, mean + average * (value - mean), mask=here & has_z)


@triton.jit
def _address(words, place: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an array's address. Where it is known to be a multiple of 16, four numbers are fetched at once."""
    pointer = tl.load(words + place).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def inner_step(table, numbers, blocks, average, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Advance one block of one parameter.

    Args:
        table: rows of 8-byte words, one row per parameter.
        numbers: the same bytes as float32.
        blocks: for every program its row, and which block of the parameter it is; int32.
        average: weight of the newest y in z.
        BLOCK: weights in a block, in four quarters: of four numbers that are drawn together each quarter gets one.
        ALIGNED: whether all addresses are multiples of 16.
    """
    QUARTER: tl.constexpr = BLOCK // 4
    program = tl.program_id(0).to(tl.int64)
    row, block = tl.load(blocks + 2 * program).to(tl.int64), tl.load(blocks + 2 * program + 1)
    words, scalars = table + row * WORDS, numbers + row * (2 * WORDS) + FIRST_NUMBER
    y, x, z = _address(words, 0, ALIGNED), _address(words, 1, ALIGNED), _address(words, 2, ALIGNED)
    m, g = _address(words, 3, ALIGNED), _address(words, 4, ALIGNED)
    size = tl.load(words + 5)
    lr, weight_decay = tl.load(scalars), tl.load(scalars + 1)
    momentum, nesterov = tl.load(scalars + 2), tl.load(scalars + 3)
    pull, noise = tl.load(scalars + 4), tl.load(scalars + 5)
    lane = tl.arange(0, QUARTER)
    n0 = tl.zeros([QUARTER], tl.float32)
    n1, n2, n3 = n0, n0, n0
    if noise != 0:
        # Philox (Salmon et al. 2011) counts a parameter's fours, beside where its noise begins in its chunk.
        count = block * QUARTER + lane
        start = tl.load(words + 6).to(tl.int32) + 0 * count
        a, b, c, d = tl.philox(tl.load(words + 10), count, start, 0 * count, 0 * count)
        n0, n1 = _normal_pair(a, b)
        n2, n3 = _normal_pair(c, d)
    at = block.to(tl.int64) * BLOCK + lane
    n0, n1, n2, n3 = noise * n0, noise * n1, noise * n2, noise * n3
    if (block.to(tl.int64) + 1) * BLOCK <= size:  # no weight is masked, so four are fetched at once
        _advance(y, x, z, m, g, at, True, lr, weight_decay, momentum, nesterov, pull, n0, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, True, lr, weight_decay, momentum, nesterov, pull, n1, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, True, lr, weight_decay, momentum, nesterov, pull, n2, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, True, lr, weight_decay, momentum, nesterov, pull, n3, average)
    else:
        _advance(y, x, z, m, g, at, at < size, lr, weight_decay, momentum, nesterov, pull, n0, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, at < size, lr, weight_decay, momentum, nesterov, pull, n1, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, at < size, lr, weight_decay, momentum, nesterov, pull, n2, average)
        at += QUARTER
        _advance(y, x, z, m, g, at, at < size, lr, weight_decay, momentum, nesterov, pull, n3, average)
