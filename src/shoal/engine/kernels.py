"""What lies between and behind a decoder's matrix products when rows have one new token or a few, on a CPU: compiled.

torch needs some thirty calls a layer for what are three here, reads keys at a fifth of the memory's speed where several
queries share them, and reads every row to the longest one's end. `shoal bench kernels` times both. Compiled by numba at
first use (seconds), then kept on disk.

    attend      q, k = rotate(q, k);  cache[position] = k, v;  out = softmax(q K^T / sqrt(D)) V
    add_norm    h = h + x;            out = h / sqrt(mean(h^2) + eps) * w
    gate        out = g / (1 + exp(-g)) * u
    draw        id = first i with  sum_(j <= i) exp(x_j / T)  >  u sum_j exp(x_j / T)

Computed in fp32 inside, rounded once to the arrays' own type; a row's result depends on that row alone. Arrays of
bfloat16 are handed over as their bits (uint16).

Invariant: NaN in a row of the input gives NaN in that row of the result.

Shapes: B rows, T new tokens a row, N query heads, K key-value heads, D head size, H hidden size, I inner size, C cached
positions, V vocabulary; where tokens do not meet, B stands for B x T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic

FAST = {"reassoc", "nsz", "contract", "arcp"}
"""Sums in any order, products and sums as one; numbers that are none stay what they are."""

BLOCK = 256
"""Tokens a block of a vocabulary holds: near its square root."""

LOWEST = np.int32(-(2**31))
"""Ranks below all numbers (`_rank`)."""

LINE = 32
"""Elements that are fetched together: a cache line of bfloat16."""


def _compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled at its first call; kept on disk where a folder for that can be written."""
    options = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except (NumbaError, RuntimeError):
        return njit(**options)(function)


@intrinsic
def _wide(typing: Any, x: Any) -> Any:
    """An array's element as fp32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.float32:
            return args[0]
        bits = builder.zext(args[0], context.get_value_type(types.uint32))
        shifted = builder.shl(bits, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return (types.float32(x), generate) if x in (types.float32, types.uint16) else None


@intrinsic
def _narrow(typing: Any, x: Any, like: Any) -> Any:
    """An fp32 number as an element of the array that `like` is of; halves go to the even neighbour."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like == types.float32:
            return args[0]
        word = context.get_value_type(types.uint32)
        bits = builder.bitcast(args[0], word)
        sixteen, one = context.get_constant(types.uint32, 16), context.get_constant(types.uint32, 1)
        odd = builder.and_(builder.lshr(bits, sixteen), one)
        rounded = builder.add(builder.add(bits, context.get_constant(types.uint32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, sixteen), context.get_value_type(types.uint16))

    return (like(types.float32, like), generate) if x == types.float32 else None


@intrinsic
def _power_of_two(typing: Any, n: Any) -> Any:
    """2^n as fp32, for a whole number n in -126…127."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bias, places = context.get_constant(types.int32, 127), context.get_constant(types.int32, 23)
        bits = builder.shl(builder.add(args[0], bias), places)
        return builder.bitcast(bits, context.get_value_type(types.float32))

    return (types.float32(types.int32), generate) if n == types.int32 else None


@intrinsic
def _fetch(typing: Any, row: Any, at: Any) -> Any:
    """Bring what lies around element `at` of a contiguous row near, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(context.make_array(row)(context, builder, args[0]).data, [args[1]])
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        whole = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, whole, whole, whole])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [place, whole(0), whole(2), whole(1)])
        return context.get_dummy_value()

    return types.none(row, types.intp), generate


@intrinsic
def _rank(typing: Any, x: Any) -> Any:
    """An fp32 number as a whole number, in the same order, NaN outermost; or such a number as what it came from.

    The largest of whole numbers is found sixteen at a time, that of numbers which may be NaN one after another.
    """
    to = types.int32 if x == types.float32 else types.float32

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = context.get_value_type(types.int32)
        bits = builder.bitcast(args[0], word)
        flipped = builder.and_(builder.ashr(bits, word(31)), word(0x7FFFFFFF))
        return builder.bitcast(builder.xor(bits, flipped), context.get_value_type(to))

    return (to(x), generate) if x in (types.float32, types.int32) else None


