"""Which device a process takes, on machines with GPUs that this one need not have."""

import pytest
import torch

from bio_inspired_nanochat.common import device, pick_device
from bio_inspired_nanochat.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that answer: the devices that become current, in order."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(device, "_cuda_works", lambda index: True)
    return current


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("local", [0, 1])
def test_a_rank_takes_its_own_gpu_and_makes_it_the_current_one(gpus, monkeypatch, name, local):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert pick_device(name) == torch.device("cuda", local)
    assert gpus == [local]


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_rank_without_a_gpu_is_told_how_many_there_are(gpus, monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 .* has 2; use --nproc_per_node=2"):
        pick_device(name)


def test_cpu_leaves_the_gpus_alone(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("cpu") == torch.device("cpu")
    assert gpus == []


def test_a_gpu_that_does_not_answer_is_not_taken(monkeypatch):
    monkeypatch.setattr(device, "_cuda_works", lambda index: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA GPU answers"):
        pick_device("cuda")
