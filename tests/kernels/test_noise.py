"""Counter-based noise: the published generator, the same draws however they are asked for, and honest statistics."""

import importlib.util
import math
import shutil

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import noise as noise_module
from bio_inspired_nanochat.kernels.noise import MODES, ReleaseNoise, ReleaseSampler, philox, sampled_probability
from tests.kernels.interpreter import run_interpreted

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def triton_words(counter_ptr, out_ptr, seed, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        counter = tl.load(counter_ptr + at), tl.load(counter_ptr + SIZE + at), tl.load(counter_ptr + 2 * SIZE + at)
        words = tl.philox(seed, counter[0], counter[1], counter[2], tl.load(counter_ptr + 3 * SIZE + at))
        plain = tl.randint4x(seed, counter[0])
        for i in tl.static_range(4):
            tl.store(out_ptr + i * SIZE + at, words[i].to(tl.int64))
            tl.store(out_ptr + (4 + i) * SIZE + at, plain[i].to(tl.int64))


IDS = torch.tensor([5, 2**40 + 3, 11, 6])
NOISE = ReleaseNoise.of(IDS, seed=1)
KNOWN_ANSWERS = [  # (counter, key, words), from the kat_vectors of Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def sampler(mode="straight_through", fraction=1.0, temperature=0.5, count=64):
    return ReleaseSampler(fraction, mode, temperature, count)


def draw(noise=NOISE, shape=(4, 4, 8, 256), logit=0.0, tick=0, **how):
    return sampled_probability(torch.full(shape, logit), tick, noise, sampler(**how))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item() * math.sqrt(a.numel())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert list(philox(tuple(counter), tuple(key))) == words
    grid = philox(tuple(torch.tensor([[c], [c]]) for c in counter), tuple(torch.tensor([k, k, k]) for k in key))
    for got, want in zip(grid, words, strict=True):
        assert torch.equal(got, torch.full((2, 3), want))


def check_triton_words(device):
    counter = torch.randint(0, 2**32, (4, 32), device=device)
    for seed in (0, 1, 0x7FEDCBA987654321):
        out = torch.full((8, 32), -1, device=device)
        as_int32 = torch.where(counter >= 2**31, counter - 2**32, counter).int().contiguous()
        triton_words[(1,)](as_int32, out, seed, SIZE=32)
        key = torch.tensor(seed & 0xFFFFFFFF, device=device), torch.tensor(seed >> 32, device=device)
        zero = torch.zeros_like(counter[0])
        want = [*philox(tuple(counter), key), *philox((counter[0], zero, zero, zero), key)]
        assert torch.equal(out & 0xFFFFFFFF, torch.stack(want))


@pytest.mark.gpu
def test_philox_is_tritons_on_the_gpu():
    pytest.importorskip("triton")
    check_triton_words("cuda")


def test_philox_is_tritons_in_the_interpreter():
    run_interpreted("from tests.kernels.test_noise import check_triton_words\ncheck_triton_words('cpu')")


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_draws_the_same_numbers_in_any_company(mode):
    logit = torch.randn(4, 3, 6, 40)
    want = sampled_probability(logit, 0, NOISE.at(2, 7), sampler(mode, fraction=0.7))
    rows = torch.tensor([3, 1])
    some = sampled_probability(logit[rows], 0, ReleaseNoise.of(IDS[rows], seed=1).at(2, 7), sampler(mode, fraction=0.7))
    fewer_keys = sampled_probability(logit[..., :23], 0, NOISE.at(2, 7), sampler(mode, fraction=0.7))
    fewer_heads = sampled_probability(logit[:, :2], 0, NOISE.at(2, 7), sampler(mode, fraction=0.7))
    torch.testing.assert_close(some, want[rows])
    torch.testing.assert_close(fewer_keys, want[..., :23])
    torch.testing.assert_close(fewer_heads, want[:, :2])


@pytest.mark.parametrize("mode", MODES)
def test_ticks_draw_the_same_numbers_however_they_are_cut(mode):
    logit = torch.randn(4, 3, 6, 40)
    want = sampled_probability(logit, 0, NOISE.at(1, 10), sampler(mode))
    for n in range(6):
        torch.testing.assert_close(sampled_probability(logit[:, :, n], n, NOISE.at(1, 10), sampler(mode)), want[:, :, n])
    torch.testing.assert_close(sampled_probability(logit[:, :, 4], 0, NOISE.at(1, 14), sampler(mode)), want[:, :, 4])
    torch.testing.assert_close(sampled_probability(logit[:, :, 2:], 2, NOISE.at(1, 10), sampler(mode)), want[:, :, 2:])
    starts = torch.tensor([10, 12, 11, 15])  # rows that stand at their own ticks
    ragged = sampled_probability(logit[range(4), :, starts - 10], 0, NOISE.at(1, starts), sampler(mode))
    torch.testing.assert_close(ragged, want[range(4), :, starts - 10])


def test_half_and_double_precision_see_the_same_vesicles():
    logit = torch.randn(4, 3, 50).bfloat16()
    for mode in MODES:
        want = sampled_probability(logit.float(), 0, NOISE, sampler(mode))
        torch.testing.assert_close(sampled_probability(logit.double(), 0, NOISE, sampler(mode)), want.double(), atol=2e-6, rtol=0)
        assert torch.equal(sampled_probability(logit, 0, NOISE, sampler(mode)), want.bfloat16())


def test_words_are_uniform():
    words = torch.stack(philox((torch.arange(2**14), 3, 1 | 2 << 16, 0), tuple(w[0, 0, 0] for w in NOISE.key)))
    size = words.shape[1]
    for bits in (words >> 24, words >> 12 & 255, words & 255):
        for row in bits:
            seen = torch.bincount(row, minlength=256).double()
            chi_square = ((seen - size / 256) ** 2).sum().item() / (size / 256)
            assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
    below = words.sort(1).values.double() / 2**32 - torch.arange(size) / size
    assert below.abs().max().item() * math.sqrt(size) < 1.63  # Kolmogorov and Smirnov at 1 %
    assert correlation(words[0].double(), words[3].double()) < 4


@pytest.mark.parametrize(
    "other",
    [
        ReleaseNoise.of(IDS, seed=2),
        ReleaseNoise.of(IDS, seed=1 + 2**32),
        ReleaseNoise.of(IDS, seed=1, step=1),
        ReleaseNoise.of(IDS, seed=1, sample=1),
        ReleaseNoise.of(IDS + 1, seed=1),
        ReleaseNoise.of(IDS + 2**32, seed=1),
        NOISE.at(1, 0),
        NOISE.at(0, 8),
    ],
    ids=["seed", "seed_high", "step", "sample", "id", "id_high", "layer", "tick"],
)
def test_neighbouring_streams_are_unrelated(other):
    for mode in ("normal_reparam", "straight_through"):
        assert correlation(draw(mode=mode), draw(other, mode=mode)) < 4
    here, there = ((draw(noise, fraction=0.5, count=1) == 0.5).double() for noise in (NOISE, other))
    assert correlation(here, there) < 4


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["row", "head", "tick", "key"])
def test_neighbouring_events_are_unrelated(axis):
    for mode in ("normal_reparam", "straight_through"):
        drawn = draw(mode=mode)
        assert correlation(drawn.narrow(axis, 0, drawn.shape[axis] - 1), drawn.narrow(axis, 1, drawn.shape[axis] - 1)) < 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.5])
