"""The probes: for each instruction its raw inputs, a numpy model, and how closely a GPU follows the model.

A case's inputs are uint32 [threads, 16], as are its outputs. Its model returns the expected words of the first columns
and, for results that are not exact, the absolute error allowed of each as a float.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import formats
from formats import DECODE, ENCODE, bits32, floats, pack

WORDS = 16
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4  # group and member: the rows and columns that a lane holds


class Case(NamedTuple):
    kernel: str
    name: str
    make: Callable  # rng -> inputs
    model: Callable  # inputs -> expected words, or (words, tolerance)


def frame(*columns, kind=0):
    """Inputs with the given first columns; the last word selects the group of instructions within the kernel."""
    x = np.zeros((len(columns[0]), WORDS), np.uint32)
    for i, column in enumerate(columns):
        x[:, i] = column
    x[:, WORDS - 1] = kind
    return x


# ---- instructions of a single thread ----

SCALAR_THREADS = 256
SPECIAL_FLOATS = np.array(
    [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-38, 1.17549435e-38, 3.4e38, -3.4e38, 0.5, 65504, 65520]
    + [126, 127, 127.9999, 128, -126, -126.5, -127, -149, 6e-8, 2.9802322e-8, 5.9604645e-8, 6.1e-5, 2.5, 3.5, 1e20],
    np.float32,
)


def random_bits(rng, n=SCALAR_THREADS):
    return rng.integers(0, 2**32, n, dtype=np.uint32)


def random_floats(rng, scale=8.0):
    x = (rng.standard_normal(SCALAR_THREADS) * scale).astype(np.float32)
    x[: len(SPECIAL_FLOATS)] = SPECIAL_FLOATS
    return bits32(x)


def flush(x):
    return np.where(np.abs(x) < np.float32(1.17549435e-38), np.copysign(np.float32(0), x), x).astype(np.float32)


def ulps(y, count):
    """The spacing of floats around y, times count; nothing at zeros, infinities and NaN, which must match exactly."""
    finite = np.where(np.isfinite(y) & (y != 0), y, np.float32(0))
    return np.where(finite != 0, np.spacing(np.abs(finite)).astype(np.float64) * count, 0)


def approximation(name, function, tolerance, ftz=True, scale=8.0):
    def model(x):
        v = floats(x[:, 0])
        with np.errstate(all="ignore"):
            y = function((flush(v) if ftz else v).astype(np.float64)).astype(np.float32)
        y = flush(y) if ftz else y
        return bits32(y)[:, None], tolerance(y)[:, None]

    return Case("scalar", name, lambda rng: frame(random_floats(rng, scale)), model)


def scalar(name, operands, model, make=random_bits):
    def columns(x):
        return [x[:, i] for i in range(operands)]

    return Case(
        "scalar",
        name,
        lambda rng: frame(*(make(rng) for _ in range(operands))),
        lambda x: np.asarray(model(*columns(x)), np.uint32)[:, None],
    )


def by_halves(kind, function):
    """A model of packed arithmetic from one of its halves."""

    def model(a, b, c):
        lo = [
            function(int(x & 0xFFFF), int(y & 0xFFFF), int(z & 0xFFFF), kind) for x, y, z in zip(a, b, c, strict=True)
        ]
        hi = [function(int(x >> 16), int(y >> 16), int(z >> 16), kind) for x, y, z in zip(a, b, c, strict=True)]
        return pack(lo, hi)

    return model


def constant(bits):
    return lambda a: np.full_like(a, bits)


ONE = {"bf16": 0x3F803F80, "fp16": 0x3C003C00}


def packed_cases(kind):
    fma = by_halves(kind, formats.fma16)
    minus_zero = constant(0x80008000)
    one = constant(ONE[kind])
    return [
        scalar(f"hfma2_{kind}", 3, fma, ordinary_halves(kind)),
        scalar(f"hmul2_{kind}", 2, lambda a, b: fma(a, b, minus_zero(a)), ordinary_halves(kind)),
        scalar(f"hadd2_{kind}", 2, lambda a, b: fma(a, one(a), b), ordinary_halves(kind)),
    ]


def ordinary_halves(kind):
    """Random bits without NaN, whose sign and payload are not specified."""

    def make(rng):
        x = random_bits(rng).view(np.uint16).copy()
        x[np.isnan(DECODE[kind](x))] = 0x3C00
        x[::7] = ENCODE[kind](rng.standard_normal(len(x[::7])).astype(np.float32))
        infinite = np.isinf(DECODE[kind](x))
        x[infinite] = 0x4000  # inf * 0 and inf - inf are NaN
        return x.view(np.uint32)

    return make


def prmt(a, b, selector):
    octets = np.stack([a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)], 1)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        octet = np.take_along_axis(octets, (nibble & 7)[:, None].astype(np.int64), 1)[:, 0]
        spread = np.where(octet & 128, 255, 0)
        out |= (np.where(nibble & 8, spread, octet) << 8 * i).astype(np.uint32)
    return out


def per_word(function):
    return lambda *columns: [function(*map(int, row)) for row in zip(*columns, strict=True)]


def conversions(kind):
    encode, decode = ENCODE[kind], DECODE[kind]
    halves = lambda rng: ordinary_halves(kind)(rng) & 0xFFFF  # noqa: E731

    def unpacked(v):
        return bits32(decode((v & 0xFFFF).astype(np.uint16))) ^ bits32(decode((v >> 16).astype(np.uint16)))

    return [
        scalar(f"from_f32_{kind}", 1, lambda a: encode(floats(a)), random_floats),
        scalar(f"from_f32_{kind}", 1, lambda a: encode(floats(a)), random_bits),
        scalar(f"to_f32_{kind}", 1, lambda a: bits32(decode(a.astype(np.uint16))), halves),
        scalar(f"pack2_{kind}", 2, lambda a, b: pack(encode(floats(a)), encode(floats(b))), random_floats),
        scalar(f"unpack2_{kind}", 1, unpacked, ordinary_halves(kind)),
    ]


def max_nan(a, b):
    x, y = floats(a), floats(b)
    larger = np.where((x > y) | ((x == y) & np.signbit(y)), x, y)
    return np.where(np.isnan(x) | np.isnan(y), np.uint32(0x7FFFFFFF), bits32(larger))


def scalar_cases():
    shift64 = lambda lo, hi: hi << 32 | lo  # noqa: E731
    cases = [
        approximation("exp2_approx", np.exp2, lambda y: ulps(y, 4)),
        approximation("log2_approx", np.log2, lambda y: np.maximum(ulps(y, 4), 2.0**-21)),
        approximation("rcp_approx", lambda v: 1 / v, lambda y: ulps(y, 2)),
        approximation("rsqrt_approx", lambda v: 1 / np.sqrt(v), lambda y: ulps(y, 4)),
        approximation("sqrt_approx", np.sqrt, lambda y: ulps(y, 4)),
        approximation("tanh_approx", np.tanh, lambda y: np.abs(np.nan_to_num(y)) * 2.0**-10, ftz=False, scale=2.0),
        scalar("to_tf32", 1, lambda a: formats.to_tf32(floats(a)), random_floats),
        scalar("max_nan", 2, max_nan, lambda rng: rng.permutation(random_floats(rng))),
        scalar("hneg2", 1, lambda a: a ^ np.uint32(0x80008000)),
        scalar("popc", 1, per_word(lambda v: v.bit_count()), sparse_bits),
        scalar("clz", 1, per_word(lambda v: 32 - v.bit_length()), sparse_bits),
        scalar("find_first_set", 1, per_word(lambda v: (v & -v).bit_length()), sparse_bits),
        scalar("bit_reverse", 1, per_word(lambda v: int(f"{v:032b}"[::-1], 2))),
        scalar("funnel_shift_left", 3, per_word(lambda lo, hi, n: shift64(lo, hi) << (n & 31) >> 32 & 0xFFFFFFFF)),
        scalar("funnel_shift_right", 3, per_word(lambda lo, hi, n: shift64(lo, hi) >> (n & 31) & 0xFFFFFFFF)),
        scalar("prmt", 3, prmt),
        scalar("lop3_xor", 3, lambda a, b, c: a ^ b ^ c),
        scalar("lop3_majority", 3, lambda a, b, c: (a & b) | (a & c) | (b & c)),
    ]
    for kind in ("bf16", "fp16"):
        cases += conversions(kind) + packed_cases(kind)
    return cases


def sparse_bits(rng):
    """Words of every population, zero and all ones included."""
    x = random_bits(rng) & random_bits(rng) >> rng.integers(0, 32, SCALAR_THREADS, dtype=np.uint32)
    x[:2] = 0, 0xFFFFFFFF
    return x


# ---- random bits ----


def philox(key0, key1, *counter):
    """Philox4x32-10 of one counter, the fourth word of which is zero."""
    a, b, c, d = *counter, 0
    for i in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        k0, k1 = (key0 + i * 0x9E3779B9) & 0xFFFFFFFF, (key1 + i * 0xBB67AE85) & 0xFFFFFFFF
        a, b, c, d = y >> 32 ^ b ^ k0, y & 0xFFFFFFFF, x >> 32 ^ d ^ k1, x & 0xFFFFFFFF
    return a, b, c, d


def random_cases():
    def make(rng):
        x = frame(*(random_bits(rng) for _ in range(5)))
        x[0, :5], x[1, :5] = 0, 0xFFFFFFFF
        return x

    return [Case("random", "philox", make, lambda x: np.array([philox(*map(int, row[:5])) for row in x], np.uint32))]


# ---- collectives ----

BLOCKS = 4
WARP_THREADS = 32 * BLOCKS


def by_warp(function):
    """A model of a whole array from one of a warp: [32, 16] -> words [32, k]."""
    return lambda x: np.concatenate([np.asarray(function(w), np.uint32).reshape(32, -1) for w in x.reshape(-1, 32, 16)])


def shuffle(name, source, make_second):
    def model(w):
        lanes = source(LANES, w[:, 1].astype(np.int64))
        return w[np.where((lanes >= 0) & (lanes < 32), lanes, LANES), 0]

    return Case("warp", name, lambda rng: frame(random_bits(rng, WARP_THREADS), make_second(rng)), by_warp(model))


def shuffle_64(w):
    lanes = w[:, 1] % 32
    return np.stack([w[lanes, 0], w[lanes, 2]], 1)


def vote(name, make, model):
    return Case("warp", name, lambda rng: frame(make(rng), kind=1), by_warp(lambda w: np.full(32, model(w[:, 0]))))


def match_any(w):
    return [sum(1 << j for j in range(32) if w[j, 0] == v) for v in w[:, 0]]


def butterfly(combine, width):
    def model(w):
        v = floats(w[:, 0])
        offset = width // 2
        while offset:
            v = combine(v, v[LANES ^ offset]).astype(np.float32)
            offset //= 2
        return bits32(v)

    return by_warp(model)


def collective_cases():
    any_lane = lambda rng: rng.integers(0, 32, WARP_THREADS)  # noqa: E731
    distance = lambda rng: np.repeat(rng.integers(0, 32, BLOCKS), 32)  # noqa: E731
    words = lambda rng: random_bits(rng, WARP_THREADS)  # noqa: E731
    few = lambda rng: rng.integers(0, 6, WARP_THREADS)  # noqa: E731
    plain_floats = lambda rng: bits32(rng.standard_normal(WARP_THREADS))  # noqa: E731

    def mixed_votes(rng):
        x = rng.integers(0, 2, WARP_THREADS)
        x[:32], x[32:64] = 0, 1
        return x

    signed = lambda v: v.view(np.int32)  # noqa: E731
    unsigned = lambda v: np.uint32(np.int64(v) & 0xFFFFFFFF)  # noqa: E731
    ballot = lambda v: sum(int(b & 1) << i for i, b in enumerate(v))  # noqa: E731
    return [
        shuffle("shfl", lambda lane, n: n, any_lane),
        shuffle("shfl_xor", lambda lane, n: lane ^ n, distance),
        shuffle("shfl_up", lambda lane, n: lane - n, distance),
        shuffle("shfl_down", lambda lane, n: lane + n, distance),
        Case("warp", "shfl_64", lambda rng: frame(words(rng), any_lane(rng), words(rng)), by_warp(shuffle_64)),
        vote("warp_ballot", words, ballot),
        vote("warp_any", mixed_votes, lambda v: int(any(v & 1))),
        vote("warp_all", mixed_votes, lambda v: int(all(v & 1))),
        Case("warp", "match_any", lambda rng: frame(few(rng), kind=1), by_warp(match_any)),
        vote("redux_add", words, lambda v: int(v.astype(np.uint64).sum()) & 0xFFFFFFFF),
        vote("redux_min_s32", words, lambda v: unsigned(signed(v).min())),
        vote("redux_min_u32", words, lambda v: v.min()),
        vote("redux_max_s32", words, lambda v: unsigned(signed(v).max())),
        vote("redux_max_u32", words, lambda v: v.max()),
        vote("elect_one", words, lambda v: 1),
        Case("warp", "warp_sum", lambda rng: frame(plain_floats(rng), kind=1), butterfly(np.add, 32)),
        Case("warp", "warp_max", lambda rng: frame(plain_floats(rng), kind=1), butterfly(np.maximum, 8)),
    ]


# ---- ldmatrix and stmatrix ----


def tile_elements(tiles, transposed):
    """Row of the address list and column of each register's low half; the high half is the next."""
    down, across = np.broadcast_to(G[:, None], (32, tiles)), np.broadcast_to(2 * T[:, None], (32, tiles))
    base = 8 * np.arange(tiles)[None]
    if transposed:
        return (base + across, down), (base + across + 1, down)
    return (base + down, across), (base + down, across + 1)


