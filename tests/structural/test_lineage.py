"""The family tree: append-only, ids that never repeat, runs that were resumed."""

import json

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.structural import LineageLog, NeuroPhylo, read_lineage
from tests.structural.colony import World, colony
from tests.structural.test_splitmerge import EASY


def event(step, kind, number, parents=(), layer=0):
    return {"step": step, "layer": layer, "event": kind, "id": number, "parents": list(parents), "slots": [0]}


STORY = [
    event(10, "split", 2, [0]),
    event(20, "split", 3, [2]),
    event(20, "death", 1),
    event(30, "merge", 4, [3, 0]),
    event(40, "birth", 5),
    event(15, "split", 2, [1], layer=1),
]


def test_the_tree_shows_who_came_from_whom(tmp_path):
    LineageLog(tmp_path).found([2, 2])
    LineageLog(tmp_path).write(STORY)
    tree = NeuroPhylo(read_lineage(tmp_path), layer=0)
    assert tree.living() == [2, 4, 5]
    assert tree.children(0) == [2] and tree.children(3) == [4]
    assert tree.render() == [
        "layer 0: 3 living, 3 ended",
        "  #0 founder, merged at 30",
        "    #2 split at 10",
        "      #3 split at 20, merged at 30",
        "        #4 merge at 30 of #3 and #0",
        "  #1 founder, died at 20",
        "  #5 birth at 40",
    ]


def test_what_an_interrupted_run_logged_after_its_checkpoint_is_not_in_the_tree(tmp_path):
    log = LineageLog(tmp_path)
    log.write(STORY[:3])
    log.resume(15)
    log.write([event(20, "split", 3, [0])])
    kept = read_lineage(tmp_path / "lineage.jsonl")
    assert [(record["step"], record["id"], record["parents"]) for record in kept] == [(10, 2, [0]), (20, 3, [0])]
    assert len((tmp_path / "lineage.jsonl").read_text().splitlines()) == 5  # append-only


def test_half_a_line_at_the_end_is_passed_over_and_damage_before_it_is_an_error(tmp_path):
    log = LineageLog(tmp_path)
    log.write(STORY[:2])
    with log.path.open("a") as file:
        file.write('{"step": 30, "la')
    assert len(read_lineage(tmp_path)) == 2
    with log.path.open("a") as file:
        file.write("\n" + json.dumps(STORY[2]) + "\n")
    with pytest.raises(UserError, match=r"lineage.jsonl:3"):
        read_lineage(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_lineage(tmp_path / "nowhere")


def test_a_living_colony_writes_a_tree_whose_ids_never_repeat(tmp_path):
    model = colony(**(EASY | {"expert_youth": 3}), n_layer=2)
    log = LineageLog(tmp_path)
    log.found([4, 4])
    world = World(model, every=4, log=log)
    world.live(36)
    events = read_lineage(tmp_path)
    assert len(events) == world.keeper.events + 2 > 6
    for index, layer in enumerate(model.experts()):
        mine = [record for record in events if record["layer"] == index]
        made = [record["id"] for record in mine if record["event"] in ("split", "merge", "birth")]
        assert made == sorted(set(made)) and all(number >= 4 for number in made)
        tree = NeuroPhylo(events, index)
        assert tree.living() == sorted(layer.accounts.ids[layer.accounts.alive].tolist())
    assert all(set(record) >= {"step", "layer", "event", "id", "parents", "health", "loss_before", "loss_after"} for record in events[2:])
    splits = [record for record in events if record["event"] == "split"]
    assert splits and all(abs(record["loss_after"] - record["loss_before"]) < 1e-4 for record in splits)
