"""Experts through the training loop: the short command, the record, resuming in mid-life, the tree that is printed."""

import json

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import read_lineage
from bio_inspired_nanochat.training import TrainConfig, train
from scripts import lineage
from tests.training.ranks import LIVING
from tests.training.tiny import small


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """A short run with a life cycle, and its record."""
    return train(small(tmp_path_factory.mktemp("life"), **LIVING))


def test_the_record_counts_events_and_living_experts(life):
    events = read_lineage(life["log_dir"])
    assert life["lineage_events"] == len(events) - 2 > 0
    model = GPT.from_checkpoint(life["checkpoint"])
    assert life["experts"] == [int(layer.accounts.alive.sum()) for layer in model.experts()]


def test_a_life_resumed_in_the_middle_ends_the_same(life, tmp_path):
    train(small(tmp_path, **LIVING, stop_after=5))
    resumed = train(small(tmp_path, **LIVING, resume="auto"))
    assert resumed["final_loss"] == life["final_loss"] and resumed["experts"] == life["experts"]
    assert read_lineage(resumed["log_dir"]) == read_lineage(life["log_dir"])


def test_the_tree_is_printed(life, capsys):
    lineage.main([f"--log={life['log_dir']}"])
    *tree, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert sum(record["events"].values()) == life["lineage_events"]
    assert record["living"] == {str(layer): count for layer, count in enumerate(life["experts"])}
    assert sum("layer" in line for line in tree) == 2 and any("split at" in line for line in tree)


def test_a_life_cycle_without_a_number_means_eight_experts(tmp_path, capsys):
    result = train(small(tmp_path, splitmerge_every=1000, num_iterations=1, synapses=True))
    assert result["experts"] == [8, 8]
    assert "8 experts in 12 slots beside the shared one, top 2" in capsys.readouterr().out


def test_a_plain_mixture_keeps_accounts_too(tmp_path):
    result = train(small(tmp_path, num_experts=4, num_iterations=2))
    model = GPT.from_checkpoint(result["checkpoint"])
    kept = model.experts()[0].accounts
    assert kept.age.tolist() == [2] * 4 and kept.balance.abs().sum() > 0
    assert result["lineage_events"] == 0


def test_a_life_cycle_without_experts_is_an_error():
    with pytest.raises(UserError, match="num_experts=0"):
        TrainConfig(splitmerge_every=10, num_experts=0)