def test_a_sample_has_the_binomial_mean_and_variance(mode, logit):
    p = torch.tensor(logit).sigmoid().item()
    drawn = draw(mode=mode, logit=logit).double()
    variance = p * (1 - p) / 64
    assert abs(drawn.mean().item() - p) < 4 * math.sqrt(variance / drawn.numel())
    assert abs(drawn.var().item() / variance - 1) < 4 * math.sqrt(2 / drawn.numel())


def test_the_normal_draws_are_normal():
    z = ((draw(mode="normal_reparam", count=10_000).double() - 0.5) * 200).flatten().sort().values
    below = torch.special.ndtr(z) - torch.arange(z.numel()) / z.numel()
    assert below.abs().max().item() * math.sqrt(z.numel()) < 1.63


@pytest.mark.parametrize("mode", MODES)
def test_the_asked_share_of_events_is_sampled(mode):
    for fraction in (0.1, 0.5, 0.95):
        sampled = draw(mode=mode, fraction=fraction, count=3) != 0.5  # three vesicles never give a half
        error = math.sqrt(fraction * (1 - fraction) / sampled.numel())
        assert abs(sampled.double().mean().item() - fraction) < 4 * error


@pytest.mark.parametrize("mode", MODES)
def test_no_event_or_every_event(mode):
    logit = torch.randn(4, 3, 50)
    assert torch.equal(sampled_probability(logit, 0, NOISE, sampler(mode, fraction=0.0)), torch.sigmoid(logit))
    assert not (draw(mode=mode, count=3) == 0.5).any()


def test_which_events_are_sampled_does_not_depend_on_the_probability():
    low, high = (draw(logit=x, fraction=0.4, count=3) != torch.tensor(x).sigmoid() for x in (-1.0, 2.0))
    assert torch.equal(low, high)
    vesicles = draw(count=3)[low].double()
    assert abs(vesicles.mean().item() - 0.5) < 4 * math.sqrt(0.25 / 3 / vesicles.numel())  # and their outcome not on being sampled


@pytest.mark.parametrize("count", [1, 3, 4, 7, 24])
def test_hard_modes_release_whole_vesicles_and_agree(count):
    logit = torch.randn(4, 3, 200).requires_grad_()
    hard = sampled_probability(logit, 0, NOISE, sampler("straight_through", count=count))
    assert torch.equal(hard, sampled_probability(logit, 0, NOISE, sampler("gumbel_sigmoid_ste", count=count)))
    whole = (hard.detach().double() * count).round()
    torch.testing.assert_close(hard.detach().double() * count, whole, atol=1e-5, rtol=0)
    assert whole.min() == 0 and whole.max() == count and len(whole.unique()) == count + 1
    with torch.no_grad():
        assert torch.equal(hard, sampled_probability(logit, 0, NOISE, sampler("gumbel_sigmoid_ste", count=count)))


