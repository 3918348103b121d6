"""The noise of the Triton kernel by its definition, one number at a time."""

import math

from lightning_entropy.engine.gaussian import Place
from lightning_entropy.engine.native.cuda import BLOCK
from lightning_entropy.engine.noise import seed_of


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011), Philox4x32 with ten rounds."""
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ low, right & 0xFFFFFFFF, (left >> 32) ^ d ^ high, left & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def box_muller(a: int, b: int) -> tuple[float, float]:
    radius = math.sqrt(-2 * math.log((a >> 8) * 2.0**-24 + 2.0**-25))
    signed = b - (1 << 32) if b >> 31 else b
    angle = (signed >> 2) * 2.0**-29 * math.pi / 4
    pair = math.cos(angle) * (-1 if b & 1 else 1), math.sin(angle)
    return (radius * pair[1], radius * pair[0]) if b & 2 else (radius * pair[0], radius * pair[1])


def normal(place: Place, weight: int) -> float:
    """The noise of one weight of a parameter whose noise is at a place."""
    quarter = BLOCK // 4
    block, which, lane = weight // BLOCK, weight % BLOCK // quarter, weight % quarter
    key = [place.seed, seed_of(place.seed, 1)]
    a, b, c, d = philox([block * quarter + lane, place.start, 0, 0], key)
    return [*box_muller(a, b), *box_muller(c, d)][which]


# The ends of quarters and blocks of a parameter of SIZE weights.
SIZE = 2 * BLOCK + 3
WEIGHTS = (0, 1, 511, 512, 1029, BLOCK - 1, BLOCK, BLOCK + 700, SIZE - 1)
