"""Counter-based noise and the stochastic release that draws from it.

Every number is a function of (seed, step, sample, sequence id, layer, head, tick, key, draw) and of nothing else, so prefill,
decoding, recomputation in a backward and any batch composition draw the same numbers without keeping a generator's state.
The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
one that `tl.philox` computes, so a Triton kernel can draw these numbers too.

Layout of a draw: key = (two words mixed from seed, step, sample, sequence id), counter = (key position j, absolute tick n,
head | layer << 16, i // 4) for word number i of the event; word 0 selects the event, words 1, 2, ... are its randomness.

Dimensions: B batch, H query heads, N ticks, Tk keys.

Numbered equations are those of prompts/presynapse.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.errors import UserError

Word = Tensor | int
MODES = ("normal_reparam", "gumbel_sigmoid_ste", "straight_through")

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# The generator's multipliers less 2^32: products with a word then stay inside int64, whose overflow C++ leaves undefined,
# the low half is unchanged, and the high half only lacks the word itself.
_FACTORS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
_MAX_HEADS = 1 << 16


def _multiply(word: Word, factor: int) -> tuple[Word, Word]:
    """High and low 32 bits of word * (factor + 2^32), for a word in [0, 2^32)."""
    product = word * factor
    return (product >> 32) + word, product & _MASK


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Four random words of each counter: Philox4x32-10, equal to Random123 and `tl.philox`.

    counter, key: int64 tensors (or ints) that hold uint32 values and broadcast against each other. Returns int64 words in
    [0, 2^32) of the common shape, tensors unless every argument is an int. Any device; pure, so torch.compile can trace it.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # Not only a guard: the mask keeps the compiler from folding arange * factor into a loop index, which it computes in int32.
    c0, c2 = c0 & _MASK, c2 & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _FACTORS[0])
        high2, low2 = _multiply(c2, _FACTORS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


class ReleaseNoise(NamedTuple):
    """Where a layer's draws come from.

    key: two words per sequence, [B, 1, 1] int64 each. layer: index of the layer. first_tick: absolute index n of the local
    tick 0, common or one per row [B].
    """

    key: tuple[Tensor, Tensor]
    layer: int | Tensor
    first_tick: int | Tensor

    @classmethod
    def of(cls, sequence_ids: Tensor, seed: int, step: int | Tensor = 0, sample: int = 0) -> ReleaseNoise:
        """Noise of layer 0 from tick 0 on, for sequences with the integer ids `sequence_ids` [B].

        seed: any integer (modulo 2^64). step and sample: in [0, 2^32), UserError otherwise; a step that is a 0-dim int64 tensor is not
        checked, which would wait for its device. One call of the generator mixes
        them, so neighbouring seeds, steps, samples and ids give unrelated streams.
        """
        for name, value in (("step", step), ("sample", sample)):
            if isinstance(value, int) and not 0 <= value <= _MASK:
                raise UserError(f"{name}={value} of the release noise is out of range: it must be between 0 and {_MASK}")
        ids = sequence_ids.to(torch.int64)[:, None, None]
        words = philox((step, sample, ids & _MASK, (ids >> 32) & _MASK), (seed & _MASK, (seed >> 32) & _MASK))
        return cls((words[0], words[1]), 0, 0)

    def at(self, layer: int | Tensor, first_tick: int | Tensor) -> ReleaseNoise:
        """The same sequences' noise in another layer, with local tick 0 at the absolute tick `first_tick` (int or [B])."""
        return self._replace(layer=layer, first_tick=first_tick)


class ReleaseSampler(NamedTuple):
    """How release events are sampled.

    fraction: share of the (tick, head, key) events that are sampled, in [0, 1]; the others keep their expectation.
    mode: one of MODES. temperature: of the relaxed gradient of "gumbel_sigmoid_ste", > 0. count: vesicles per event, >= 1.
    """

    fraction: float
    mode: str
    temperature: float
    count: int


