"""The benchmark of the server: it measures what it says, on the same tokens both ways."""

from __future__ import annotations

import json

import pytest

from bio_inspired_nanochat.checkpoint import save_checkpoint
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.engine import Piece
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web.benchmark import BenchApiConfig, bench_api, jain
from bio_inspired_nanochat.web.completions import joined
from scripts import bench_api as script
from tests.web.conftest import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    loaded = tiny()
    files = {"tokenizer.json": loaded.tokenizer.to_json().encode()}
    meta = {"kind": "sft", "model_config": to_dict(loaded.model.config)}
    return str(save_checkpoint(tmp_path_factory.mktemp("bench") / "run", 1, loaded.model.state_dict(), meta, files=files))


def test_the_script_measures_both_ways_and_a_crowd(checkpoint, capsys):
    script.main([f"--source={checkpoint}", "--tokens=6", "--clients=3", "--seconds=0", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["rounds"] == 3 and record["tokens"] == 6 and record["clients"] == 3
    assert all(record[name] > 0 for name in ("engine_tok_per_s", "api_tok_per_s", "engine_first_ms", "api_first_ms", "crowd_tok_per_s"))
    assert record["engine_first_ms"] < 1e3 / record["engine_tok_per_s"] * 6, "the first token comes before the last"
    assert 1 / 3 < record["fairness"] <= 1 and 0 < record["slowest_to_fastest"] <= 1
    assert any("overhead per token" in line for line in lines)


def test_answers_that_do_not_fit_are_refused(checkpoint):
    with pytest.raises(UserError, match="--tokens=500"):
        bench_api(BenchApiConfig(source=checkpoint, tokens=500, device="cpu"))


def test_fairness_is_one_when_all_get_as_much_and_one_in_n_when_one_gets_all():
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1) and jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_plain_text_that_came_together_is_one_record_and_nothing_else_is_joined():
    a, b, other = Piece(0, 1, "a"), Piece(0, 2, "b"), Piece(1, 3, "c")
    call, sure = Piece(0, 4, "1+1", "python"), Piece(0, 5, "d", "", 0.5)
    assert [piece.text for piece in joined([a, b, other, a, call, call, sure, sure, a, b])] == [
        "ab",
        "c",
        "a",
        "1+1",
        "1+1",
        "d",
        "d",
        "ab",
    ]
    assert joined([]) == []