@njit(inline="always")
def _exp(x: Any) -> Any:
    """e^x in fp32, to 2e-7 of itself where -87 <= x <= 88, by Cephes' polynomial; beyond, as at the ends."""
    if x < np.float32(-87):
        x = np.float32(-87)
    if x > np.float32(88):
        x = np.float32(88)
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * _power_of_two(np.int32(n))


@njit(inline="always")
def _weight(x: Any) -> Any:
    """e^x, and nothing where that is less than fp32's smallest normal number: a token of logit -inf is never drawn."""
    return _exp(x) if not x < np.float32(-87) else np.float32(0)


def make_attend(group: int, dim: int) -> Callable[..., None]:
    """Attention for models with N = group x K query heads of size `dim`.

    The result is called with (qkv [B, T, N + 2K, D], cos [B, T, D], sin [B, T, D] (signed, as `rotary` gives it), keys
    and values [B, K, C, D], start [B] int64, scale, out [B, T, N, D]). Positions start[b] … start[b] + T - 1 of `keys`
    and `values` are written; a token sees those up to its own.
    """
    half = dim // 2

    def attend(qkv, cos, sin, keys, values, start, scale, out):  # type: ignore[no-untyped-def]
        batch, width, num_kv = qkv.shape[0], qkv.shape[1], keys.shape[1]
        q = np.empty((group, dim), np.float32)
        mixed = np.empty((group, dim), np.float32)
        weights = np.empty((group, start.max() + width), np.float32)
        for b in range(batch):
            for head in range(num_kv):
                k, v = keys[b, head], values[b, head]
                after = keys[b, head + 1] if head + 1 < num_kv else keys[min(b + 1, batch - 1), 0]
                for t in range(width):
                    here, c, s = start[b] + t, cos[b, t], sin[b, t]
                    new_k, new_v = qkv[b, t, num_kv * group + head], qkv[b, t, num_kv * (group + 1) + head]
                    for d in range(half):
                        low, high = _wide(new_k[d]), _wide(new_k[d + half])
                        k[here, d] = _narrow(low * _wide(c[d]) + high * _wide(s[d]), k[0, 0])
                        k[here, d + half] = _narrow(high * _wide(c[d + half]) + low * _wide(s[d + half]), k[0, 0])
                    for d in range(dim):
                        v[here, d] = new_v[d]
                for t in range(width):
                    length, c, s = start[b] + t + 1, cos[b, t], sin[b, t]
                    for g in range(group):
                        x = qkv[b, t, head * group + g]
                        for d in range(half):
                            low, high = _wide(x[d]), _wide(x[d + half])
                            q[g, d] = (low * _wide(c[d]) + high * _wide(s[d])) * scale
                            q[g, d + half] = (high * _wide(c[d + half]) + low * _wide(s[d + half])) * scale
                    for at in range(length):
                        row = k[at]
                        for line in range(0, dim, LINE):
                            _fetch(v[at], line)
                        for g in range(group):
                            score = np.float32(0)
                            for d in range(dim):
                                score += q[g, d] * _wide(row[d])
                            weights[g, at] = score
                    for g in range(group):
                        highest = LOWEST
                        for at in range(length):
                            highest = max(highest, _rank(weights[g, at]))
                        top = _rank(np.int32(highest))
                        total = np.float32(0)
                        for at in range(length):
                            weight = _exp(weights[g, at] - top)
                            weights[g, at] = weight
                            total += weight
                        share = np.float32(1) / total
                        for at in range(length):
                            weights[g, at] *= share
                        for d in range(dim):
                            mixed[g, d] = 0
                    fours = length - length % 4
                    for at in range(0, fours, 4):
                        for line in range(0, 4 * dim, LINE):
                            _fetch(after[at], line)
                        v0, v1, v2, v3 = v[at], v[at + 1], v[at + 2], v[at + 3]
                        for d in range(dim):
                            x0, x1, x2, x3 = _wide(v0[d]), _wide(v1[d]), _wide(v2[d]), _wide(v3[d])
                            for g in range(group):
                                mixed[g, d] += (
                                    weights[g, at] * x0
                                    + weights[g, at + 1] * x1
                                    + weights[g, at + 2] * x2
                                    + weights[g, at + 3] * x3
                                )
                    for at in range(fours, length):
                        for g in range(group):
                            for d in range(dim):
                                mixed[g, d] += weights[g, at] * _wide(v[at, d])
                    for g in range(group):
                        for d in range(dim):
                            out[b, t, head * group + g, d] = _narrow(mixed[g, d], out[0, 0, 0, 0])

    compiled: Callable[..., None] = _compiled(attend)
    return compiled


