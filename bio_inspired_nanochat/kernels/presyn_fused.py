"""Drive, terminals and attention in two passes over the pairs, for terminals whose calcium and pool are linear recurrences.

Phase 1 walks each block of keys forward in time and keeps the terminals' state at the start of every tile of queries. Phase 2
has one program per tile of queries: it loads those states, replays the ticks of the tile from the same logits that it needs
for the softmax, and adds the resulting bias. The backward walks each block of keys through the tiles in reverse time, with
the adjoints of calcium and pool in registers; a last pass over queries makes dq, so that results are the same twice.

Tiles are keys x queries. Their columns are permuted so that on tensor-core hardware every thread holds consecutive times of
a key: a sum over a tick then moves no data between threads. Biochemistry runs on [K, M / c] values. What happens within a
tick is generated from `kernels.terminal` (see `kernels.codegen`).

Logits need no running maximum: with QK norm |logit| has a bound, the bias has one, and the barrier is never positive.

Dimensions: B batch, H query heads, Hkv key heads, T tokens, N ticks, D head size; a tile has K keys and M queries.
"""

from __future__ import annotations

import functools
import linecache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels import codegen
from bio_inspired_nanochat.kernels.terminal import calcium_step, pool_step, release_logit, terminal_bias
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

# Largest |logit| + beta_max whose exponentials and their sums stay well inside float32.
LARGEST_LOGIT = 40.0


class Spec(NamedTuple):
    """The static part of a set of core parameters."""

    tick: int
    beta_max: float
    epsilon: float
    constants: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Spec:
        """The inverse of `text`."""
        tick, beta_max, epsilon, constants = text.split("|")
        return cls(int(tick), float(beta_max), float(epsilon), tuple(constants.split(",")))

    @property
    def text(self) -> str:
        """The spec as an operator can take it."""
        return f"{self.tick}|{self.beta_max}|{self.epsilon}|{','.join(self.constants)}"

    def params(self, values: tuple[Tensor, ...]) -> PresynParams:
        """Parameters with these constants."""
        fields = dict.fromkeys(PresynParams._fields) | {"tick": self.tick, "beta_max": self.beta_max, "epsilon": self.epsilon}
        return PresynParams(**(fields | {"endo_slots": 0, "lateral_window": 0} | dict(zip(self.constants, values, strict=True))))


class Part(NamedTuple):
    """A generated elementwise function: lines for the constants, for the values and for the adjoint, with their results."""

    once: list[str]
    constants: list[str]
    lines: list[str]
    outputs: list[str]
    reverse: list[str]
    gradients: list[str]
    finish: list[str]
    finished: list[str]


def _part(spec: Spec, function: Any, inputs: list[str], cotangents: list[str], prefix: str) -> Part:
    """Generate `function(*inputs, p)`; names of variables start with `prefix`."""
    count = len(spec.constants)
    graph = codegen.trace(lambda *t: function(*t[: len(inputs)], spec.params(t[len(inputs) :])), len(inputs) + count)
    prelude, body = codegen.split(graph, count)
    derived = sum(node.op == "placeholder" for node in body.graph.nodes) - len(inputs)
    names = [f"{prefix}h{i}" for i in range(derived)]
    raw = [f"r{i}" for i in range(count)]
    once, constants = codegen.emit(prelude, raw, f"{prefix}w")
    lines, outputs = codegen.emit(body, [*inputs, *names], f"{prefix}v")
    reverse, gradients = codegen.emit(
        codegen.derivative(body, 0, len(inputs) + derived, len(outputs)), [*inputs, *names, *cotangents], f"{prefix}u"
    )
    finish, finished = codegen.emit(codegen.derivative(prelude, 0, count, derived), [*raw, *(f"d{n}" for n in names)], f"{prefix}f")
    return Part(
        [*once, *(f"{n} = {v}" for n, v in zip(names, constants, strict=True))], names, lines, outputs, reverse, gradients, finish, finished
    )


def _influx(drive: Tensor, p: PresynParams) -> list[Tensor]:
    decay, influx = calcium_step(p)
    return [decay + 0 * drive, influx * drive]


def _pool(calcium: Tensor, drive: Tensor, p: PresynParams) -> list[Tensor]:
    logit = release_logit(PresynState(calcium, calcium, calcium), p)
    decay, target, _ = pool_step(p.release_rate * torch.sigmoid(logit) * drive, 1 / p.tau_rrp, p)
    return [decay, target * (1 - decay), logit]


