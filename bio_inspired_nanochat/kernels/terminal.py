"""The biology of one presynaptic terminal: how its state biases attention and how it moves over one tick.

Every function is elementwise. States and drives have any shape in which parameters broadcast (`PresynParams.broadcast`).
Each step is an exact exponential or an implicit step of its differential equation for a drive that is constant within the
tick, so that bounds hold for every drive >= 0 and every tick length. Steady states are those of the equations, except that
docking from a finite reserve slows in ticks of many tokens (see `docking_rate`).

Notation: C calcium, B bound calcium, R readily releasable pool, Z reserve, F endocytosis ring, Q primed SNAREs, E energy,
I drive, c tick length, p release probability.

Numbered equations are those of prompts/presynapse.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

DOC2_SLOPE = 4.0
# Vesicles in a full pool (the background's init_rrp), which turns a cost per vesicle into one per pool.
POOL_VESICLES = 6.0
TINY = 1e-12
VANISHING = 1e-30


def doc2_activation(calcium: Tensor, p: PresynParams) -> Tensor:
    """Doc2's response to residual calcium: sigmoid(4 (C - c_doc2)) above its value at rest, 0 for a rested terminal. Equation (P3)."""
    return torch.sigmoid(DOC2_SLOPE * (calcium - p.doc2_threshold)) - torch.sigmoid(-DOC2_SLOPE * p.doc2_threshold)


def release_logit(state: PresynState, p: PresynParams) -> Tensor:
    """Logit of the release probability: a syt(C) + a_Q (Q - 1) + complexin (1 - clamp) + b0. Equations (P4) and (P5).

    The sensors follow Hill curves of order one, C / (C + K): Syt1 is the fast one, Syt7 the slow one, mixed by w, and Doc2
    adds a tail at low calcium. b0 contains the complexin clamp of a rested terminal.
    """
    calcium = state.calcium
    if p.k_slow is None:
        syt = calcium / (calcium + p.k_fast)
    else:  # w C / (C + K_fast) + (1 - w) C / (C + K_slow) with one division
        fast, slow = calcium + p.k_fast, calcium + p.k_slow
        syt = calcium * (fast + p.syt_mix * (slow - fast)) / (fast * slow)
    if p.doc2_gain is not None:
        syt = syt + p.doc2_gain * doc2_activation(calcium, p)
    logit = p.syt_gain * syt + p.release_bias
    if state.primed is not None:
        logit = logit + p.priming_gain * (state.primed - 1)
    if state.clamp is not None:
        logit = logit + p.complexin * (1 - state.clamp)
    return logit


def log_pool(pool: Tensor, epsilon: float) -> Tensor:
    """l(x) = log((x + eps) / (1 + eps)): zero for a full pool, finite slope at an empty one. Equation (P17)."""
    return torch.log((pool + epsilon) / (1 + epsilon))


def log_probability(logit: Tensor) -> Tensor:
    """log p of a release logit, from the p that the step needs too; its slope stays finite where p vanishes."""
    return torch.log(torch.sigmoid(logit) + VANISHING)


def terminal_bias(state: PresynState, p: PresynParams, logit: Tensor | None = None) -> Tensor:
    """beta = g_f log(p / p_rest) + g_d l(R) + g_q log(q / q_rest) + g_Q l(Q), limited smoothly to +-beta_max. Equation (P18).

    Zero for a rested terminal. With all gains equal to lambda this is the background's lambda log(eps + q n), n = p R Q, up
    to its constant. q = sigmoid(slope (E - 1/2)) is the quantal amplitude. `logit` saves a second release_logit.
    """
    logit = release_logit(state, p) if logit is None else logit
    beta = p.gain_release * (log_probability(logit) - log_probability(p.release_bias))
    beta = beta + p.gain_depletion * log_pool(state.vesicles, p.epsilon)
    if p.quantal_slope is not None:
        amplitude = F.logsigmoid(p.quantal_slope * (state.energy - 0.5)) - F.logsigmoid(0.5 * p.quantal_slope)
        beta = beta + p.gain_quantal * amplitude
    if state.primed is not None:
        beta = beta + p.gain_priming * log_pool(state.primed, p.epsilon)
    return p.beta_max * torch.tanh(beta / p.beta_max) if p.beta_max > 0 else beta


def calcium_step(p: PresynParams) -> tuple[Tensor, Tensor]:
    """Decay and influx of calcium over one tick: C+ = decay C + influx I, exact for constant I. Equation (P9)."""
    decay = torch.exp(-p.tick / p.tau_c)
    return decay, (1 - decay) * p.tau_c * p.alpha_ca