@_compiled
def add_norm(hidden, x, weight, eps, out):  # type: ignore[no-untyped-def]
    """Add x [B, H] to `hidden` [B, H], rounded to its type, and write its RMS norm to `out`."""
    size = hidden.shape[1]
    for b in range(hidden.shape[0]):
        squares = np.float32(0)
        for i in range(size):
            total = _narrow(_wide(hidden[b, i]) + _wide(x[b, i]), hidden[0, 0])
            hidden[b, i] = total
            squares += _wide(total) * _wide(total)
        scale = np.float32(1) / np.sqrt(squares / np.float32(size) + eps)
        for i in range(size):
            out[b, i] = _narrow(_wide(hidden[b, i]) * scale * _wide(weight[i]), out[0, 0])


@_compiled
def gate(gate_up, out):  # type: ignore[no-untyped-def]
    """silu(g) u of gate_up [B, 2I], g first, into `out` [B, I]."""
    size = out.shape[1]
    for b in range(out.shape[0]):
        for i in range(size):
            g = _wide(gate_up[b, i])
            out[b, i] = _narrow(g / (np.float32(1) + _exp(-g)) * _wide(gate_up[b, size + i]), out[0, 0])


@_compiled
def draw(logits, temperatures, uniforms, ids, logprobs):  # type: ignore[no-untyped-def]
    """For each row of logits [B, V]: the token at which the cumulative distribution passes its uniform number.

    In two levels as in `sampling`: blocks of the vocabulary, summed in fp32, then a block's tokens, both added up in
    fp64. At temperature 0 the largest logit's first token, with its log-probability at temperature 1.

    Args:
        temperatures: [B] fp32, 0 or at least `sampling.LOWEST_TEMPERATURE`.
        uniforms: [B] fp64, in [0, 1).
        ids, logprobs: [B] int64 and fp64, written.
    """
    size = logits.shape[1]
    blocks = (size + BLOCK - 1) // BLOCK
    mass = np.empty(blocks, np.float64)
    for b in range(logits.shape[0]):
        row = logits[b]
        highest = LOWEST
        for i in range(size):
            highest = max(highest, _rank(_wide(row[i])))
        top = _rank(np.int32(highest))
        greedy = temperatures[b] == 0
        share = np.float32(1) / (np.float32(1) if greedy else temperatures[b])
        total = np.float64(0)
        for block in range(blocks):
            weight = np.float32(0)
            for i in range(block * BLOCK, min(size, (block + 1) * BLOCK)):
                weight += _weight((_wide(row[i]) - top) * share)
            total += weight
            mass[block] = total
        target = uniforms[b] * total
        found = 0
        if greedy:
            while found < size - 1 and _wide(row[found]) != top:
                found += 1
        else:
            block = 0
            while block < blocks - 1 and not mass[block] > target:
                block += 1
            reached = mass[block - 1] if block else np.float64(0)
            # The block's weight was summed in fp32 and may be a trifle more than that of its tokens: then its last
            # token that has any.
            for i in range(block * BLOCK, min(size, (block + 1) * BLOCK)):
                weight = _weight((_wide(row[i]) - top) * share)
                if weight > 0:
                    found = i
                    reached += weight
                    if reached > target:
                        break
        ids[b] = found
        logprob = np.float64((_wide(row[found]) - top) * share) - np.log(total)
        logprobs[b] = 0.0 if logprob > 0 else logprob
