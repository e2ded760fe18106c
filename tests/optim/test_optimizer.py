"""The front object: roles decide, state is addressed by name, and a resumed run is the same run bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from bio_inspired_nanochat.checkpoint import load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.optim import ROLES, OptimConfig, Optimizer, build_optimizer, parameter_groups

ROLE_OF = {
    "embed": "embed",
    "values": "value_embed",
    "mix": "matrix",
    "out": "fast",
    "tall": "matrix",
    "experts": "matrix",
    "head": "head",
    "gain": "scalar",
    "gate": "gate",
    "route": "router",
    "tau": "kinetics",
}
SHAPE_OF = {
    "embed": (11, 8),
    "values": (11, 8),
    "mix": (8, 8),
    "out": (8, 8),
    "tall": (16, 8),
    "experts": (2, 8, 16),
    "head": (11, 8),
    "gain": (),
    "gate": (2, 8),
    "route": (2, 8),
    "tau": (4,),
}


class Toy(nn.Module):
    """One parameter per role (and more matrices), and a loss in which each has a gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPE_OF.items():
            self.register_parameter(name, Parameter(0.3 * torch.randn(shape, generator=generator)))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed[ids] + torch.sigmoid(self.embed[ids] @ self.gate.T)[..., :1] * self.values[ids]
        x = x + self.gain * (x @ self.mix.T) @ self.out.T
        hidden = (x @ self.tall.T).relu().square()
        x = (
            x
            + torch.einsum("btf,edf,bte->btd", hidden, self.experts, torch.softmax(x @ self.route.T, dim=-1)) * torch.exp(-self.tau).mean()
        )
        return nn.functional.cross_entropy((x @ self.head.T).flatten(0, 1), targets.flatten())


def built(model: nn.Module, config: OptimConfig | None = None) -> Optimizer:
    return build_optimizer(model.named_parameters(), ROLE_OF, config or OptimConfig(), n_embd=8, batch_tokens=4096)


def train(
    model: Toy, optimizer: Optimizer, first: int, last: int, skip: Callable[[int, str], bool] = lambda step, name: False
) -> list[float]:
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (4, 6), generator=generator)
        loss = model(ids, (ids * 3 + 1) % 11)
        loss.backward()
        for name, param in model.named_parameters():
            if skip(step, name):
                param.grad = None
        optimizer.schedule(step, 20)
        optimizer.clip_grad_norm()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_every_role_learns_with_its_own_settings() -> None:
    model = Toy()
    optimizer = built(model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = train(model, optimizer, 0, 20)
    assert losses[-1] < 0.9 * losses[0]
    for name, param in model.named_parameters():
        assert not torch.equal(param.detach(), before[name]), name
    assert {group["role"] for group in optimizer.param_groups} == set(ROLES)
    assert {name: group["role"] for group in optimizer.param_groups for name in group["names"]} == ROLE_OF
    kinetics = next(group for group in optimizer.param_groups if group["role"] == "kinetics")
    assert kinetics["betas"] == (0.8, 0.95) and kinetics["weight_decay"] == 0.0 and kinetics["initial_lr"] == 0.01


MUON = ("matrix", "fast")


def test_only_matrices_and_those_of_fast_weights_reach_muon() -> None:
    model = Toy()
    optimizer = built(model)
    train(model, optimizer, 0, 1)
    for name, entry in optimizer.state_dict()["parameters"].items():
        assert ("momentum" in entry["state"]) == (ROLE_OF[name] in MUON)
        assert ("exp_avg" in entry["state"]) == (ROLE_OF[name] not in MUON)


@pytest.mark.parametrize("role", [role for role in ROLES if role not in MUON])
def test_a_two_dimensional_parameter_of_another_role_stays_with_adamw(role: str) -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(model.named_parameters(), {"weight": role}, OptimConfig(), n_embd=4, batch_tokens=64)
    model.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert set(optimizer.moments("weight")) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("param", "role", "message"),
    [
        (Parameter(torch.zeros(4)), "matrix", "matrices only"),
        (Parameter(torch.zeros(())), "matrix", "matrices only"),
        (Parameter(torch.zeros(4)), "fast", "matrices only"),
        (Parameter(torch.zeros(4, 4), requires_grad=False), "matrix", "does not learn"),
        (Parameter(torch.zeros(4, 4)), "weight", "unknown role"),
    ],
)
def test_wrong_roles_are_assertions(param: Parameter, role: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        parameter_groups([("p", param)], {"p": role}, OptimConfig(), n_embd=4, batch_tokens=64)


def test_parameters_and_roles_must_be_the_same_set() -> None:
    for roles in ({}, {"p": "scalar", "q": "scalar"}):
        with pytest.raises(AssertionError, match="differ"):
            parameter_groups([("p", Parameter(torch.zeros(4)))], roles, OptimConfig(), n_embd=4, batch_tokens=64)


def test_frozen_parameters_of_other_roles_are_left_out() -> None:
    frozen, free = Parameter(torch.zeros(4), requires_grad=False), Parameter(torch.zeros(4))
    groups = parameter_groups([("a", frozen), ("b", free)], {"a": "scalar", "b": "scalar"}, OptimConfig(), n_embd=4, batch_tokens=64)
    assert [group["names"] for group in groups] == [["b"]]


def test_a_missing_gradient_changes_neither_parameter_nor_moments() -> None:
    model = Toy()
    optimizer = built(model, OptimConfig(weight_decay=0.5))
    train(model, optimizer, 0, 2)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    state = {name: {k: v.clone() for k, v in entry["state"].items()} for name, entry in optimizer.state_dict()["parameters"].items()}
    absent = ("out", "embed", "tau", "experts")
    train(model, optimizer, 2, 3, skip=lambda step, name: name in absent)
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), before[name]) == (name in absent), name
    for name, entry in optimizer.state_dict()["parameters"].items():
        for key, value in entry["state"].items():
            assert torch.equal(value, state[name][key]) == (name in absent), (name, key)


