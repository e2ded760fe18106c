"""The speedrun's report: what it says, what hostile text cannot do to it, and its arithmetic."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation import Bpb
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.training import TrainConfig
from bio_inspired_nanochat.training.comparison import Findings, Outcome, Synapses, difference, learned_times, pooled
from bio_inspired_nanochat.training.pictures import smooth
from bio_inspired_nanochat.training.plan import make_plan
from bio_inspired_nanochat.training.report import report_text, table_rows, with_error, write_report
from bio_inspired_nanochat.training.rounds import Curve


def _blocks(*values: float) -> list[Bpb]:
    return [Bpb(value, value * 2, 100, 300) for value in values]


def _outcome(synapses: bool, blocks: list[Bpb], **changes: Any) -> Outcome:
    config = TrainConfig(
        synapses=synapses, depth=2, n_embd=32, head_dim=16, max_seq_len=32, vocab_size=300, num_iterations=20, device="cpu"
    )
    plan = make_plan(config, torch.device("cpu"), 1, 300, 0)
    record = {"steps": 20, "tokens": 5120, "final_loss": 3.2, "tok_per_s": 1000.0, "params": 40_000, "seconds": 5.0}
    record |= {"checkpoint": "checkpoints/x/step_000020", "peak_memory_gib": 0.5, "stopped": None, "log_dir": "runs/x"}
    curve = Curve()
    curve.train = [(step, 5.0 - 0.1 * step) for step in range(1, 21)]
    curve.val = [(10, 2.5), (20, 2.0)]
    return Outcome(plan, record | changes, curve, blocks, [("KING:\n", "Away!")])


def _findings(folder: Path, **changes: Any) -> Findings:
    gains = [{"gain_release": [0.5, -0.25], "gain_depletion": [0.0, 1.0], "barrier_strength": [1.0, 2.0]}] * 2
    synapses = Synapses(gains, [{"tau_c": [40.0, 60.0], "tau_rrp": [90.0, 110.0]}] * 2, _blocks(2.2, 2.3, 2.5))
    found = Findings(
        name="speedrun-d2",
        data="text",
        machine="a CPU",
        command="python -m scripts.speedrun --depth=2",
        seed=0,
        folder=folder / "runs" / "speedrun-d2",
        val_tokens=300,
        vanilla=_outcome(False, _blocks(2.0, 2.1, 2.2)),
        synaptic=_outcome(True, _blocks(1.9, 2.0, 2.15), tok_per_s=500.0, params=41_000),
        synapses=synapses,
    )
    return dataclasses.replace(found, **changes)


def test_report_and_pictures_are_complete_in_both_places(tmp_path: Path) -> None:
    found = _findings(tmp_path)
    assert write_report(found, tmp_path / "report.md") == tmp_path / "report.md"
    for folder in (tmp_path, found.folder):
        page = (folder / "report.md").read_text()
        for name in ("loss.png", "synapses.png"):
            assert f"(report_files/{name})" in page and (folder / "report_files" / name).stat().st_size > 5000


def test_gains_and_time_constants_are_listed_per_layer(tmp_path: Path) -> None:
    page = report_text(_findings(tmp_path))
    row = "0.125 (-0.250 … 0.500) | 0.500 (0.000 … 1.000) | 1.500 (1.000 … 2.000) | 50 (40 … 60) | 100 (90 … 110) |"
    assert f"| 0 | {row}" in page and f"| 1 | {row}" in page


def test_zeroed_gains_and_their_effect_are_told(tmp_path: Path) -> None:
    page = report_text(_findings(tmp_path))
    assert "from 4.0333 to 4.6667 nats per token (+0.6333" in page and "relies on its synapses" in page
    found = _findings(tmp_path)
    found.synapses.zeroed = found.synaptic.blocks
    assert "has not come to rely" in report_text(found)


def test_table_sets_both_models_side_by_side(tmp_path: Path) -> None:
    rows = {row[0]: row[1:] for row in table_rows(_findings(tmp_path))}
    assert rows["validation, bits per byte"][:2] == ["2.1000", "2.0167"]
    assert rows["validation, bits per byte"][2].startswith("-0.0833 ± ")
    assert rows["tokens per second"] == ["1,000", "500", "x 0.5"] and rows["parameters"] == ["40,000", "41,000", "+1,000"]
    assert rows["training tokens"][2] == "the same"


def test_missing_numbers_are_dashes_and_an_empty_curve_draws(tmp_path: Path) -> None:
    bare = _outcome(True, _blocks(2.0), tok_per_s=None, final_loss=None)
    bare.curve = Curve()
    found = _findings(tmp_path, vanilla=_outcome(False, _blocks(2.0)), synaptic=bare)
    found.synapses.zeroed = _blocks(2.0)
    write_report(found, tmp_path / "report.md")
    rows = {row[0]: row[1:] for row in table_rows(found)}
    assert rows["tokens per second"] == ["1,000", "-", "-"] and rows["validation, bits per byte"][2] == "+0.0000"


def test_a_model_without_presynapses_has_gains_but_no_time_constants(tmp_path: Path) -> None:
    found = _findings(tmp_path)
    found.synapses = Synapses([{"barrier_strength": [1.0]}] * 2, [], _blocks(2.0, 2.0, 2.0))
    write_report(found, tmp_path / "report.md")
    page = (tmp_path / "report.md").read_text()
    assert "barrier strength" in page and "calcium decay" not in page


def test_sampled_text_cannot_leave_its_block(tmp_path: Path) -> None:
    found = _findings(tmp_path)
    found.vanilla.samples = [("x", "\n```\n# Not a heading\n\x1b[31m\u202e<script>")]
    lines = report_text(found).splitlines()
    start = lines.index("````text")
    block = lines[start : lines.index("````", start)]
    assert "# Not a heading" in block and "```" in block
    assert "\x1b" not in "".join(block) and "\u202e" not in "".join(block)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="report cannot be written"):
        write_report(_findings(tmp_path), tmp_path / "file" / "report.md")


def test_difference_is_weighted_and_its_error_pairs_the_blocks() -> None:
    before, after = [Bpb(1.0, 1.0, 10, 30), Bpb(3.0, 3.0, 10, 10)], [Bpb(1.2, 1.1, 10, 30), Bpb(3.0, 3.3, 10, 10)]
    mean, error = difference(before, after)
    assert mean == pytest.approx(pooled(after).bpb - pooled(before).bpb) == pytest.approx(0.15)
    assert error > 0
    assert difference(before, after, "nats_per_token")[0] == pytest.approx(0.2)
    shifted = [dataclasses.replace(block, bpb=block.bpb + 0.5) for block in before]
    assert difference(before, shifted) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert math.isnan(difference(before[:1], after[:1])[1])
    assert with_error(0.5, math.nan) == "+0.5000" and with_error(-0.5, 0.1) == "-0.5000 ± 0.1000"


def test_standard_error_of_equal_blocks_is_that_of_the_mean() -> None:
    gaps = [0.1, 0.2, 0.4, 0.1]
    before, after = _blocks(*[2.0] * 4), _blocks(*[2.0 + gap for gap in gaps])
    assert difference(before, after)[1] == pytest.approx(torch.tensor(gaps).std().item() / 2, rel=1e-5)


def test_smoothing_keeps_constants_lines_and_length() -> None:
    assert smooth([]) == [] and smooth([3.0]) == [3.0]
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smooth([float(i) for i in range(50)]) == pytest.approx([float(i) for i in range(50)])


def test_learned_times_are_those_of_the_kinetics() -> None:
    plan = _outcome(True, []).plan
    model = GPT(plan.model)
    times = learned_times(model)
    assert len(times) == 2
    assert times[0]["tau_c"] == pytest.approx([plan.model.syn_cfg.tau_c] * 2, rel=1e-5)
    with torch.no_grad():
        model.blocks[1].attn.synapse.tau_rrp.add_(1.0)
    assert learned_times(model)[1]["tau_rrp"][0] > times[1]["tau_rrp"][0]
