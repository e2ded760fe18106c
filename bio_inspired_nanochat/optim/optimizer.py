"""The optimizer of a model: Muon for its matrices and AdamW for the rest behind one object, with state addressed by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bio_inspired_nanochat.common import cut_like
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim.clip import clip_grad_norm
from bio_inspired_nanochat.optim.config import OptimConfig
from bio_inspired_nanochat.optim.groups import MUON, parameter_groups
from bio_inspired_nanochat.optim.muon import Muon
from bio_inspired_nanochat.optim.schedule import lr_multiplier, muon_momentum

_EPS = 1e-10  # far below the usual 1e-8: gradients of a mean loss over many tokens are small


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]],
    roles: Mapping[str, str],
    config: OptimConfig,
    *,
    n_embd: int,
    batch_tokens: int,
) -> Optimizer:
    """The optimizer of a model's `named_parameters()` with the roles of `param_roles()`.

    n_embd: width of the model; batch_tokens: tokens per optimizer step over all ranks. Both set the learning rates (see `groups`).
    Build it after the model has moved to its device.
    """
    return Optimizer(parameter_groups(named_parameters, roles, config, n_embd=n_embd, batch_tokens=batch_tokens), config)


class Optimizer:
    """Muon and AdamW as one. Every group has `name` and `role` (the role), `names`, `params`, `lr` and `initial_lr` (its `lr` at multiplier 1).

    A parameter without a gradient is left alone in that step, moments included.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.config = config
        self.lr_multiplier = 1.0
        self.momentum = config.momentum
        matrices = [group for group in groups if group["role"] in MUON]
        others = [group for group in groups if group["role"] not in MUON]
        self._muon = Muon(matrices, cautious=config.cautious) if matrices else None
        self._adamw = torch.optim.AdamW(others, eps=_EPS, fused=True) if others else None
        self._parts: list[torch.optim.Optimizer] = [part for part in (self._muon, self._adamw) if part is not None]
        self.param_groups: list[dict[str, Any]] = [group for part in self._parts for group in part.param_groups]
        self._parameters = {name: (part, param) for part in self._parts for name, param in _named(part)}

    def step(self) -> None:
        """One step from the gradients in `.grad`, with the learning rates and the momentum that were set last."""
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def clip_grad_norm(self) -> Tensor:
        """The gradients' global norm, 0-dim on their device, before clipping them to `config.grad_clip` (0: measured only)."""
        return clip_grad_norm([param for _, param in self._parameters.values()], self.config.grad_clip)

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Set every group's `lr` to `initial_lr` times the multiplier."""
        self.lr_multiplier = multiplier
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multiplier

    def set_momentum(self, momentum: float) -> None:
        """Set Muon's momentum."""
        self.momentum = momentum
        if self._muon is not None:
            for group in self._muon.param_groups:
                group["momentum"] = momentum

    def schedule(self, step: int, total: int) -> float:
        """Set learning rates and momentum for `step` (0 ... total - 1) of a run, by the config. Returns the learning rate multiplier.

        Warm-ups are shortened in short runs: to a tenth of the run for the learning rate, a third for the momentum.
        """
        config = self.config
        warmup = min(config.warmup_steps, total // 10)
        self.set_lr_multiplier(lr_multiplier(step, total, warmup, config.decay_frac, config.final_lr_frac))
        self.set_momentum(muon_momentum(step, min(config.momentum_warmup, total // 3), config.momentum_start, config.momentum))
        return self.lr_multiplier

    def moments(self, name: str) -> dict[str, Tensor]:
        """The state tensors of a parameter that have its shape, to be edited in place; empty before its first gradient."""
        part, param = self._parameters[name]
        return {key: value for key, value in part.state.get(param, {}).items() if value.shape == param.shape and key != "step"}

    def state_dict(self) -> dict[str, Any]:
        """What continues the run bit for bit: moments and step counts by parameter name, multiplier and momentum.

        Tensors are the live ones, not copies (under FSDP cut like their parameters: `common.whole_tree` gathers them). Learning rates, decays and betas are not in it: they belong to the config.
        """
        parameters = {}
        for name, (part, param) in self._parameters.items():
            parameters[name] = {"shape": list(param.shape), "state": dict(part.state.get(param, {}))}
        return {"parameters": parameters, "lr_multiplier": self.lr_multiplier, "momentum": self.momentum}

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> list[str]:
        """Take over a state of `state_dict`, copied to the parameters' devices; all of it or, on an error, nothing.

        strict: UserError unless it describes the same parameters. Otherwise what fits by name and shape is taken and the names of the
        parameters that start afresh are returned (a model that has gained parts since it was saved).
        """
        saved: Mapping[str, Any] = state["parameters"]
        problems = {name: problem for name in self._parameters if (problem := self._mismatch(name, saved.get(name)))}
        unknown = [name for name in saved if name not in self._parameters]
        if strict and (problems or unknown):
            reason = next(iter(problems.values())) if problems else f"{unknown[0]} is not in the model"
            raise UserError(f"optimizer state does not fit the model: {reason}; resume with the configuration that saved it")
        for name, (part, param) in self._parameters.items():
            part.state.pop(param, None)
            if name not in problems and saved[name]["state"]:
                part.state[param] = {
                    key: cut_like(value.detach().to(device=param.device, copy=True, memory_format=torch.contiguous_format), param)
                    for key, value in saved[name]["state"].items()
                }
        self.set_lr_multiplier(state["lr_multiplier"])
        self.set_momentum(state["momentum"])
        return list(problems)

    def _mismatch(self, name: str, entry: Mapping[str, Any] | None) -> str | None:
        """Why a saved entry cannot continue this parameter; None when it can."""
        if entry is None:
            return f"{name} has no saved state"
        part, param = self._parameters[name]
        if list(entry["shape"]) != list(param.shape):
            return f"{name} has shape {list(param.shape)}, the saved one {list(entry['shape'])}"
        expected = {"momentum"} if part is self._muon else {"step", "exp_avg", "exp_avg_sq"}
        tensors = {key: value for key, value in entry["state"].items() if key != "step"}
        if entry["state"] and set(entry["state"]) != expected:
            return f"{name} was saved by another optimizer (state {', '.join(entry['state'])})"
        if any(value.shape != param.shape or value.dtype != param.dtype for value in tensors.values()):
            return f"{name} has a saved state of another shape or dtype"
        return None


def _named(part: torch.optim.Optimizer) -> Iterable[tuple[str, Parameter]]:
    for group in part.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
