"""The soak test itself: it passes for runs that end alike, and notices those that do not."""

import json
import os
import signal
import subprocess

import pytest

from bio_inspired_nanochat.training import soak
from scripts import soak as script


@pytest.mark.soak
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "FEWEST", 30)
    monkeypatch.setattr(soak, "RUN", {**soak.RUN, "save_every": 5})
    script.main(["--minutes=0.5", "--calm=2", f"--folder={tmp_path}"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["same"] and record["final_loss_hex"][0] == record["final_loss_hex"][1] and record["first_differing_step"] is None
    assert record["processes"] == 1 + sum(record["disturbances"].values()) and record["memory_growth_gib"] < 1


@pytest.mark.parametrize(
    ("loss", "memory", "code"),
    [(1.5, [0.1] * 99, 0), (1.5000000000000002, [0.1] * 99, 1), (1.5, [0.1] * 98 + [1.2], 1), (1.5, [0.1, 1.2], 0)],
)
def test_a_bit_or_a_gigabyte_is_noticed(tmp_path, monkeypatch, capsys, loss, memory, code):
    def part(folder, steps, disturbance):
        logs = folder / "runs"
        logs.mkdir(parents=True, exist_ok=True)
        value = loss if folder.name == "disturbed" else 1.5
        (logs / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", "loss": value}) + "\n" for _ in range(steps)))
        (logs / "lineage.jsonl").write_text("")
        return soak.Part(0, {"final_loss": value, "steps": steps, "tok_per_s": 100.0, "log_dir": str(logs)}, memory)

    monkeypatch.setattr(soak, "_part", part)
    monkeypatch.setattr(soak, "read_lineage", lambda _: [])
    if code:
        with pytest.raises(SystemExit) as caught:
            script.main([f"--folder={tmp_path}"])
        assert caught.value.code == code
    else:
        script.main([f"--folder={tmp_path}"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["same"] == (loss == 1.5)


def test_a_process_that_fails_by_itself_ends_the_soak(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "_part", lambda *_: soak.Part(1, None, [], "RuntimeError: something else"))
    with pytest.raises(soak.UserError, match="ended with 1 after nothing: RuntimeError"):
        soak.soak(soak.SoakConfig(folder=str(tmp_path)))


def test_no_process_outlives_the_soak(monkeypatch, tmp_path):
    started = []

    class Popen(subprocess.Popen):
        def communicate(self, *arguments, **options):
            started.append(self)
            os.kill(os.getpid(), signal.SIGTERM)
            return super().communicate(*arguments, **options)

    monkeypatch.setattr(soak.subprocess, "Popen", Popen)
    with pytest.raises(soak.UserError, match="SIGTERM ended the soak test"):
        soak.soak(soak.SoakConfig(folder=str(tmp_path)))
    assert started[0].wait(timeout=10) == -signal.SIGKILL
