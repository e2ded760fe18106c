"""The speedrun end to end on a tiny text, and the arithmetic of its minutes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint
from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.engine import load, style_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.training import Callback, speedrun
from bio_inspired_nanochat.training.lesson import seconds_for
from bio_inspired_nanochat.training.pace import FEWEST_STEPS, Pace, make_budget
from bio_inspired_nanochat.training.plan import make_plan
from bio_inspired_nanochat.training.rounds import FEW_ROUNDS, ROUNDS
from scripts.speedrun import main
from tests.training.tiny import small

TINY = ["--depth=2", "--n_embd=32", "--max_seq_len=32", "--vocab_size=300", "--batch_size=4", "--minutes=2", "--device=cpu"]
STEPS = 12
WORDS = ["calcium", "enters", "the", "terminal", "and", "vesicles", "leave", "it", "again", "until", "rest"]


def _write_text(path: Path) -> Path:
    rng = random.Random(0)
    path.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=60)).capitalize() + "." for _ in range(120)))
    return path


@dataclasses.dataclass
class Done:
    """A finished run: its folder, its lines without the last one, its record."""

    folder: Path
    lines: list[str]
    record: dict[str, Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("speedrun")
    text = _write_text(folder / "text.txt")
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.chdir(folder)
        main([*TINY, f"--data={text}", f"--max_steps={STEPS}", "--lesson_steps=3"])
    *lines, last = shown.getvalue().splitlines()
    return Done(folder, lines, json.loads(last))


# --- the whole run -------------------------------------------------------------------------------------------------------------------


def test_record_names_both_models_with_what_users_rely_on(done: Done) -> None:
    for kind in ("vanilla", "synaptic"):
        assert {"val_bpb", "tok_per_s", "params", "seconds", "checkpoint"} <= set(done.record[kind])
        assert 0 < done.record[kind]["val_bpb"] < 10 and done.record[kind]["tok_per_s"] > 0
    assert done.record["synaptic"]["params"] > done.record["vanilla"]["params"]


def test_both_models_get_the_same_tokens_seed_and_recipe(done: Done) -> None:
    assert [done.record[kind]["steps"] for kind in speedrun.KINDS] == [STEPS, STEPS]
    assert [done.record[kind]["tokens"] for kind in speedrun.KINDS] == [STEPS * 4 * 32] * 2
    configs = [json.loads((done.folder / done.record[kind]["log_dir"] / "config.json").read_text()) for kind in speedrun.KINDS]
    differing = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert differing <= {"synapses", "run_name", "resume"} and "synapses" in differing


def test_checkpoints_hold_the_models_that_were_compared(done: Done) -> None:
    vanilla, synaptic = (GPT.from_checkpoint(done.record[kind]["checkpoint"]) for kind in speedrun.KINDS)
    assert not vanilla.gains() and len(synaptic.gains()) == 2
    assert synaptic.num_params() == done.record["synaptic"]["params"]


def test_report_shows_the_gains_of_the_checkpoint_and_its_pictures(done: Done) -> None:
    page = (done.folder / "report.md").read_text()
    assert page == (done.folder / "runs/speedrun-d2/report.md").read_text()
    gains = GPT.from_checkpoint(done.record["synaptic"]["checkpoint"]).gains()
    for layer, values in enumerate(gains):
        row = next(line for line in page.splitlines() if line.startswith(f"| {layer} |"))
        for heads in values.values():
            assert f"{sum(heads) / len(heads):.3f} (" in row
    for name in ("loss.png", "synapses.png"):
        assert f"](report_files/{name})" in page
        assert (done.folder / "report_files" / name).read_bytes().startswith(b"\x89PNG")
    assert f"{done.record['vanilla']['val_bpb']:.4f}" in page and f"{done.record['synaptic']['val_bpb']:.4f}" in page
    assert "Setting all of them to zero" in page


def test_zeroing_the_gains_changes_the_trained_model(done: Done) -> None:
    assert done.record["zero_gains"]["raises_val_loss"] != 0.0


def test_tensorboard_has_both_runs(done: Done) -> None:
    for kind in speedrun.KINDS:
        assert list((done.folder / "runs" / f"speedrun-d2-{kind}").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(("pace", "share"), [(1e-3, 0.05), (0.3, 150 * 0.3 / 570), (10.0, 0.2)])
def test_the_lesson_gets_time_for_its_steps_within_a_share_of_the_minutes(pace: float, share: float) -> None:
    assert seconds_for(9.5, pace) == pytest.approx(share * 570)


def test_the_tokenizer_is_trained_once_also_where_the_text_supports_fewer_ids_than_wanted(done: Done) -> None:
    assert sum(line.startswith("tokenizer: ") for line in done.lines) == 1
    (tokenizer,) = (done.folder / "base" / "tokenizers").glob("*/tokenizer.json")
    assert tokenizer.parent.name.endswith("-300")


def test_output_shows_table_samples_and_what_to_type_next(done: Done) -> None:
    shown = "\n".join(done.lines)
    assert all(text in shown for text in ("[1/5]", "[5/5]", "validation, bits per byte", "vanilla writes:", "synaptic writes:"))
    after = shown[shown.index("next, type") :]
    assert f"scripts.chat_cli --source={done.record['chat']['checkpoint']}" in after and "--logdir runs" in after
    assert f"scripts.chat_cli --checkpoint={done.record['synaptic']['checkpoint']}" in after


def test_the_synaptic_model_is_taught_to_chat_and_asked(done: Done) -> None:
    chat = done.record["chat"]
    loaded = load(chat["checkpoint"], torch.device("cpu"))
    base = load_checkpoint(done.record["synaptic"]["checkpoint"])
    assert style_of(loaded.meta) == "chat" and loaded.meta["sft_source"] == str(base.path)
    assert loaded.meta["model_config"] == base.meta["model_config"]
    assert 0 < chat["steps"] and 0 <= chat["ended"] <= chat["prompts"] <= 50
    page = (done.folder / "report.md").read_text()
    assert f"{chat['ended']} of its answers to {chat['prompts']} prompts" in page and chat["checkpoint"] in page


def test_last_validation_point_of_the_curve_is_the_value_in_the_table(done: Done) -> None:
    log = (done.folder / done.record["synaptic"]["log_dir"] / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in log if '"kind": "eval"' in line]
    assert curve[-1]["step"] == STEPS and len(curve) == len(FEW_ROUNDS)
    assert curve[-1]["val_bpb"] == pytest.approx(done.record["synaptic"]["val_bpb"], abs=1e-5)


# --- interruptions and time ------------------------------------------------------------------------------------------------------------


class _InterruptAt(Callback):
    def after_update(self, step: int, model: Any, optimizer: Any) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_saves_the_model_in_training_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = speedrun.read_config([*TINY, f"--data={_write_text(tmp_path / 'text.txt')}", "--max_steps=8"], {}, "speedrun")
    record = speedrun.speedrun(config, lambda: [_InterruptAt()])
    assert record["stopped"] == "SIGINT" and record["vanilla"]["steps"] == 3 and record["synaptic"]["steps"] == 2
    shown = capsys.readouterr().out
    assert all(f"scripts.base_train --resume={record[kind]['checkpoint']}" in shown for kind in speedrun.KINDS)
    assert GPT.from_checkpoint(record["vanilla"]["checkpoint"]).num_params() == record["vanilla"]["params"]


def test_budget_fits_both_trainings_and_all_evaluations() -> None:
    paces = [Pace(0.5, 1e-4, 1.0), Pace(0.8, 2e-4, 1.0)]
    budget = make_budget(570.0, 25.0, paces, 1024, 10**9, 10**9)
    evaluation = budget.eval_tokens * (len(ROUNDS) * 3e-4 + 1e-4 + 2 * 2e-4)
    assert 0.75 * 545 < budget.steps * 1.3 + evaluation < 0.95 * 545 and evaluation < 0.13 * 545
    assert budget.steps * 1.3 < budget.seconds < 545 and budget.eval_tokens % 1024 == 0


def test_threads_are_chosen_for_the_model_with_the_smaller_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other work takes a core, a synaptic step may take ten times as long on all threads, a vanilla one hardly longer."""
    asked = []

    def measure(plan, device, seconds, choose_threads):
        asked.append((plan.model.synapses, choose_threads))
        return Pace(1.0 + plan.model.synapses, 1.0, 1.0)

    monkeypatch.setattr(speedrun, "measure", measure)
    plans = [make_plan(small(Path(), synapses=synapses), torch.device("cpu"), 1) for synapses in (False, True)]
    _, paces = speedrun.measure_both(plans, torch.device("cpu"), 10.0)
    assert asked == [(True, True), (False, False)] and [pace.step for pace in paces] == [1.0, 2.0]


