"""The doctor reports whatever is broken, and never breaks itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bio_inspired_nanochat.upkeep import doctor, probes
from scripts import doctor as script
from tests import standin
from tests.kernels import interpreter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that start no process."""
    monkeypatch.setattr(doctor, "probe", lambda name, arguments, timeout: {"said": f"{name} {arguments}"})


def test_the_report_has_every_part_and_ends_with_its_record(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes run in this process, where PyTorch is loaded; Triton has its own, for it reads its variable when it is imported."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    alone = doctor.probe

    def probe(name: str, arguments: list[int], timeout: float) -> doctor.Section:
        return alone(name, arguments, timeout) if name == "triton" else json.loads(json.dumps(probes.PROBES[name](*arguments)))

    monkeypatch.setattr(doctor, "probe", probe)
    monkeypatch.setattr(sys, "executable", standin.python(interpreter.LOADED, (interpreter.VARIABLE,)))
    script.main(["--depth=2", "--context=64"])
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["problems"] == [] and record["ok"], "or something is broken here"
    assert record["execution"]["vanilla"].startswith("attention:") and "rows" in record["execution"]["largest synaptic"]
    assert record["torch"]["version"] and "version" in record["triton"] and "extension" in record["rust"]
    if record["triton"]["version"][0].isdigit():
        assert record["triton"]["probe launch"].startswith("ran on cpu, ")
    assert {"torch", "rust", "packages", "variables"} <= set(lines) and str(ROOT) not in "\n".join(lines)


@pytest.mark.parametrize("look", doctor.LOOKS)
def test_a_part_that_cannot_be_examined_is_a_line(look: str, quick: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fails() -> dict[str, str]:
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setitem(doctor.LOOKS, look, fails)
    script.main(["--json"])
    (line,) = capsys.readouterr().out.splitlines()
    (problem,) = json.loads(line)["problems"]
    assert problem == f"{look}: this part could not be examined (RuntimeError: the disk is on fire)"


def test_probes_that_crash_hang_or_fail_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    run, code = subprocess.run, ""
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **how: run([sys.executable, "-c", code], **how))
    found = []
    for code in (  # the function above reads it
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "import time; time.sleep(60)",
        "raise RuntimeError('no driver')",
        "print('chatter')",
        "print([1])",
        "print('noise'); print('{\"version\": \"1\"}')",
    ):
        found.append(doctor.probe("torch", [], 2.0))
    said = [one.get("problem", "") for one in found]
    assert "ended by SIGSEGV" in said[0] and "within 2 seconds" in said[1] and "RuntimeError: no driver" in said[2]
    assert "exit code 0" in said[3] and "said [1]" in said[4] and found[5] == {"version": "1"}


def test_it_speaks_without_any_package() -> None:
    """Nothing but the standard library: -S leaves site-packages out."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['doctor', '--json']; import scripts.doctor as d"
    code += "; d.doctor.probe = lambda *_: {}; d.main()"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and done.stderr == ""
    record = json.loads(done.stdout)
    assert any("torch" in problem and "not installed" in problem for problem in record["problems"]) and "Python" in record["system"]


def test_versions_are_held_against_the_pins(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.15.0+cpu", "numpy": "1.0", "tyro": None}
    monkeypatch.setattr(doctor, "_constraints", lambda: "# pins\nnumpy==2.4.6\ntorch==2.15.0\nextra==1\n")
    monkeypatch.setattr(doctor, "_needed", lambda: list(have))
    monkeypatch.setattr(doctor, "_version", have.get)
    found = doctor.LOOKS["packages"]()
    assert found["as pinned"] == "1 of 2 installed packages" and found["other versions"] == "numpy 1.0 (pinned 2.4.6)"
    assert found["problem"].startswith("tyro not installed")


def test_an_installed_package_knows_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["numpy>=2", "nothing-such>=1", "ruff>=0.9; extra == 'dev'"])
    found = doctor.LOOKS["packages"]()
    assert found["needed"].startswith("numpy ") and "nothing-such not installed" in found["problem"] and "ruff" not in str(found)


def test_private_paths_are_named_by_their_roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/home/somebody/base")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/x{os.pathsep}/data/secret/y")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = doctor.LOOKS["variables"]()
    assert (found["NANOCHAT_BASE_DIR"], found["PYTHONPATH"], found["WORLD_SIZE"]) == ("~/base", f"<repository>/x{os.pathsep}.../y", "2")
    assert doctor.private("/home/somebodyelse and /home/somebody/a") == "/home/somebodyelse and ~/a"


def test_a_base_folder_that_cannot_be_used_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    assert "cannot be written" in doctor.LOOKS["storage"]()["problem"]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "new"))
    found = doctor.LOOKS["storage"]()
    assert "problem" not in found and "not made yet" in found["base folder"] and not (tmp_path / "new").exists()


def test_a_kernel_that_computes_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from bio_inspired_nanochat.kernels import rust

    monkeypatch.setattr(rust, "available", lambda: True)
    monkeypatch.setattr(rust, "phi", torch.zeros_like)
    assert "something else" in probes.rust_probe()["problem"]


@pytest.mark.parametrize("flag", ["--depth=0", "--depth=a", "--dept=3", "--json=2"])
def test_wrong_flags_are_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main([flag])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
