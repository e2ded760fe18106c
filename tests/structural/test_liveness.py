"""Nothing inert: every knob that acts between training steps changes what becomes of a colony."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.config import SynapticConfig, knobs_of
from bio_inspired_nanochat.registry import BETWEEN_STEPS
from bio_inspired_nanochat.structural import decide, operate
from bio_inspired_nanochat.structural.splitmerge import Event
from tests.structural.colony import World, batch, colony

QUICK = {"router_identity": True, "expert_youth": 4, "bank_gain": 1.0, "bank_rate": 0.1, "bank_decay": 0.2, "balance_rate": 0.01}
QUICK |= {"router_contrastive_push": 0.1, "router_contrastive_pull": 0.1, "split_health_min": 0.6, "merge_health_max": 0.6}
QUICK |= {"merge_similarity": 0.0, "death_health_max": 0.3}
STEPS = 16


def outcome(**fields) -> torch.Tensor:
    """Logits after a short life in which accounts act and every kind of event can happen."""
    model = colony(5, 8, **(QUICK | fields))
    layer = model.experts()[0]
    layer.router.data[0] *= 3  # some are asked for more than others
    layer.router.data[1] *= 0.2
    layer.experts.w_out.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    World(model, every=4).live(STEPS)
    with torch.no_grad():
        return model(batch(9999)[0])


@pytest.fixture(scope="module")
def usual() -> torch.Tensor:
    return outcome()


MOVED = {"sm_use_neuroscore": True, "split_health_min": 1.0, "merge_health_max": 0.0, "death_health_max": 0.5, "merge_similarity": 1.0}
MOVED |= {"bank_decay": 1e-3, "expert_youth": 12, "mutation_strength": 1.0}


@pytest.mark.parametrize("name", [name for name in BETWEEN_STEPS if name != "twin_overlap"])
def test_moving_a_knob_changes_what_becomes_of_a_colony(name, usual):
    record = knobs_of(SynapticConfig)[name]
    value = MOVED.get(name, record.off if record.off is not None else record.hi)
    change = ((outcome(**{name: value}) - usual).norm() / usual.norm()).item()
    assert change >= 1e-3


def test_the_overlap_of_twins_decides_when_they_separate():
    layer = colony(5, 8).experts()[0]
    cfg = SynapticConfig()
    operate(layer, Event("split", (0, 5), 5, (0,), (1.0, 0.0)), cfg, prefix="blocks.0.mlp", seed=0, step=1)
    layer.accounts.blend[0], layer.accounts.both[0] = 1.0, 0.1
    assert decide(layer, cfg) == []
    assert [event.event for event in decide(layer, dataclasses.replace(cfg, twin_overlap=0.2))] == ["separate"]
