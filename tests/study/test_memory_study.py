"""The memory study: windows leave no path through attention, memories do, finished runs are kept."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bio_inspired_nanochat.common import progress
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.optim import OptimConfig
from bio_inspired_nanochat.study import VARIANTS, LinearMemory, MemoryStudyConfig, build_variant, memory_study
from bio_inspired_nanochat.study import memory as module
from bio_inspired_nanochat.study.cohort import Cohort
from bio_inspired_nanochat.study.memory import StudyRun, append_record, read_records, records_path, summarise
from bio_inspired_nanochat.study.models import WindowedConfig, memory_only, memory_values, variant_roles
from bio_inspired_nanochat.tasks.memory import Facts, Recall
from bio_inspired_nanochat.training.gradients import WARM_RUNS
from scripts import memory_study as script

MEMORIES = [name for name in VARIANTS if name not in ("vanilla", "full")]
TASK = Recall(distance=12, spread=0, pairs=2, keys=5, values=4, fillers=5)
SYNAPSES = dataclasses.replace(memory_only(), rank_eligibility=8)


def sizes(**changes) -> WindowedConfig:
    defaults = {"n_layer": 2, "n_head": 1, "n_kv_head": 1, "n_embd": 32, "attention_window": 4, "syn_cfg": SYNAPSES}
    return WindowedConfig(**{"sequence_len": TASK.length, "vocab_size": TASK.vocab_size, **defaults, **changes})


def lively(name: str, **changes):
    """A variant whose matrices that are zero at birth are not."""
    model, generator = build_variant(name, sizes(**changes), seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


def study(folder, **changes) -> MemoryStudyConfig:
    small = {"steps": 3, "rows": 4, "eval_rows": 8, "n_layer": 1, "n_embd": 16, "head_dim": 16, "window": 4, "engram_names": 0}
    small |= {"tasks": ("recall",), "variants": ("vanilla", "delta"), "seeds": (0,), "device": "cpu", "recall": TASK}
    small |= {"syn_cfg": SYNAPSES, "out": str(folder / "records.jsonl")}
    return MemoryStudyConfig(**{**small, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study of two variants and two seeds, and its result."""
    folder = tmp_path_factory.mktemp("study")
    config = study(folder, seeds=(0, 1), eval_every=2, eval_distances=(9, 20))
    return config, memory_study(config)


# --- models -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_told_reaches_the_question_only_through_a_memory_or_full_attention(name):
    model, rows = lively(name), TASK.sample(torch.Generator().manual_seed(0), 4)
    assert model.config.reach is None if name == "full" else model.config.reach == 6 < TASK.distance
    other = rows.idx.clone()
    other[:, 1:5] = other[:, 1:5].flip(1)
    with torch.no_grad():
        asked = [model(idx)[rows.targets >= 0] for idx in (rows.idx, other)]
    assert torch.equal(*asked) if name == "vanilla" else (asked[0] - asked[1]).abs().max() > 1e-4


@pytest.mark.parametrize("layers", [1, 3])
def test_a_token_just_beyond_the_reach_changes_nothing_and_one_within_it_does(layers):
    model = lively("vanilla", n_layer=layers)
    idx = TASK.batch(0, 1)[0]
    reach = model.config.reach
    assert reach == 3 * layers
    for back, same in ((reach + 1, True), (reach, False)):
        other = idx.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 1) % TASK.vocab_size
        with torch.no_grad():
            assert torch.equal(model(idx)[0, -1], model(other)[0, -1]) == same


@pytest.mark.parametrize("name", MEMORIES)
def test_variants_of_a_seed_share_the_vanilla_parameters_and_memories_start_silent(name):
    vanilla, model = (build_variant(kind, sizes(), seed=5) for kind in ("vanilla", name))
    mine = model.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in vanilla.state_dict().items())
    with torch.no_grad():
        for each in (vanilla, model):
            each.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    idx = TASK.batch(0, 2)[0]
    assert torch.equal(vanilla(idx), model(idx))


@pytest.mark.parametrize(
    ("variant", "adds"), [("delta_gates", {"camkii_gain", "pp1_gain", "bdnf_gamma", "camkii_read"}), ("delta_bdnf", {"bdnf_gamma"})]
)
def test_gates_are_what_the_gated_variants_add(variant, adds):
    plain, gated = (build_variant(name, sizes()).config.syn_cfg for name in ("delta", variant))
    assert plain.hebb == gated.hebb == "delta"
    changed = {name for name, value in dataclasses.asdict(plain).items() if value != getattr(gated, name)}
    assert changed == adds
    assert not any(getattr(plain, name) for name in changed) and all(getattr(gated, name) > 0 for name in changed)