def test_budget_never_exceeds_the_wanted_steps_and_the_text_there_is() -> None:
    budget = make_budget(570.0, 25.0, [Pace(0.01, 1e-6, 0.1)] * 2, 1024, most_steps=50, val_tokens=2560)
    assert budget.steps == 50 and budget.eval_tokens == 2048


def test_budget_without_time_still_has_a_few_steps() -> None:
    budget = make_budget(-5.0, 10.0, [Pace(10.0, 1e-2, 10.0)] * 2, 256, 10**9, 10**9)
    assert budget.steps == FEWEST_STEPS and budget.eval_tokens == 256


# --- configuration -------------------------------------------------------------------------------------------------------------------


def test_variables_set_defaults_and_flags_win(tmp_path: Path) -> None:
    variables = {"SPEEDRUN_DEPTH": "3", "SPEEDRUN_MINUTES": "4.5", "SPEEDRUN_DATA": str(tmp_path)}
    config = speedrun.read_config([], variables, "speedrun")
    assert (config.depth, config.minutes, config.data) == (3, 4.5, str(tmp_path))
    assert speedrun.read_config(["--depth", "5"], variables, "speedrun").depth == 5
    assert speedrun.read_config([], {"SPEEDRUN_DEPTH": " "}, "speedrun").depth is None


