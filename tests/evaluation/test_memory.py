"""Scores of memory tasks and log-odds from engrams, on models small enough to check by hand."""

import math

import pytest
import torch

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.memory import engram_log_odds, judge, log_odds, measure
from bio_inspired_nanochat.gpt import GPT, GPTConfig
from bio_inspired_nanochat.synaptic import SynapticConfig
from bio_inspired_nanochat.tasks.memory import Episodes, Facts, Recall, Switching

FACTS = Facts(distance=6, spread=2, fillers=5, facts=2, syllables=10, name_length=3, attributes=6)
RECALL = Recall(distance=6, spread=9, fillers=5, pairs=3, keys=5, values=4)


def model_for(task, **changes) -> GPT:
    """A model whose matrices that are zero at birth are not."""
    sizes = {"sequence_len": task.length, "vocab_size": task.vocab_size, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 16}
    model, generator = GPT(GPTConfig(**{**sizes, **changes}), seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(0, 0.5, generator=generator)
    return model


class Oracle(GPT):
    """Knows the answers of the first group, and says a wrong word elsewhere."""

    def __init__(self, config: GPTConfig, task: Switching) -> None:
        super().__init__(config)
        self.task = task

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        truth = self.task.sample(torch.Generator().manual_seed(self.seed), len(idx))
        assert torch.equal(truth.idx, idx)
        said = torch.where((truth.targets >= 0) & (truth.group == 0), truth.targets, 0)
        return torch.nn.functional.one_hot(said, self.config.vocab_size).float() * 20


def test_accuracy_is_split_by_group_and_by_distance(monkeypatch):
    task = Switching(distance=6, spread=0, fillers=5, pairs=3, keys=5, values=4)
    oracle = Oracle(model_for(task).config, task)
    oracle.seed = 123
    monkeypatch.setattr("bio_inspired_nanochat.evaluation.memory.stable_hash", lambda *_: 123)
    score = measure(oracle, task, rows=32, batch=32)
    assert score.answers == 32 * 9 and score.by_group == {"A": 1.0, "B": 0.0, "A again": 0.0}
    assert score.accuracy == pytest.approx(1 / 3) and score.loss == pytest.approx(20 * 2 / 3, abs=1e-3)
    truth = task.sample(torch.Generator().manual_seed(123), 32)
    far = truth.distance[truth.group == 2]
    assert all(low <= far.max() < 2**8 for low in score.by_distance) and min(score.by_distance) == 8 and far.min() >= 32
    near = truth.distance[truth.targets >= 0] < 16
    assert score.by_distance[8] == pytest.approx((truth.group[truth.targets >= 0][near] == 0).double().mean().item())


def test_judging_takes_the_most_likely_of_all_words():
    targets = torch.tensor([[-1, 2, 3]])
    episodes = Episodes(targets.clone(), targets, torch.tensor([[0, 7, 9]]), torch.tensor([[0, 0, 1]]))
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 1, 0], [0, 5, 0, 1]]])
    right, losses, distance, group = judge(logits, episodes)
    assert right.tolist() == [True, False] and distance.tolist() == [7, 9] and group.tolist() == [0, 1]
    assert losses[0].item() == pytest.approx(math.log(math.e + 3) - 1)


def test_measuring_repeats_and_does_not_depend_on_the_batch():
    model = model_for(RECALL).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = (measure(model, RECALL, rows=40, seed=seed, batch=40) for seed in (0, 0, 1))
    assert first == again and first.loss != other.loss and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert measure(model, RECALL, rows=40, batch=7).answers == first.answers == 120


def test_the_fact_probe_is_measured_on_held_out_names(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Facts, "sample", lambda self, generator, rows, real=Facts.sample: seen.append(self.held_out) or real(self, generator, rows)
    )
    measure(model_for(FACTS), FACTS, rows=4, batch=2)
    assert seen == [True, True]


def test_log_odds_are_exact_also_near_certainty():
    logits = torch.tensor([[0.0, 1.0, 2.0], [60.0, 0.0, 0.0]])
    answers = torch.tensor([2, 0])
    p = torch.softmax(logits[0].double(), 0)[2]
    assert log_odds(logits, answers).tolist() == pytest.approx([math.log(p / (1 - p)), 60 - math.log(2)])


def test_a_session_is_compared_with_nothing_and_with_another_ones():
    """With the whole state carried over, key-value cache included, a session's memory is what one long sequence sees."""
    model, count = model_for(FACTS), 5
    report = engram_log_odds(model, FACTS, names=count, seed=3, start=lambda state, tokens: state)
    sessions = recorded(FACTS, count, seed=3)

    def direct(told: torch.Tensor | None) -> torch.Tensor:
        idx = sessions.asked if told is None else torch.cat([told, sessions.asked], 1)
        return log_odds(model.logits(idx)[:, -1], sessions.answers)

    for found, expected in zip(
        (report.own, report.empty, report.other), map(direct, (sessions.told, None, sessions.told.roll(-1, 0))), strict=True
    ):
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)
    assert report.over_empty == pytest.approx((report.own - report.empty).mean().item()) and abs(report.over_empty) > 1e-3
    record = report.record()
    assert record["over_other"] == pytest.approx(record["own"] - record["other"]) and 0 <= record["share_higher"] <= 1


def recorded(task: Facts, names: int, seed: int):
    """The sessions that the measurement made."""
    return task.unseen().sessions(stable_hash(seed, "engrams"), names)


def test_a_second_session_remembers_the_engram_alone(tmp_path):
    synapses = SynapticConfig(presyn=False, barrier="none", hebb="delta", rank_eligibility=4)
    model, count = model_for(FACTS, synapses=True, syn_cfg=synapses), 4
    report = engram_log_odds(model, FACTS, names=count, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == count
    assert ((report.own - report.empty).abs() > 1e-4).all() and ((report.own - report.other).abs() > 1e-4).any()
    sessions = recorded(FACTS, count, seed=0)
    first = model.init_state(count, 200)
    model.step(sessions.told, first)
    second = model.init_state(count, 200, engram=first.engram())
    assert second.pos.tolist() == [0] * count
    expected = log_odds(model.step(sessions.asked, second)[:, -1], sessions.answers)
    torch.testing.assert_close(report.own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: measure(model_for(RECALL), FACTS), "words, more than the model's vocab_size"),
        (lambda: measure(model_for(RECALL), RECALL, rows=0), "rows=0"),
        (lambda: engram_log_odds(model_for(FACTS), FACTS, names=1), "names=1"),
        (lambda: engram_log_odds(model_for(FACTS), FACTS, names=500), "use more syllables"),
        (lambda: engram_log_odds(model_for(FACTS), FACTS, names=2), "no fast weights"),
    ],
)
def test_what_cannot_be_measured_is_one_line(act, said):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        act()
    assert said in str(error.value)
