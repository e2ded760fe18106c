"""Every tag of the metrics list is written by a run with everything on, moves, and stays in its range."""

from __future__ import annotations

import errno
import json
import math
import re
import threading
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import record_writer

from bio_inspired_nanochat import structural
from bio_inspired_nanochat.gpt import GPT, GPTConfig
from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard, layout
from bio_inspired_nanochat.structural import read_lineage
from bio_inspired_nanochat.training import StepRecord, train
from bio_inspired_nanochat.training.callbacks import JsonLog, Run
from bio_inspired_nanochat.training.metrics import METRICS, SCALARS
from bio_inspired_nanochat.training.vitals import look
from tests.neuroviz.conftest import RUN
from tests.structural.colony import World, batch, colony
from tests.training.ranks import LIVING
from tests.training.tiny import small

LAYERS = 2
ABSENT = {"train/mfu"}  # no peak is known of a CPU
SHAPE = GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, synapses=True)
SLOW = {"experts/dead"}  # takes a hundred steps to move, see below


@pytest.fixture(scope="module")
def events(trained):
    return EventAccumulator(str(trained.logs), size_guidance={"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}).Reload()


def matching(pattern: str, tags) -> list[str]:
    """The tags that a tag of the list with <placeholders> stands for."""
    return [tag for tag in tags if re.fullmatch(re.sub(r"<\w+>", r"[\\w]+", pattern.replace("/", r"\/")), tag)]


@pytest.mark.parametrize("metric", [metric for metric in SCALARS if metric.tag not in ABSENT], ids=lambda metric: metric.tag)
def test_every_scalar_is_written_moves_and_lies_in_its_range(metric, events):
    known = events.Tags()["scalars"]
    tags = matching(metric.tag, known) if "<" in metric.tag else metric.tags(LAYERS)
    assert tags and set(tags) <= set(known)
    for tag in tags:
        values = [event.value for event in events.Scalars(tag)]
        assert all(math.isfinite(value) and metric.low <= value <= metric.high for value in values), tag
        assert metric.rests or metric.tag in SLOW or len(set(values)) > 1, f"{tag} stands still at {values[0]}"


def test_no_scalar_is_written_that_the_list_does_not_name(events):
    named = {tag for metric in SCALARS for tag in metric.tags(LAYERS)} | {
        tag for metric in SCALARS if "<" in metric.tag for tag in matching(metric.tag, events.Tags()["scalars"])
    }
    assert set(events.Tags()["scalars"]) <= named


def test_dead_experts_are_seen():
    """Nobody asks for an expert whose score is far below all others."""
    model = colony(slots=4)
    world, kept = World(model), model.experts()[0].accounts
    kept.balance[2] = -100.0
    before = look(model, batch(0)[0], 0).values["experts/dead"]
    world.live(100)
    assert before == 0 and look(model, batch(0)[0], 100).values["experts/dead"] == 0.25


def test_pictures_histograms_texts_and_curves_are_written(events):
    tags = events.Tags()
    wanted = {kind: [metric.tag for metric in METRICS if metric.kind == kind] for kind in ("figure", "histogram", "text", "PR curve")}
    assert sorted(tags["images"]) == sorted(wanted["figure"])
    assert all(matching(tag, tags["histograms"]) for tag in wanted["histogram"])
    assert set(wanted["PR curve"]) <= set(tags["tensors"])
    assert {f"{tag}/text_summary" for tag in wanted["text"]} <= set(tags["tensors"])
    assert "custom_scalars__config__" in tags["tensors"]
    (text,) = events.Tensors("lineage/text_summary")[-1].tensor_proto.string_val
    assert "layer 1: " in text.decode() and "split at" in text.decode()


def test_flags_are_hyperparameters_of_the_run_itself(trained, events):
    assert not [path for path in trained.logs.iterdir() if path.is_dir() and path.name != "projector"], "no second run appears beside it"
    content = events.PluginTagToContent("hparams")
    assert {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"} <= set(content)
    assert b"splitmerge_every" in content["_hparams_/session_start_info"]


def test_the_projector_holds_one_row_per_living_expert(trained):
    rows = (trained.logs / "projector" / "experts.tsv").read_text().splitlines()
    head, *named = (trained.logs / "projector" / "metadata.tsv").read_text().splitlines()
    assert len(rows) == len(named) == sum(trained.record["experts"])
    assert (
        head.split("\t")[:4] == ["name", "layer", "id", "age"]
        and "projector/experts.tsv" in (trained.logs / "projector_config.pbtxt").read_text()
    )


def test_the_custom_page_shows_tags_that_exist(events):
    known = events.Tags()["scalars"]
    charts = [patterns for chapter in layout(LAYERS).values() for title, (_, patterns) in chapter.items() if title not in ABSENT]
    assert charts and all(any(re.search(pattern, tag) for tag in known) for patterns in charts for pattern in patterns)


def test_the_json_log_has_the_same_looks(trained, events):
    lines = [json.loads(line) for line in (trained.logs / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line["kind"] == "vitals"]
    assert [line["step"] for line in looks] == [1, 5, 10, 15, 20]
    shown = {event.step: event.value for event in events.Scalars("rrp_mean/layer1")}
    assert {line["step"]: pytest.approx(line["layers"]["rrp_mean"][1], rel=1e-5) for line in looks} == shown
    assert len(looks[-1]["experts"]) == sum(trained.record["experts"]) and {"x", "y", "health"} <= set(looks[-1]["experts"][0])


def test_decisions_follow_health(trained, events):
    """Only experts above the threshold split, so recall is complete down to it and precision falls below it."""
    assert any(event["event"] == "split" for event in read_lineage(trained.logs))
    curve = events.Tensors("decisions/split")[-1].tensor_proto
    assert curve.tensor_shape.dim[0].size == 6, "rows of a precision-recall curve"


def test_a_resumed_run_doubles_no_line(tmp_path):
    short = {**RUN, "num_iterations": 6, "vitals_every": 2, "save_every": 3, "splitmerge_every": 2, "sample_every": 0, "eval_every": 0}
    record = train(small(tmp_path, **short), [TensorBoard(share=0.0)])
    train(small(tmp_path, **short, resume="3"), [TensorBoard(share=0.0)])
    again = EventAccumulator(record["log_dir"]).Reload()
    for tag in ("calcium_mean", "experts/population/layer0", "neuroscore/best"):
        assert [event.step for event in again.Scalars(tag)] == [1, 2, 4, 6], tag
    assert [event.step for event in again.Images("pictures/vesicles")] == [6], "the last pictures are always drawn"


def test_a_look_changes_nothing():
    model = colony(slots=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    look(model, batch(0)[0], 1)
    assert model.training and all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_vanilla_run_has_no_vitals(tmp_path):
    record = train(small(tmp_path, num_iterations=2), [TensorBoard()])
    tags = EventAccumulator(record["log_dir"]).Reload().Tags()
    assert not [tag for tag in tags["scalars"] if not tag.startswith(("train/", "val/"))] and not tags["images"]


def test_a_step_is_one_record_on_disk_that_training_does_not_wait_for(tmp_path, monkeypatch):
    """The thread that writes is held up for a while; nothing is closed, as where a process is killed."""
    model, go, records = GPT(SHAPE), threading.Event(), []
    callback, write = TensorBoard(), record_writer.RecordWriter.write
    callback.on_start(Run(small(tmp_path), model, 0, 10, tmp_path))
    callback._writer.flush()

    def held_up(self, data):
        go.wait(5)
        records.append(data)
        write(self, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", held_up)
    seen = look(model, torch.randint(64, (1, 64)), 1)
    callback.on_look(seen)
    for step in range(1, 6):
        callback.on_step(StepRecord(step, 1.0, 1.0, 1.0, 1.0, None, 1.0, 0.0, 0, step, None))
    assert not records, "six calls have returned"
    go.set()
    until = time.monotonic() + 20
    found = EventAccumulator(str(tmp_path))
    while len(found.Reload().Tags()["scalars"]) < 10 or len(found.Scalars("train/loss")) < 5:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(records) == 6
    assert found.Scalars("rrp_mean/layer1")[0].value == pytest.approx(seen.layers["rrp_mean"][1])
    (pool,) = found.Histograms("pools/vesicles/layer0")
    assert pool.histogram_value.num == pytest.approx(SHAPE.n_head, rel=1e-5) and pool.histogram_value.bucket[-1] > 0
    callback.close()


def test_a_full_disk_ends_the_logs_and_not_the_run(tmp_path, capfd, monkeypatch):
    """/dev/full takes the place of the family tree; the others find the disk full after a while."""
    monkeypatch.setattr(structural.lineage, "FILE", "../../full.jsonl")
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    full, written = OSError(errno.ENOSPC, "No space left on device"), []

    def write(self, data):
        written.append(data)
        if len(written) > 8:
            raise full

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    monkeypatch.setattr(JsonLog, "_reopen", lambda self, *_: self._ends(full))
    record = train(small(tmp_path, **LIVING), [TensorBoard()])
    said, complaints = capfd.readouterr()
    assert record["steps"] == LIVING["num_iterations"] and record["lineage_events"] > 0
    for what in ("the family tree ends here", "the TensorBoard log cannot be written", "metrics.jsonl cannot be written"):
        assert said.count(what) == 1, said
    assert "Traceback" not in said + complaints