def buffer_step(calcium: Tensor, bound: Tensor, p: PresynParams) -> tuple[Tensor, Tensor]:
    """Exchange of calcium with the buffer (parvalbumin, calmodulin) over one tick, exact: dB/dt = k_on C (1 - B) - k_off B. Equation (P10).

    C + B is constant, which leaves a Riccati equation in B with the two fixed points r- < r+.
    """
    k_off = 1 / p.tau_buf
    k_on = k_off / p.buf_kd
    total = calcium + bound
    middle = total + 1 + p.buf_kd
    root = torch.sqrt((total - 1) * (total - 1) + 2 * p.buf_kd * (total + 1) + p.buf_kd * p.buf_kd)
    low = 2 * total / (middle + root)
    high = (middle + root) / 2
    ratio = (bound - low) / (bound - high) * torch.exp(-p.tick * k_on * root)
    after = (low - high * ratio) / (1 - ratio)
    after = torch.minimum(torch.clamp(after, min=0.0), total)
    return total - after, after


def clamp_step(clamp: Tensor, calcium: Tensor, p: PresynParams) -> Tensor:
    """Complexin: dX/dt = (1 - X) / tau_clamp - k C X. Calcium lifts the clamp, which returns with its own time constant. Equation (P11)."""
    back = 1 / p.tau_clamp
    rate = back + p.clamp_release * calcium
    target = back / rate
    return target + (clamp - target) * torch.exp(-p.tick * rate)


def pool_step(use: Tensor, dock: Tensor, p: PresynParams) -> tuple[Tensor, Tensor, Tensor]:
    """Decay, target and rate of the pool over one tick: R+ = target + (R - target) decay, dR/dt = dock (1 - R) - use R. Equation (P7).

    Release and refill act together and exactly (the rate form of Tsodyks and Markram, 1997).
    """
    rate = use + dock
    return torch.exp(-p.tick * rate), dock / rate, rate


