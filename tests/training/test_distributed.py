"""Two processes train as one does: the same losses, the same end, and no rank that waits for another for ever."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.structural import read_lineage
from tests.training import ranks
from tests.training.tiny import flags

ROOT = Path(__file__).parents[2]


ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    """What two ranks saw, started with the variables that torchrun sets."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in ("0", "1"):
        place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.training.ranks", str(out)]
        started.append(subprocess.Popen(command, env=ENV | place, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            said = process.communicate(timeout=240)[1]
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
    return [json.loads((out / f"rank{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "changes", "accumulation"),
    [
        ("vanilla", {}, 1),
        ("accumulated", {}, 2),
        ("synaptic", {"synapses": True}, 2),
        ("experts", ranks.EXPERTS, 2),
        ("masked", {"masked": True}, 2),
    ],
)
def test_two_processes_lose_what_one_loses(pair, kind, changes, accumulation):
    alone = ranks.run(ranks.ALONE, 8, **changes)
    together = pair[0][kind]
    assert together["accumulation"] == accumulation and alone["accumulation"] == 1
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert alone["losses"][-1] < alone["losses"][0] - 0.05, "the losses would agree without learning, too"
    assert together["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert pair[1][kind]["norm"] == pytest.approx(together["norm"], rel=1e-12), "both ranks hold the same weights"
    assert pair[1][kind]["val_bpb"] == together["val_bpb"], "the evaluation is reduced over ranks"


def test_two_processes_lead_experts_through_a_whole_life_and_resume_it(pair):
    whole, resumed = (GPT.from_checkpoint(pair[0][name]["checkpoint"]).state_dict() for name in ("life", "resumed_life"))
    assert pair[0]["life"]["final_loss"] == pair[0]["resumed_life"]["final_loss"] == pair[1]["life"]["final_loss"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert pair[0]["life"]["experts"] == pair[1]["life"]["experts"] == pair[0]["resumed_life"]["experts"]
    events = [read_lineage(pair[0][name]["log_dir"]) for name in ("life", "resumed_life")]
    assert events[0] == events[1]
    assert {event["event"] for event in events[0]} >= {"founding", "death", "split", "merge"}
    assert pair[0]["life"]["lineage_events"] == len(events[0]) - 2


def test_a_rank_that_diverges_stops_both(pair):
    assert "step 4: the loss is not finite" in pair[0]["poisoned"] and pair[0]["poisoned"] == pair[1]["poisoned"]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(pair):
    assert pair[0]["interrupted"] == pair[1]["interrupted"] == 3


def test_two_processes_resume_bit_for_bit(pair):
    whole, resumed = pair[0]["whole"], pair[0]["resumed"]
    assert resumed["resumed_from"] == 2 and resumed["steps"] == 4
    assert pair[0]["whole_losses"] == pair[0]["resumed_losses"]
    assert (whole["final_loss"], whole["val_bpb"]) == (resumed["final_loss"], resumed["val_bpb"])


def test_a_mistake_is_said_by_one_rank_and_ends_the_other(pair):
    assert "nowhere does not exist" in pair[0]["bad_path"] and pair[1]["bad_path"] == ""


@pytest.mark.slow
def test_base_train_under_torchrun_takes_the_separator_and_prints_one_record(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", "--"]
    command += flags(tmp_path, num_iterations=2)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, cwd=ROOT, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 00002/00002") == 1, "rank 0 alone prints"
    lines = done.stdout.strip().splitlines()
    assert json.loads(lines[-1])["steps"] == 2 and sum(line.startswith("{") for line in lines) == 1