def _bias(logit: Tensor, vesicles: Tensor, p: PresynParams) -> list[Tensor]:
    return [terminal_bias(PresynState(logit, vesicles, logit), p, logit)]


HELPERS = """
import triton
import triton.language as tl
from bio_inspired_nanochat.kernels.tiles import logarithm, reciprocal

@triton.jit
def affine(a0, b0, a1, b1):
    return a0 * a1, b0 * a1 + b1

@triton.jit
def raise_drive(x, scale, theta, KIND: tl.constexpr):
    if KIND == 0:
        half = tl.maximum(x * (0.5 * scale) + (0.5 - 0.5 * theta), 0.0)
        slope = tl.minimum(half, 1.0)
        return slope * slope + 2.0 * (half - slope), slope
    above = x * scale - theta
    return tl.maximum(above, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(above))), reciprocal(1.0 + tl.exp(-above))

@triton.jit
def tick_sum(x, K: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    timed = tl.permute(tl.reshape(x, [K, M // 8, 4, 2]), (0, 2, 1, 3))
    return tl.sum(tl.reshape(timed, [K, M // C, C]), 2)

@triton.jit
def tick_spread(x, K: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    timed = tl.reshape(tl.broadcast_to(x[:, :, None], [K, M // C, C]), [K, 4, M // 8, 2])
    return tl.reshape(tl.permute(timed, (0, 2, 1, 3)), [K, M])

@triton.jit
def times(M: tl.constexpr):
    m = tl.arange(0, M)
    return ((m % 8) // 2) * (M // 4) + (m // 8) * 2 + m % 2

@triton.jit
def before(x, first, N: tl.constexpr, K: tl.constexpr):
    column = tl.broadcast_to(tl.arange(0, N)[None, :], [K, N])
    return tl.where(column == 0, tl.broadcast_to(first[:, None], [K, N]), tl.gather(x, tl.maximum(column - 1, 0), 1))

@triton.jit
def behind(x, last, N: tl.constexpr, K: tl.constexpr):
    column = tl.broadcast_to(tl.arange(0, N)[None, :], [K, N])
    return tl.where(column == N - 1, tl.broadcast_to(last[:, None], [K, N]), tl.gather(x, tl.minimum(column + 1, N - 1), 1))

@triton.jit
def pick(x, at, N: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == at, x, 0.0), 1)
"""


class Kernels(NamedTuple):
    """The compiled kernels of one Spec; derived counts the per-head constants that the gradients are collected for."""

    derived: int
    states: Any
    attend: Any
    keys: Any
    queries: Any
    finish: Any


@functools.cache
def kernels_for(text: str) -> Kernels:
    """Generate and compile the kernels of a spec; some seconds the first time. Not inside an operator or a compilation."""
    spec = Spec.parse(text)
    with torch.no_grad():
        influx = _part(spec, _influx, ["drive"], ["gcdecay", "gcadd"], "i")
        pool = _part(spec, _pool, ["calcium", "drive"], ["grdecay", "gradd", "glogit"], "p")
        bias = _part(spec, _bias, ["release", "vesicles"], ["gbeta"], "b")
    source = HELPERS + "\n".join(_texts(spec, influx, pool, bias))
    name = f"<fused presyn kernels {text}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)  # noqa: S102 (the text was made above, from the definition alone)
    derived = sum(len(part.constants) for part in (influx, pool, bias))
    return Kernels(derived, *(namespace[kernel] for kernel in ("states", "attend", "backward_keys", "backward_queries", "finish")))