def test_a_parameter_that_never_had_a_gradient_survives_a_resume() -> None:
    never = lambda step, name: name in ("mix", "gate")
    whole = Toy()
    optimizer = built(whole)
    train(whole, optimizer, 0, 3, skip=never)
    saved, weights = optimizer.state_dict(), {k: v.clone() for k, v in whole.state_dict().items()}
    resumed = Toy(1)
    resumed.load_state_dict(weights)
    other = built(resumed)
    assert other.load_state_dict(saved) == []
    train(whole, optimizer, 3, 6)
    train(resumed, other, 3, 6)
    assert same_bits(whole, resumed)


def test_resume_through_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    config = OptimConfig(grad_clip=1.0)
    gap = lambda step, name: (step + len(name)) % 3 == 0
    whole = Toy()
    optimizer = built(whole, config)
    train(whole, optimizer, 0, 9, gap)
    path = save_checkpoint(tmp_path, 9, whole.state_dict(), {}, optimizer.state_dict())
    expected = train(whole, optimizer, 9, 15, gap)

    resumed = Toy(seed=1)
    resumed.load_state_dict(load_checkpoint(path).model)
    continued = built(resumed, config)
    continued.load_state_dict(load_optimizer(path))
    assert train(resumed, continued, 9, 15, gap) == expected
    assert same_bits(whole, resumed)


def test_state_is_found_by_name_and_not_by_order() -> None:
    model = Toy()
    optimizer = built(model)
    train(model, optimizer, 0, 3)
    shuffled = list(model.named_parameters())[::-1]
    other = build_optimizer(shuffled, dict(reversed(ROLE_OF.items())), OptimConfig(), n_embd=8, batch_tokens=4096)
    other.load_state_dict(optimizer.state_dict())
    for name in ROLE_OF:
        for key, value in optimizer.moments(name).items():
            assert torch.equal(value, other.moments(name)[key])


def test_multiplier_and_momentum_are_part_of_the_state() -> None:
    optimizer, other = built(Toy()), built(Toy())
    optimizer.set_lr_multiplier(0.5)
    optimizer.set_momentum(0.9)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.5 * group["initial_lr"] for group in other.param_groups]
    assert (other.lr_multiplier, other.momentum) == (0.5, 0.9)
    assert next(group for group in other.param_groups if group["role"] == "matrix")["momentum"] == 0.9


def test_a_loaded_state_is_a_copy() -> None:
    model = Toy()
    optimizer = built(model)
    train(model, optimizer, 0, 1)
    state = optimizer.state_dict()
    other = built(Toy())
    other.load_state_dict(state)
    other.moments("mix")["momentum"].zero_()
    assert optimizer.moments("mix")["momentum"].abs().sum() > 0


def changed(saved: dict[str, Any], name: str, **entry: Any) -> dict[str, Any]:
    return {**saved, "parameters": {**saved["parameters"], name: {**saved["parameters"].get(name, {}), **entry}}}


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = Toy()
    optimizer = built(model)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    missing = {**state, "parameters": {k: v for k, v in state["parameters"].items() if k != "mix"}}
    wrong = {
        "mix has no saved state": missing,
        "extra is not in the model": changed(state, "extra", shape=[1], state={}),
        "mix has shape": changed(state, "mix", shape=[9, 9]),
        "mix was saved by another optimizer": changed(state, "mix", state={"exp_avg": torch.zeros(8, 8)}),
        "mix has a saved state of another": changed(state, "mix", state={"momentum": torch.zeros(8, 8, dtype=torch.float64)}),
    }
    for message, bad in wrong.items():
        before = optimizer.moments("out")["momentum"]
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(bad)
        assert optimizer.moments("out")["momentum"] is before
    fresh = Toy()
    other = built(fresh)
    train(fresh, other, 0, 1)
    assert other.load_state_dict(missing, strict=False) == ["mix"]
    assert not other.moments("mix") and torch.equal(other.moments("out")["momentum"], optimizer.moments("out")["momentum"])


