"""What is said of files before work whose outcome goes there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bio_inspired_nanochat.common import check_writable
from bio_inspired_nanochat.common.files import write_atomic
from bio_inspired_nanochat.errors import UserError
from scripts import bench_decode, download_data, param_census, tok_train, tune_bio_params


def test_a_place_that_takes_a_file_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.json"
    assert check_writable("out", str(path)) == path and list(path.parent.iterdir()) == []
    write_atomic(path, "kept")
    check_writable("out", path)
    assert path.read_text() == "kept" and list(path.parent.iterdir()) == [path]


def test_a_place_that_takes_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^out='.*/file/x.json' cannot be written \(.*\): give a file in a writable folder$"):
        check_writable("out", tmp_path / "file" / "x.json")
    with pytest.raises(UserError, match=r"^out='.*' is a folder: give a file$"):
        check_writable("out", tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a folder in which even root can make no file")
@pytest.mark.parametrize(
    ("script", "argv", "flag"),
    [
        (tok_train, [], "out"),
        (download_data, ["--make_manifest=."], "manifest"),
        (param_census, ["--knobs=tau_c"], "markdown"),
        (bench_decode, ["--depth=1"], "json"),
        (tune_bio_params, ["best", "--run_dir=."], "out"),
    ],
)
def test_scripts_ask_before_they_work(script, argv: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main([*argv, f"--{flag}=/proc/x.json"])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith(f"error: {flag}='/proc/x.json' cannot be written (") and err.count("\n") == 1