def _indent(lines: list[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


HEAD = """\
row = tl.program_id(1).to(tl.int64)
batch, head = row // heads, row % heads
source = (batch * (heads // group) + head // group) * tokens
depth = tl.arange(0, D)
theta = tl.load(theta_ptr + head)
tiles = tl.cdiv(tokens, M)
N: tl.constexpr = M // C"""
KEYS = """\
key = block * K + tl.arange(0, K)
live = key < tokens
k = tl.load(k_ptr + (source + key[:, None]) * D + depth, mask=live[:, None], other=0.0)"""
STATES = """\
ca_start = tl.load(check_ptr + tile * 2 * size + row * tokens + key, mask=live, other=0.0)
pool_start = tl.load(check_ptr + (tile * 2 + 1) * size + row * tokens + key, mask=live, other=1.0)"""
QUERIES = """\
place = tile * M + times(M)
real = place < tokens
at = (row * tokens + place[:, None]) * D + depth
q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)"""
DRIVE = """\
x = tl.dot(k, tl.trans(q), input_precision=PRECISION)
raised, slope = raise_drive(x, scale, theta, KIND)
if tile * M < block * K + K:
    raised = tl.where(place[None, :] > key[:, None], raised, 0.0)
drive = tick_sum(raised, K, M, C) * (1.0 / C)"""
LOGIT = """\
bias = beta * 1.4426950408889634
if BARRIER:
    nearness = (tl.load(barrier_ptr + row * tokens + key, mask=live, other=0.0) - origin).to(tl.float32)
    bias += strength * 1.4426950408889634 * nearness[:, None]
logit = x * (scale * 1.4426950408889634) + tick_spread(bias, K, M, C)"""
COST = """\
strength = 0.0
cost = tl.zeros([M], tl.float32)
origin = tl.zeros([1], tl.float32)
if BARRIER:
    strength = tl.load(strength_ptr + head)
    origin = tl.load(barrier_ptr + row * tokens + tile * M)
    cost = (tl.load(barrier_ptr + row * tokens + place, mask=real, other=0.0) - origin).to(tl.float32)
    cost *= strength * 1.4426950408889634"""
WEIGHT = """\
weight = tl.exp2(logit - (lse + cost)[None, :])
if (tile * M < block * K + K) | (tile == tiles - 1):
    weight = tl.where((place[None, :] >= key[:, None]) & real[None, :] & live[:, None], weight, 0.0)
g = weight * (tl.dot(v, tl.trans(gy), input_precision=PRECISION) - delta[None, :])"""
SLOPE = """\
spread = slope * tick_spread(gu, K, M, C)
if tile * M < block * K + K:
    spread = tl.where(place[None, :] > key[:, None], spread, 0.0)"""
COTANGENTS = """\
gy = tl.load(gy_ptr + at, mask=real[:, None], other=0.0)
lse = tl.load(lse_ptr + row * tokens + place, mask=real, other=0.0)
delta = tl.load(delta_ptr + row * tokens + place, mask=real, other=0.0)"""
STATIC = "C: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr"


def _replay(influx: Part, pool: Part, bias: Part | None) -> list[str]:
    """States at the start (calcium, vesicles) and end (*_after) of every tick of a tile, [K, N], and the bias."""
    lines = [
        *influx.lines,
        f"cdecay, cadd = {', '.join(influx.outputs)}",
        "ca, cb = tl.associative_scan((cdecay, cadd), 1, affine)",
        "calcium_after = ca * ca_start[:, None] + cb",
        "calcium = before(calcium_after, ca_start, N, K)",
        *pool.lines,
        f"rdecay, radd, release = {', '.join(pool.outputs)}",
        "ra, rb = tl.associative_scan((rdecay, radd), 1, affine)",
        "vesicles_after = ra * pool_start[:, None] + rb",
        "vesicles = before(vesicles_after, pool_start, N, K)",
    ]
    return lines if bias is None else [*lines, *bias.lines, f"beta = {bias.outputs[0]}"]


split = str.splitlines


def _states_lines(once: list[str], influx: Part, pool: Part) -> list[str]:
    """Phase 1: one block of keys forward through the tiles."""
    return [
        *split(HEAD), *once, "block = tl.program_id(0)", *split(KEYS),
        "ca_start = tl.zeros([K], tl.float32)",
        "pool_start = tl.full([K], 1.0, tl.float32)",
        "for tile in range(block * K // M, tiles):",
        "    tl.store(check_ptr + tile * 2 * size + row * tokens + key, ca_start, mask=live)",
        "    tl.store(check_ptr + (tile * 2 + 1) * size + row * tokens + key, pool_start, mask=live)",
        *_indent([*split(QUERIES), *split(DRIVE), *_replay(influx, pool, None)], 1),
        "    ca_start = pick(calcium_after, N - 1, N)",
        "    pool_start = pick(vesicles_after, N - 1, N)",
    ]  # fmt: skip


def _attend_lines(once: list[str], influx: Part, pool: Part, bias: Part) -> list[str]:
    """Phase 2: one tile of queries over the blocks of keys."""
    return [
        *split(HEAD), *once, "tile = tiles - 1 - tl.program_id(0)", *split(QUERIES), *split(COST),
        "sums = tl.zeros([K, M], tl.float32)",
        "y = tl.zeros([M, D], tl.float32)",
        "for block in range(0, tl.cdiv(tl.minimum(tokens, tile * M + M), K)):",
        *_indent([*split(KEYS), *split(STATES)], 1),
        "    v = tl.load(v_ptr + (source + key[:, None]) * D + depth, mask=live[:, None], other=0.0)",
        *_indent([*split(DRIVE), *_replay(influx, pool, bias), *split(LOGIT)], 1),
        "    weight = tl.exp2(logit - (cost + limit)[None, :])",
        "    if tile * M < block * K + K:",
        "        weight = tl.where((place[None, :] >= key[:, None]) & live[:, None], weight, 0.0)",
        "    sums += weight",
        "    y += tl.dot(tl.trans(weight.to(v.dtype)), v, input_precision=PRECISION)",
        "total = tl.sum(sums, 0)",
        "tl.store(y_ptr + at, (y / total[:, None]).to(q.dtype), mask=real[:, None])",
        "tl.store(lse_ptr + row * tokens + place, tl.log2(total) + limit, mask=real)",
    ]  # fmt: skip


def _keys_lines(once: list[str], names: list[str], influx: Part, pool: Part, bias: Part) -> list[str]:
    """Backward of one block of keys through the tiles in reverse time."""

    def collect(part: Part, first: int) -> list[str]:
        return [f"a{n} += {g}" for n, g in zip(part.constants, part.gradients[first:], strict=True)]

    return [
        *split(HEAD), *once, "block = tl.program_id(0)", *split(KEYS),
        "v = tl.load(v_ptr + (source + key[:, None]) * D + depth, mask=live[:, None], other=0.0)",
        *(f"a{name} = tl.zeros([K, N], tl.float32)" for name in names),
        *(f"{name} = tl.zeros([K], tl.float32)" for name in ("gc", "gr")),
        *(f"{name} = tl.zeros([K, N], tl.float32)" for name in ("gtheta", "gbarrier", "gstrength")),
        "gk = tl.zeros([K, D], tl.float32)",
        "gv = tl.zeros([K, D], tl.float32)",
        "for back in range(block * K // M, tiles):",
        "    tile = tiles - 1 - (back - block * K // M)",
        *_indent([*split(QUERIES), *split(COST), *split(STATES), *split(DRIVE), *_replay(influx, pool, bias), *split(LOGIT)], 1),
        *_indent([*split(COTANGENTS), *split(WEIGHT)], 1),
        *_indent([
            "gv += tl.dot(weight.to(gy.dtype), gy, input_precision=PRECISION)",
            "gbeta = tick_sum(g, K, M, C)",
            "if BARRIER:",  # every row of g sums to zero, so a part of the gap that is common to a row drops out
            "    gbarrier += gbeta * strength",
            "    gstrength += gbeta * nearness[:, None]",
            *bias.reverse, f"glogit, gvesicles = {', '.join(bias.gradients[:2])}", *collect(bias, 2),
            "ga, gb = tl.associative_scan((rdecay, gvesicles), 1, affine, reverse=True)",
            "gvesicles = ga * gr[:, None] + gb",
            "gradd = behind(gvesicles, gr, N, K)",
            "grdecay = gradd * vesicles",
            *pool.reverse, f"gcalcium = {pool.gradients[0]}", f"gdrive = {pool.gradients[1]}", *collect(pool, 2),
            "ga, gb = tl.associative_scan((cdecay, gcalcium), 1, affine, reverse=True)",
            "gcalcium = ga * gc[:, None] + gb",
            "gcadd = behind(gcalcium, gc, N, K)",
            "gcdecay = gcadd * calcium",
            *influx.reverse, f"gdrive += {influx.gradients[0]}", *collect(influx, 1),
            "gu = gdrive * (1.0 / C)",
            "gr = pick(gvesicles, 0, N)",
            "gc = pick(gcalcium, 0, N)",
            "tick = tile * N + tl.arange(0, N)",
            "there = row * ticks * tokens + (tick[None, :] * tokens + key[:, None])",
            "tl.store(beta_ptr + there, beta, mask=live[:, None] & (tick[None, :] < ticks))",
            "tl.store(gu_ptr + there, gu, mask=live[:, None] & (tick[None, :] < ticks))",
            *split(SLOPE),
            "gtheta -= tick_sum(spread, K, M, C)",
            "g += spread",
            "gk += tl.dot(g.to(q.dtype), q, input_precision=PRECISION)",
        ], 1),
        "own = (row * tokens + key[:, None]) * D + depth",
        "tl.store(gk_ptr + own, gk * scale, mask=live[:, None])",
        "tl.store(gv_ptr + own, gv, mask=live[:, None])",
        "blocks = tl.num_programs(0)",
        "tl.store(gtheta_ptr + row * blocks + block, tl.sum(tl.where(live, tl.sum(gtheta, 1), 0.0), 0))",
        "if BARRIER:",
        "    tl.store(gbarrier_ptr + row * tokens + key, tl.sum(gbarrier, 1), mask=live)",
        "    tl.store(gstrength_ptr + row * blocks + block, tl.sum(tl.where(live, tl.sum(gstrength, 1), 0.0), 0))",
        *(
            f"tl.store(gh_ptr + ({i} * tl.num_programs(1) + row) * blocks + block, tl.sum(tl.where(live, tl.sum(a{name}, 1), 0.0), 0))"
            for i, name in enumerate(names)
        ),
    ]  # fmt: skip


def _queries_lines() -> list[str]:
    """dq of one tile of queries, from the bias and the drive's gradient that the other pass stored."""
    return [
        *split(HEAD), "tile = tiles - 1 - tl.program_id(0)", *split(QUERIES), *split(COST), *split(COTANGENTS),
        "gq = tl.zeros([M, D], tl.float32)",
        "for block in range(0, tl.cdiv(tl.minimum(tokens, tile * M + M), K)):",
        *_indent([
            *split(KEYS),
            "v = tl.load(v_ptr + (source + key[:, None]) * D + depth, mask=live[:, None], other=0.0)",
            "x = tl.dot(k, tl.trans(q), input_precision=PRECISION)",
            "raised, slope = raise_drive(x, scale, theta, KIND)",
            "tick = tile * N + tl.arange(0, N)",
            "there = row * ticks * tokens + (tick[None, :] * tokens + key[:, None])",
            "beta = tl.load(beta_ptr + there, mask=live[:, None] & (tick[None, :] < ticks), other=0.0)",
            "gu = tl.load(gu_ptr + there, mask=live[:, None] & (tick[None, :] < ticks), other=0.0)",
            *split(LOGIT), *split(WEIGHT), *split(SLOPE),
            "gq += tl.dot(tl.trans((g + spread).to(k.dtype)), k, input_precision=PRECISION)",
        ], 1),
        "tl.store(gq_ptr + at, gq * scale, mask=real[:, None])",
    ]  # fmt: skip


def _texts(spec: Spec, influx: Part, pool: Part, bias: Part) -> list[str]:
    """The source lines of the five kernels."""
    parts = (influx, pool, bias)
    once = [f"r{i} = tl.load(constant_ptr + {i} * heads + head)" for i in range(len(spec.constants))]
    once += [line for part in parts for line in part.once]
    names = [name for part in parts for name in part.constants]
    states, attend = _states_lines(once, influx, pool), _attend_lines(once, influx, pool, bias)
    keys, queries = _keys_lines(once, names, influx, pool, bias), _queries_lines()
    sizes = "scale, tokens, heads, group, size"
    inputs = "q_ptr, k_ptr, v_ptr, theta_ptr, constant_ptr, check_ptr, barrier_ptr, strength_ptr"
    return [
        *codegen.kernel_text("states", f"q_ptr, k_ptr, theta_ptr, constant_ptr, check_ptr, {sizes}, {STATIC}", states),
        *codegen.kernel_text("attend", f"{inputs}, y_ptr, lse_ptr, limit, {sizes}, BARRIER: tl.constexpr, {STATIC}", attend),
        *codegen.kernel_text(
            "backward_keys",
            f"{inputs}, gy_ptr, lse_ptr, delta_ptr, gk_ptr, gv_ptr, beta_ptr, gu_ptr, gtheta_ptr, gbarrier_ptr, gstrength_ptr, gh_ptr, ticks, "
            f"{sizes}, BARRIER: tl.constexpr, {STATIC}",
            keys,
        ),
        *codegen.kernel_text(
            "backward_queries",
            f"q_ptr, k_ptr, v_ptr, theta_ptr, barrier_ptr, strength_ptr, gy_ptr, lse_ptr, delta_ptr, beta_ptr, gu_ptr, gq_ptr, ticks, "
            f"{sizes}, BARRIER: tl.constexpr, {STATIC}",
            queries,
        ),
        *codegen.finish_text(
            len(spec.constants),
            names,
            [line for part in parts for line in part.finish],
            [" + ".join(values) for values in zip(*(part.finished for part in parts), strict=True)],
        ),
        "",
    ]
