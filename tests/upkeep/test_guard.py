"""The guard of the benchmarks tells a ratio that became worse from noise, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.upkeep import guard as guards
from bio_inspired_nanochat.upkeep.guard import GuardConfig, checkout, figures, guard, judge
from tests.upkeep.test_gate import git, project  # noqa: F401  # a fixture

FAKE = 'import json, sys\nprint("a line")\nprint(json.dumps({{"step_ratio": {ratio}, "decode_speedup": {{"64": {speedup}}}, "flags": sys.argv[1:]}}))\n'


def put(root: Path, name: str, text: str) -> None:
    """Commit a script."""
    (root / "scripts").mkdir(exist_ok=True)
    (root / "scripts/__init__.py").touch()  # as in the repository: a folder without it would lose against the installed package
    (root / f"scripts/{name}.py").write_text(text)
    git(root, "add", "-A")
    git(root, "commit", "-qm", name)


def left_behind(root: Path) -> int:
    return len(git(root, "worktree", "list").splitlines()) - 1


def test_a_worse_ratio_fails_and_what_the_old_revision_lacks_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    put(project, "bench_fake", FAKE.format(ratio=1.5, speedup=2.0))
    git(project, "tag", "before")
    (project / "scripts/bench_fake.py").write_text(FAKE.format(ratio=1.8, speedup=2.4))  # not committed: the working tree counts
    (project / "scripts/bench_new.py").write_text(FAKE.format(ratio=1, speedup=1))
    record = guard(GuardConfig(against="before", run="bench_fake --a=1; scripts.bench_new", rounds=3), project)
    assert not record["ok"] and record["worse"] == ["bench_fake step_ratio"] and list(record["skipped"]) == ["bench_new"]
    found = record["figures"]
    assert found["bench_fake step_ratio"]["worsening"] == pytest.approx(1.2) and found["bench_fake step_ratio"]["certainty"] == 1
    assert found["bench_fake decode_speedup.64"]["outcome"] == "ok", "a larger speedup is better"
    assert "before has no scripts/bench_new.py" in capsys.readouterr().out and left_behind(project) == 0
    assert guard(GuardConfig(against="before", run="bench_fake", rounds=3, tolerance=25), project)["ok"]


def test_a_benchmark_that_fails_now_is_broken_and_one_that_failed_before_is_skipped(project: Path) -> None:  # noqa: F811
    put(project, "bench_fake", FAKE.format(ratio=1, speedup=1))
    put(project, "bench_mended", "raise SystemExit('sorry')")
    git(project, "tag", "before")
    put(project, "bench_fake", "raise SystemExit('sorry')")
    put(project, "bench_mended", FAKE.format(ratio=1, speedup=1))
    record = guard(GuardConfig(against="before", run="bench_fake; bench_mended", rounds=3), project)
    assert record["broken"] == {"bench_fake": "the working tree: exit code 1: sorry"} and not record["ok"]
    assert record["skipped"] == {"bench_mended": "before: exit code 1: sorry"} and left_behind(project) == 0


def test_an_interrupt_removes_the_temporary_tree(project: Path) -> None:  # noqa: F811
    with pytest.raises(KeyboardInterrupt), checkout(project, "HEAD") as (place, _):
        assert (place / "README.md").exists() and left_behind(project) == 1
        raise KeyboardInterrupt
    assert not place.parent.exists() and left_behind(project) == 0


def test_a_signal_ends_the_script_without_remains(project: Path, tmp_path: Path) -> None:  # noqa: F811
    put(project, "bench_slow", "import time, pathlib\npathlib.Path('started').touch()\ntime.sleep(60)\n")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "scripts.bench_guard", "--against=HEAD", "--run=bench_slow"]
    root = Path(__file__).resolve().parents[2]
    code = f"import os, sys; sys.argv[1:] = {command[3:]!r}; import scripts.bench_guard as b; os.chdir({str(project)!r}); b.main()"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 40
        while not list(temporary.glob("bench-guard-*/old/started")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said
    assert list(temporary.glob("bench-guard-*")) == [] and left_behind(project) == 0


def test_noise_is_not_called_worse() -> None:
    config = GuardConfig()
    steady = judge("a step_ratio", [1.0, 1.01, 0.99, 1.0, 1.02], [1.1, 1.12, 1.09, 1.11, 1.1], 1, config)
    assert steady.outcome == "worse" and steady.certainty > 0.99
    noisy = judge("a step_ratio", [1.0] * 5, [0.8, 0.9, 1.06, 1.3, 1.4], 1, config)
    assert noisy.outcome == "unsure" and 0.5 < noisy.certainty < 0.9
    assert judge("a step_ratio", [1.0] * 5, [0.8, 0.9, 1.04, 1.3, 1.4], 1, config).outcome == "ok"
    assert judge("a decode_speedup", [2.0] * 5, [1.8] * 5, -1, config).outcome == "worse"


def test_figures_are_positive_numbers_by_name() -> None:
    record = {"step_ratio": 1.5, "memory_ratio": None, "fwd_bwd_ratio": {"64": 1.2, "128": float("nan")}, "other": 3, "efficiency": True}
    assert figures(json.loads(json.dumps(record))) == {"step_ratio": 1.5, "fwd_bwd_ratio.64": 1.2}


def test_wrong_input_is_one_line(project: Path) -> None:  # noqa: F811
    with pytest.raises(UserError, match="run is empty"):
        GuardConfig(run=" ; ")
    with pytest.raises(UserError, match="no name of a script"):
        GuardConfig(run="--depth=3")
    with pytest.raises(UserError, match="there is no scripts/bench_fake.py"):
        guard(GuardConfig(run="bench_fake"), project)
    with pytest.raises(UserError, match="against='nowhere' is no revision"), checkout(project, "nowhere"):
        pass


def test_both_sides_have_the_extension_or_none(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    put(project, "bench_fake", FAKE.format(ratio=1, speedup=1))
    (project / "bio_inspired_nanochat/_rust.abi3.so").write_bytes(b"compiled")
    with checkout(project, "HEAD") as (old, commit):
        guards._share_extension(project, old, commit, 10.0)
        assert (old / "bio_inspired_nanochat/_rust.abi3.so").read_bytes() == b"compiled"
    (project / "Cargo.toml").write_text("")
    git(project, "add", "Cargo.toml")
    monkeypatch.setattr(guards, "_build", lambda tree, seconds: tree / "README.md")
    with checkout(project, "HEAD") as (old, commit):
        guards._share_extension(project, old, commit, 10.0)
        assert (old / "bio_inspired_nanochat/_rust.abi3.so").read_text() == "words\n"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="cargo is not on PATH"):
        guards._build(project, 10.0)