def slope(mode, logit, **how):
    logit = logit.clone().requires_grad_()
    return torch.autograd.grad(sampled_probability(logit, 0, NOISE, sampler(mode, **how)).sum(), logit)[0]


def test_straight_through_has_the_slope_of_the_expectation():
    logit = torch.randn(4, 3, 50)
    torch.testing.assert_close(slope("straight_through", logit), torch.sigmoid(logit) * torch.sigmoid(-logit))


def test_the_relaxed_slope_follows_its_temperature_to_the_hard_slope():
    logit = torch.full((4, 4, 512), 0.5)
    cold, warm, hot = (slope("gumbel_sigmoid_ste", logit, temperature=t, count=16) for t in (0.1, 0.5, 2.0))
    assert (warm > 0).all() and (hot > 0).all() and (cold >= 0).all()
    hard = (torch.sigmoid(logit) * torch.sigmoid(-logit)).mean().item()
    assert cold.mean().item() == pytest.approx(hard, rel=0.03)
    assert hot.mean().item() < warm.mean().item() < cold.mean().item()
    assert hot.mean().item() < 0.6 * hard


def test_the_relaxed_slope_is_that_of_the_relaxed_release():
    """Against the relaxation written down with the noise that a one-vesicle event reveals by where it flips."""
    logit = torch.linspace(-8, 8, 20_001, dtype=torch.float64).expand(4, 1, -1)
    noise = NOISE
    words = philox((torch.arange(20_001), 0, 0, 0), (noise.key[0], noise.key[1]))
    logistic = -torch.logit(((words[1] >> 9).double() + 0.5) * 2.0**-23)
    assert torch.equal(sampled_probability(logit, 0, noise, sampler(count=1)), (logit + logistic > 0).double())
    x = logit.clone().requires_grad_()
    want = torch.autograd.grad(torch.sigmoid((x + logistic) / 0.7).sum(), x)[0]
    torch.testing.assert_close(slope("gumbel_sigmoid_ste", logit, temperature=0.7, count=1), want)


def test_the_normal_sample_is_differentiable_to_the_letter():
    logit = torch.linspace(-1.5, 1.5, 24, dtype=torch.float64).view(4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sampled_probability(x, 0, NOISE, sampler("normal_reparam", count=400)), logit)
    noisy, certain = slope("normal_reparam", logit.detach(), count=4), slope("straight_through", logit.detach())
    assert not torch.allclose(noisy, certain)


@pytest.mark.parametrize("mode", MODES)
def test_probabilities_and_slopes_stay_finite_at_the_extremes(mode):
    logit = torch.tensor([-1e4, -200.0, -80.0, -17.0, 17.0, 80.0, 200.0, 1e4]).expand(4, 2, 8)
    drawn = sampled_probability(logit, 0, NOISE, sampler(mode, count=4))
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert slope(mode, logit, count=4, temperature=0.01).isfinite().all()


def test_sampling_compiles_in_one_graph():
    torch._dynamo.reset()
    logit = torch.randn(4, 3, 20, requires_grad=True)
    for mode in MODES:
        how = sampler(mode, fraction=0.5, count=3)
        compiled = torch.compile(sampled_probability, backend="aot_eager", fullgraph=True)
        calls = [(1, 3, torch.tensor([1, 2, 3, 4])), (0, 0, 0), (2, 4, 5)]
        for layer, tick, first in calls if mode == "straight_through" else calls[:1]:
            noise = NOISE.at(layer, first)
            want, got = sampled_probability(logit, tick, noise, how), compiled(logit, tick, noise, how)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got.sum(), logit), torch.autograd.grad(want.sum(), logit))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler")
def test_compiled_words_of_a_range_do_not_overflow(monkeypatch):
    """One round: there a compiler could fold the multiplication into a loop index, and ten take it minutes on a CPU."""
    monkeypatch.setattr(noise_module, "_ROUNDS", 1)
    torch._dynamo.reset()

    def words(key):
        return philox((torch.arange(20), 3, torch.arange(4)[:, None], 0), (key, key))

    key = torch.tensor([7])
    for got, want in zip(torch.compile(words)(key), words(key), strict=True):
        assert torch.equal(got, want)


def test_bad_input_is_named():
    for wrong, name in [
        ({"mode": "poisson"}, "poisson"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"count": 0}, "count=0"),
    ]:
        with pytest.raises(UserError, match=name):
            draw(**wrong)
    for wrong in ({"step": -1}, {"sample": 2**32}):
        with pytest.raises(UserError, match="must be between 0 and 4294967295"):
            ReleaseNoise.of(IDS, seed=1, **wrong)
