"""Several processes train as one does: the same losses, the same end, and no rank that waits for another for ever."""

import json

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import read_lineage
from bio_inspired_nanochat.training import train
from tests.launcher import PATIENCE, launched, torchrun
from tests.training import ranks
from tests.training.launch import seen_by
from tests.training.test_resume import same_checkpoint
from tests.training.tiny import corpus, flags, small

pytestmark = pytest.mark.timeout(2 * PATIENCE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """What two ranks saw; `out` is the folder of their runs."""
    out = tmp_path_factory.mktemp("pair")
    train(small(out / "alone", **ranks.SHARED, stop_after=3))
    return [seen | {"out": out} for seen in seen_by(2, "tests.training.ranks", "all", out=out)]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    """Every kind of model in one process, with the whole batch in one forward."""
    return {kind: ranks.run(ranks.ALONE, 8, **changes) for kind, changes in ranks.KINDS.items()}


@pytest.mark.parametrize("way", ranks.WAYS)
@pytest.mark.parametrize("kind", ranks.KINDS)
def test_two_processes_lose_what_one_loses(pair, alone, kind, way):
    one, together, other = alone[kind], pair[0]["equal"][way][kind], pair[1]["equal"][way][kind]
    assert together["accumulation"] == 2 and one["accumulation"] == 1
    assert together["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["losses"][-1] < one["losses"][0] - 0.05, "the losses would agree without learning, too"
    assert together["norm"] == pytest.approx(one["norm"], rel=1e-5)
    assert other["norm"] == pytest.approx(together["norm"], rel=1e-12), "both ranks hold the same weights"
    assert other["val_bpb"] == together["val_bpb"], "the evaluation is reduced over ranks"
    assert together["events"] == one["events"] and (one["events"] > 0) == (kind == "life")


def test_three_processes_share_what_does_not_divide(tmp_path):
    corpus()  # once, before the ranks ask for it
    changes = {**ranks.EXPERTS, "num_iterations": 4, "eval_tokens": 192}
    one = ranks.run(ranks.ALONE, 6, total=6, **changes)
    seen = [of["experts"] for of in seen_by(3, "tests.training.ranks", "uneven", out=tmp_path)]
    assert seen[0]["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert {of["norm"] for of in seen} == {seen[0]["norm"]} and seen[0]["norm"] == pytest.approx(one["norm"], rel=1e-5)


def test_accumulating_gradients_sends_nothing_more(pair):
    for way, (once, twice) in pair[0]["messages"].items():
        assert once == twice > 0, way


def test_smaller_buckets_are_more_messages_and_parameters_that_are_freed_travel_again(pair):
    assert pair[0]["buckets"][0] < pair[0]["buckets"][1]
    assert pair[0]["reshard"][0] < pair[0]["reshard"][1]


@pytest.mark.parametrize("way", ranks.WAYS)
def test_gradients_that_travel_in_bfloat16_are_rounded(pair, way):
    exact, rounded = pair[0]["equal"][way]["vanilla"]["losses"], pair[0]["rounded"][way]
    assert rounded[0] == exact[0] and 2e-5 < abs(rounded[1] - exact[1]) < 1e-2


def test_fsdp_leaves_each_rank_half_of_the_matrices_and_their_momenta(pair):
    assert [seen["shares"] for seen in pair] == [[1.0, 0.5]] * 2


def test_statistics_are_summed_alike_on_every_rank(pair):
    total = (torch.tensor(0.1) + torch.tensor(1.1)).item()
    assert pair[0]["sum"] == pair[1]["sum"] == [total, total]


def test_both_ways_write_the_same_checkpoint(pair):
    ddp, fsdp = (pair[0][f"whole-{way}"] for way in ranks.WAYS)
    assert ddp["losses"] == fsdp["losses"] and ddp["val_bpb"] == fsdp["val_bpb"]
    same_checkpoint(ddp["checkpoint"], fsdp["checkpoint"])
    assert all(type(value) is torch.Tensor for value in GPT.from_checkpoint(fsdp["checkpoint"]).state_dict().values())


def test_two_processes_resume_bit_for_bit_by_the_other_way(pair):
    whole, resumed = pair[0]["whole-ddp"], pair[0]["resumed"]
    assert resumed["resumed_from"] == 2 and resumed["steps"] == 4
    assert whole["losses"] == resumed["losses"]
    same_checkpoint(whole["checkpoint"], resumed["checkpoint"])


def test_two_processes_lead_experts_through_a_whole_life_and_resume_it_by_the_other_way(pair):
    life, resumed = pair[0]["life"], pair[0]["resumed_life"]
    same_checkpoint(life["checkpoint"], resumed["checkpoint"])
    assert life["final_loss"] == resumed["final_loss"] == pair[1]["life"]["final_loss"]
    assert life["experts"] == pair[1]["life"]["experts"] == resumed["experts"]
    events = [read_lineage(record["log_dir"]) for record in (life, resumed)]
    assert events[0] == events[1]
    assert {event["event"] for event in events[0]} >= {"founding", "death", "split", "merge"}
    assert life["lineage_events"] == len(events[0]) - 2


@pytest.mark.parametrize("way", ranks.WAYS)
def test_a_rank_that_diverges_stops_both(pair, way):
    said = pair[0][f"poisoned-{way}"]
    assert "step 4: the loss is not finite" in said and said == pair[1][f"poisoned-{way}"]


@pytest.mark.parametrize("way", ranks.WAYS)
def test_weights_of_one_rank_that_are_not_finite_are_saved_by_none(pair, way):
    said = pair[0][f"poisoned-late-{way}"]
    assert "step 3: the weights are not finite" in said and said == pair[1][f"poisoned-late-{way}"]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(pair):
    assert pair[0]["interrupted"] == pair[1]["interrupted"] == 3


def test_a_run_of_one_process_and_of_two_read_the_same_text_and_continue_each_other(pair, tmp_path):
    train(small(tmp_path, **ranks.SHARED), [whole := ranks.Record()])
    assert pair[0]["shared"]["apart"] == pytest.approx(whole.losses[:3], abs=1e-5)
    assert pair[0]["shared"]["grown"] == pytest.approx(whole.losses[3:], abs=1e-5)
    train(small(pair[0]["out"] / "pair", **ranks.SHARED, resume="auto"), [shrunk := ranks.Record()])
    assert shrunk.losses == pytest.approx(whole.losses[3:], abs=1e-5)
    assert len({round(loss, 4) for loss in whole.losses}) == 6, "other text would give another loss"


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run_and_the_last_checkpoint_loads(tmp_path):
    corpus()
    code, _, complaints = launched(2, "tests.training.ranks", "killed", str(tmp_path))
    assert code != 0 and "Signal 9 (SIGKILL)" in complaints, "the launcher names the rank and what ended it"
    assert "bio_inspired_nanochat/" not in complaints, "the other rank leaves no traceback"
    assert load_checkpoint(tmp_path / "checkpoints").step == 3


def test_a_mistake_is_said_by_one_rank_and_ends_the_other(pair):
    assert "nowhere does not exist" in pair[0]["bad_path"] and pair[1]["bad_path"] == ""


@pytest.mark.slow
def test_base_train_under_torchrun_takes_the_separator_and_prints_one_record(tmp_path):
    said = torchrun(2, "scripts.base_train", "--", *flags(tmp_path, num_iterations=2, parallel="fsdp"))
    assert said.count("step 00002/00002") == 1, "rank 0 alone prints"
    lines = said.strip().splitlines()
    assert json.loads(lines[-1])["steps"] == 2 and sum(line.startswith("{") for line in lines) == 1
