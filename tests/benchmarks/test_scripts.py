"""The three benchmarks end to end on a CPU: table, reasons, and the names in the record that outside code relies on."""

import json
from types import SimpleNamespace

import pytest

from bio_inspired_nanochat.benchmarks.scaling import traffic_of
from bio_inspired_nanochat.benchmarks.timing import Course
from scripts import bench_cpu, bench_decode, bench_kernels, bench_memory, bench_scaling, bench_train
from tests.training.launch import PATIENCE, run_ranks

KERNELS = ["--device=cpu", "--seconds=0", "--head_dim=16", "--context=32,17", "--tick=8"]
TRAIN = ["--device=cpu", "--seconds=0", "--depth=1", "--n_embd=32", "--head_dim=16", "--max_seq_len=32", "--vocab_size=300"]
CPU = ["--seconds=0", "--depth=1", "--n_embd=32", "--head_dim=16", "--vocab_size=300", "--threads=1", "--compiled=0"]
DECODE = ["--device=cpu", "--seconds=0", "--depth=1", "--n_embd=32", "--head_dim=16", "--vocab_size=300"]


def run(capsys, script, *words: str) -> tuple[list[str], dict]:
    """The lines before the record, and the record."""
    script.main(list(words))
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def table(lines: list[str], first: str) -> list[dict[str, str]]:
    """The rows of the table whose header starts with `first`, by column; cells hold at most single blanks."""
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{first}  "))
    split = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start:]]
    header = split[0]
    return [dict(zip(header, row, strict=True)) for row in split[1:] if len(row) == len(header)]


def test_kernels_are_compared_with_flash_attention(capsys, tmp_path):
    words = [*KERNELS[:1], "--seconds=2", *KERNELS[2:], f"--json={tmp_path / 'record.json'}"]
    lines, record = run(capsys, bench_kernels, *words)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    rows = {(row["context"], row["operator"], row["backend"]): row for row in record["rows"]}
    measured = {key: row for key, row in rows.items() if "skipped" not in row}
    for row in measured.values():
        assert row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["both_ms"] >= max(row["forward_ms"], row["backward_ms"]) * 0.99
        assert row["runs"] >= 1 and row["floor_gb"] > 0 and row["pairs"] == round(2048 / row["context"])
    layer = rows[32, "layer", "sdpa"]
    assert record["fwd_bwd_ratio"] == {"16": layer["ratio"]} and layer["ratio"] > 0
    assert record["fwd_bwd_ratio_of"]["16"] == {"layer": "sdpa", "context": 32, "tick": 8, "pairs": 64}
    low, high = record["fwd_bwd_ratio_quartiles"]["16"]
    assert low <= layer["ratio"] <= high
    shown = table(lines, "D")
    assert len(shown) == len(measured)
    (line,) = [row for row in shown if (row["T"], row["operator"], row["execution"]) == ("32", "layer", "sdpa")]
    assert float(line["both ms"]) == layer["both_ms"] and float(line["x flash"]) == layer["ratio"]


def planted(monkeypatch, module: str, seconds: dict[str, tuple[float, float]]) -> None:
    """Let every competitor of a benchmark take these seconds in its two phases; those not named take those of ''."""

    def courses(competitors, *_, **__) -> dict[str, Course]:
        return {name: Course([seconds.get(name, seconds[""])] * 3) for name in competitors}

    monkeypatch.setattr(f"bio_inspired_nanochat.benchmarks.{module}.interleave", courses)


def test_ratios_stand_the_right_way_up(capsys, monkeypatch):
    planted(monkeypatch, "kernels", {"attention flash": (1e-3, 3e-3), "": (4e-3, 6e-3)})
    _, record = run(capsys, bench_kernels, *KERNELS[:3], "--context=32", "--tick=8", "--backends=flash,sdpa")
    assert record["fwd_bwd_ratio"] == {"16": 2.5}
    (layer,) = [row for row in record["rows"] if row["operator"] == "layer" and "skipped" not in row]
    assert (layer["forward_ms"], layer["backward_ms"], layer["both_ms"]) == (4.0, 6.0, 10.0)
    planted(monkeypatch, "train", {"vanilla": (1e-3, 3e-3), "": (2e-3, 4e-3)})
    _, record = run(capsys, bench_train, *TRAIN)
    assert (record["step_ratio"], record["forward_backward_ratio"]) == (1.5, 2.0)
    planted(monkeypatch, "train", {"experts": (4e-3, 8e-3), "": (2e-3, 4e-3)})
    _, routed = run(capsys, bench_train, *TRAIN, "--num_experts=3", "--expert_ratio=1")
    assert (routed["step_ratio"], routed["experts_step_ratio"]) == (1.0, 2.0)
    wider = routed["vanilla"]["params"] - record["vanilla"]["params"]
    assert wider == 2 * record["depth"] * 2 * record["n_embd"] ** 2, (
        "a dense MLP has the hidden units of the two experts that a token visits"
    )
    planted(monkeypatch, "decoding", {"vanilla": (1e-3, 16e-3), "": (3e-3, 32e-3)})
    _, record = run(capsys, bench_decode, *DECODE, "--context=8", "--new_tokens=16")
    synaptic = record["rows"][1]
    assert (record["step_ratio"], synaptic["step_ms"], synaptic["first_token_ratio"], synaptic["tok_per_s"]) == (2.0, 2.0, 3.0, 500.0)