@pytest.mark.parametrize("layers", [("mlp_in",), ("q", "o", "mlp_out")])
def test_the_linear_memory_is_as_large_as_fast_weights_and_stands_at_the_same_places(layers):
    synapses = dataclasses.replace(SYNAPSES, fast_layers=layers)
    linear, delta = (build_variant(name, sizes(syn_cfg=synapses)) for name in ("linear", "delta"))

    def matrices(model) -> dict[str, torch.Size]:
        names = ("linear_memory.", "density.")
        found = {key: value.shape for key, value in model.named_parameters() if any(name in key for name in names) and value.ndim == 2}
        return {key.replace(names[0], names[1]): shape for key, shape in found.items()}

    assert matrices(linear) == matrices(delta) and len(matrices(linear)) == 2 * 3 * len(layers)
    assert memory_values("linear", sizes(syn_cfg=synapses)) == memory_values("delta", sizes(syn_cfg=synapses)) == 2 * len(layers) * 64
    assert memory_values("vanilla", sizes()) == memory_values("full", sizes()) == 0
    roles = variant_roles(linear)
    assert {role for key, role in roles.items() if "linear_memory" in key} == {"fast"} and set(roles) == set(
        dict(linear.named_parameters())
    )


def test_the_linear_memory_sums_all_it_has_read_strictly_before():
    memory = LinearMemory(6, 5, 3)
    memory.init_weights(0, "a")
    assert not memory.out.any()
    with torch.no_grad():
        memory.out.normal_()
    x, y = torch.randn(2, 9, 6), torch.randn(2, 9, 5)
    u, m = F.normalize(x @ memory.pre.T, dim=-1), y @ memory.post.T
    read = torch.tril(u @ u.transpose(1, 2), diagonal=-1) @ m
    torch.testing.assert_close(memory(x, y), y + read @ memory.out.T)


# --- runs and records ----------------------------------------------------------------------------------------------------------------


def test_every_run_leaves_a_record_that_says_what_came_of_it(done):
    config, result = done
    records = list(read_records(records_path(config)).values())
    assert result["runs"] == result["new_runs"] == len(records) == 4
    assert {(record["variant"], record["seed"]) for record in records} == {(v, s) for v in ("vanilla", "delta") for s in (0, 1)}
    for record in records:
        assert record["failed"] is None and record["steps"] == 3 and record["answers"] == 16 and 0 <= record["accuracy"] <= 1
        assert [step for step, *_ in record["curve"]] == [2] and set(record["at_distance"]) == {"9", "20"}
        assert (record["memory_values"] > 0) == (record["variant"] == "delta")
    cell = result["results"]["recall"]["delta"]
    accuracies = [record["accuracy"] for record in records if record["variant"] == "delta"]
    assert sorted(cell["accuracies"]) == sorted(accuracies) and cell["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert cell["sd"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)


def test_what_is_done_is_not_done_again_and_a_repetition_finds_the_same(done, tmp_path):
    config, result = done
    again = memory_study(config)
    assert again["new_runs"] == 0 and again["results"] == result["results"]
    assert memory_study(dataclasses.replace(config, seeds=(1, 2)))["new_runs"] == 2
    elsewhere = memory_study(dataclasses.replace(config, seeds=(1,), out=str(tmp_path / "other.jsonl")))
    cells = elsewhere["results"]["recall"]
    assert {name: cell["accuracies"] for name, cell in cells.items()} == {
        name: cell["accuracies"][1:] for name, cell in result["results"]["recall"].items()
    }


def test_a_line_that_a_crash_cut_off_is_done_again_and_spoils_no_other(done, tmp_path):
    config, _ = done
    lines = records_path(config).read_bytes().splitlines(keepends=True)
    path = tmp_path / "records.jsonl"
    path.write_bytes(lines[0] + lines[1] + lines[2][:40])
    assert len(read_records(path)) == 2
    append_record(path, json.loads(lines[3]))
    assert set(read_records(path)) == {json.loads(line)["key"] for line in (lines[0], lines[1], lines[3])}
    append_record(path, json.loads(lines[2]))
    assert path.read_bytes() == lines[0] + lines[1] + lines[2][:40] + b"\n" + lines[3] + lines[2]


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"device": "auto", "out": None, "seeds": (0, 4), "tasks": ("recall", "facts")}, False),
        ({"steps": 4}, True),
        ({"distance": 13}, True),
        ({"recall": dataclasses.replace(TASK, pairs=3)}, True),
        ({"facts": Facts(facts=3)}, False),
        ({"window": 5}, True),
        ({"syn_cfg": dataclasses.replace(SYNAPSES, rho_elig=0.9)}, True),
        ({"dtype": "bfloat16"}, True),
    ],
)
def test_a_run_is_known_by_what_its_result_depends_on(tmp_path, changes, new):
    config = study(tmp_path)
    keys = [StudyRun(one, "recall", "delta", 0).key() for one in (config, dataclasses.replace(config, **changes))]
    assert (keys[0] != keys[1]) == new
    assert keys[0] not in (StudyRun(config, "recall", "delta", 1).key(), StudyRun(config, "recall", "hebb", 0).key())


