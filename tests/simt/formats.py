"""16-bit floats and tf32 in numpy, exactly."""

import math
from fractions import Fraction

import numpy as np

NAN16 = 0x7FFF  # what the conversion instructions give

# mantissa bits, smallest exponent of a normal number, largest exponent
FORMATS = {"fp16": (10, -14, 15), "bf16": (7, -126, 127)}


def bits32(x):
    return np.asarray(x, np.float32).view(np.uint32)


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def to_bf16(x):
    u = bits32(x).astype(np.uint64)
    rounded = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(floats(u.astype(np.uint32))), np.uint16(NAN16), rounded)


def to_fp16(x):
    with np.errstate(over="ignore"):
        rounded = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(np.asarray(x, np.float32)), np.uint16(NAN16), rounded)


def from_bf16(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def from_fp16(bits):
    return np.asarray(bits, np.uint16).view(np.float16).astype(np.float32)


ENCODE = {"bf16": to_bf16, "fp16": to_fp16}
DECODE = {"bf16": from_bf16, "fp16": from_fp16}


def to_tf32(x):
    """Nearest, ties away from zero."""
    u = bits32(x)
    special = (u & 0x7F800000) == 0x7F800000
    nan = special & ((u & 0x7FFFFF) != 0)
    rounded = ((u.astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32)
    return np.where(nan, np.uint32(0x7FFFFFFF), np.where(special, u, rounded))


def pack(lo, hi):
    return np.asarray(lo, np.uint32) | np.asarray(hi, np.uint32) << 16


def round_exact(value, kind):
    """The 16-bit float nearest to a non-zero Fraction, ties to even."""
    mantissa, e_min, e_max = FORMATS[kind]
    sign = 0x8000 if value < 0 else 0
    value = abs(value)
    exponent = math.floor(math.log2(value)) if value else e_min
    while Fraction(2) ** exponent > value:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    exponent = max(exponent, e_min)
    scaled = value / Fraction(2) ** (exponent - mantissa)
    integer = round(scaled)  # Python rounds halves to even
    # A mantissa that overflows carries into the exponent by itself; subnormals have exponent field 0.
    field = exponent - e_min + 1
    bits = integer + ((field - 1) << mantissa)
    return sign | min(bits, (e_max - e_min + 2) << mantissa)


def fma16(a, b, c, kind):
    """a * b + c on the bits of one 16-bit float each, rounded once."""
    x, y, z = (float(DECODE[kind](v)) for v in (a, b, c))
    if not all(map(math.isfinite, (x, y, z))):
        with np.errstate(invalid="ignore"):
            return int(ENCODE[kind](np.float32(np.float64(x) * y + z)))
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:  # the sign of a zero sum: as IEEE addition has it
        return 0x8000 if math.copysign(1, x) * math.copysign(1, y) < 0 and math.copysign(1, z) < 0 else 0
    return round_exact(exact, kind)