def load_matrix(tiles, transposed):
    def model(w):
        memory = np.ascontiguousarray(w[:, :4]).view(np.uint16)  # 32 rows of 8
        rows = memory[w[:, 4] % 32]  # lane i names row w[i, 4]
        low, high = tile_elements(tiles, transposed)
        out = np.zeros((32, 4), np.uint32)
        out[:, :tiles] = pack(rows[low], rows[high])
        return out

    return by_warp(model)


def store_matrix(transposed):
    def model(w):
        low, high = tile_elements(4, transposed)
        memory = np.zeros((32, 8), np.uint16)
        target = w[:, 4] % 32
        memory[target[low[0]], low[1]] = w[:, :4] & 0xFFFF
        memory[target[high[0]], high[1]] = w[:, :4] >> 16
        return memory.view(np.uint32)

    return by_warp(model)


def matrix_inputs(rng):
    rows = np.concatenate([rng.permutation(32) for _ in range(BLOCKS)])
    return frame(*(random_bits(rng, WARP_THREADS) for _ in range(4)), rows, kind=2)


def matrix_cases():
    cases = []
    for tiles in (1, 2, 4):
        for suffix in ("", "_trans"):
            model = load_matrix(tiles, bool(suffix))
            cases.append(Case("warp", f"ldmatrix_x{tiles}{suffix}", matrix_inputs, model))
    for suffix in ("", "_trans"):
        cases.append(Case("stmatrix", f"stmatrix_x4{suffix}", matrix_inputs, store_matrix(bool(suffix))))
    return cases


