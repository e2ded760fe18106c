"""GPT: one model for vanilla and synaptic attention, in the modern nanochat recipe.

Rotary positions, QK norm, squared ReLU, RMS norm without gains, residual and embedding (x0) scalars per layer, an untied
zero-initialised head with a soft cap, grouped key heads, a window pattern and optional value embeddings.

Dimensions: B batch, T tokens, V vocabulary, H query heads, D head size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bio_inspired_nanochat.checkpoint import find_checkpoint, load_checkpoint
from bio_inspired_nanochat.common import generator_for, to_host
from bio_inspired_nanochat.common.automata import RULES, automaton_matrix
from bio_inspired_nanochat.config import GPTConfig, from_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels import ReleaseNoise
from bio_inspired_nanochat.registry import active_mechanisms, check_extra
from bio_inspired_nanochat.synaptic import (
    GAINS,
    GATE_CHANNELS,
    Accounts,
    Block,
    Chunk,
    Density,
    Embedding,
    Engram,
    ExpertSynapse,
    Extras,
    LayerTelemetry,
    Linear,
    Presynaptic,
    Probe,
    Routing,
    SynapseState,
    SynapticMoE,
    auxiliary_loss,
    flops_per_token,
    param_roles,
    rms_norm,
    rotary,
    stream_scales,
    summarise,
)

SOFTCAP = 15.0

__all__ = ["GATE_CHANNELS", "GPT", "SOFTCAP", "GPTConfig", "RunOutput"]


class RunOutput(NamedTuple):
    """What one forward pass returns.

    logits: [B, T, V] float32 (with several samples the log of the mean probabilities); loss: mean cross-entropy in nats, given targets;
    aux: weighted auxiliary losses of the synapses, which training adds, or None; telemetry: one entry per synaptic layer, or None;
    variance: [B, T, V] variance of the probabilities over the samples, or None; routing: per layer what its experts did, or None.
    """

    logits: Tensor
    loss: Tensor | None
    aux: Tensor | None = None
    telemetry: list[LayerTelemetry] | None = None
    variance: Tensor | None = None
    routing: list[Routing] | None = None


class GPT(nn.Module):
    """The language model. Ready to use after construction; on the meta device call `init_weights` after `to_empty`."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        check_extra(config.syn_cfg)
        self.config = config
        self.compute_dtype = torch.float32
        self.compiled = False
        self.embed = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.resid_scale = nn.Parameter(torch.empty(config.n_layer))
        self.x0_scale = nn.Parameter(torch.empty(config.n_layer))
        self.head = Linear(config.n_embd, config.vocab_size)
        if self.embed.weight.device.type != "meta":
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter. Each draws from a generator keyed by (seed, name), so models that share names start equal."""
        depth = torch.linspace(0, 1, self.config.n_layer)
        bound = math.sqrt(3 / self.config.n_embd)
        for name, parameter in self.named_parameters():
            if ".synapse." in name or ".density." in name:
                continue
            leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if leaf in ("o", "w_out", "head", "gate"):
                parameter.zero_()
            elif leaf == "resid_scale":
                parameter.copy_(1.15 - 0.10 * depth)
            elif leaf == "x0_scale":
                parameter.copy_(0.20 - 0.15 * depth)
            else:
                values = torch.empty(parameter.shape)
                generator = generator_for(seed, name)
                if leaf == "embed":
                    values.normal_(0, 0.8, generator=generator)
                elif self.config.init in RULES and leaf in ("q", "k", "v", "w_in") and parameter.ndim == 2:
                    std = (0.4 * bound if leaf == "w_in" else bound) / math.sqrt(3)
                    values = automaton_matrix(parameter.shape[0], parameter.shape[1], RULES[self.config.init], generator, std)
                else:
                    limit = 0.4 * bound if leaf == "w_in" else bound
                    values.uniform_(-limit, limit, generator=generator)
                parameter.copy_(values)
        for name, module in self.named_modules():
            if isinstance(module, (Presynaptic, Density, ExpertSynapse)):
                module.init_weights(seed, name)
            elif isinstance(module, Accounts):
                module.reset()

    def set_compute_dtype(self, dtype: torch.dtype) -> GPT:
        """Dtype of activations and caches; parameters stay float32."""
        self.compute_dtype = dtype
        return self

    def compile_regions(self, backend: str = "inductor", options: Mapping[str, bool] | None = None) -> GPT:
        """Compile every block and the loss in place, for training at fixed shapes; options: further ones of inductor.

        Blocks share their graphs, so the time to compile does not grow with depth. Decoding by `step` is left as it is.
        """
        import torch._dynamo.config as dynamo  # imported late: it loads the whole compiler

        dynamo.recompile_limit = max(32, dynamo.recompile_limit)  # value embeddings x windows x grad modes
        if self.config.synapses:  # a first pass makes the kernels of the synapses, which cannot be made while compiling
            idx = torch.zeros(1, 16 * self.config.syn_cfg.tick, dtype=torch.long, device=self.embed.weight.device)
            with torch.no_grad():
                self.run(idx, idx, noise_seed=0)
        # a block has many small parameters, whose values are put together in one kernel
        given = {"max_pointwise_cat_inputs": 64, **(options or {})} if backend == "inductor" else None
        for block in self.blocks:
            block.compile(dynamic=False, backend=backend, options=given)
        self._loss = torch.compile(self._loss, dynamic=False, backend=backend, options=given)
        self.compiled = True
        return self

    def _documents(self, idx: Tensor) -> Tensor | None:
        """Document id per position [B, T] (the number of BOS tokens read so far), when documents are kept apart."""
        return (idx == self.config.bos_token_id).cumsum(1) if self.config.doc_mask else None

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the activations: the compute dtype over float32 parameters, else that of the parameters."""
        own = self.embed.weight.dtype
        return self.compute_dtype if own == torch.float32 else own

    def _embed(self, idx: Tensor) -> Tensor:
        return rms_norm(self.embed(idx).to(self._dtype))

    def _scales(self) -> list[Tensor]:
        """Per layer the factors [2] of the residual stream and of x0."""
        return list(stream_scales(self.resid_scale, self.x0_scale))

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.head(rms_norm(x)).to(torch.promote_types(x.dtype, torch.float32))
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def logits(self, idx: Tensor) -> Tensor:
        """Logits [B, T, V] float32 of token ids idx [B, T]. Raises UserError on an empty input and on ids of no token."""
        self.embed.check(idx)
        return self._logits(self._trunk(idx))

    def _trunk(
        self,
        idx: Tensor,
        noise: ReleaseNoise | None = None,
        records: list[dict[str, Any]] | None = None,
        routing: list[list[Routing]] | None = None,
        probes: Sequence[Probe] | None = None,
        brief: bool = False,
    ) -> Tensor:
        """The residual stream after the last block, [B, T, n_embd]; `records` (brief: see `Extras`) and `routing` get one entry per layer."""
        positions = torch.arange(idx.shape[1], device=idx.device)[None]
        x0 = self._embed(idx)
        x = x0.clone()  # were it x0 itself, the compiler would give the first layer a graph of its own
        cos_sin = rotary(positions, self.config.head_dim, x.dtype)
        doc = self._documents(idx)
        layers = torch.arange(len(self.blocks), device=idx.device)
        for layer, (block, scales) in enumerate(zip(self.blocks, self._scales(), strict=True)):
            record = routes = None
            if records is not None:
                records.append(record := {})
            if routing is not None:
                routing.append(routes := [])
            # the layer's index is a tensor, so that compiled blocks share their graph
            draws = None if noise is None else noise.at(layers[layer], 0)
            x = block(x, x0, scales, idx, cos_sin, Extras(doc, draws, record, routes, None if probes is None else probes[layer], brief))
        return x

    def forward(self, idx: Tensor, targets: Tensor | None = None, noise_seed: int | None = None) -> Tensor:
        """Logits [B, T, V] float32, or with targets [B, T] (-1 ignored) what training minimises: cross-entropy plus aux, in nats.

        noise_seed: see `run`.
        """
        out = self.run(idx, targets, noise_seed=noise_seed)
        if out.loss is None:
            return out.logits
        return out.loss if out.aux is None else out.loss + out.aux

    def run(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        telemetry: bool = False,
        noise_seed: int | None = None,
        noise_step: int | Tensor = 0,
        samples: int = 1,
        sequence_ids: Tensor | None = None,
        routing: bool = False,
        probes: Sequence[Probe] | None = None,
    ) -> RunOutput:
        """One pass over whole sequences; never changes the model.

        telemetry: also return what the terminals did. noise_seed: draw the fraction `stochastic_train_frac` of the release
        events from this seed (and noise_step, the step of a training run); None computes expectations. samples: Monte-Carlo passes, which give the predictive mean and
        variance (noise_seed None means 0 then). sequence_ids: [B] which sequence a row is, 0..B-1 by default: a row's noise
        follows its id and not its place in the batch. routing: also return what the experts did; probes: instruments of the experts,
        one per layer (see `synaptic.moe.Probe`). Raises UserError when several samples are asked of a model without
        stochastic release.
        """
        if samples > 1:
            return self._monte_carlo(idx, targets, telemetry, noise_seed or 0, samples, sequence_ids)
        noise = self._noise(idx, noise_seed, sequence_ids, step=noise_step)
        return self._pass(idx, targets, telemetry, noise, routing and self.config.num_experts > 0, probes)

    @property
    def stochastic(self) -> bool:
        """Whether this model's synapses can release at random."""
        return self.config.synapses and "stochastic" in active_mechanisms(self.config.syn_cfg)

    def _noise(
        self, idx: Tensor, seed: int | None, sequence_ids: Tensor | None, step: int | Tensor = 0, sample: int = 0
    ) -> ReleaseNoise | None:
        if seed is None or not self.stochastic:
            return None
        ids = torch.arange(idx.shape[0]) if sequence_ids is None else sequence_ids
        if ids.shape != idx.shape[:1]:
            raise UserError(f"sequence_ids of shape {list(ids.shape)} do not fit {idx.shape[0]} sequences: give one id for each")
        return ReleaseNoise.of(ids.to(idx.device), seed, step, sample)

    def _pass(
        self,
        idx: Tensor,
        targets: Tensor | None,
        telemetry: bool,
        noise: ReleaseNoise | None,
        routing: bool = False,
        probes: Sequence[Probe] | None = None,
    ) -> RunOutput:
        self.embed.check(idx, targets)
        cfg = self.config.syn_cfg
        wants_aux = self.config.synapses and cfg.presyn and targets is not None and (cfg.aux_energy or cfg.aux_pool)
        tells = self.config.synapses and (cfg.presyn or cfg.hebb != "off")
        records: list[dict[str, Any]] | None = [] if wants_aux or (telemetry and tells) else None
        routes: list[list[Routing]] | None = [] if routing else None
        x = self._trunk(idx, noise, records, routes, probes, brief=not telemetry)
        logits, loss = (self._logits(x), None) if targets is None else self._loss(x, targets)
        aux = summary = None
        if wants_aux:
            aux = torch.stack([auxiliary_loss(record, cfg.aux_energy, cfg.aux_pool) for record in records or []]).mean()
        if telemetry:
            summary = summarise(records or [], cfg.tick)
        return RunOutput(logits, loss, aux, summary, routing=None if routes is None else [route for (route,) in routes])

    def _monte_carlo(
        self, idx: Tensor, targets: Tensor | None, telemetry: bool, seed: int, samples: int, sequence_ids: Tensor | None
    ) -> RunOutput:
        if not self.stochastic:
            raise UserError(f"samples={samples}: this model releases no vesicle at random: set syn_cfg.stochastic_train_frac above 0")
        mean, spread, first = 0.0, 0.0, None
        for sample in range(samples):  # mean and sum of squared deviations, updated as Welford (1962)
            out = self._pass(idx, targets, telemetry and sample == 0, self._noise(idx, seed, sequence_ids, sample=sample))
            first = first or out
            probabilities = torch.softmax(out.logits, dim=-1)
            deviation = probabilities - mean
            mean = mean + deviation / (sample + 1)
            spread = spread + deviation * (probabilities - mean)
        logits = torch.log(mean)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return RunOutput(logits, loss, first.aux, first.telemetry, spread / (samples - 1))

    @torch.no_grad()
    def course(self, idx: Tensor) -> list[dict[str, Any]]:
        """What the terminals of every layer did over idx [B, T]: calcium, vesicles, bias, released, ... [B, H, N, T] by tick."""
        self.embed.check(idx)
        records: list[dict[str, Any]] = []
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            self._trunk(idx, records=records)
        return records

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats [B, T] float32; 0 where the target is -1. Never compiled.

        An evaluation is shorter than another compilation; without a compiled model asking for eager would load the compiler.
        """
        self.embed.check(idx, targets)
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            logits = self._logits(self._trunk(idx))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
        return losses.view_as(targets)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        engram: Engram | str | Path | None = None,
        *,
        noise_seed: int | None = None,
        sequence_ids: Tensor | None = None,
    ) -> SynapseState:
        """KV cache and synapse state of `batch_size` fresh sequences of at most `max_len` tokens.

        engram: fast weights of an earlier session to start from, or their file; one row serves all sequences. noise_seed, sequence_ids:
        stochastic release as in `run`; the key of the draws then belongs to the state. Raises UserError for sizes below 1 and for an
        engram that does not fit.
        """
        if batch_size < 1 or max_len < 1:
            raise UserError(f"init_state(batch_size={batch_size}, max_len={max_len}): both must be at least 1")
        device = self.embed.weight.device
        layers = [block.init_state(batch_size, max_len, device, self._dtype) for block in self.blocks]
        doc = torch.zeros(batch_size, max_len, dtype=torch.long, device=device) if self.config.doc_mask else None
        noise = self._noise(torch.empty(batch_size, 0, device=device), noise_seed, sequence_ids)
        key = None if noise is None else torch.stack([word.flatten() for word in noise.key], dim=1)
        state = SynapseState(torch.zeros(batch_size, dtype=torch.long), layers, max_len, doc, key, self.config.tick)
        if engram is not None:
            state.implant(engram if isinstance(engram, Engram) else Engram.load(engram, device))
        return state

    @torch.no_grad()
    def step(self, idx: Tensor, state: SynapseState, lengths: list[int] | Tensor | None = None) -> Tensor:
        """Read the next chunk idx [B, t] of every sequence, advance `state` in place and return logits [B, t, V].

        `lengths` [B] says how many tokens of each row are real (1..t); the rest is right padding, changes nothing, and its
        logits are meaningless. Raises UserError when a row would pass the state's max_len or shapes do not match.
        """
        self.embed.check(idx)
        counts = [idx.shape[1]] * idx.shape[0] if lengths is None else [int(n) for n in lengths]
        starts = state.pos.tolist()
        self._check_step(idx, state, starts, counts)
        chunk = Chunk.of(starts, counts, idx.shape[1], idx.device)
        if state.noise_key is not None:
            chunk.noise = ReleaseNoise((state.noise_key[:, 0, None, None], state.noise_key[:, 1, None, None]), 0, 0)
        if state.doc is not None:
            self._extend_documents(idx, state, chunk)
        positions = torch.tensor(starts, device=idx.device)[:, None] + torch.arange(idx.shape[1], device=idx.device)
        x = x0 = self._embed(idx)
        cos_sin = rotary(positions, self.config.head_dim, x.dtype)
        for block, scales, layer_state in zip(self.blocks, self._scales(), state.layers, strict=True):
            x = block.step(x, x0, scales, idx, cos_sin, layer_state, chunk)
        state.pos += torch.tensor(counts)
        return self._logits(x)

    def _extend_documents(self, idx: Tensor, state: SynapseState, chunk: Chunk) -> None:
        before = torch.stack([state.doc[row, a - 1] if a else state.doc.new_zeros(()) for row, a in enumerate(chunk.starts)])
        chunk.write(state.doc, before[:, None] + self._documents(idx), dim=1)
        chunk.doc = state.doc[:, : chunk.stop]
        starts = torch.tensor(chunk.starts, device=idx.device)[:, None]
        chunk.fresh = (idx == self.config.bos_token_id) & (starts + torch.arange(idx.shape[1], device=idx.device) > 0)

    def _check_step(self, idx: Tensor, state: SynapseState, starts: list[int], counts: list[int]) -> None:
        if idx.shape[0] != state.batch_size or len(counts) != state.batch_size:
            raise UserError(f"a chunk of {idx.shape[0]} rows does not fit a state of {state.batch_size} sequences")
        k = state.layers[0].k  # layers of one state are alike
        fits = len(state.layers) == len(self.blocks) and (state.doc is not None) == self.config.doc_mask and state.tick == self.config.tick
        if not fits or k.shape[2] != state.max_len or not self.blocks[0].fits(state.layers[0]):
            ticks = "" if state.tick == self.config.tick else f" (ticks of {state.tick} tokens, this model {self.config.tick})"
            raise UserError(f"this state belongs to another model{ticks}: make one with model.init_state")
        if (k.dtype, k.device) != (self._dtype, device := self.embed.weight.device):
            where = f"{k.dtype} on {k.device}, the model in {self._dtype} on {device}"
            raise UserError(f"this state is in {where}: make one with model.init_state, or read its file with load(path, device)")
        for row, (begin, count) in enumerate(zip(starts, counts, strict=True)):
            if not 1 <= count <= idx.shape[1]:
                raise UserError(f"lengths[{row}]={count} is out of bounds [1, {idx.shape[1]}]")
            if begin + count > state.max_len:
                raise UserError(
                    f"row {row} would reach {begin + count} tokens, past this state's max_len={state.max_len}: start with a larger max_len"
                )

    def param_roles(self) -> dict[str, str]:
        """What each parameter is for the optimizer; see `synaptic.roles`."""
        return param_roles(self.named_parameters())

    def num_params(self) -> int:
        """Number of learned values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Training operations per token, forward and backward; see `synaptic.roles`."""
        modes = [module.modes for module in self.modules() if isinstance(module, Density)]
        return flops_per_token(self.config, dict(self.named_parameters()), modes)

    def experts(self) -> list[SynapticMoE]:
        """The mixtures of experts, one per layer; none in a model without."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, SynapticMoE)]

    def gains(self) -> list[dict[str, list[float]]]:
        """Learned output gains per layer (see `Block.gains`): a list for each that exists; empty for a vanilla model."""
        held = to_host([gains for block in self.blocks if (gains := block.gains())])
        return [{name: values.tolist() for name, values in layer.items()} for layer in held]

    @torch.no_grad()
    def zero_gains(self) -> GPT:
        """Set every output gain to zero, which makes the model compute the vanilla one. Changes the model."""
        for module in self.modules():
            if isinstance(module, Density):
                module.out.zero_()
            if isinstance(module, ExpertSynapse):
                module.zero_gains()
            if isinstance(module, Presynaptic):
                for name in GAINS:
                    if hasattr(module, name):
                        getattr(module, name).zero_()
        return self

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> GPT:
        """The model of a checkpoint (a step directory or a folder of them), in evaluation mode on `device`.

        Raises UserError for a missing or damaged one, and for one whose tensors do not fit its own configuration.
        """
        checkpoint = load_checkpoint(find_checkpoint(path))
        config = from_dict(GPTConfig, checkpoint.meta.get("model_config"))
        with torch.device("meta"):
            model = cls(config)
        expected = dict(model.state_dict())
        wrong = [name for name in expected if name not in checkpoint.model or checkpoint.model[name].shape != expected[name].shape]
        wrong += [name for name in checkpoint.model if name not in expected]
        if wrong:
            raise UserError(f"checkpoint {checkpoint.path} does not fit its own model_config: tensor {wrong[0]!r}")
        model.load_state_dict(checkpoint.model, assign=True)
        return model.to(device).eval()