def test_constants_of_the_memory_do_not_concern_models_without_one(tmp_path):
    a, b = study(tmp_path), study(tmp_path, syn_cfg=dataclasses.replace(SYNAPSES, rho_elig=0.9))
    assert StudyRun(a, "recall", "vanilla", 0).key() == StudyRun(b, "recall", "vanilla", 0).key()


def test_a_diverged_run_is_recorded_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    step = Cohort.step

    def poisoned(self, batches):
        memories = any("density" in name for name, _ in self.models[0].named_parameters())
        return step(self, batches) * (float("nan") if memories else 1)

    monkeypatch.setattr(Cohort, "step", poisoned)
    result = memory_study(study(tmp_path))
    cells = result["results"]["recall"]
    assert cells["delta"]["failed"] == 1 and cells["delta"]["accuracy"] is None and cells["vanilla"]["seeds"] == 1
    assert "not finite at step 3" in capsys.readouterr().out


def test_models_that_train_side_by_side_are_those_that_train_alone(tmp_path, monkeypatch):
    """The one that has seed 1 is said to have learned at once: it stops early, and the others do not notice."""
    real = module.measure

    def measured(model, *rest, **options):
        score = real(model, *rest, **options)
        return dataclasses.replace(score, accuracy=1.0 if model.seed == 1 else 0.0)

    def build(name, sizes, seed):
        model = build_variant(name, sizes, seed)
        model.seed = seed
        return model

    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(module, "build_variant", build)
    config = study(tmp_path, seeds=(0, 1, 2), steps=8, eval_every=2, stop_accuracy=0.99)
    runs = [StudyRun(config, "recall", "delta", seed) for seed in config.seeds]
    with progress(None, "study", "steps") as bar:
        alone = [record for run in runs for record in module.train_runs([run], torch.device("cpu"), bar)]
        together = list(module.train_runs(runs, torch.device("cpu"), bar))
    assert [(record["seed"], record["steps"]) for record in together] == [(1, 2), (0, 8), (2, 8)]
    for record in alone:
        (other,) = (one for one in together if one["seed"] == record["seed"])
        assert other["steps"] == record["steps"] and other["loss"] == pytest.approx(record["loss"], abs=1e-4)
        assert [point[1] for point in other["curve"]] == pytest.approx([point[1] for point in record["curve"]], abs=1e-4)
    assert len({record["loss"] for record in together}) == 3


@pytest.mark.parametrize("refused", [False, True])
def test_a_recorded_step_of_several_models_is_the_step(monkeypatch, capsys, refused):
    def capture(run):
        """In the place of a CUDA graph, whose replays read and write the tensors that it was recorded with."""
        made = run()
        grads = [parameter.grad for parameter in cohort.parameters]
        if refused:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def replay() -> None:
            played.append(made.copy_(run()))
            for parameter, grad in zip(cohort.parameters, grads, strict=True):
                parameter.grad = grad.copy_(parameter.grad)

        for tensor in (made, *grads):
            tensor.fill_(torch.nan)
        return SimpleNamespace(replay=replay), made

    monkeypatch.setattr("bio_inspired_nanochat.study.cohort.capture", capture)
    losses, played = [], []
    for graph in (False, True):
        models = [build_variant("delta", sizes(), seed) for seed in (0, 1)]
        cohort = Cohort(models, variant_roles(models[0]), OptimConfig(), 4 * TASK.length, 8, graph=graph)
        cohort.wanted = graph
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        losses.append(torch.stack([cohort.step([TASK.batch(generator, 4) for generator in generators]) for _ in range(8)]))
    assert torch.equal(*losses) and len(played) == (0 if refused else 8 - WARM_RUNS) and cohort.wanted is not refused
    assert capsys.readouterr().out.count("notice: steps are not replayed as a CUDA graph") == refused


def on_gpu(graph: bool) -> tuple[torch.Tensor, Cohort]:
    """Losses [12, 3] of three models trained side by side, and these."""
    device = torch.device("cuda")
    models = [build_variant("delta", sizes(), seed).to(device) for seed in (0, 1, 2)]
    cohort = Cohort(models, variant_roles(models[0]), OptimConfig(), 4 * TASK.length, 12, graph=graph)
    generators = [torch.Generator(device).manual_seed(seed) for seed in (0, 1, 2)]
    return torch.stack([cohort.step([TASK.batch(generator, 4) for generator in generators]) for _ in range(12)]).cpu(), cohort


@pytest.mark.gpu
def test_replayed_steps_of_several_models_are_eager_ones():
    (told, _), (replayed, cohort) = on_gpu(False), on_gpu(True)
    assert cohort.wanted and torch.allclose(told, replayed, atol=1e-3) and len(told[-1].unique()) == 3


