"""When a run is looked at, what that takes of its time, and what a look asks of the device."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bio_inspired_nanochat.benchmarks.vitals import bounded_share
from bio_inspired_nanochat.gpt import GPT, GPTConfig
from bio_inspired_nanochat.synaptic import SynapticCausalSelfAttention, summarise
from bio_inspired_nanochat.synaptic.block import Embedding
from bio_inspired_nanochat.training import Callback, looks, train, vitals
from bio_inspired_nanochat.training.looks import EVERY, SHARE, Looks
from tests.training.tiny import small

SHAPE = GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, synapses=True)


def course(every: int | None, steps: int, step: float, look: float, opening: float | None = None) -> tuple[list[int], float, Looks, list]:
    """Steps that were looked at in a run by a clock of its own, its time after the first look, and what was said. opening: of the first look."""
    now, taken, since, said = 0.0, [], 0.0, []
    rule = Looks(every, clock=lambda: now, tell=said.append)
    for at in range(1, steps + 1):
        now += step
        if rule.take(at, at == steps):
            with rule.timed():
                now += look if taken or opening is None else opening
            since = since if taken else now
            taken.append(at)
    return taken, now - since, rule, said


@pytest.mark.parametrize("look", [0.03, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("opening", [None, 60.0])
def test_slow_looks_keep_to_their_share_of_the_time(look, opening):
    taken, seconds, rule, said = course(None, 60_000, 0.03, look, opening)
    assert taken[0] == 1 and taken[-1] == 60_000 and all(step % EVERY == 0 for step in taken[1:])
    assert taken[1] == EVERY, "the first look, in which kernels are made, is not held against those after it"
    between = look * len(taken[1:-1])
    assert between <= SHARE * seconds + look, "all looks but the first and the last"
    assert between >= min(SHARE * seconds, look * 599) - look, "what they may take is used"
    assert rule.left_out_in_all == 600 - len(taken[1:]) and len(said) == (rule.left_out_in_all > 0)


def test_cheap_looks_are_all_taken_and_explicit_numbers_followed_exactly():
    regular = [1, *range(EVERY, 3001, EVERY)]
    assert course(None, 3000, 0.03, 0.01)[0] == regular
    for look in (0.01, 100.0):
        assert course(EVERY, 3000, 0.03, look)[0] == regular
        assert course(7, 31, 0.03, look)[0] == [1, 7, 14, 21, 28, 31]
        assert course(0, 300, 0.03, look)[0] == []


def test_a_resumed_run_begins_with_a_look_that_is_not_counted():
    now = 0.0
    rule = Looks(None, clock=lambda: now)
    for step, seconds, taken in ((EVERY * 8, 50.0, True), (EVERY * 9, 1.0, True), (EVERY * 10, 1.0, False)):
        now += 3.0
        assert rule.take(step, False) is taken
        if taken:
            with rule.timed():
                now += seconds


class Slow(Callback):
    """Takes its time over a look."""

    def on_look(self, look) -> None:
        time.sleep(0.2)


@pytest.mark.parametrize(("every", "steps"), [(None, [1, 2, 12]), (2, [1, 2, 4, 6, 8, 10, 12])])
def test_a_run_leaves_out_slow_looks_and_says_how_many(tmp_path, monkeypatch, capsys, every, steps):
    monkeypatch.setattr(looks, "EVERY", 2)
    record = train(small(tmp_path, num_iterations=12, synapses=True, vitals_every=every, eval_tokens=0), [Slow()])
    lines = [json.loads(line) for line in (Path(record["log_dir"]) / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["left_out"] for line in lines if line["kind"] == "vitals"}
    assert list(seen) == steps
    assert record["looks_left_out"] == sum(seen.values()) == seen[12] == 7 - len(steps)
    assert capsys.readouterr().out.count("--vitals_every=2 takes them all") == (every is None)


class Steps(Callback):
    """Notes when a step's work has been given to the device."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def after_update(self, step, model, optimizer) -> None:
        self.events.append("update")


def test_the_wait_for_earlier_steps_is_not_the_looks(tmp_path, monkeypatch):
    """The device is waited for before the clock of a look starts, and only when one is due."""
    events: list[str] = []
    timed = Looks.timed
    monkeypatch.setattr("bio_inspired_nanochat.training.loop.wait_for_device", lambda _: events.append("wait"))
    monkeypatch.setattr(Looks, "timed", lambda self: events.append("look") or timed(self))
    train(small(tmp_path, num_iterations=4, synapses=True, vitals_every=3, eval_tokens=0, log_every=0, save_every=-1), [Steps(events)])
    assert " ".join(events).replace("wait update", "step") == "step wait look step step wait look step wait look"


