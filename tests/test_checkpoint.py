"""Checkpoints are complete or absent, whatever happens while one is written, and a damaged one is never taken silently."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bio_inspired_nanochat import checkpoint
from bio_inspired_nanochat.checkpoint import begin, find_checkpoint, load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.errors import UserError

META = {"model_config": {"n_embd": 8}, "loop": {"val_bpb": 0.1 + 0.2, "rows": [1, 2**60], "none": None, "on": True}}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}


def moments(seed: int = 0) -> dict[str, Any]:
    return {"parameters": {"a.weight": {"state": {"exp_avg": weights(seed)["b"], "step": torch.tensor(3.0)}}}, "lr": 1 / 3, "none": []}


def save(root: Path, step: int, seed: int | None = None, **options: Any) -> Path:
    seed = step if seed is None else seed
    return save_checkpoint(root, step, weights(seed), META, moments(seed), {"tokenizer.json": b'{"x": 1}'}, **options)


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def holds(path: Path, seed: int) -> bool:
    loaded, expected = load_checkpoint(path), weights(seed)
    optimizer = load_optimizer(path)["parameters"]["a.weight"]["state"]["exp_avg"]
    return all(torch.equal(loaded.model[name], expected[name]) for name in expected) and torch.equal(optimizer, expected["b"])


# --- round trips -----------------------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 12)
    assert path == tmp_path / "run" / "step_000012" and names(tmp_path / "run") == ["step_000012"]
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step) == (path, 12)
    assert loaded.meta == {"step": 12, **META} and loaded.meta["loop"]["val_bpb"].hex() == (0.1 + 0.2).hex()
    assert loaded.model.keys() == weights().keys() and holds(path, 12)
    assert loaded.file("tokenizer.json").read_bytes() == b'{"x": 1}'
    state = load_optimizer(path)
    assert state["lr"] == 1 / 3 and state["none"] == [] and state["parameters"]["a.weight"]["state"]["step"].item() == 3.0


def test_tensors_of_every_kind_keep_their_bits(tmp_path: Path) -> None:
    base = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    model = {
        "bfloat16": base.bfloat16(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "strided": base[::2, 1:],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "row": base[1],
        "whole": base,
        "flat": base.view(36),
        "parameter": torch.nn.Parameter(base.clone()),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "integers": torch.tensor([2**62, -1]),
        "mask": torch.tensor([True, False]),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, model, {})).model
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        same = loaded[name].contiguous().view(-1).view(torch.uint8) == tensor.detach().contiguous().view(-1).view(torch.uint8)
        assert same.all(), name


def test_a_shared_tensor_is_stored_once_and_loaded_under_both_names(tmp_path: Path) -> None:
    tied = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    path = save_checkpoint(tmp_path, 0, {"embed": tied, "head": tied}, {})
    assert (path / "model.safetensors").stat().st_size < 1.5 * tied.nbytes
    model = load_checkpoint(path).model
    assert torch.equal(model["head"], tied) and model["head"].data_ptr() == model["embed"].data_ptr()


def test_loaded_tensors_outlive_and_do_not_touch_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    model = load_checkpoint(path).model
    model["b"].zero_()
    assert holds(path, 1)
    model = load_checkpoint(path).model
    shutil.rmtree(path)
    assert torch.equal(model["b"], weights(1)["b"])


def test_nothing_is_pickled_and_files_are_readable_by_the_group_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(old)
    assert {entry.suffix for entry in path.iterdir()} == {".json", ".safetensors"}
    assert {entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {0o644}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"loop": {"val_bpb": float("nan")}}, "loop/val_bpb = nan"),
        ({"loop": [1.0, float("inf")]}, "loop/1 = inf"),
        ({"loop": {1: "a"}}, "no usable strings"),
        ({"loop": {"path": Path("x")}}, "loop/path of type"),
        ({"loop": {"t": torch.ones(1)}}, "loop/t of type Tensor"),
    ],
)
def test_meta_that_json_would_change_is_refused_and_nothing_is_left(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path, 2, weights(), meta)
    assert names(tmp_path) == ["step_000001"]


def test_meta_of_another_step_is_an_assertion(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step 3"):
        save_checkpoint(tmp_path, 2, weights(), {"step": 3})


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "optim_rank0.json", "../x", "a/b", "", ".hidden"])
def test_further_files_cannot_take_reserved_names_or_leave_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="no name"):
        save_checkpoint(tmp_path / "root", 1, weights(), {}, moments(), {name: b""})
    assert names(tmp_path / "root") == []


# --- several checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_highest_step_is_found_in_a_root_and_one_level_deeper(tmp_path: Path) -> None:
    for step in (5, 1_000_000, 999_999):
        save(tmp_path / "tag", step)
    for path in (tmp_path / "tag", tmp_path, str(tmp_path)):
        assert find_checkpoint(path) == tmp_path / "tag" / "step_1000000"
        assert find_checkpoint(path, 5) == tmp_path / "tag" / "step_000005"
    save(tmp_path / "later", 7)
    assert find_checkpoint(tmp_path) == tmp_path / "later" / "step_000007"
    assert find_checkpoint(tmp_path / "tag" / "step_000005") == tmp_path / "tag" / "step_000005"


def test_rotation_keeps_the_newest_and_always_the_one_just_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000002"]
    with pytest.raises(UserError, match="keep=0"):
        save(tmp_path, 5, keep=0)
    assert names(tmp_path) == ["step_000002"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 3, seed=1)
    save(tmp_path, 3, seed=2)
    assert names(tmp_path) == ["step_000003"] and holds(tmp_path, 2)


def test_every_rank_brings_its_own_optimizer_state(tmp_path: Path) -> None:
    with begin(tmp_path, 4, rank=0, world=2) as first:
        second = begin(tmp_path, 4, rank=1, world=2)
        second.write_optimizer(1, moments(1))
        first.write_optimizer(0, moments(0))
        with pytest.raises(UserError, match="no checkpoint"):
            find_checkpoint(tmp_path)
        path = first.commit(weights(0), META)
    for rank in (0, 1):
        assert torch.equal(load_optimizer(path, rank)["parameters"]["a.weight"]["state"]["exp_avg"], weights(rank)["b"])
    with pytest.raises(UserError, match="rank 2: it was saved by 2 ranks"):
        load_optimizer(path, 2)


def test_a_missing_rank_stops_the_commit(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="1 of 2 ranks"), begin(tmp_path, 4, rank=0, world=2) as stage:
        stage.write_optimizer(0, moments())
        stage.commit(weights(), META)
    assert names(tmp_path) == []


# --- damage ----------------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = [
    ("model.safetensors", flip, "model.safetensors does not have the recorded sha256"),
    ("model.safetensors", cut, "model.safetensors has [0-9]+ bytes instead of"),
    ("optim_rank0.safetensors", flip, "optim_rank0.safetensors does not"),
    ("optim_rank0.json", Path.unlink, "optim_rank0.json is missing"),
    ("meta.json", cut, "meta.json has"),
    ("tokenizer.json", flip, "tokenizer.json does not"),
    ("manifest.json", Path.unlink, "manifest.json is missing"),
    ("manifest.json", lambda path: path.write_bytes(path.read_bytes()[:40]), "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_text("[" * 100_000), "manifest.json is not JSON"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace("tokenizer.json", "x\\u0000")), "bad entry"),
    ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is not of format 1"),
    ("manifest.json", lambda path: path.write_text('{"format": 1}'), "manifest.json does not describe"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace("tokenizer.json", "../x")), "bad entry '../x'"),
    ("manifest.json", lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 9')), "that of step 9"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Any, message: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == newest
    damage(newest / name)
    assert find_checkpoint(tmp_path) == tmp_path / "step_000001"
    notice = capsys.readouterr().out
    assert notice.startswith("notice: ") and "step_000002" in notice and notice.count("\n") == 1
    for ask in (lambda: find_checkpoint(tmp_path, 2), lambda: find_checkpoint(newest), lambda: load_checkpoint(newest)):
        with pytest.raises(UserError, match=message):
            ask()
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path)


def test_foreign_and_empty_places_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "step_000009.txt").write_text("x")
    (tmp_path / "step_9").mkdir()
    (tmp_path / "model_000009.pt").write_bytes(b"x")
    (tmp_path / ".stage-step_000004").mkdir()
    with pytest.raises(UserError, match="no checkpoint under"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        find_checkpoint(tmp_path / "model_000009.pt")
    save(tmp_path / "run", 1)
    with pytest.raises(UserError, match="no checkpoint of step 3 .* choose one of 1"):
        find_checkpoint(tmp_path / "run", 3)
    with pytest.raises(UserError, match="is of step 1, not 2"):
        find_checkpoint(tmp_path / "run" / "step_000001", 2)
    with pytest.raises(UserError, match="holds no readme"):
        load_checkpoint(tmp_path / "run").file("readme")


# --- trouble while writing -------------------------------------------------------------------------------------------------------


class Death(BaseException):
    """The process is gone: nothing that follows runs, cleaning up included."""


CALLS = [
    (os, "mkdir"),
    (os, "rename"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "unlink"),
    (os, "rmdir"),
    (checkpoint, "save_file"),
    (checkpoint, "_write"),
    (checkpoint, "sha256_file"),
    (shutil, "rmtree"),
]


def die_at(monkeypatch: pytest.MonkeyPatch, moment: int, after: bool, error: BaseException | None = None) -> list[str]:
    """From the `moment`-th file operation on (after it, or instead of it) every operation fails. Returns the log of operations."""
    log: list[str] = []

    def wrapped(name: str, call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            log.append(name)
            if error is not None:
                if len(log) == moment + 1:
                    raise error
            elif len(log) > moment + after:
                raise Death
            return call(*arguments, **options)

        return run

    for module, name in CALLS:
        monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))
    return log


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", [2, 1])
def test_dying_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path, step: int, after: bool) -> None:
    """Step 2 is new, step 1 replaces the only checkpoint there is; some leftovers of an earlier death lie about."""
    finished, moment = False, 0
    while not finished:
        root = tmp_path / f"{moment}"
        save(root, 1, seed=1)
        (root / ".stage-step_000007").mkdir()
        (root / ".stage-step_000007" / "meta.json").write_text("half")
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, moment, after)
            try:
                save(root, step, seed=5)
                finished = True
            except Death:
                pass
        new = holds(root, 5)
        assert new or holds(root, 1), f"moment {moment}"
        assert new or not finished
        save(root, 3, seed=3, keep=1)
        assert names(root) == ["step_000003"] and holds(root, 3), f"moment {moment}"
        shutil.rmtree(root)
        moment += 1
    assert moment > 15


@pytest.mark.parametrize("step", [2, 1])
def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(tmp_path: Path, step: int) -> None:
    finished, moment = False, 0
    while not finished:
        root = tmp_path / f"{moment}"
        save(root, 1, seed=1)
        with pytest.MonkeyPatch.context() as patch:
            log = die_at(patch, moment, False, OSError(errno.ENOSPC, "No space left on device"))
            try:
                save(root, step, seed=5)
                finished = len(log) <= moment
            except UserError as error:
                assert "No space left on device" in str(error) and f"step {step}" in str(error)
                assert holds(root, 1) or holds(root, 5)
        assert not [name for name in names(root) if name.startswith(".stage")] or log[moment] == "rmtree"
        assert holds(root, 1) or holds(root, 5), f"moment {moment} {log[moment]}"
        moment += 1


def test_a_checkpoint_that_was_being_replaced_survives_a_failing_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1).rename(tmp_path / ".replaced-step_000001")  # where a death between the two renames leaves it
    assert holds(tmp_path, 1) and find_checkpoint(tmp_path, 1).name == ".replaced-step_000001"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"] and holds(tmp_path, 1)


def test_the_library_reports_a_full_disk_as_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"] and holds(tmp_path, 1)


def test_the_manifest_is_written_after_everything_else_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record(handle: int) -> None:
        fsync(handle)
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", record)
    path = save(tmp_path, 1)
    files = {entry.name for entry in path.iterdir()}
    assert set(synced[: len(files) - 1]) == files - {"manifest.json"}
    assert synced[len(files) - 1 :] == ["manifest.json", ".stage-step_000001", tmp_path.name]


def test_an_unwritable_root_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written to .*choose a writable"):
        save(tmp_path / "file" / "root", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_root_is_a_user_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            save(tmp_path, 2)
        assert holds(tmp_path, 1)
    finally:
        tmp_path.chmod(0o755)


def test_an_interrupt_removes_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_trouble_while_deleting_old_checkpoints_is_only_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".trash-" in str(target):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    assert holds(save(tmp_path, 2, keep=1), 2)
    assert "notice: old checkpoint" in capsys.readouterr().out


def test_manifest_is_readable_by_others(tmp_path: Path) -> None:
    """The file format is plain: a digest tool and a JSON reader are enough to check a checkpoint."""
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 1 and manifest["world"] == 1
    assert set(manifest["files"]) == {entry.name for entry in path.iterdir()} - {"manifest.json"}