@pytest.mark.gpu
def test_a_recording_that_ends_in_one_of_several_models_leaves_eager_steps(monkeypatch):
    forward = GPT.forward

    def asking(self, *args):
        loss = forward(self, *args)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss

    monkeypatch.setattr(GPT, "forward", asking)
    (told, _), (went_on, cohort) = on_gpu(False), on_gpu(True)
    assert not cohort.wanted and torch.allclose(told, went_on, atol=1e-3)
    for stream in (*cohort._streams, torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            assert not torch.cuda.is_current_stream_capturing()


def test_a_run_ends_early_at_the_accuracy_asked_for(tmp_path):
    config = study(tmp_path, variants=("vanilla",), steps=6, eval_every=2, stop_accuracy=1e-9, recall=dataclasses.replace(TASK, values=2))
    (record,) = (memory_study(config), *read_records(records_path(config)).values())[1:]
    assert record["steps"] == 2 and len(record["curve"]) == 1


def test_the_fact_probe_reports_engrams_of_models_with_fast_weights(tmp_path):
    facts = Facts(distance=8, spread=0, fillers=5, syllables=10)
    cells = memory_study(study(tmp_path, tasks=("facts",), variants=("full", "linear", "hebb"), facts=facts, engram_names=3))["results"][
        "facts"
    ]
    assert cells["full"]["engram"] is None and cells["linear"]["engram"] is None
    assert set(cells["hebb"]["engram"]) == {"own", "empty", "other", "over_empty", "over_other", "share_higher"}


def test_the_summary_leaves_failed_runs_out():
    good = {
        "task": "recall",
        "variant": "delta",
        "failed": None,
        "chance": 0.1,
        "params": 1,
        "memory_values": 2,
        "seconds": 1.0,
        "engram": None,
    }
    good |= {"by_group": {"all": 0.5}, "by_distance": {}, "at_distance": {"9": 0.25}}
    cell = summarise([good | {"accuracy": 0.5}, good | {"accuracy": 0.7}, good | {"accuracy": None, "failed": "x"}])["recall"]["delta"]
    assert (cell["accuracy"], cell["seeds"], cell["failed"]) == (pytest.approx(0.6), 2, 1)
    assert cell["sd"] == pytest.approx(0.2 / 2**0.5) and cell["at_distance"] == {"9": 0.25}


def test_full_attention_and_the_memory_learn_what_the_window_cannot(tmp_path):
    task = Recall(distance=12, spread=0, pairs=2, keys=4, values=4, fillers=4)
    shape = {"n_layer": 2, "n_embd": 32, "rows": 24, "eval_rows": 128, "recall": task, "steps": 160, "seeds": (1,)}
    optim, synapses = OptimConfig(matrix_lr=0.03, fast_lr=0.02), dataclasses.replace(SYNAPSES, rank_eligibility=16)
    result = memory_study(study(tmp_path, variants=("vanilla", "full", "delta"), optim=optim, syn_cfg=synapses, **shape))
    found = {name: cell["accuracy"] for name, cell in result["results"]["recall"].items()}
    assert found["vanilla"] < 0.35 and found["full"] > 0.9 and found["delta"] > 0.8, found


# --- the command line -----------------------------------------------------------------------------------------------------------------


def test_the_script_ends_with_a_table_and_one_json_line(tmp_path, capsys):
    words = [
        "--tasks=recall",
        "--variants=vanilla,hebb",
        "--seeds=3",
        "--steps=2",
        "--rows=2",
        "--eval_rows=4",
        "--n_embd=32",
        "--device=cpu",
    ]
    script.main([*words, f"--out={tmp_path / 'new' / 'r.jsonl'}", "--recall.pairs=2"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["runs"] == 2 and lines[-4].startswith("task") and lines[-2].split()[:2] == ["recall", "hebb"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--window=40"], "use window at most 22"),
        (["--distance=10"], "use window at most 4"),
        (["--eval_distances=128,9"], "not less than the distance of 9"),
        (["--tasks=recal"], "did you mean 'recall'"),
        (["--variants=delta,delta"], "names something twice"),
        (["--seeds="], "seeds is empty"),
        (["--n_embd=100"], "n_embd=100 is not a multiple of head_dim=32"),
        (["--engram_names=300"], "use engram_names at most"),
        (["--engram_names=1"], "at least 2"),
        (["--recall.keys=2"], "recall.keys=2 is less than"),
        (["--out=/dev/null/x"], "cannot be written"),
    ],
)
def test_the_script_refuses_in_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--device=cpu", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_a_study_of_the_memory_has_neither_terminals_nor_barrier_unless_asked():
    assert not memory_only().presyn and memory_only().barrier == "none" and isinstance(memory_only(), SynapticConfig)
