"""From flags to numbers: defaults, batches that divide, what a resumed run inherits."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, from_dict, to_dict
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training import TrainConfig, dry_run, hardware, print_config
from bio_inspired_nanochat.training import plan as planning
from bio_inspired_nanochat.training.hardware import bytes_per_row, crowded, peak_by_name
from bio_inspired_nanochat.training.plan import OPERATIONAL, given_fields, inherit, make_plan, suited_batch
from tests.training.tiny import SMALL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan(world=1, **changes):
    return make_plan(TrainConfig(**changes), CPU, world)


def test_the_default_on_a_cpu_is_small():
    made = plan()
    assert (made.model.n_layer, made.model.n_embd, made.model.sequence_len, made.rows, made.dtype) == (4, 256, 256, 8, torch.float32)
    assert made.tokens_per_step == 2048 and made.steps == round(made.config.tokens_per_param * (4 * 12 * 256**2 + 4096 * 256) / 2048)


def test_vanilla_and_synaptic_get_equally_many_tokens():
    vanilla, synaptic = plan(), plan(synapses=True)
    assert synaptic.params > vanilla.params
    assert (synaptic.steps, synaptic.tokens_per_step, synaptic.eval_rows()) == (vanilla.steps, vanilla.tokens_per_step, vanilla.eval_rows())


@pytest.mark.parametrize(
    ("total", "tokens", "accumulation", "notice"),
    [(1024, 1024, 1, False), (4096, 4096, 4, False), (3000, 3072, 3, True), (5, 1024, 1, True), (1535, 1024, 1, True)],
)
def test_a_batch_that_does_not_divide_is_rounded_with_a_notice(capsys, total, tokens, accumulation, notice):
    made = plan(world=2, device_batch_size=8, max_seq_len=64, total_batch_size=total)
    assert (made.tokens_per_step, made.accumulation) == (tokens, accumulation)
    assert ("is not a multiple of 1024 (8 rows x 64 tokens x 2 processes)" in capsys.readouterr().out) == notice


def test_a_small_total_batch_shrinks_rows_that_nobody_asked_for(capsys):
    assert plan(max_seq_len=64, total_batch_size=128).rows == 2 and "notice" not in capsys.readouterr().out


def test_short_runs_on_a_gpu_take_small_steps(monkeypatch):
    """As many tokens as were measured, and in whole rows that need not be accumulated; a batch or a number of steps that was given counts."""
    monkeypatch.setattr(planning, "free_memory", lambda device: 80 << 30)

    def on_gpu(**changes):
        return make_plan(
            TrainConfig(device="cuda", dtype="bfloat16", depth=6, **{"vocab_size": 8192, "max_seq_len": 1024, **changes}), CUDA, 1
        )

    assert suited_batch(8_000_000) == 8192 and suited_batch(12 * 110_000_000) == 1 << 19
    made = on_gpu(tokens_per_param=0.6)
    assert (made.tokens_per_step, made.rows, made.accumulation) == (8192, 8, 1) and 900 < made.steps < 1100
    longer = on_gpu(tokens_per_param=6.0)
    assert longer.tokens_per_step == 65536 and longer.rows * longer.accumulation == 64
    assert on_gpu(tokens_per_param=0.6, device_batch_size=4).accumulation == 2
    assert on_gpu(num_iterations=100).rows == 64, "as many as fit"


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_covers_the_same_tokens_on_any_number_of_ranks(world):
    assert plan(world, max_seq_len=64, eval_tokens=1024).eval_rows() * world * 64 == 1024
    assert plan(world, eval_tokens=0).eval_rows() == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"syn_cfg": TrainConfig(synapses=True).syn_cfg.preset("core")}, "add --synapses=1"),
        ({"n_embd": 60, "head_dim": 15}, "head size 15 is odd"),
        ({"run_name": "a/b"}, "run_name='a/b' is not a folder name"),
        ({"data_dir": ".", "dataset": "x"}, "two sources"),
        ({"window_pattern": "SX"}, "window_pattern='SX'"),
        ({"n_kv_head": 3}, "n_kv_head=3 does not divide"),
    ],
)
def test_flags_that_contradict_each_other_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        plan(**changes)


def test_a_resumed_run_inherits_training_but_not_settings_of_the_process():
    saved = to_dict(TrainConfig(depth=3, seed=9, log_every=5, optim=TrainConfig().optim.__class__(matrix_lr=0.5, grad_clip=2.0)))
    config = TrainConfig(resume="auto", optim=TrainConfig().optim.__class__(grad_clip=1.0))
    values = inherit(config, given_fields(config), saved)
    assert (values["depth"], values["seed"], values["log_every"]) == (3, 9, 10)
    assert values["optim"]["matrix_lr"] == 0.5 and values["optim"]["grad_clip"] == 1.0
    assert values["resume"] == "auto"


def test_a_new_length_in_tokens_replaces_the_old_length_in_steps():
    saved = to_dict(TrainConfig(num_iterations=100))
    config = TrainConfig(tokens_per_param=2.0)
    assert inherit(config, {"tokens_per_param"}, saved)["num_iterations"] is None


def test_operational_settings_exist():
    assert set(to_dict(TrainConfig())) >= OPERATIONAL


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB200", 2500.0),
        ("Something New", None),
    ],
)
def test_peaks_are_found_by_name(name, tflops):
    assert peak_by_name(name) == (None if tflops is None else tflops * 1e12)


def test_a_dry_run_steps_once_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = dry_run(TrainConfig(**SMALL, synapses=True, data_dir=str(tmp_path)))
    assert record["first_loss"] == pytest.approx(torch.tensor(280.0).log().item(), abs=0.1)
    assert record["params"] > 0 and record["flops_per_token"] > 0 and record["memory_gib"] > 0
    assert not list(tmp_path.iterdir())


def test_the_printed_config_leaves_nothing_open(capsys):
    record = print_config(TrainConfig())
    unknown = [name for name, value in record["config"].items() if value is None]
    assert set(unknown) <= {"head_dim", "n_kv_head", "data_dir", "dataset", "tokenizer", "checkpoint_dir", "run_name", "vitals_every"}


def test_long_contexts_fit_where_the_fused_layer_keeps_nothing():
    """Per row a synaptic model needs little more than vanilla where one operator serves its layers, and T^2 / c values where not."""
    sizes = {"sequence_len": 8192, "vocab_size": 8192, "n_layer": 12, "n_head": 12, "n_kv_head": 12, "n_embd": 768}
    ticks = SynapticConfig(tick=8)
    vanilla, fused, split = (
        bytes_per_row(GPTConfig(**sizes, synapses=synapses, syn_cfg=ticks, backend=backend), torch.bfloat16)
        for synapses, backend in ((False, "auto"), (True, "auto"), (True, "triton"))
    )
    assert fused == vanilla and split > 10 * vanilla
    shorter = {**sizes, "sequence_len": 2048}
    kept = bytes_per_row(GPTConfig(**shorter, synapses=True, syn_cfg=ticks), torch.bfloat16)
    kept -= bytes_per_row(GPTConfig(**shorter), torch.bfloat16)
    assert kept == pytest.approx(12 * 12 * 2048 * 2048 / 8 * 2, rel=0.01)  # the drive, one bfloat16 per head, tick and key


def test_chosen_experts_take_memory_and_idle_ones_none():
    sizes = {"sequence_len": 1024, "vocab_size": 8192, "n_layer": 8, "n_head": 8, "n_kv_head": 8, "n_embd": 512}
    dense, two, of_more, three = (
        bytes_per_row(GPTConfig(**sizes, **experts), torch.bfloat16)
        for experts in ({}, {"num_experts": 8}, {"num_experts": 32}, {"num_experts": 8, "moe_top_k": 3})
    )
    assert two == of_more and two - dense == 2 * (three - two) == 1024 * 8 * 2 * 4 * 512 * 2  # input, output and twice the width hidden


def test_how_processes_share_a_model_is_not_inherited():
    saved = to_dict(TrainConfig(parallel="fsdp", reshard=True, bucket_mb=1.0, reduce_dtype="bfloat16"))
    assert from_dict(TrainConfig, inherit(TrainConfig(), set(), saved)) == TrainConfig()


def test_freeing_parameters_needs_divided_ones():
    with pytest.raises(UserError, match="add --parallel=fsdp"):
        TrainConfig(reshard=True)


def test_a_machine_that_is_busy_is_told_about_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for load, fewer in ((0.4, None), (0.6, 3), (1.6, 2), (3.7, 1), (40.0, 1)):
        monkeypatch.setattr(hardware, "busy_cores", lambda load=load: load)
        found = crowded(CPU)
        assert not found if fewer is None else "of 4 cores busy" in found[0] and f"OMP_NUM_THREADS={fewer} " in found[0]
    assert crowded(torch.device("cuda")) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert crowded(CPU) == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert crowded(CPU) == [], "who has said how many threads there are knows"


def test_other_work_is_what_other_processes_do(monkeypatch, tmp_path):
    ticks, now = os.sysconf("SC_CLK_TCK"), {"idle": 0.0, "others": 0.0, "own": 0.0}
    monkeypatch.setattr(hardware, "STAT", tmp_path / "stat")

    def write() -> None:
        busy, idle = (now["others"] + now["own"]) * ticks, now["idle"] * ticks
        hardware.STAT.write_text(f"cpu  {busy:.0f} 0 0 {idle / 2:.0f} {idle / 2:.0f} 0 0 0 7 7\ncpu0 1 1 1 1\n")

    def a_while(seconds: float) -> None:  # four cores: one and a half of others, two of this process
        for name, cores in (("idle", 0.5), ("others", 1.5), ("own", 2.0)):
            now[name] += cores * seconds
        write()

    write()
    monkeypatch.setattr(hardware, "WATCH", 1.0)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(sleep=a_while, process_time=lambda: now["own"]))
    assert hardware.busy_cores() == pytest.approx(1.5)
    hardware.STAT.unlink()
    monkeypatch.setattr(hardware.time, "sleep", lambda seconds: None)
    assert hardware.busy_cores() == 0.0, "a system without it"


FAULTS = """
import ctypes, os, resource, sys, torch
from bio_inspired_nanochat.training.hardware import keep_freed_memory
ctypes.CDLL(None).mallopt(-3, 1 << 17)  # where glibc begins: it learns, but not always enough
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [torch.empty(1 << 21).fill_(1.0) for _ in range(10)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(20))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_memory_that_a_step_frees_is_there_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ordinary, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, what], env=clean, capture_output=True, text=True, check=True, timeout=120).stdout)
        for what in ("as it is", "keep")
    )
    if ordinary < 20_000:
        pytest.skip(f"this system clears memory in other pieces: {ordinary} faults")
    assert kept < ordinary / 4
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: pytest.fail("who sets a variable has decided"))
    hardware.keep_freed_memory(CPU)