def sampled_probability(logit: Tensor, tick: int, noise: ReleaseNoise, sampler: ReleaseSampler) -> Tensor:
    """Release probabilities of which a random share is replaced by a sampled k / count, k ~ Binomial(count, p). Equation (P20).

    Args:
        logit: [B, H, Tk], p = sigmoid(logit), key j at absolute position j; or [B, H, N, Tk] for N ticks at once.
        tick: index of the tick (of the first of the N ticks), counted from noise.first_tick.
        noise: its rows are the B sequences. sampler: see `ReleaseSampler`.

    Returns:
        Probabilities in [0, 1], logit's shape and dtype. Which events are sampled never depends on p. By mode:
        normal_reparam: p + sqrt(p (1 - p) / count) * eps with eps ~ N(0, 1), limited to [0, 1], and its own gradient.
        gumbel_sigmoid_ste: k = number of vesicles i with logit + l_i > 0 for logistic l_i (Jang et al. and Maddison et al.,
        2017), with the gradient of the mean of sigmoid((logit + l_i) / temperature), which is first order only.
        straight_through: the same k with the gradient of p.

    Raises UserError for a sampler out of its bounds.
    """
    _check(sampler)
    assert noise.key[0].shape[0] == logit.shape[0], "one noise key per row"
    assert logit.shape[1] <= _MAX_HEADS, "the counter keeps 16 bits for the head"
    x = logit.to(torch.promote_types(logit.dtype, torch.float32))
    p = torch.sigmoid(x)
    if sampler.fraction <= 0:
        return p.to(logit.dtype)
    words = 3 if sampler.mode == "normal_reparam" else 1 + sampler.count
    draws = _uniforms(x, tick, noise, words)
    selected = next(draws) < sampler.fraction
    if sampler.mode == "normal_reparam":
        # eps by Box and Muller (1958)
        eps = torch.sqrt(-2 * torch.log(next(draws))) * torch.cos(2 * math.pi * next(draws))
        sampled = normal_probability(x, eps, sampler.count)
    elif sampler.mode == "gumbel_sigmoid_ste":
        sampled = _gumbel(x, p, draws, sampler)
    else:
        hard = sum(u < p.detach() for u in draws).to(p.dtype) / sampler.count
        sampled = hard + (p - p.detach())
    return torch.where(selected, sampled, p).to(logit.dtype)


def _check(sampler: ReleaseSampler) -> None:
    if sampler.mode not in MODES:
        raise UserError(f"stochastic release mode {sampler.mode!r} is not valid: one of {', '.join(MODES)}")
    if not 0 <= sampler.fraction <= 1:
        raise UserError(f"fraction={sampler.fraction} of sampled release events is out of range: it must be between 0 and 1")
    if not sampler.temperature > 0:
        raise UserError(f"temperature={sampler.temperature} of the sampled release is out of range: it must be greater than 0")
    if sampler.count < 1:
        raise UserError(f"count={sampler.count} vesicles per release event is out of range: it must be at least 1")


def _uniforms(x: Tensor, tick: int, noise: ReleaseNoise, words: int) -> Iterator[Tensor]:
    """The first `words` uniform numbers of every event, in x's shape and dtype, strictly between 0 and 1.

    One call of the generator makes four of them, so no more than four are alive at once. They lie on a grid of 2^-23 plus a
    half, which float32 holds exactly: symmetric, never 0 or 1, the same in float32 and float64.
    """
    axes = (1,) * (x.dim() - 2)
    heads = torch.arange(x.shape[1], device=x.device).view(-1, *axes) + noise.layer * _MAX_HEADS
    key = tuple(word.view(-1, 1, *axes) for word in noise.key)
    n = noise.first_tick
    n = (n if isinstance(n, int) else n.to(x.device, torch.int64).view(-1, 1, *axes)) + tick
    if x.dim() == 4:
        n = n + torch.arange(x.shape[2], device=x.device)[:, None]
    keys = torch.arange(x.shape[-1], device=x.device)
    for draw in range(-(-words // 4)):
        for word in philox((keys, n, heads, draw), key)[: words - 4 * draw]:
            yield ((word >> 9).to(x.dtype) + 0.5) * 2.0**-23


def normal_probability(x: Tensor, eps: Tensor, count: int) -> Tensor:
    """The normal approximation of k / count at logit x: p + sqrt(p (1 - p) / count) eps, limited to [0, 1]."""
    # sqrt(p (1 - p)) through logarithms: autograd's own sqrt has an infinite slope, then a NaN, once p rounds to 0 or 1
    spread = torch.exp((F.logsigmoid(x) + F.logsigmoid(-x)) / 2)
    return (torch.sigmoid(x) + spread * (eps / math.sqrt(count))).clamp(0, 1)


def _gumbel(x: Tensor, p: Tensor, draws: Iterator[Tensor], sampler: ReleaseSampler) -> Tensor:
    """The hard k / count with the relaxed slope in x, which is summed up beside k so that no vesicle outlives its turn.

    A vesicle is released for u < p, the same as x + l > 0 with the logistic l = -logit(u).
    """
    needs_slope = torch.is_grad_enabled() and x.requires_grad
    at, hard, slope = x.detach(), torch.zeros_like(p), torch.zeros_like(p)
    with torch.no_grad():
        for u in draws:
            hard = hard + (u < p)
            if needs_slope:
                relaxed = torch.sigmoid((at - torch.logit(u)) / sampler.temperature)
                slope = slope + relaxed * (1 - relaxed)
    hard = hard / sampler.count
    return hard + (x - at) * (slope / (sampler.count * sampler.temperature)) if needs_slope else hard
