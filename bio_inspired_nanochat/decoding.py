"""GraphDecoder: the step of one token per row as one CUDA graph, for vanilla and synaptic models.

It computes what `GPT.step` computes for one token, on the same `SynapseState`; both may take turns at any token. All sizes are
fixed and positions lie in device memory, so two graphs serve every token: one for tokens that end a tick, one for the others.
On the CPU (under Triton's interpreter) the same code runs without a graph.

Dimensions: B batch, V vocabulary, H query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from bio_inspired_nanochat.common import aside, capture, reason
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.kernels.scan import on_triton
from bio_inspired_nanochat.synaptic import (
    CausalSelfAttention,
    LayerState,
    Place,
    SynapseState,
    SynapticCausalSelfAttention,
    SynapticMoE,
    rotary,
)
from bio_inspired_nanochat.synaptic.moe import Standing

if TYPE_CHECKING:
    from bio_inspired_nanochat.kernels.decode_triton import TokenSite

WARM_RUNS = 2  # before a capture: kernels are compiled and libraries make their workspaces


class NotRecorded(RuntimeError):
    """A step could not be recorded as a CUDA graph, for the reason in the message; the state is as it was."""


class _Held(NamedTuple):
    """What does not change from token to token: the attention of every layer, and the experts of those that have some."""

    sites: list[TokenSite]
    experts: dict[SynapticMoE, Standing]

    @classmethod
    def of(cls, model: GPT, dtype: torch.dtype) -> _Held:
        """Of a model whose activations are of this dtype."""
        mixtures = (block.mlp for block in model.blocks)
        experts = {mlp: mlp.hold(dtype) for mlp in mixtures if isinstance(mlp, SynapticMoE)}
        return cls([_site(block.attn, dtype) for block in model.blocks], experts)


class _Token:
    """How a layer reads one token per row: in place of a `Chunk`, with positions that only the device knows.

    positions: [B, 1] of the new tokens, on the device; ends: whether any row may end a tick with it.
    """

    def __init__(self, positions: Tensor, held: _Held, ends: bool) -> None:
        self.positions, self.held, self.ends = positions, held, ends
        self._place = Place(positions[:, 0], None, positions >= 0)

    def attend(self, layer: CausalSelfAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: LayerState) -> Tensor:
        """See `Chunk.attend`."""
        from bio_inspired_nanochat.kernels import decode_triton

        site, cache = self.held.sites[layer.layer], state.tensors()
        gate = (x, layer.synapse.gate_shift(x)) if site.barrier == "gated" else ()
        y = decode_triton.attend(q, k, v, cache, self.positions, site, *gate)
        if self.ends and site.terminals is not None:
            decode_triton.advance(cache, self.positions, site)
        return y

    def place(self, device: torch.device) -> Place:
        """See `Chunk.place`; a row at position -1 is not there."""
        return self._place

    def standing(self, layer: SynapticMoE) -> Standing:
        """See `Chunk.standing`."""
        return self.held.experts[layer]


class _Reader(nn.Module):
    """What the graph holds of a model: what every step casts to the dtype of the activations is cast once."""

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        roles = model.param_roles()
        self.cast: Mapping[str, Tensor] = {
            f"model.{name}": value.detach().to(dtype)
            for name, value in model.named_parameters()
            if value.dtype != dtype
            and (
                roles[name] in ("matrix", "head", "fast")
                or (roles[name] == "gate" and value.ndim == 2 and not name.endswith("synapse.gate_weight"))  # which a site holds
                or name in ("resid_scale", "x0_scale")
            )
        }

    def read(self, idx: Tensor, token: _Token, layers: list[LayerState]) -> Tensor:
        """Logits [B, V] after the tokens idx [B, 1]."""
        return torch.func.functional_call(self, self.cast, (idx, token, layers)) if self.cast else self(idx, token, layers)

    def forward(self, idx: Tensor, token: _Token, layers: list[LayerState]) -> Tensor:
        """As `GPT.step`, for one token."""
        model = self.model
        x = x0 = model._embed(idx)
        cos_sin = rotary(token.positions, model.config.head_dim, x.dtype)
        for block, scales, state in zip(model.blocks, model._scales(), layers, strict=True):
            x = block.step(x, x0, scales, idx, cos_sin, state, token)
        return model._logits(x)[:, 0]


def graph_obstacle(model: GPT, state: SynapseState) -> str | None:
    """Why a GraphDecoder cannot serve this model and state, or None."""
    if not on_triton(state.layers[0].k):
        return "it runs Triton kernels on CUDA (with TRITON_INTERPRET=1 also on the CPU)"
    if state.doc is not None:
        return "this model keeps documents apart"
    from bio_inspired_nanochat.kernels import decode_triton  # imported late: a machine without Triton never gets here

    for block, layer in zip(model.blocks, state.layers, strict=True):
        params = block.attn.synapse.params() if layer.calcium is not None else None
        if obstacle := decode_triton.obstacle(layer.tensors(), params, state.noise_key is not None):
            return obstacle
    return None


class GraphDecoder:
    """Decodes one token per row of `state`, which stays valid for `model.step` and for copies between any two tokens.

    Weights, kinetics and accounts of experts must stay what they are: some are copied at construction, the others are read where they lie,
    so that a step of training or a consolidation calls for a new decoder. The tensors of the state must stay where they are: a copy or a
    selection of rows needs a decoder of its own, which `follow` makes. Raises UserError when it cannot serve the model or the state.
    """

    def __init__(self, model: GPT, state: SynapseState, *, capture: bool = True) -> None:
        self._check(model, state)
        with torch.no_grad():
            dtype = state.layers[0].k.dtype
            self._set_up(state, _Reader(model, dtype), _Held.of(model, dtype), capture)

    def follow(self, state: SynapseState) -> GraphDecoder:
        """A decoder of another state of the same model, with the weights of this one."""
        self._check(self._reader.model, state)
        other = object.__new__(GraphDecoder)
        other._set_up(state, self._reader, self._held, self._capture)
        return other

    @staticmethod
    def _check(model: GPT, state: SynapseState) -> None:
        model._check_step(torch.empty(state.batch_size, 1), state, [0] * state.batch_size, [1] * state.batch_size)
        if obstacle := graph_obstacle(model, state):
            raise UserError(f"a captured step cannot serve this model and state: {obstacle}; use model.step")

    def _set_up(self, state: SynapseState, reader: _Reader, held: _Held, capture: bool) -> None:
        self.state = state
        self._reader, self._held = reader, held
        device = state.layers[0].k.device
        self._capture = capture and device.type == "cuda"
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._ids = torch.zeros(state.batch_size, 1, dtype=torch.long, device=device)
        self._positions = torch.full_like(self._ids, -1)
        self._expected: list[int] | None = None  # what _positions holds, when it is known
        ticks = {site.tick for site in held.sites if site.terminals is not None}
        self._tick = ticks.pop() if ticks else None

    @torch.no_grad()
    def record(self) -> None:
        """Record the graphs that `step` records otherwise at the first token that needs them; nothing to do off CUDA. Raises NotRecorded."""
        for ends in (False, True) if self._tick is not None else (False,):
            if self._capture and ends not in self._graphs:
                self._graphs[ends] = self._captured(ends)
                self._expected = None

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read token ids [B] and return logits [B, V] float32; the state advances in place. Raises NotRecorded, before it does."""
        state, starts = self.state, self.state.pos.tolist()
        if ids.shape != (state.batch_size,):
            raise UserError(f"token ids have shape {list(ids.shape)}: this state needs [{state.batch_size}], one per sequence")
        if max(starts) >= state.max_len:
            self._reader.model._check_step(ids[:, None], state, starts, [1] * len(starts))
        self._ids.copy_(ids[:, None])
        ends = self._tick is not None and any((start + 1) % self._tick == 0 for start in starts)
        if self._capture and ends not in self._graphs:
            self._graphs[ends] = self._captured(ends)
            self._expected = None
        if self._expected != starts:
            self._positions.copy_(state.pos[:, None])
        self._expected = None
        if self._capture:
            graph, logits = self._graphs[ends]
            graph.replay()
            logits = logits.clone()
        else:
            logits = self._read(ends)
        state.pos += 1
        self._expected = [start + 1 for start in starts]
        return logits

    def _read(self, ends: bool) -> Tensor:
        logits = self._reader.read(self._ids, _Token(self._positions, self._held, ends), self.state.layers)
        self._positions += 1
        return logits

    def _captured(self, ends: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a step, and where it leaves the logits. Rows at position -1 are not there, so the state stays as it is."""
        with torch.cuda.device(self._ids.device):
            with aside():
                for _ in range(WARM_RUNS):
                    self._positions.fill_(-1)
                    self._read(ends)
            try:
                return capture(lambda: self._read(ends))
            except RuntimeError as error:
                raise NotRecorded(reason(error)) from error


def _site(attn: CausalSelfAttention, dtype: torch.dtype) -> TokenSite:
    """What of a layer does not change from token to token, for activations of this dtype."""
    from bio_inspired_nanochat.kernels.decode_triton import TokenSite

    if not isinstance(attn, SynapticCausalSelfAttention):
        return TokenSite(attn.tick, attn.scale, attn.window)
    synapse, cfg = attn.synapse, attn.cfg
    theta, params = (synapse.theta_value(), synapse.params()) if cfg.presyn else (None, None)
    strength = None if cfg.barrier == "none" else synapse.strength()
    if cfg.barrier == "linear":
        strength = strength * synapse._slopes(strength.device)
    gate = (synapse.gate_weight.detach().to(dtype), synapse.gate_bias) if cfg.barrier == "gated" else ()
    return TokenSite(attn.tick, attn.scale, attn.window, cfg.drive, theta, params, cfg.barrier, strength, *gate)
