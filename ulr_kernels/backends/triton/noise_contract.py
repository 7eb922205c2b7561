# mypy: disable-error-code="assignment"
"""The noise contract on tiles: `ulr_kernels.noise_contract`, bit for bit, in Triton.

A tile is BR rows by BC columns. Its columns begin where a call of Philox begins (a column that 4, or for signs 128,
divides), so that a tile's calls are used whole. `source` is what `open_source` returns: values that stay in registers.

The code is shaped by the instructions of a sm_90 cubin. A 64-bit product gives both halves of Philox's product in one
IMAD.WIDE. A table row has 48 bytes and uses 24: one IMAD.WIDE addresses it (a power of two would take a pair of LEA),
and two aligned loads read it. Bit masks are read from memory, because ptxas sets a constant anew at each use. Work that
needs no whole tile is done on parts of a tile, which never leave their thread.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NORMAL = tl.constexpr(0)
LAPLACE = tl.constexpr(1)
RADEMACHER = tl.constexpr(2)  # codes from here on are of signs
HADAMARD = tl.constexpr(3)  # orthogonal signs

ROW_WORDS = tl.constexpr(12)  # 32-bit words from one octave's row of the table to the next
FIRST_ROW = tl.constexpr(127)  # the exponent field of 1.0: octave 0
MASKS = tl.constexpr(32 * 12)  # where the masks follow the rows
SOBOL_BITS = tl.constexpr(30)
HADAMARD_BITS = tl.constexpr(16)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counters and a uint32 key."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def open_source(key, table):
    """(key low, key high, table, masks of a word, masks of packed bf16): read once, before the loops."""
    value = tl.load(key)
    magnitude = tl.load(table + MASKS)
    mantissa = tl.load(table + MASKS + 1)
    signs = tl.load(table + MASKS + 2)
    return value.to(tl.uint32), (value >> 32).to(tl.uint32), table, magnitude, mantissa, signs


@triton.jit
def _words(rows, first, draw, source, BR: tl.constexpr, CALLS: tl.constexpr):
    """Four uint32 [BR, CALLS]: word j of calls first, first + 1 ... of each row."""
    calls = first + tl.arange(0, CALLS).to(tl.uint32)
    c0 = tl.broadcast_to(calls[None, :], (BR, CALLS))
    c1 = tl.broadcast_to(rows[:, None], (BR, CALLS))
    zero = tl.zeros_like(c0)
    return philox(c0, c1, zero + draw, zero, source[0], source[1])


@triton.jit
def join_parts(parts):
    """The parts, P tiles [BR, BC / P], as one tile [BR, BC]; P is 1, 2, 4 or 16."""
    BR: tl.constexpr = parts[0].shape[0]
    BC: tl.constexpr = parts[0].shape[1] * len(parts)
    # Each join appends an axis of two: the first one the highest bit of p, the last one the lowest.
    for _ in tl.static_range(4):
        if len(parts) > 1:
            joined = ()
            for p in tl.static_range(len(parts) // 2):
                joined = joined + (tl.join(parts[p], parts[p + len(parts) // 2]),)
            parts = joined
    return parts[0].reshape(BR, BC)


@triton.jit
def _coefficients(address):
    """The six coefficients of an octave, lowest power first, from the addresses of table rows."""
    if INTERPRETED:
        row = address.to(tl.pointer_type(tl.float32))
        return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    else:
        # Triton has no loads of several values per element, and would move the tile to a layout made for its loads.
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$6]; ld.global.nc.v2.f32 {$4, $5}, [$6+16];",
            "=f,=f,=f,=f,=f,=f,l",
            [address],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def quantile(words, source):
    """`normal` or `laplace` noise of words: a polynomial per octave, then the word's bit 31 as sign."""
    magnitude = (words & source[3]) | 1
    bits = magnitude.to(tl.int32).to(tl.float32).to(tl.uint32, bitcast=True)
    argument = ((bits & source[4]) | 0x3F800000).to(tl.float32, bitcast=True)
    octave_0 = source[2].to(tl.uint64) - FIRST_ROW * ROW_WORDS * 4
    a0, a1, a2, a3, a4, a5 = _coefficients(octave_0 + (bits >> 23).to(tl.uint64) * (ROW_WORDS * 4))
    result = tl.fma(a5, argument, a4)
    result = tl.fma(result, argument, a3)
    result = tl.fma(result, argument, a2)
    result = tl.fma(result, argument, a1)
    result = tl.fma(result, argument, a0)
    return (result.to(tl.uint32, bitcast=True) ^ (words & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def sign_words(rows, first, draw, source, BR: tl.constexpr, BC: tl.constexpr):
    """uint32 [BR, BC / 32]: the signs of the columns from call `first` on, as bits: 0 is +1, 1 is -1."""
    w0, w1, w2, w3 = _words(rows, first, draw, source, BR, BC // 128)
    return join_parts((w0, w1, w2, w3))


@triton.jit
def sign_halves(words):
    """uint32 [BR, BC / 16]: half words of signs: the bit of column 2 j is bit 2 j, that of 2 j + 1 is bit 2 j + 16."""
    low = (words & 0x5555) | ((words & 0xAAAA) << 15)
    high = ((words >> 16) & 0x5555) | ((words >> 1) & 0x55550000)
    return join_parts((low, high))


@triton.jit
def _odd(bits):
    """0xFFFFFFFF where the number of set bits is odd, else 0."""
    if INTERPRETED:
        for shift in tl.static_range(5):
            bits ^= bits >> (16 >> shift)
    else:
        bits = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.uint32, is_pure=True, pack=1)
    return 0 - (bits & 1)


@triton.jit
def slots(rows, cols, positions, width):
    """uint32: the slots of coordinates of orthogonal signs, which broadcast. `positions` None: 2^32."""
    if positions is not None:
        count = tl.cast(positions, tl.uint32)  # 2^32 are 0
        rows = tl.where(count == 0, rows, rows % tl.maximum(count, 1))
    return rows * (tl.cast(width, tl.uint32) | 1) + cols


@triton.jit
def walsh_words(slot, draw):
    """uint32: the Walsh functions slot ... slot + 31 at the lower 16 bits of `draw`, a bit each: 1 is -1.

    The lower five bits of the slots go round once; where they start again, the higher ones have grown by one.
    """
    draw = tl.cast(draw, tl.uint32)
    bits = (0 - (draw & 1)) & 0xAAAAAAAA
    bits ^= (0 - (draw >> 1 & 1)) & 0xCCCCCCCC
    bits ^= (0 - (draw >> 2 & 1)) & 0xF0F0F0F0
    bits ^= (0 - (draw >> 3 & 1)) & 0xFF00FF00
    bits ^= (0 - (draw >> 4 & 1)) & 0xFFFF0000
    turn = slot & 31
    high = draw >> 5 & 0x7FF
    turned = (bits >> turn) | (bits << ((0 - turn) & 31))
    later = ~(tl.full([], 0xFFFFFFFF, tl.uint32) >> turn)  # slots of the next 32
    here, beyond = _odd(high & (slot >> 5)), _odd(high & ((slot >> 5) + 1))
    return turned ^ here ^ (later & (here ^ beyond))


@triton.jit
def no_signs(DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Words for `shared_signs` to make."""
    if DIST == HADAMARD:
        return tl.zeros([BR, BC // 32], tl.uint32)
    else:
        return 0


@triton.jit
def shared_signs(kept, is_first, rows, first, draw, source, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The words that orthogonal draws share: `kept` from one draw to the next, and made for the first draw of all and
    where a block of 2^16 draws begins. Other noise shares nothing."""
    if DIST == HADAMARD:
        if is_first | ((draw & 0xFFFF) == 0):
            kept = sign_words(rows, first, draw >> HADAMARD_BITS, source, BR, BC)
    return kept


@triton.jit
def sign_pairs(halves, j, source):
    """uint32: columns 2 j and 2 j + 1 of half words as two bf16, the even one in the low half: one shift for both."""
    return ((halves << (15 - 2 * j)) & source[5]) | 0x3F803F80


@triton.jit
def _split_pairs(pairs):
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _sobol_points(rows, first, draw, directions, positions, width, word: tl.constexpr, CALLS: tl.constexpr):
    """uint32 [BR, CALLS]: the XOR of V[dimension][b] over the set bits b of `draw`, of every fourth column."""
    cols = (first.to(tl.int32) + tl.arange(0, CALLS)) * 4 + word
    dimension = (rows % tl.cast(positions, tl.uint32)).to(tl.int32)[:, None] * width + cols[None, :]
    numbers = directions + dimension * SOBOL_BITS
    inside = (cols < width)[None, :]
    point = tl.zeros_like(dimension).to(tl.uint32)
    while draw != 0:
        number = tl.load(numbers, mask=inside, other=0).to(tl.uint32, bitcast=True)
        point ^= tl.where((draw & 1) != 0, number, 0)
        numbers += 1
        draw >>= 1
    return point


@triton.jit
def raw_noise(
    rows, first, draw, source, directions, positions, width, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    kept=None,
):  # fmt: skip
    """The random bits of a tile: uint32 `rows`, and the columns from call `first` on. `directions` None: no Sobol.

    `kept` are what `shared_signs` returns, for a loop over draws.
    """
    if DIST == HADAMARD:
        if kept is None:
            kept = sign_words(rows, first, draw >> HADAMARD_BITS, source, BR, BC)
        cols = first * 128 + (tl.arange(0, BC // 32) * 32).to(tl.uint32)
        return (sign_halves(kept ^ walsh_words(slots(rows[:, None], cols[None, :], positions, width), draw)),)
    elif DIST == RADEMACHER:
        return (sign_halves(sign_words(rows, first, draw, source, BR, BC)),)
    else:
        CALLS: tl.constexpr = BC // 4
        if directions is None:
            return _words(rows, first, draw, source, BR, CALLS)
        else:
            w0, w1, w2, w3 = _words(rows, first, draw - draw, source, BR, CALLS)
            w0 ^= _sobol_points(rows, first, draw, directions, positions, width, 0, CALLS)
            w1 ^= _sobol_points(rows, first, draw, directions, positions, width, 1, CALLS)
            w2 ^= _sobol_points(rows, first, draw, directions, positions, width, 2, CALLS)
            w3 ^= _sobol_points(rows, first, draw, directions, positions, width, 3, CALLS)
            return w0, w1, w2, w3


@triton.jit
def noise_parts(raw, source, DIST: tl.constexpr):
    """The noise as a tuple of P fp32 tiles [BR, BC / P]: part p holds columns p, p + P ...

    P is 4, the words of a call, or for signs 16, half a word. Work on parts needs no exchange between threads.
    """
    if DIST >= RADEMACHER:
        parts = ()
        for j in tl.static_range(8):
            parts = parts + _split_pairs(sign_pairs(raw[0], j, source))
        return parts
    else:
        return quantile(raw[0], source), quantile(raw[1], source), quantile(raw[2], source), quantile(raw[3], source)


@triton.jit
def noise_tile(raw, source, DIST: tl.constexpr):
    """The noise as one fp32 tile [BR, BC]."""
    if DIST >= RADEMACHER:
        BR: tl.constexpr = raw[0].shape[0]
        HALVES: tl.constexpr = raw[0].shape[1]
        halves = tl.broadcast_to(raw[0][:, :, None], (BR, HALVES, 8))
        pairs = sign_pairs(halves, tl.arange(0, 8).to(tl.uint32)[None, None, :], source).reshape(BR, HALVES * 8)
        return join_parts(_split_pairs(pairs))
    else:
        return join_parts(noise_parts(raw, source, DIST))


@triton.jit
def score(eps, DIST: tl.constexpr):
    """-d/d eps ln f(eps): eps, or for `laplace` sqrt(2) with the sign bit of eps."""
    if DIST == LAPLACE:
        sign = eps.to(tl.uint32, bitcast=True) & 0x80000000
        return (sign | 0x3FB504F3).to(tl.float32, bitcast=True)
    else:
        return eps


@triton.jit
def number_of(bits):
    """The fp32 number of these bits. (A float argument would have more than fp32's precision in the interpreter.)"""
    return tl.cast(bits, tl.uint32).to(tl.float32, bitcast=True)