@pytest.mark.parametrize(
    "variable, value, said",
    [
        ("SPEEDRUN_DEPTH", "abc", "SPEEDRUN_DEPTH=abc"),
        ("SPEEDRUN_DEPTH", "0", "SPEEDRUN_DEPTH=0"),
        ("SPEEDRUN_MINUTES", "-1", "SPEEDRUN_MINUTES=-1"),
        ("SPEEDRUN_MINUTES", "nan", "SPEEDRUN_MINUTES=nan"),
        ("SPEEDRUN_DATA", "/nonexistent/text", "SPEEDRUN_DATA='/nonexistent/text'"),
    ],
)
def test_a_wrong_variable_is_one_line_in_its_own_name(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and "--" not in line


def test_help_lists_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("SPEEDRUN_DEPTH", "SPEEDRUN_MINUTES", "SPEEDRUN_DATA", "--seed"))


def test_a_model_that_no_such_machine_could_train_in_time_is_refused_before_it_is_built(tmp_path: Path) -> None:
    text = _write_text(tmp_path / "text.txt")
    config = speedrun.read_config([f"--data={text}", "--depth=64", "--minutes=0.5", "--vocab_size=300", "--device=cpu"], {}, "speedrun")
    with pytest.raises(UserError, match="depth=64 is too large"):
        speedrun.speedrun(config)


def test_text_is_made_into_shards_once_and_a_folder_of_shards_is_taken_as_it_is(tmp_path: Path) -> None:
    text = _write_text(tmp_path / "mine.txt")
    first = speedrun.data_folder(str(text))
    assert first is not None and speedrun.data_folder(str(text)) == first
    assert speedrun.data_folder(first) == first and resolve_data(first).train_paths
    text.write_text(text.read_text() + "\n\nAnd one more.")
    assert speedrun.data_folder(str(text)) != first
    assert speedrun.data_folder(None) is None


def test_a_second_speedrun_takes_a_new_name_for_all_its_folders(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done.folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(done.folder / "base"))
    config = speedrun.read_config(TINY, {}, "speedrun")
    plan = dataclasses.make_dataclass("P", [("model", Any)])(dataclasses.make_dataclass("M", [("n_layer", int)])(2))
    assert speedrun.run_name(config, plan) == "speedrun-d2-2"
    assert speedrun.run_name(dataclasses.replace(config, log_dir="elsewhere"), plan) == "speedrun-d2-2"  # its checkpoints are there


def test_a_gpu_gets_a_larger_model_and_compiles_only_where_there_is_time() -> None:
    config = speedrun.read_config([], {}, "speedrun")
    cpu, gpu = (speedrun.base_config(config, torch.device(name), None) for name in ("cpu", "cuda"))
    assert gpu.depth > cpu.depth and gpu.max_seq_len > cpu.max_seq_len and gpu.vocab_size > cpu.vocab_size
    assert (cpu.compile, gpu.compile) == ("0", "1")
    short = speedrun.base_config(dataclasses.replace(config, minutes=2.0, depth=5, batch_size=3), torch.device("cuda"), None)
    assert (short.compile, short.depth, short.device_batch_size, short.total_batch_size) == ("0", 5, 3, None)
