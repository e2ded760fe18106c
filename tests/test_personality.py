"""The README's table of personalities, on constructed sequences with preset `seed` and all gains fixed at one.

"Repetitive: raise tau_rrp." A head that copies asks for the same token again and again; the probability of that token is the
attention on its occurrences. "Scatterbrained: lower syt_fast_kd." What has just been read holds attention, and a head with a
topic, a key that all its queries aim at, spreads its attention less: the entropy falls, by about one percent. The second row has
limits. Without a topic (random queries on random keys) the entropy changes as little, with either sign; and under long, strong use
(logits from 5) a sensitive terminal tires, so that the entropy rises as much.
"""

import dataclasses
import itertools

import pytest
import torch

from bio_inspired_nanochat import kernels
from bio_inspired_nanochat.config import SynapticConfig
from tests.kernels.terminals import kinetics

VOCAB = 24
TICKS = (1, 4, 8)


def attention(q: torch.Tensor, k: torch.Tensor, **knobs) -> torch.Tensor:
    """Attention weights [T, T] of one head with preset `seed`; q and k: [T, D] in float64, q's entries are logits times sqrt(D)."""
    config = dataclasses.replace(SynapticConfig.preset("seed"), lambda_loge=1.0, **knobs)
    params, theta = kinetics(config), torch.full((1,), config.theta, dtype=torch.float64)
    q, k, v = q[None, None], k[None, None], torch.eye(len(k), dtype=torch.float64)[None, None]
    scale = q.shape[-1] ** -0.5
    drive = kernels.tick_drive(q, k, theta, config.tick, scale) / config.tick
    beta, _ = kernels.presyn(drive, params, closed=len(k[0, 0]) // config.tick)
    return kernels.tick_biased_attention(q, k, v, beta, config.tick, scale, backend="reference")[0, 0]


def entropy(weights: torch.Tensor) -> torch.Tensor:
    return -torch.special.xlogy(weights, weights).sum(-1)


def repeated_token_probability(wish: float, share: float, seed: int, **knobs) -> float:
    """A head that copies wants token 0 with logit `wish` after a prompt of 32; `share` of what follows is that token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (96,), generator=generator)
    ids[3] = 0
    wanting = torch.arange(96) >= 32
    ids[wanting & (torch.rand(96, generator=generator) < share)] = 0
    embedding = torch.eye(VOCAB, dtype=torch.float64) * VOCAB**0.5
    noise = 0.3 * torch.randn(96, VOCAB, generator=generator, dtype=torch.float64)
    q = wish * wanting[:, None] * embedding[0] / VOCAB**0.5 + noise
    return attention(q, embedding[ids], **knobs)[-16:, ids == 0].sum(-1).mean().item()


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("wish, seed", [(1.5, 0), (3.0, 1), (5.0, 0)])
def test_a_repetitive_model_repeats_less_with_a_larger_tau_rrp(wish, share, seed, tick):
    found = [repeated_token_probability(wish, share, seed, tick=tick, tau_rrp=tau) for tau in (20.0, 40.0, 80.0, 160.0, 400.0)]
    assert all(b < a for a, b in itertools.pairwise(found)), found
    if share == 0:
        assert found[-1] < 0.95 * found[1], found


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_readmes_adhd_mode_seeks_novelty(share, tick):
    usual = repeated_token_probability(3.0, share, 0, tick=tick)
    restless = repeated_token_probability(3.0, share, 0, tick=tick, tau_rrp=100.0, energy_cost_rel=0.05)
    assert restless < usual


def with_a_topic(strength: float, seed: int, **knobs) -> torch.Tensor:
    """Attention [T, T] of a head whose queries all aim at key 3 with logit `strength`, give or take, among random keys."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    k = k / k.norm(dim=-1, keepdim=True) * 4
    q = 0.3 * torch.randn(64, 16, generator=generator, dtype=torch.float64) + strength * k[3] / 4
    return attention(q, k, **knobs)


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("strength, seed", [(1.0, 0), (1.0, 1), (2.0, 2), (4.0, 3)])
def test_a_scatterbrained_model_is_less_scattered_with_a_smaller_syt_fast_kd(strength, seed, tick):
    found = [entropy(with_a_topic(strength, seed, tick=tick, syt_fast_kd=kd)[16:]).mean().item() for kd in (0.4, 0.2, 0.1, 0.05)]
    assert all(b < a for a, b in itertools.pairwise(found)), found


@pytest.mark.parametrize("tick", TICKS)
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 4.0])
def test_a_smaller_syt_fast_kd_holds_attention_on_what_was_just_read(strength, tick):
    k = torch.eye(32, dtype=torch.float64) * 32**0.5
    q = torch.zeros(32, 32, dtype=torch.float64)
    q[16 : 16 + tick, 3] = strength
    found = [attention(q, k, tick=tick, syt_fast_kd=kd)[16 + tick, 3].item() for kd in (1.6, 0.8, 0.4, 0.2, 0.1, 0.05)]
    assert all(b > a for a, b in itertools.pairwise(found)), found