def test_what_cannot_run_says_why(capsys):
    lines, record = run(capsys, bench_kernels, *KERNELS, "--backends=cudnn,flex,triton,fused")
    assert record["fwd_bwd_ratio"] == {"16": None}
    said = {(row["operator"], row["backend"]): row["skipped"] for row in record["rows"] if row["context"] == 32}
    assert "CUDA only" in said["attention", "cudnn"] and "no backward on cpu" in said["biased attention", "flex"]
    assert all("on cpu" in said[key] for key in said if key[1] in ("triton", "fused"))
    assert {"no time left: raise --seconds"} == {row["skipped"] for row in record["rows"] if row["context"] == 17}
    assert all(any(line.startswith(f"skipped: {name} {backend}") for line in lines) for name, backend in said)


def test_the_reference_is_left_out_where_it_takes_too_long_or_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr("bio_inspired_nanochat.benchmarks.operators._CPU_ROOM", 1 << 20)
    for words, said in ((["--context=257", "--tick=1"], "257 ticks"), (["--context=32"], "GiB")):
        _, record = run(capsys, bench_kernels, *KERNELS[:3], "--tick=8", *words, "--backends=reference")
        assert all(said in row["skipped"] for row in record["rows"])


def test_a_training_step_is_compared_with_the_vanilla_one(capsys):
    lines, record = run(capsys, bench_train, *TRAIN)
    low, high = record["step_ratio_quartiles"]
    assert 0 < low <= record["step_ratio"] <= high and record["forward_backward_ratio"] > 0
    vanilla, synaptic = record["vanilla"], record["synaptic"]
    assert record["memory_ratio"] == pytest.approx(synaptic["memory_gib"] / vanilla["memory_gib"], rel=1e-3)
    assert 1 < record["memory_ratio"] < 10 and synaptic["params"] > vanilla["params"]
    for result in (vanilla, synaptic):
        assert result["tok_per_s"] == pytest.approx(1e3 * record["total_batch_size"] / result["step_ms"], rel=1e-3)
        assert 0 < result["forward_backward_ms"] < result["step_ms"] and result["steps"] == vanilla["steps"]
    assert not record["compiled"] and record["total_batch_size"] == 2 * 32 and vanilla["mfu"] is None
    assert [(row["model"], float(row["step ms"])) for row in table(lines, "model")] == [
        ("vanilla", vanilla["step_ms"]),
        ("synaptic", synaptic["step_ms"]),
    ]


def test_a_step_of_several_forwards_and_a_changed_constant_are_measured_too(capsys):
    words = [*TRAIN, "--total_batch_size=192", "--device_batch_size=2", "--syn_preset=core", "--syn_cfg.tick=4"]
    _, record = run(capsys, bench_train, *words)
    assert (record["total_batch_size"], record["device_batch_size"], record["tick"]) == (192, 2, 4)


