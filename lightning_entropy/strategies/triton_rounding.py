"""Rounding what is sent, as three Triton kernels. ``fused.py`` launches them and has the reasons.

Imported where ``compile=True`` rounds on a GPU, and not before: a torch without CUDA comes without Triton.

A program has a block of 1,024 values, in rows of those that share a scale.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
# The arguments' types are Triton's own, and it reads annotations itself.

import triton
import triton.language as tl


@triton.jit
def _numbers(GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return 0, 1, 2 and so on, of shape (groups, size)."""
    return tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def _places(row, block, n, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr):
    """Return where a block's words are, and its scales, each counted in its own size."""
    size = n * BITS // 8 + (4 * (n // GROUP) if LEVELS else 0)  # bytes of a row
    word: tl.constexpr = 2 if BITS == 16 else 1
    first = row * (size // word) + block * (BLOCK * BITS // 8 // word)
    scale = (row * size + n * BITS // 8) // 4 + block * (BLOCK // GROUP)
    words = first + _numbers(BLOCK // GROUP, GROUP * BITS // 8 // word)
    return words, scale + tl.arange(0, BLOCK // GROUP)


@triton.jit
def _to_bfloat16(values):
    """Return the 16 bits that values round to, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _from_bfloat16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _write(
    values,
    words,
    scales,
    row,
    block,
    n,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Round a block's values and write them; return what they are rounded to."""
    word, place = _places(row, block, n, BLOCK, BITS, GROUP, LEVELS)
    if BITS == 16:
        bits = _to_bfloat16(values)
        tl.store(words + word, bits)
        rounded = _from_bfloat16(bits)
    else:
        # Magnitudes are in the order of their bits, those of nan the largest.
        largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, tl.full([BLOCK // GROUP], LEVELS, tl.float32))
        tl.store(scales + place, scale)
        each = tl.broadcast_to(scale[:, None], values.shape)
        steps = tl.div_rn(values, each)
        steps = tl.where(tl.abs(steps) < float("inf"), steps, 0.0)
        steps = (steps + 12582912.0) - 12582912.0  # 1.5 x 2^23, beside which there is room for whole numbers alone
        if BITS == 8:
            tl.store(words + word, steps.to(tl.int8))
        else:  # each with 8 on top, the second of a pair 16 times
            first, second = tl.split(tl.reshape(steps, [BLOCK // GROUP, GROUP // 2, 2]))
            tl.store(words + word, (first + 16.0 * second + 136.0).to(tl.int32).to(tl.uint8))
        rounded = steps * each
    return rounded


@triton.jit
def _read(
    words,
    scales,
    row,
    block,
    n,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Return a block's values."""
    word, place = _places(row, block, n, BLOCK, BITS, GROUP, LEVELS)
    read = tl.load(words + word)
    if BITS == 16:
        values = _from_bfloat16(read)
    else:
        if BITS == 4:
            pairs = read.to(tl.int32)
            steps = tl.reshape(tl.join((pairs & 15) - 8, (pairs >> 4) - 8), [BLOCK // GROUP, GROUP])
        else:
            steps = read
        values = steps.to(tl.float32) * tl.load(scales + place)[:, None]
    return values


@triton.jit
def enter(
    values,
    reference,
    before,
    lost,
    words,
    scales,
    left,
    size,
    n,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Round the values of all rows, less a reference and with what was left out before; see :class:`Entry`.

    Args:
        values: float32, as reference and before.
        reference: is taken off; or None.
        before: is added; or None.
        lost: a byte that is not 0 where zeros are sent; or None.
        words: for the rounded values.
        scales: the same bytes as float32.
        left: for what rounding leaves out; of what is lost, what was left out before.
        size: how many values there are.
        n: values in a row.
        BLOCK: of a program.
        BITS: of a value.
        GROUP: values that share a scale.
        LEVELS: steps on either side of zero; 0: there are no scales.
    """
    program, n = tl.program_id(0).to(tl.int64), n.to(tl.int64)
    at = program * BLOCK + _numbers(BLOCK // GROUP, GROUP)
    value = tl.load(values + at, mask=at < size, other=0.0)
    kept = value * 0.0
    gone = False
    if reference is not None:
        value -= tl.load(reference + at, mask=at < size, other=0.0)
    if before is not None:
        kept = tl.load(before + at, mask=at < size, other=0.0)
        value += kept
    if lost is not None:
        gone = tl.load(lost) != 0
        value = tl.where(gone, 0.0, value)
    row, block = program // (n // BLOCK), program % (n // BLOCK)
    rest = value - _write(value, words, scales, row, block, n, BLOCK, BITS, GROUP, LEVELS)
    if before is not None:
        rest = tl.where(gone, kept, rest)
    tl.store(left + at, rest, mask=at < size)


@triton.jit
def pass_on(
    words,
    scales,
    residual,
    own_words,
    own_scales,
    left,
    n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Round the sum of some rows and a residual, which may be None; otherwise as :func:`enter`."""
    block, n = tl.program_id(0).to(tl.int64), n.to(tl.int64)
    at = block * BLOCK + _numbers(BLOCK // GROUP, GROUP)
    total = tl.zeros([BLOCK // GROUP, GROUP], tl.float32)
    for row in range(ROWS):
        total += _read(words, scales, row, block, n, BLOCK, BITS, GROUP, LEVELS)
    if residual is not None:
        total += tl.load(residual + at)
    tl.store(left + at, total - _write(total, own_words, own_scales, 0, block, n, BLOCK, BITS, GROUP, LEVELS))


@triton.jit
def leave(
    words,
    scales,
    values,
    n,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Read the values of all rows; otherwise as :func:`enter`."""
    program, n = tl.program_id(0).to(tl.int64), n.to(tl.int64)
    row, block = program // (n // BLOCK), program % (n // BLOCK)
    at = program * BLOCK + _numbers(BLOCK // GROUP, GROUP)
    tl.store(values + at, _read(words, scales, row, block, n, BLOCK, BITS, GROUP, LEVELS))