def test_rank_0s_clock_decides_for_all(monkeypatch):
    """Two ranks as threads, by whose clocks looks cost something or, on rank 1, nothing and then everything."""
    meeting, told = threading.Barrier(2, timeout=20), {}

    def agree(values):
        told[threading.current_thread()] = values
        meeting.wait()
        largest = [max(one) for one in zip(*told.values(), strict=True)]
        meeting.wait()
        return largest

    monkeypatch.setattr(looks.guards, "agree", agree)

    def decide(first: bool) -> list[int]:
        now, found, rule = 0.0, [], Looks(None, first, lambda: now, lambda _: None)
        for at in (1, *range(EVERY, 20 * EVERY + 1, EVERY)):
            now = max(now, at * 0.03)
            if rule.take(at, at == 20 * EVERY):
                with rule.timed():
                    now += 0.1 if first else 0.0 if at < 10 * EVERY else 1e6
                found.append(at)
        return found

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(decide, (True, False)))
    assert taken[0] == taken[1] == [1, 100, 700, 1400, 2000]


def test_bench_vitals_bounds_the_share_by_the_same_rule():
    assert bounded_share(None, 0.03, 0.003) == pytest.approx(0.003 / 3, rel=0.01), "cheap: every hundredth step"
    assert bounded_share(EVERY, 0.03, 0.3) == pytest.approx(0.1, rel=0.01), "an explicit number is followed"
    assert 0.9 * SHARE < bounded_share(None, 0.03, 0.3) < SHARE + 4 * 0.3 / 3000


class Census(TorchDispatchMode):
    """Counts operations, reads of single numbers and shapes that depend on data; and those that touch given memory."""

    def __init__(self, memory: set[int] | None = None) -> None:
        super().__init__()
        self.operations, self.waits, self.touched, self._memory = 0, [], [], memory or set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func._schema.name, func(*args, **(kwargs or {}))
        self.operations += 1
        if name in ("aten::_local_scalar_dense", "aten::nonzero") or (name == "aten::index" and any(map(_mask, args[1]))):
            self.waits.append(name)
        tensors = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        self.touched += [name for tensor in tensors if tensor.untyped_storage().data_ptr() in self._memory]
        return out


def _mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@pytest.mark.parametrize("experts", [False, True])
def test_a_look_reads_the_device_once(monkeypatch, experts):
    """On a GPU every number that is read alone is a wait. Before the copy nothing is read; after it only the copy is."""
    monkeypatch.setattr(SynapticCausalSelfAttention, "checked", False)  # as in training
    model = GPT(dataclasses.replace(SHAPE, num_experts=4 if experts else 0))
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    before, after, copies = Census(), Census(memory), []

    def copied(tree):
        before.__exit__(None, None, None)
        copies.append(vitals_to_host(tree))
        after.__enter__()
        return copies[-1]

    vitals_to_host = vitals.to_host
    with monkeypatch.context() as patched:
        patched.setattr(vitals, "to_host", copied)
        # the operator and the check of ids ask a CPU for the range of their input, and a GPU for nothing
        patched.setattr(Embedding, "check", lambda *_: None)
        patched.setattr(torch.nn.functional, "one_hot", lambda ticks, count: (ticks[..., None] == torch.arange(count)).long())
        before.__enter__()
        seen = vitals.look(model, torch.randint(64, (2, 64)), 1)
        after.__exit__(None, None, None)
    assert len(copies) == 1 and before.operations > 100 and before.waits == []
    assert after.operations > 0 and after.touched == []
    assert len(seen.experts) == (8 if experts else 0) and seen.constants == vitals.constants(model)
    assert seen.gains == model.gains() and seen.pools[1]["calcium"].sum() > 0


def test_all_layers_are_summarised_together():
    """As many operations for six layers as for one, but for views; the same values."""
    torch.manual_seed(0)
    records = [{name: torch.randn(2, 3, 4, 16) for name in ("calcium", "bias", "vesicles")} for _ in range(6)]
    records[3].pop("vesicles")
    with Census() as one:
        summarise(records[:1], 4)
    with Census() as six:
        together = summarise(records, 4)
    assert six.operations <= one.operations + 5 * 2 * len(records) + 6
    for record, summary in zip(records, together, strict=True):
        (alone,) = summarise([record], 4)
        assert set(alone.mean) == set(summary.mean) == set(record) | {"bias_abs"}
        for name, mean in alone.mean.items():
            torch.testing.assert_close(summary.mean[name], mean)
            torch.testing.assert_close(summary.histogram[name], alone.histogram[name])