def test_decoding_is_compared_at_the_largest_context_with_the_smallest_batch(capsys, monkeypatch):
    # a clock that always has some time left: a busy machine must not skip sizes
    monkeypatch.setattr("bio_inspired_nanochat.benchmarks.decoding.Deadline", lambda seconds: SimpleNamespace(left=lambda: seconds))
    lines, record = run(capsys, bench_decode, *DECODE, "--seconds=1", "--context=8,20", "--batch=2,1", "--syn_cfg.tick=4", "--new_tokens=5")
    assert record["new_tokens"] == 8 and record["step_ratio_of"] == {"context": 20, "batch": 1}
    rows = {(row["context"], row["batch"], row["model"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 8 and all(row["first_token_ms"] > 0 for row in rows.values())
    assert all(row["record_ms"] is None for row in rows.values()), "without graphs nothing is recorded"
    headline = rows[20, 1, "synaptic"]
    assert record["step_ratio"] == headline["step_ratio"] > 0 and headline["first_token_ratio"] > 0
    for (_, batch, _), row in rows.items():
        assert row["tok_per_s"] == pytest.approx(1e3 * batch / row["step_ms"], rel=1e-3)
    shown = table([line for line in lines if "vanilla  " in line or "synaptic  " in line or "context  " in line], "context")
    assert [float(row["step ms"]) for row in shown] == [row["step_ms"] for row in record["rows"]]


def test_decoding_with_experts_is_compared_with_a_plain_mixture(capsys, monkeypatch):
    from bio_inspired_nanochat.benchmarks import decoding

    models, made = [], decoding._models
    monkeypatch.setattr(decoding, "_models", lambda *args: models.extend(made(*args)) or models)
    _, record = run(capsys, bench_decode, *DECODE, "--context=8", "--num_experts=4", "--moe_top_k=1")
    assert record["num_experts"] == 4 and record["step_ratio"] > 0
    assert [(model.config.synapses, model.config.num_experts, model.config.moe_top_k) for model in models] == [(False, 4, 1), (True, 4, 1)]


def test_decoding_without_time_measures_one_size_and_says_so(capsys):
    lines, record = run(capsys, bench_decode, *DECODE, "--context=8,16")
    assert [row.get("skipped") for row in record["rows"]] == ["no time left: raise --seconds"] * 2 + [None] * 2
    assert record["step_ratio_of"]["context"] == 16 and any(line.startswith("skipped: context 8, batch 1") for line in lines)


def test_rust_is_compared_with_pytorch_on_a_cpu(capsys, tmp_path):
    words = [*CPU, "--context=8,20", "--syn_cfg.tick=4", f"--json={tmp_path / 'record.json'}"]
    lines, record = run(capsys, bench_cpu, *words)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    for name in ("decode_speedup", "step_speedup", "step_over_vanilla", "presyn_speedup"):
        low, high = record[f"{name}_quartiles"]
        assert 0 < low <= record[name] <= high
    assert record["of"] == {"context": 20, "threads": 1} and record["vanilla"] == "vanilla eager"
    rows = {row["model"]: row for row in record["rows"] if "skipped" not in row}
    assert set(rows) == {"vanilla eager", "synaptic rust", "synaptic torch"} and all(row["context"] == 20 for row in rows.values())
    assert [row["skipped"] for row in record["rows"] if row["context"] == 8] == ["no time left: raise --seconds"]
    for row in rows.values():
        assert 0 < row["attention_ms"] < row["step_ms"] and row["tok_per_s"] == pytest.approx(1e3 / row["step_ms"], rel=1e-2)
    assert record["bandwidth_fraction"] == rows["synaptic rust"]["bandwidth_fraction"]
    assert [float(row["step ms"]) for row in table(lines, "threads")] == [row["step_ms"] for row in rows.values()]


def test_experts_are_timed_apart(capsys):
    _, record = run(capsys, bench_cpu, *CPU, "--context=8", "--num_experts=3", "--moe_top_k=1")
    low, high = record["experts_speedup_quartiles"]
    assert 0 < low <= record["experts_speedup"] <= high and record["num_experts"] == 3
    assert all(0 < row["experts_ms"] < row["step_ms"] - row["attention_ms"] for row in record["rows"])
    assert "experts_speedup" not in run(capsys, bench_cpu, *CPU, "--context=8")[1]


def test_the_ratios_of_a_cpu_stand_the_right_way_up(capsys, monkeypatch):
    planted(monkeypatch, "cpu", {"vanilla eager": (1e-3,), "synaptic rust": (2e-3,), "reference": (6e-3,), "rust": (2e-3,), "": (8e-3,)})
    monkeypatch.setattr("bio_inspired_nanochat.benchmarks.cpu.Measured.attention_ratio", lambda *_: None)
    monkeypatch.setattr("bio_inspired_nanochat.benchmarks.cpu.Measured.fraction", lambda *_: None)
    monkeypatch.setattr("bio_inspired_nanochat.benchmarks.cpu._line", lambda _: "")
    _, record = run(capsys, bench_cpu, *CPU, "--context=8")
    assert (record["step_speedup"], record["step_over_vanilla"], record["presyn_speedup"]) == (4.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (bench_kernels, ["--ticks=8"], "did you mean '--tick'"),
        (bench_kernels, ["--tick=0"], "--tick=0 is out of bounds"),
        (bench_kernels, ["--context="], "context is empty"),
        (bench_kernels, ["--backends=flsh"], "did you mean 'flash'"),
        (bench_kernels, ["--syn_preset=barrier"], "no terminals"),
        (bench_train, ["--depth=0"], "--depth=0"),
        (bench_train, ["--syn_preset=off"], "nothing to compare"),
        (bench_train, ["--backend=fast"], "--backend='fast' is not valid"),
        (bench_train, ["--json=/does/not/exist/record.json"], "--json=FILE"),
        (bench_scaling, [], "start several by torchrun"),
        (bench_scaling, ["--models="], "models is empty"),
        (bench_scaling, ["--parallel=dpd"], "did you mean 'ddp'"),
        (bench_decode, ["--batch="], "batch is empty"),
        (bench_decode, ["--context=8,x"], "--context=x is not a whole number"),
        (bench_decode, ["--syn_cfg.tick=none"], "--syn_cfg.tick"),
        (bench_decode, ["--graph=1", "--context=8"], "graphs are captured on CUDA only"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(capsys, script, words, said):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device=cpu", *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_memory_is_compared_with_attention(capsys):
    words = ["--device=cpu", "--rows=1", "--context=32", "--modes=4", "--executions=chunked,reference,fla"]
    lines, record = run(capsys, bench_memory, *words, "--seconds=20")
    found = {(row["rule"], row["execution"]): row for row in record["memory"]}
    assert set(found) == {("attention", ""), *((rule, execution) for rule in ("hebb", "delta") for execution in ("chunked", "reference"))}
    assert all(row["both_ms"] > 0 and row["ratio"] > 0 for row in found.values()) and found["attention", ""]["ratio"] == 1
    assert sum("backend='fla' cannot serve" in line for line in lines) == 2
    lines, record = run(capsys, bench_memory, *words, "--seconds=0")
    assert [row["rule"] for row in record["memory"]] == ["attention"] and sum("raise --seconds" in line for line in lines) == 6


@pytest.mark.timeout(2 * PATIENCE)
def test_several_processes_are_compared_with_one():
    sizes = [word for word in TRAIN if not word.startswith("--depth")]
    words = [*sizes, "--depth=2", "--models=vanilla,synaptic", "--steps=1", "--accumulation=2"]
    said, nothing = run_ranks(2, "scripts.bench_scaling", "--", *words)
    *lines, last = said.splitlines()
    record = json.loads(last)
    assert nothing == "" and record["world"] == 2 and record["tokens_per_step"] == 2 * 2 * 2 * 32
    assert set(record["efficiency"]) == {"vanilla", "synaptic"} and len(record["results"]) == 4
    for row in record["results"]:
        assert record["efficiency"][row["model"]][row["parallel"]] == row["efficiency"] and row["rounds"] >= 3
        low, high = row["efficiency_quartiles"]
        assert 0 < low <= row["efficiency"] <= high
        assert row["tok_per_s"] == pytest.approx(1e3 * record["tokens_per_step"] / row["step_ms"], rel=1e-3)
        assert row["tok_per_s_alone"] == pytest.approx(1e3 * record["tokens_per_step"] / 2 / row["step_ms_alone"], rel=1e-3)
        assert row["hidden_share"] is None, "gloo has no timeline"
    shown = table(lines, "model")
    assert [(row["model"], row["parallel"]) for row in shown] == [(row["model"], row["parallel"]) for row in record["results"]]


def test_communication_is_hidden_where_another_kernel_runs():
    def kernel(name: str, ts: float, dur: float) -> dict:
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur}

    events = [
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 0, 4000),
        kernel("gemm", 1000, 1000),
        kernel("gemm", 1500, 1500),  # overlaps the one before
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 5000, 2000),
        kernel("adamw", 8000, 500),
        {"cat": "gpu_user_annotation", "name": "nccl:all_reduce", "ts": 0, "dur": 9000},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 5000, "dur": 2000},
        {"name": "process_name"},
    ]
    assert traffic_of(events, 2) == {"communication_ms": 3.0, "compute_ms": 1.25, "hidden_share": 0.3333}
    assert traffic_of([kernel("gemm", 0, 1)], 1)["hidden_share"] is None
