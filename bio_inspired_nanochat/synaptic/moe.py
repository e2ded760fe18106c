"""SynapticMoE: an MLP with experts beside it, chosen token by token. Without synapses the same module is a plain mixture of experts.
Equations (L2) and (L3) of prompts/life_cycle.md; twins: (L14).

    logit_e  = x . W_r[e] + identity and SNARE cosines - lateral inhibition + facilitation and depression + NMDA term
    score_e  = logit_e + kappa (account_e - 1/2) + balance_e                 the k best slots are chosen, ties by index
    y        = shared(x) + sum over the chosen of softmax(logit)_e expert_e(x)

Facilitation and NMDA follow the tokens before the current tick (`expert_synapse`), so that a route is strictly causal; account and
balance change between training steps only (`accounts`). Twins compete as one slot, with the leader's logit for both while they are
equal, and the logit of the one that serves the token once `blend` is 1; likewise with what they release.

Dimensions: B batch, T tokens, S = B T, E slots for experts, k choices, D width, F hidden units of an expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.kernels import rust_moe
from bio_inspired_nanochat.kernels.grouped import combine, dispatch, group_by_expert, grouped_linear, top_k
from bio_inspired_nanochat.kernels.scan import for_inference
from bio_inspired_nanochat.synaptic import held_moe, native_moe
from bio_inspired_nanochat.synaptic.accounts import Accounts
from bio_inspired_nanochat.synaptic.expert_synapse import ExpertSynapse, Traits
from bio_inspired_nanochat.synaptic.glue import relu_squared
from bio_inspired_nanochat.synaptic.mlp import SynapticMLP
from bio_inspired_nanochat.synaptic.state import Arrival, ExpertState, Extras, LayerState, Place

CLOSED = float("-inf")  # the score of a slot that cannot be chosen


class Routing(NamedTuple):
    """Sums over the tokens of one pass, detached, float32: what the accounts and the life cycle are kept by.

    tokens []; load, demand, gates, both [E]: tokens that visit an expert, that would without the balancing bias, the sum of their
    gates, and the tokens that both twins of a slot would take as two slots (at the leader); together [E, E]: tokens that visit both;
    inputs [E, D]: sum of the inputs of an expert; common [D]: of all inputs.
    """

    tokens: Tensor
    load: Tensor
    demand: Tensor
    gates: Tensor
    both: Tensor
    together: Tensor
    inputs: Tensor
    common: Tensor


class Probe:
    """Instruments of one pass. tap: [E, 2] zeros that require a gradient: the backward of a mean loss leaves in its gradient the sums of
    a and a^2 over tokens, a = g dL/dg for the gate g of an expert; muted: [E] bool, experts whose gate is set to zero, without
    routing anew; forced: (tokens [S] bool, expert, list): these tokens visit that expert alone; the list gets the own choice [S, k].
    """

    # A plain class and not a tuple: FSDP would take the tap for an input of the layers and reduce their gradients before they are complete.
    __slots__ = ("forced", "muted", "tap")

    def __init__(
        self, tap: Tensor | None = None, muted: Tensor | None = None, forced: tuple[Tensor, int, list[Tensor]] | None = None
    ) -> None:
        self.tap, self.muted, self.forced = tap, muted, forced


class Standing(NamedTuple):
    """What a route takes from parameters and accounts alone: the same for every token until a step of training.

    shut [E]: slots that do not compete; bank [E]: what the account of energy adds to a score; traits: of the synapses, or None; router:
    what routes one token per row in a single kernel (`kernels.route_triton`), or None.
    """

    shut: Tensor
    bank: Tensor
    traits: Traits | None
    router: Any = None


class Route(NamedTuple):
    """Where tokens go.

    expert, gates: [S, k]; scale: [S, k] of the output, or None; score, bare: [S, E] what slots are chosen by, and the same without the
    balancing bias; logit: [S, E] of every expert, before twins share one; winner: [S, E] the expert that serves a slot.
    """

    expert: Tensor
    gates: Tensor
    scale: Tensor | None
    score: Tensor
    bare: Tensor
    logit: Tensor
    winner: Tensor


class _Tap(torch.autograd.Function):
    """The gates themselves; backward leaves sums of a = g dL/dg and a^2 per expert in the gradient of `tap`."""

    @staticmethod
    def forward(ctx, gates: Tensor, expert: Tensor, tap: Tensor) -> Tensor:
        ctx.save_for_backward(gates, expert)
        ctx.experts = tap.shape[0]
        return gates.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        gates, expert = ctx.saved_tensors
        a = (grad * gates).flatten().to(torch.float32)
        member = (expert.flatten()[:, None] == torch.arange(ctx.experts, device=a.device)).to(a.dtype)
        return grad, None, torch.stack([a, a.square()]).matmul(member).T


class Experts(nn.Module):
    """The stacked matrices of all experts: w_in [E, F, D] and w_out [E, D, F], squared ReLU between them."""

    def __init__(self, slots: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(slots, hidden, width))
        self.w_out = nn.Parameter(torch.empty(slots, width, hidden))

    def forward(self, x: Tensor, expert: Tensor, gates: Tensor) -> Tensor:
        """x [S, D] through expert [S, k], weighted with gates [S, k] and summed: [S, D]."""
        w_in, w_out = self.w_in.to(x.dtype), self.w_out.to(x.dtype)
        if kernels := _kernels(x, expert.shape[1]):
            return kernels.mix(x, expert, gates, w_in, w_out)
        groups = group_by_expert(expert, len(self.w_in))
        hidden = grouped_linear(dispatch(x, groups, expert.shape[1]), w_in, groups)
        return combine(grouped_linear(relu_squared(hidden), w_out, groups), groups, gates)


class SynapticMoE(SynapticMLP):
    """The MLP as the shared expert, under its own names, and routed experts beside it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.k, self.slots, self.backend = config.moe_top_k, config.slots, config.backend
        self.fair = float(config.num_experts)
        self.kappa = config.syn_cfg.bank_gain if config.synapses else 0.0
        self.experts = Experts(self.slots, config.n_embd, config.expert_ratio * config.n_embd)
        self.router = nn.Parameter(torch.empty(self.slots, config.n_embd))
        self.synapse = ExpertSynapse(config) if config.synapses else None
        self.accounts = Accounts(self.slots, config.num_experts, config.n_embd)

    @property
    def remembers(self) -> bool:
        """Whether experts have a state that follows a sequence."""
        return self.synapse is not None and self.synapse.remembers

    def forward(self, x: Tensor, extras: Extras | None = None) -> Tensor:
        """Whole sequences, x [B, T, D] to [B, T, D]; `extras.routing` gets a `Routing`."""
        extras = extras or Extras()
        y, route, _ = self.mix(x, Place.whole(extras.doc), probe=extras.probe)
        if extras.routing is not None:
            extras.routing.append(self.statistics(x, route))
        return super().forward(x, extras) + y

    def step(self, x: Tensor, state: LayerState, chunk: Arrival) -> Tensor:
        """The next chunk of running sequences, x [B, t, D]; fast weights and experts in `state` advance in place."""
        y = native_moe.mix(self, x, state, chunk)
        if y is None:
            place, standing = chunk.place(x.device), chunk.standing(self)
            if standing is not None and standing.router is not None:
                expert, gates = standing.router.route(x, place.first, state.experts)
                y = self.experts(x.flatten(0, 1), expert, gates).view_as(x)
            else:
                y, _, after = self.mix(x, place, state.experts, standing=standing)
                if after is not None:
                    state.experts.copy_(after)
        return super().step(x, state, chunk) + y

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> ExpertState | None:
        """The experts of `batch` fresh sequences, where they have a state; dtype is that of the activations."""
        return ExpertState.rest(batch, self.slots, device, torch.promote_types(dtype, torch.float32)) if self.remembers else None

    def mix(
        self,
        x: Tensor,
        place: Place,
        before: ExpertState | None = None,
        probe: Probe | None = None,
        standing: Standing | None = None,
    ) -> tuple[Tensor, Route, ExpertState | None]:
        """What the routed experts add for x [B, T, D], the route, and the state after the last token. before: see `ExpertSynapse.course`."""
        route, after = self.route(x, place, before, standing)
        gates = route.gates
        if probe is not None and probe.tap is not None:
            gates = _Tap.apply(gates, route.expert, probe.tap)
        if probe is not None and probe.muted is not None:
            gates = gates.masked_fill(probe.muted[route.expert], 0.0)
        if route.scale is not None:
            gates = gates * route.scale
        expert = route.expert
        if probe is not None and probe.forced is not None:
            tokens, slot, seen = probe.forced
            seen.append(expert)
            alone = torch.zeros_like(gates)
            alone[:, 0] = 1
            expert, gates = torch.where(tokens[:, None], slot, expert), torch.where(tokens[:, None], alone, gates)
        return self.experts(x.flatten(0, 1), expert, gates).view_as(x), route, after

    def standing(self) -> Standing:
        """What the next route takes from parameters and accounts."""
        kept = self.accounts
        traits = None if self.synapse is None else self.synapse.traits(kept.lead)
        return Standing(~kept.leads(), self.kappa * (kept.energy - 0.5), traits)

    def hold(self, dtype: torch.dtype) -> Standing:
        """`standing` for many tokens of the model as it is now, one per row and in this dtype; waits for the device."""
        standing = self.standing()
        return standing._replace(router=held_moe.router_of(self, standing, dtype))

    def route(
        self, x: Tensor, place: Place, before: ExpertState | None = None, standing: Standing | None = None
    ) -> tuple[Route, ExpertState | None]:
        """Choose k experts for every token of x [B, T, D]."""
        standing = standing or self.standing()
        logit, released, after = self._logits(x, place, before, standing)
        slot, winner, scale = self._twins(logit, released)
        bare = (slot + standing.bank).masked_fill(standing.shut, CLOSED)
        score = bare + self.accounts.balance
        places = top_k(score.detach(), self.k)
        gates = torch.softmax(slot.masked_fill(standing.shut, CLOSED).gather(1, places), dim=-1)
        expert = winner.gather(1, places)
        scale = None if scale is None else scale.gather(1, places).exp()
        return Route(expert, gates, scale, score.detach(), bare.detach(), logit.detach(), winner), after

    def _logits(
        self, x: Tensor, place: Place, before: ExpertState | None, standing: Standing
    ) -> tuple[Tensor, Tensor | None, ExpertState | None]:
        """Of every expert the logit and what it releases (see `Effects`), [S, E] each, and the state after the last token."""
        logit = F.linear(x, self.router.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
        if self.synapse is None or standing.traits is None:
            return logit.flatten(0, 1), None, None
        affinity = self.synapse.affinity(x, standing.traits)
        logit = logit if affinity is None else logit + affinity
        logit, released, after = self._modulate(self.synapse, logit, standing, standing.traits, place, before)
        return logit.flatten(0, 1), None if released is None else released.flatten(0, 1), after

    def _modulate(
        self, synapse: ExpertSynapse, logit: Tensor, standing: Standing, traits: Traits, place: Place, before: ExpertState | None
    ) -> tuple[Tensor, Tensor | None, ExpertState | None]:
        """Add lateral inhibition and the course of the sequence to logits [B, T, E]. A slot's demand drives both twins alike."""
        share = self.fair * torch.softmax(logit.masked_fill(standing.shut, CLOSED), dim=-1)
        lost = synapse.inhibition(share / self.fair, traits)
        plain = logit
        logit = logit if lost is None else logit - lost
        if not self.remembers:
            return logit, None, None
        effects, after = synapse.course(share[..., self.accounts.lead], place, before, traits)
        if effects.bias is not None:
            logit = logit + effects.bias
        if effects.slow is not None:
            logit = logit + synapse.nmda_gain * effects.slow * torch.sigmoid(plain)
        return logit, effects.released, after

    def _twins(self, logit: Tensor, released: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of every slot the logit, the expert that serves it, and what it releases (see `Effects`), [S, E] each. Equation (L14).

        Of two twins the one with the larger logit plus tie serves; how far the slot is its own in all else follows `blend`.
        """
        kept = self.accounts
        places = torch.arange(self.slots, device=logit.device)
        younger = logit[:, kept.child] - logit
        serves = (kept.child != places) & (younger + (1 - kept.blend) * kept.tie > 0)
        winner = torch.where(serves, kept.child, places)
        if released is not None:
            released = released + torch.where(serves, kept.blend * (released[:, kept.child] - released), 0.0)
        return logit + torch.where(serves, kept.blend * younger, 0.0), winner, released

    def _separate(self, route: Route) -> Tensor:
        """Scores [S, E] as if twins were two slots."""
        kept = self.accounts
        bank = self.kappa * (kept.energy - 0.5)
        return (route.logit + bank[kept.lead] + kept.balance[kept.lead]).masked_fill(~kept.alive, CLOSED)

    @torch.no_grad()
    def statistics(self, x: Tensor, route: Route) -> Routing:
        """What the accounts need to know of a pass over x [B, T, D]."""
        x = x.flatten(0, 1).float()
        if rust_moe.obstacle(self.backend, x, self.accounts.child) is None and route.gates.dtype == torch.float32:
            taken = {name: getattr(route, name) for name in ("expert", "gates", "bare", "winner")} | {"separate": self._separate(route)}
            return Routing(tokens=torch.tensor(float(len(x))), **rust_moe.sums(x, taken, self.accounts.child))
        places = torch.arange(self.slots, device=x.device)
        chosen = route.expert[..., None] == places
        member = chosen.any(1).float()
        wanted = torch.zeros_like(route.bare, dtype=torch.float32).scatter_(1, top_k(route.bare, self.k), 1.0)
        separate = self._separate(route)
        both = separate >= _kth(separate, self.k)
        child = self.accounts.child
        own = wanted * (route.winner == places)  # the others would go to the leader's twin
        return Routing(
            tokens=torch.full((), len(x), dtype=torch.float32, device=x.device),
            load=member.sum(0),
            demand=own.sum(0) + torch.zeros_like(child, dtype=torch.float32).scatter_add(0, child, (wanted - own).sum(0)),
            gates=(route.gates.float()[..., None] * chosen).sum((0, 1)),
            both=(both & both[:, child] & (child != places)).float().sum(0),
            together=member.T @ member,
            inputs=member.T @ x,
            common=x.sum(0),
        )


def _kernels(x: Tensor, choices: int) -> Any:
    """The kernels for a few tokens x [S, D] that visit so many experts each, if they take them."""
    if not for_inference(x):
        return None
    from bio_inspired_nanochat.kernels import moe_triton  # imported late: a machine without Triton never gets here

    return moe_triton if moe_triton.serves(x, choices) else None


def _kth(score: Tensor, k: int) -> Tensor:
    """The k-th largest of score [S, E], as [S, 1]."""
    return torch.topk(score, k, dim=-1).values[:, -1:]
