"""Terminals to experiment on: the kinetics of every registered part alone and of all together, and recordings of their course.

A new part joins every test that runs over `CONFIGS` by being registered as a mechanism that changes `PresynParams`.
Dimensions: H heads, N ticks, K keys (one experiment each).
"""

import dataclasses
import functools

import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.kernels import PresynParams, PresynState, presyn_step
from bio_inspired_nanochat.registry import MECHANISMS, closure, config_with
from bio_inspired_nanochat.synaptic.genome import PROTEINS
from bio_inspired_nanochat.synaptic.presynaptic import Presynaptic

TICKS = (1, 8, 64, 1000)
# Kinetics under which a few hundred tokens empty and refill everything.
LIVELY = {"alpha_ca": 0.2, "tau_c": 20.0, "tau_rrp": 40.0, "release_rate": 0.1, "release_bias": -0.5, "endo_delay": 48.0}


def kinetics(
    config: SynapticConfig,
    heads: int = 1,
    dtype: torch.dtype = torch.float64,
    spread: float = 0.0,
    proteins: dict[str, float] | None = None,
) -> PresynParams:
    """The terminal of a config at birth; with `spread` the heads differ in every learned quantity and in their gains.

    proteins: logits of expression in the first head, for a genome of proteins.
    """
    sizes = {"n_layer": 1, "n_head": heads, "n_kv_head": heads, "n_embd": 16 * heads, "vocab_size": 8, "sequence_len": 8}
    synapse = Presynaptic(GPTConfig(**sizes, synapses=True, syn_cfg=config)).to(dtype)
    synapse.init_weights()
    with torch.no_grad():
        for index, parameter in enumerate(synapse.parameters()):
            offsets = torch.sin(1.0 + index + 2.0 * torch.arange(parameter.numel(), dtype=dtype)).view_as(parameter)
            parameter += spread * offsets
        for name, level in (proteins or {}).items():
            synapse.genome.level[0, PROTEINS.index(name)] = level
    params = synapse.params()
    return PresynParams(*[value.detach() if isinstance(value, torch.Tensor) else value for value in params])._replace(sampler=None)


def terminal(*parts: str, heads: int = 1, dtype: torch.dtype = torch.float64, **knobs) -> PresynParams:
    """A terminal with only these mechanisms, with knobs by name; tick 1 unless told otherwise."""
    return kinetics(config_with("presyn", *parts, **({"tick": 1} | knobs)), heads, dtype)


def _acts(name: str) -> bool:
    """Whether a mechanism changes the terminal's own kinetics (not only its learning, its drive or what is added to its bias)."""
    if "presyn" not in closure(name) or name == "presyn":
        return False
    needed = [need for need in closure(name) if need != name]
    return differ(kinetics(config_with(name)), kinetics(config_with(*needed)))


def differ(a: PresynParams, b: PresynParams) -> bool:
    """Whether two terminals are not the same."""
    return any((x is None) != (y is None) or (x is not None and bool(torch.as_tensor(x != y).any())) for x, y in zip(a, b, strict=True))


PARTS = [name for name in MECHANISMS if _acts(name)]
ALL_ON = config_with(*PARTS)


def _lively(config: SynapticConfig) -> SynapticConfig:
    return dataclasses.replace(config, **{name: value for name, value in LIVELY.items() if name != "endo_delay" or config.endo_delay})


CONFIGS = {"core": _lively(config_with("presyn"))}
CONFIGS |= {name: _lively(config_with(name)) for name in PARTS}
CONFIGS |= {"all": _lively(ALL_ON), "seed": SynapticConfig.preset("seed")}


@functools.cache
def make(part: str, tick: int, dtype: torch.dtype = torch.float64, heads: int = 2, spread: float = 0.3) -> PresynParams:
    """The terminal of `CONFIGS[part]` with a given tick, heads differing."""
    return kinetics(dataclasses.replace(CONFIGS[part], tick=tick), heads, dtype, spread)


def rest(p: PresynParams, keys: int = 1) -> PresynState:
    """Rested terminals [1, H, K] in the kinetics' dtype."""
    return PresynState.rest(1, len(p.tau_c), keys, dtype=p.tau_c.dtype, params=p)


def constant(p: PresynParams, *values: float) -> torch.Tensor:
    """A drive [1, H, K], one key per value."""
    return torch.tensor(values, dtype=p.tau_c.dtype).expand(1, len(p.tau_c), -1)


@torch.no_grad()
def course(p: PresynParams, drive: torch.Tensor, state: PresynState | None = None) -> tuple[list[PresynState], torch.Tensor]:
    """Run over drive [N, K]: the N + 1 states that were passed through, and what was released in each tick, [N, H, K]."""
    states = [rest(p, drive.shape[1]) if state is None else state]
    freed = []
    for row in drive.to(p.tau_c.dtype):
        ahead, out = presyn_step(states[-1], row.expand_as(states[-1].calcium), p)
        states.append(ahead)
        freed.append(out[0])
    return states, torch.stack(freed)


def trace(states: list[PresynState], name: str) -> torch.Tensor:
    """One quantity over time, [N + 1, H, K] (the ring [N + 1, H, K, d])."""
    return torch.stack([getattr(state, name)[0] for state in states])


def silence(ticks: int, keys: int = 1) -> torch.Tensor:
    """No drive, [N, K]."""
    return torch.zeros(ticks, keys, dtype=torch.float64)


def adversarial(ticks: int) -> torch.Tensor:
    """Drives [N, K] that an attacker or an accident may make, one per key."""
    n = torch.arange(ticks)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(ticks, 6, generator=generator, dtype=torch.float64)
    columns = [
        torch.zeros(ticks),
        torch.full((ticks,), 1e-8),
        torch.ones(ticks),
        torch.full((ticks,), 1e4),
        1e4 * (n % 7 == 0),
        1e4 * (n % 2 == 0),
        1e4 * ((n % 50) < 10),
        1e4 * ((n < 20) | (n >= ticks - 20)),
        1.0 * (n < ticks // 2),
        3 * uniform[:, 0],
        10 ** (12 * uniform[:, 1] - 8),
        1e4 * (uniform[:, 2] < 0.05),
        30 * uniform[:, 3] * (uniform[:, 4] < 0.3),
    ]
    return torch.stack([column.double() for column in columns], dim=1)


def vesicles_everywhere(state: PresynState, p: PresynParams) -> torch.Tensor:
    """Vesicles of a terminal with a reserve wherever they are, in units of the releasable pool: [1, H, K]."""
    total = state.vesicles + p.reserve_size[:, None] * state.reserve + state.resynthesis
    if state.ring is not None:
        total = total + state.ring.sum(-1)
    if state.early is not None:
        total = total + state.early + state.late
    return total