def priming_step(primed: Tensor, spent: Tensor, use: Tensor, supply: Tensor, nsf: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """SNARE cycle: free sites are primed (Munc13/18), release spends them, NSF frees them; implicit step of length c. Equation (P12).

    dQ/dt = supply (1 - Q - X) - use Q; dX/dt = use Q - nsf X. Returns Q, X and the share that was primed.
    """
    leave, fill, free = c * use, c * supply, 1 + c * nsf
    rest = 1 - primed - spent
    primed = (primed + fill - fill * spent / free) / (1 + fill + leave + fill * leave / free)
    spent = (spent + leave * primed) / free
    # fill (1 - primed - spent) after the tick, written so that a long tick does not multiply its rounding, which would give energy
    return primed, spent, fill / (1 + fill) * (rest + c * nsf * spent)


def leak(pool: Tensor, inflow: Tensor, rate: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """A compartment that empties with `rate` while `inflow` arrives evenly over the tick: (what is left, what left). Equation (P14)."""
    decay = torch.exp(-c * rate)
    after = pool * decay - inflow * torch.expm1(-c * rate) / (c * rate + TINY)
    return after, torch.clamp(pool + inflow - after, min=0.0)


def recycle(state: PresynState, freed: Tensor, p: PresynParams) -> tuple[PresynState, Tensor, Tensor]:
    """Bring released vesicles back: endocytosis ring, Rab5 and Rab7 stages, resynthesis. The sum of all stages is kept. Equation (P15).

    freed: vesicles released in this tick. Returns the state with the stages advanced, the vesicles that reach the reserve,
    and those of them that had to be filled anew.
    """
    direct: Tensor | float = 0.0
    flow = freed
    if state.ring is not None:
        slots = state.ring.unbind(-1)
        flow = slots[-1]
        state = state._replace(ring=torch.stack([freed, *slots[:-1]], dim=-1))
        if state.early is not None:
            early, flow = leak(state.early, flow, 1 / p.tau_rab5, p.tick)
            direct = p.rec_rate * flow
            late, flow = leak(state.late, flow - direct, 1 / p.tau_rab7, p.tick)
            state = state._replace(early=early, late=late)
        else:
            direct = p.rec_rate * flow
            flow = flow - direct
    speed = 1 / p.tau_syn if state.energy is None else state.energy / p.tau_syn
    resynthesis, filled = leak(state.resynthesis, flow, speed, p.tick)
    return state._replace(resynthesis=resynthesis), direct + filled, filled


def docking_rate(state: PresynState, p: PresynParams) -> Tensor:
    """Rate at which a free site gets a vesicle: 1 / tau_rrp, slowed by low energy, by an emptying reserve, sped by calcium. Equation (P13).

    Synapsin ties the reserve to actin; calcium frees it: factor 1 + m C / (C + 1). A tick cannot dock more than the reserve
    holds, because the reserve drains exponentially while it docks.
    """
    rate = 1 / p.tau_rrp
    if state.energy is not None:
        rate = rate * state.energy + TINY
    if state.reserve is None:
        return rate
    rate = rate * (1 + p.mobilisation * state.calcium / (state.calcium + 1))
    return state.reserve * p.reserve_size * -torch.expm1(-p.tick * rate / p.reserve_size) / p.tick + TINY


# What a terminal lacks below a threshold, by the part of the state that is low, and the threshold.
SHORTAGES = {"low_pool": ("vesicles", 0.25), "low_energy": ("energy", 0.5)}


def shortage(name: str, part: Tensor) -> Tensor:
    """How far a part of the state lies below the threshold of `SHORTAGES`, at least 0, elementwise. Equation (P24)."""
    return torch.clamp(SHORTAGES[name][1] - part, min=0.0)


def terminal_step(state: PresynState, drive: Tensor, p: PresynParams, probability: Tensor | None = None) -> tuple[PresynState, Tensor]:
    """Advance every terminal by one tick under a mean drive I = `drive` >= 0. Equations (P6) and (P8).

    probability: release probability to use instead of the expected one (stochastic release). Returns the state with
    open_drive at zero, and the vesicles released during the tick as a fraction of the full pool: the integral of use R(t).
    """
    c = p.tick
    expected = torch.sigmoid(release_logit(state, p)) if probability is None else probability
    use = p.release_rate * expected * drive
    if p.async_rate is not None:
        use = use + p.async_rate * doc2_activation(state.calcium, p)
    decay, target, rate = pool_step(use, docking_rate(state, p), p)
    vesicles = target + (state.vesicles - target) * decay
    freed = use * (c * target + (state.vesicles - target) * -torch.expm1(-c * rate) / rate)
    docked = torch.clamp(vesicles - state.vesicles + freed, min=0.0)

    ca_decay, influx = calcium_step(p)
    calcium = ca_decay * state.calcium + influx * drive
    ahead = state._replace(vesicles=vesicles, calcium=calcium, open_drive=torch.zeros_like(drive))
    if state.buffer is not None:
        calcium, bound = buffer_step(calcium, state.buffer, p)
        ahead = ahead._replace(calcium=calcium, buffer=bound)
    if state.clamp is not None:
        ahead = ahead._replace(clamp=clamp_step(state.clamp, state.calcium, p))
    filled = docked
    if state.reserve is not None:
        ahead, returned, filled = recycle(ahead, freed, p)
        ahead = ahead._replace(reserve=torch.clamp(state.reserve + (returned - docked) / p.reserve_size, min=0.0))
    assembled: Tensor | float = 0.0
    if state.primed is not None:
        supply = 1 / p.tau_prime if state.energy is None else state.energy / p.tau_prime
        primed, spent, assembled = priming_step(state.primed, state.spent, p.prime_use * freed / c, supply, 1 / p.tau_nsf, c)
        ahead = ahead._replace(primed=primed, spent=spent)
    if state.energy is not None:
        cost = p.energy_cost_rel * freed + p.energy_cost_pump * filled
        if state.primed is not None:
            cost = cost + p.energy_cost_prime * assembled
        ahead = ahead._replace(energy=energy_step(state.energy, POOL_VESICLES * cost / c, p))
    return ahead, freed


def energy_step(energy: Tensor, cost: Tensor, p: PresynParams) -> Tensor:
    """dE/dt = (1 - E) / tau_energy - cost E, exact: mitochondria supply, work consumes in proportion to what is there. Equation (P16)."""
    supply = 1 / p.tau_energy
    rate = supply + cost
    target = supply / rate
    return target + (energy - target) * torch.exp(-p.tick * rate)


def activity(state: PresynState, p: PresynParams, logit: Tensor | None = None) -> Tensor:
    """Release above that of a rested terminal, R (p - p_rest): what a terminal inhibits its neighbours with.

    `logit` saves a second release_logit.
    """
    logit = release_logit(state, p) if logit is None else logit
    return state.vesicles * (torch.sigmoid(logit) - torch.sigmoid(p.release_bias))
