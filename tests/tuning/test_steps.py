"""Training a population: the host never waits for the device, and a recorded step is the step that was recorded."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.tasks.memory import Recall
from bio_inspired_nanochat.tuning import steps
from bio_inspired_nanochat.tuning.stack import Stack
from bio_inspired_nanochat.tuning.steps import Gradients, by_seed, task_rows, text_rows, train

TASK = Recall(distance=8, spread=2, fillers=4, pairs=2, keys=6, values=4)
OPTIM = OptimConfig()
STEPS = 8


def population(device: str = "cpu", **changes: object) -> Stack:
    sizes = {"sequence_len": TASK.length, "vocab_size": TASK.vocab_size, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 16}
    configs = [GPTConfig(**sizes, synapses=True, syn_cfg=SynapticConfig(tau_c=tau, tick=4, **changes)) for tau in (9.0, 50.0)]
    return Stack(configs, [0, 0], device)


def rows(seed: int):
    return task_rows(TASK, torch.Generator().manual_seed(seed), 4)


@pytest.mark.parametrize("changes", [{}, {"hebb": "delta", "rank_eligibility": 4}, {"barrier": "linear", "hebb": "hebb"}])
def test_a_step_on_cuda_asks_nothing_of_the_host(changes: dict) -> None:
    """Tensors without data have no values to wait for: reading one raises."""
    idx = torch.zeros(2, 4, TASK.length, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stack = population("cuda", **changes)
        losses = stack.losses(idx.to("cuda"), idx.to("cuda"))
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()
    assert losses.device.type == "cuda" and losses.shape == (2,)


class Recording:
    """Stands in for a CUDA graph: replaying computes the recorded pass again, from and into the tensors that it was recorded with."""

    def __init__(self, recorded: list[Recording]) -> None:
        recorded.append(self)
        self.gradients: Gradients | None = None
        self.replays = 0

    def replay(self) -> None:
        assert self.gradients is not None
        self.replays += 1
        kept = [parameter.grad for parameter in self.gradients.parameters]
        self.gradients._pass(self.gradients.idx, self.gradients.targets)
        for parameter, grad in zip(self.gradients.parameters, kept, strict=True):
            grad.copy_(parameter.grad)
            parameter.grad = grad


def recording(monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> list[Recording]:
    recorded: list[Recording] = []

    def capture(run):
        tape = Recording(recorded)
        made = run()
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return tape, made

    def wanted(self: Gradients, model: Stack, graph: bool) -> None:
        plain(self, model, graph)
        self.wanted = graph

    plain = Gradients.__init__
    monkeypatch.setattr(Gradients, "__init__", wanted)
    monkeypatch.setattr(steps, "aside", contextlib.nullcontext)
    monkeypatch.setattr(steps, "capture", capture)
    return recorded


def trained(graph: bool) -> dict[str, torch.Tensor]:
    stack = population()
    for _ in train(stack, by_seed([0, 0], rows), STEPS, STEPS, OPTIM, graph):
        pass
    return stack.member(1)


def test_a_replayed_step_trains_as_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(False)
    recorded = recording(monkeypatch)
    record = Gradients._record

    def told(self: Gradients, idx: torch.Tensor, targets: torch.Tensor) -> None:
        record(self, idx, targets)
        recorded[-1].gradients = self

    monkeypatch.setattr(Gradients, "_record", told)
    found = trained(True)
    assert len(recorded) == 1 and recorded[0].replays == STEPS - steps.WARM_RUNS
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.gpu
def test_a_replayed_step_of_a_population_is_the_step(capsys) -> None:
    def on_gpu(seed: int):
        return task_rows(TASK, torch.Generator("cuda").manual_seed(seed), 4)

    losses = []
    for graph in (False, True):
        stack = population("cuda", hebb="delta", rank_eligibility=4)
        for _ in train(stack, by_seed([0, 1], on_gpu), STEPS, STEPS, OPTIM, graph):
            pass
        losses.append(stack.losses(*next(by_seed([2, 3], on_gpu))).detach().cpu())
    assert "not replayed" not in capsys.readouterr().out
    assert torch.allclose(*losses, atol=1e-3) and losses[0][0] != losses[0][1]


def test_a_recording_that_fails_is_said_once_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    expected = trained(False)
    recorded = recording(monkeypatch, fails=True)
    found = trained(True)
    assert len(recorded) == 1 and all(torch.equal(weight, expected[name]) for name, weight in found.items())
    lines = capsys.readouterr()
    assert (lines.out + lines.err).count("notice: steps are not replayed") == 1 and "and more" not in lines.out + lines.err


def test_models_of_one_seed_see_the_same_rows_and_others_do_not() -> None:
    idx, targets = next(by_seed([5, 3, 5], rows))
    assert idx.shape == targets.shape == (3, 4, TASK.length)
    assert torch.equal(idx[0], idx[2]) and not torch.equal(idx[0], idx[1])
    assert torch.equal(idx[1], next(rows(3))[0])


def test_a_pass_over_a_text_shows_every_row_once() -> None:
    held = torch.arange(10)[:, None].expand(10, 4) * 10 + torch.arange(4)
    stream = text_rows(held, torch.Generator().manual_seed(0), 3)
    drawn = [next(stream) for _ in range(6)]
    first, second = ([int(row[0]) for idx, _ in part for row in idx] for part in (drawn[:3], drawn[3:]))
    assert len(set(first)) == len(set(second)) == 9 and first != second
    assert all(torch.equal(targets, idx + 1) for idx, targets in drawn)