def test_learning_rates_come_from_the_config_and_not_from_the_state() -> None:
    model = Toy()
    optimizer = built(model)
    train(model, optimizer, 0, 1)
    other = built(Toy(), OptimConfig(matrix_lr=0.5))
    other.load_state_dict(optimizer.state_dict())
    matrix = next(group for group in other.param_groups if group["role"] == "matrix")
    assert matrix["lr"] == matrix["initial_lr"] * optimizer.lr_multiplier
    assert matrix["initial_lr"] > optimizer.param_groups[0]["initial_lr"]


def test_multiplier_zero_freezes_and_the_same_multiplier_restores() -> None:
    model = Toy()
    optimizer = built(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.set_lr_multiplier(0.0)
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.arange(8).view(2, 4), torch.arange(8).view(2, 4)).backward()
    optimizer.step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.set_lr_multiplier(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_warm_ups_shrink_with_the_run() -> None:
    optimizer = built(Toy())
    assert optimizer.schedule(0, 10_000) == pytest.approx(1 / 40)
    assert optimizer.schedule(299, 10_000) == 1.0 and optimizer.momentum < 0.95
    assert optimizer.schedule(0, 20) == 0.5
    optimizer.schedule(7, 20)
    assert optimizer.momentum == 0.95
    assert optimizer.schedule(0, 1) == 1.0


def test_moments_can_be_edited_row_by_row() -> None:
    """What a split or a merge of experts does to their optimizer state."""
    model = Toy()
    optimizer = built(model)
    assert optimizer.moments("experts") == {}
    train(model, optimizer, 0, 1)
    momentum = optimizer.moments("experts")["momentum"]
    momentum[1] = momentum[0]
    state = optimizer.state_dict()["parameters"]["experts"]["state"]["momentum"]
    assert torch.equal(state[1], state[0])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(OptimConfig)])
def test_every_setting_changes_the_run(field: str) -> None:
    default = getattr(OptimConfig(), field)
    value = (not default) if isinstance(default, bool) else default * 2 + 3 if isinstance(default, int) else default / 2 + 0.003
    assert final_weights(OptimConfig(**{field: value})) != final_weights(OptimConfig())


def final_weights(config: OptimConfig) -> list[float]:
    model = Toy()
    optimizer = built(model, config)
    for step in range(0, 1000, 50):
        train_step(model, optimizer, step)
    return [param.double().sum().item() for param in model.parameters()]


def train_step(model: Toy, optimizer: Optimizer, step: int) -> None:
    ids = torch.arange(24).view(4, 6) * (step + 1) % 11
    model(ids, (ids * 3 + 1) % 11).backward()
    optimizer.schedule(step, 1000)
    optimizer.clip_grad_norm()
    optimizer.step()
    optimizer.zero_grad()


def test_out_of_bounds_settings_are_user_errors() -> None:
    for values in ({"matrix_lr": -1.0}, {"decay_frac": 1.5}, {"momentum": 1.0}, {"warmup_steps": 2.5}):
        with pytest.raises(UserError, match="optim."):
            OptimConfig(**values)


def test_learning_rates_follow_width_and_batch() -> None:
    def rates(n_embd: int, batch_tokens: int) -> dict[str, float]:
        groups = parameter_groups(Toy().named_parameters(), ROLE_OF, OptimConfig(), n_embd=n_embd, batch_tokens=batch_tokens)
        return {group["role"]: group["initial_lr"] for group in groups}

    base = rates(768, 1 << 19)
    assert base == {role: getattr(OptimConfig(), f"{role}_lr") for role in ROLES}
    assert rates(768, 4096) == base
    narrow = rates(192, 4096)
    assert {role: narrow[role] / base[role] for role in ROLES if narrow[role] != base[role]} == {
        "embed": 2.0,
        "value_embed": 2.0,
        "head": 2.0,
    }
    large = rates(768, 1 << 20)
    assert {role for role in ROLES if large[role] == base[role]} == {"gate", "router", "kinetics"}
    assert large["matrix"] == pytest.approx(2**0.5 * base["matrix"])
    assert rates(768, 1 << 24)["matrix"] == 2 * base["matrix"]