# ---- mma ----


def accumulator(c):
    """[16, 8] -> a lane's four values."""
    return np.stack([c[G + i // 2 * 8, 2 * T + i % 2] for i in range(4)], 1)


def fragment_a(bits):
    """16-bit [16, 16] -> four registers."""
    index = [(G + i % 2 * 8, 2 * T + i // 2 * 8) for i in range(4)]
    return np.stack([pack(bits[r, k], bits[r, k + 1]) for r, k in index], 1)


def fragment_b(bits):
    """16-bit [k, 8] -> k / 8 registers."""
    return np.stack([pack(bits[2 * T + k, G], bits[2 * T + k + 1, G]) for k in range(0, len(bits), 8)], 1)


def matrices(rng, m, k, n, exact):
    """Small integers, whose products and sums are exact, or normal numbers."""
    if exact:
        return tuple(rng.integers(-4, 5, shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))


def product_inputs(k, encode_a, encode_b, encode_c, kind):
    """Alternating warps of exact and inexact numbers."""

    def make(rng):
        x = np.zeros((WARP_THREADS, WORDS), np.uint32)
        for block in range(BLOCKS):
            a, b, c = matrices(rng, 16, k, 8, exact=block % 2 == 0)
            w = x[32 * block : 32 * block + 32]
            for start, registers in ((0, encode_a(a)), (4, encode_b(b)), (8, encode_c(c))):
                w[:, start : start + registers.shape[1]] = registers
        x[:, WORDS - 1] = kind
        return x

    return make


def unpack_halves(registers, kind):
    lo, hi = (registers & 0xFFFF).astype(np.uint16), (registers >> 16).astype(np.uint16)
    return DECODE[kind](lo).astype(np.float64), DECODE[kind](hi).astype(np.float64)


def matrix_a(registers, kind):
    a = np.zeros((16, 16))
    lo, hi = unpack_halves(registers, kind)
    for i in range(4):
        a[G + i % 2 * 8, 2 * T + i // 2 * 8] = lo[:, i]
        a[G + i % 2 * 8, 2 * T + i // 2 * 8 + 1] = hi[:, i]
    return a


def matrix_b(registers, kind):
    b = np.zeros((8 * registers.shape[1], 8))
    lo, hi = unpack_halves(registers, kind)
    for i in range(registers.shape[1]):
        b[2 * T + 8 * i, G] = lo[:, i]
        b[2 * T + 8 * i + 1, G] = hi[:, i]
    return b


def matrix_c(words):
    c = np.zeros((16, 8))
    for i in range(4):
        c[G + i // 2 * 8, 2 * T + i % 2] = words[:, i]
    return c


def float_product(decode):
    """Words and tolerances from a function of a warp's inputs to its matrices A, B, C."""

    def model(x):
        words, tolerances = [], []
        for w in x.reshape(-1, 32, 16):
            a, b, c = decode(w)
            words.append(bits32(accumulator(a @ b + c)))
            integers = all((m == np.round(m)).all() for m in (a, b, c))
            bound = np.zeros((16, 8)) if integers else 2.0**-19 * (np.abs(a) @ np.abs(b) + np.abs(c))
            tolerances.append(accumulator(bound))
        return np.concatenate(words), np.concatenate(tolerances)

    return model


def product_16(name, kind, zero=False):
    encode = ENCODE[kind]

    def decode(w):
        c = matrix_c(floats(w[:, 8:12]))
        return matrix_a(w[:, :4], kind), matrix_b(w[:, 4:6], kind), 0 * c if zero else c

    make = product_inputs(
        16, lambda a: fragment_a(encode(a)), lambda b: fragment_b(encode(b)), lambda c: bits32(accumulator(c)), kind=3
    )
    return Case("warp", name, make, float_product(decode))


def product_tf32():
    def registers_a(a):
        bits = formats.to_tf32(a)
        return np.stack([bits[G + i % 2 * 8, T + i // 2 * 4] for i in range(4)], 1)

    def registers_b(b):
        bits = formats.to_tf32(b)
        return np.stack([bits[T + 4 * i, G] for i in range(2)], 1)

    def decode(w):
        v = floats(w).astype(np.float64)
        a, b = np.zeros((16, 8)), np.zeros((8, 8))
        for i in range(4):
            a[G + i % 2 * 8, T + i // 2 * 4] = v[:, i]
        for i in range(2):
            b[T + 4 * i, G] = v[:, 4 + i]
        return a, b, matrix_c(v[:, 8:12])

    make = product_inputs(8, registers_a, registers_b, lambda c: bits32(accumulator(c)), kind=3)
    return Case("warp", "mma_m16n8k8_tf32", make, float_product(decode))


def product_acc16():
    def half_c(c):
        h = formats.to_fp16(c)
        return np.stack([pack(h[G + 8 * i, 2 * T], h[G + 8 * i, 2 * T + 1]) for i in range(2)], 1)

    def model(x):
        words = []
        for w in x.reshape(-1, 32, 16):
            lo, hi = unpack_halves(w[:, 8:10], "fp16")
            c = np.zeros((16, 8))
            for i in range(2):
                c[G + 8 * i, 2 * T], c[G + 8 * i, 2 * T + 1] = lo[:, i], hi[:, i]
            d = half_c(matrix_a(w[:, :4], "fp16") @ matrix_b(w[:, 4:6], "fp16") + c)
            words.append(np.stack([d[:, 0], d[:, 1], d[:, 0], d[:, 1]], 1))
        return np.concatenate(words)

    # Small integers only: how a tensor core rounds between its steps is its own affair.
    exact = lambda a, k: np.rint(np.clip(a, -4, 4))  # noqa: E731
    make = product_inputs(
        16,
        lambda a: fragment_a(formats.to_fp16(exact(a, 0))),
        lambda b: fragment_b(formats.to_fp16(exact(b, 0))),
        lambda c: half_c(exact(c, 0)),
        kind=4,
    )
    return Case("warp", "mma_m16n8k16_acc16", make, model)


def product_s8(k):
    def make(rng):
        return frame(*(random_bits(rng, WARP_THREADS) for _ in range(12)), kind=4)

    def signed_bytes(words):
        return np.ascontiguousarray(words).view(np.int8).reshape(32, -1, 4).astype(np.int64)

    def model(w):
        ra, rb = signed_bytes(w[:, : k // 8]), signed_bytes(w[:, 4 : 4 + k // 16])
        a, b, c = np.zeros((16, k), np.int64), np.zeros((k, 8), np.int64), np.zeros((16, 8), np.int64)
        for byte in range(4):
            for i in range(k // 8):
                a[G + i % 2 * 8, 4 * T + i // 2 * 16 + byte] = ra[:, i, byte]
            for i in range(k // 16):
                b[4 * T + 16 * i + byte, G] = rb[:, i, byte]
        for i in range(4):
            c[G + i // 2 * 8, 2 * T + i % 2] = w[:, 8 + i].view(np.int32)
        return (accumulator(a @ b + c) & 0xFFFFFFFF).astype(np.uint32)

    return Case("warp", f"mma_m16n8k{k}_s8", make, by_warp(model))


LEGAL_NIBBLES = np.array([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], np.uint32)


def metadata_words(nibbles, selector):
    """[16 rows, 8 groups] -> one word per lane; the lanes of the other pair hold nonsense that must be ignored."""
    words = np.full(32, 0xFFFFFFFF, np.uint32)
    for g in range(8):
        for half in range(2):
            word = 0
            for j in range(4):
                word |= int(nibbles[g, 4 * half + j]) << 4 * j
                word |= int(nibbles[g + 8, 4 * half + j]) << (16 + 4 * j)
            words[4 * g + 2 * selector + half] = word
    return words


def product_sparse(kind, selector):
    dense = product_inputs(
        16,
        lambda a: fragment_a(ENCODE[kind](a)),
        lambda b: np.zeros((32, 0), np.uint32),
        lambda c: bits32(accumulator(c)),
        kind=3,
    )

    def make(rng):
        x = dense(rng)
        for block in range(BLOCKS):
            w = x[32 * block : 32 * block + 32]
            _, b, _ = matrices(rng, 16, 32, 8, exact=block % 2 == 0)
            w[:, 4:8] = fragment_b(ENCODE[kind](b))
            w[:, 12] = metadata_words(rng.choice(LEGAL_NIBBLES, (16, 8)), selector)
        return x

    def decode(w):
        compressed, a = matrix_a(w[:, :4], kind), np.zeros((16, 32))
        for row in range(16):
            for group in range(8):
                word = int(w[4 * (row % 8) + 2 * selector + group // 4, 12])
                nibble = word >> (16 * (row // 8) + 4 * (group % 4)) & 15
                a[row, 4 * group + (nibble & 3)] = compressed[row, 2 * group]
                a[row, 4 * group + (nibble >> 2)] = compressed[row, 2 * group + 1]
        return a, matrix_b(w[:, 4:8], kind), matrix_c(floats(w[:, 8:12]))

    return Case("warp", f"mma_sp_m16n8k32_{kind}_{selector}", make, float_product(decode))


def product_cases():
    cases = [product_tf32(), product_acc16(), product_s8(16), product_s8(32)]
    for kind in ("bf16", "fp16"):
        cases.append(product_16(f"mma_m16n8k16_{kind}", kind))
        cases.append(product_16(f"mma_m16n8k16_zero_{kind}", kind, zero=True))
        cases += [product_sparse(kind, selector) for selector in (0, 1)]
    return cases


# ---- memory ----


def copy_case(nbytes):
    def model(x):
        kept = np.arange(4) < nbytes // 4
        copied = np.where((x[:, 4] & 1)[:, None], x[:, :4], 0)
        return np.where(kept, copied, ~x[:, :4])

    make = lambda rng: frame(*(random_bits(rng) for _ in range(5)))  # noqa: E731
    return Case("memory", f"cp_async{nbytes}", make, model)


def move_case(name, nbytes):
    def model(x):
        mask = 0xFFFF if nbytes == 2 else 0xFFFFFFFF
        return x[:, : max(1, nbytes // 4)] & np.uint32(mask)

    make = lambda rng: frame(*(random_bits(rng) for _ in range(4)), kind=1)  # noqa: E731
    return Case("memory", name, make, model)


def atomic_case(name, function, kind, make=random_bits):
    def columns(rng):
        old, operand, expected = make(rng), make(rng), make(rng)
        expected[::2] = old[::2]
        return frame(old, operand, expected, kind=kind)

    def model(x):
        new = np.asarray(function(x[:, 0], x[:, 1], x[:, 2]), np.uint32)
        return np.stack([x[:, 0], new], 1)

    return Case("memory", name, columns, model)


def memory_cases():
    signed = lambda f: lambda a, b, c: f(a.view(np.int32), b.view(np.int32)).view(np.uint32)  # noqa: E731
    normal = lambda rng: bits32(rng.standard_normal(SCALAR_THREADS))  # noqa: E731
    cases = [copy_case(n) for n in (4, 8, 16)]
    cases += [move_case(f"load_store_{n}", n) for n in (2, 4, 8, 16)]
    cases += [move_case("stream_16", 16), move_case("const_16", 16)]
    for kind in (2, 3):  # global, shared
        cases += [
            atomic_case("atomic_add_f32", lambda a, b, c: bits32(floats(a) + floats(b)), kind, normal),
            atomic_case("atomic_add_s32", signed(np.add), kind),
            atomic_case("atomic_add_u32", lambda a, b, c: a + b, kind),
            atomic_case("atomic_max_s32", signed(np.maximum), kind),
            atomic_case("atomic_max_u32", lambda a, b, c: np.maximum(a, b), kind),
            atomic_case("atomic_min_s32", signed(np.minimum), kind),
            atomic_case("atomic_min_u32", lambda a, b, c: np.minimum(a, b), kind),
            atomic_case("atomic_or", lambda a, b, c: a | b, kind),
            atomic_case("atomic_and", lambda a, b, c: a & b, kind),
            atomic_case("atomic_exch", lambda a, b, c: b, kind),
            atomic_case("atomic_cas", lambda a, b, c: np.where(a == c, b, a), kind),
        ]
    return cases


def label(case, index):
    return f"{case.name}-{index}"


def all_cases():
    """Cases by a name that is unique and stable."""
    named, seen = {}, {}
    groups = scalar_cases, random_cases, collective_cases, matrix_cases, product_cases, memory_cases
    for case in itertools.chain.from_iterable(group() for group in groups):
        seen[case.name] = seen.get(case.name, 0) + 1
        suffix = "" if seen[case.name] == 1 else f"-{seen[case.name]}"
        named[case.name + suffix] = case
    return named


CASES = all_cases()
THREADS_PER_BLOCK = {"scalar": 128, "random": 128, "memory": 128, "warp": 32, "stmatrix": 32}


def inputs(name):
    """The same for every run: seeded by the name."""
    return CASES[name].make(np.random.default_rng(sum(map(ord, name))))


def expected(name, x):
    """Words and tolerances of the first columns."""
    result = CASES[name].model(x)
    words, tolerance = result if isinstance(result, tuple) else (result, None)
    return words, np.zeros(words.shape) if tolerance is None else tolerance


def mismatches(actual, words, tolerance):
    """Where the results differ: bits where no tolerance is given, floats within it elsewhere; NaN equals NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = floats(actual), floats(words)
        near = np.abs(a.astype(np.float64) - b) <= tolerance
        nan = np.isnan(a) & np.isnan(b) & (tolerance >= 0)
    same = actual == words
    return ~(same | ((tolerance > 0) & near) | (nan & (tolerance.any() > 0)))
