"""Memory tasks: an interpreter that reads the tokens must find every answer, and find it farther back than the distance."""

import dataclasses

import pytest
import torch

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tasks.memory import (
    ASK,
    BEGIN,
    CONTEXT_A,
    CONTEXT_B,
    HAS,
    HELD_OUT,
    IS,
    OF,
    SPECIAL,
    STOP,
    TASKS,
    THE,
    WHAT,
    Binding,
    Facts,
    Recall,
    Switching,
    distinct,
)

ROWS = 40
SMALL = {
    "recall": {"pairs": 5, "keys": 7, "values": 6},
    "binding": {"variables": 3, "copies": 3, "names": 5, "values": 6},
    "facts": {"facts": 3, "syllables": 10, "name_length": 3, "attributes": 6},
    "switching": {"pairs": 3, "keys": 5, "values": 6},
}


def tiny(name: str, **changes):
    return TASKS[name](**{"distance": 9, "spread": 4, "fillers": 5, **SMALL[name], **changes})


def tasks() -> list:
    found = [tiny(name) for name in TASKS]
    return [*found, tiny("recall", spread=0), tiny("facts", name_length=2).unseen(), tiny("switching", refresh=2)]


def recall_answers(task: Recall, row: list[int]):
    first, memory = SPECIAL + task.fillers, {}
    for at, token in enumerate(row):
        if row[at - 1] == ASK:
            yield at, *memory[token], 0
        elif token >= first + task.keys:
            memory[row[at - 1]] = (token, at)


def binding_answers(task: Binding, row: list[int]):
    memory = {}
    for at, token in enumerate(row):
        if token == STOP:
            name, source = row[at - 3], row[at - 1]
            assert row[at - 2] == IS
            value, copied = (memory[source][0], 1) if source in memory else (source, 0)
            memory[name] = (value, at - 1, copied)
        elif row[at - 1] == ASK:
            yield at, *memory[token]


def facts_answers(task: Facts, row: list[int]):
    memory, size = {}, task.name_length
    for at, token in enumerate(row):
        if token == STOP:
            assert row[at - 2] == HAS and row[at - 3 - size] == THE
            memory[tuple(row[at - 2 - size : at - 2])] = (row[at - 1], at - 1)
        elif token == ASK:
            assert row[at - size - 2 : at - size] == [WHAT, OF]
            yield at, *memory[tuple(row[at - size : at])], 0


def switching_answers(task: Switching, row: list[int]):
    memory, first, group = {}, SPECIAL + task.fillers, 0
    for at, token in enumerate(row):
        if row[at - 1] in (CONTEXT_A, CONTEXT_B) and row[at - 2] == ASK:
            group = 1 if row[at - 1] == CONTEXT_B else 2 if group else 0
            yield at, *memory[row[at - 1], token], group
        elif token >= first + task.keys:
            memory[row[at - 2], row[at - 1]] = (token, at)


READERS = {"recall": recall_answers, "binding": binding_answers, "facts": facts_answers, "switching": switching_answers}


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_what_was_told_answers_every_question(task):
    rows = task.sample(torch.Generator().manual_seed(3), ROWS)
    assert all(part.shape == (ROWS, task.length) and part.dtype == torch.long for part in rows)
    for idx, targets, distance, group in zip(*(part.tolist() for part in rows), strict=True):
        assert idx[0] == BEGIN and 0 <= min(idx) and max(idx) < task.vocab_size
        expected = list(READERS[task.name](task, idx))
        asked = [at for at, target in enumerate(targets) if target != -1]
        found = [(at, targets[at], at - distance[at], group[at]) for at in asked]
        assert expected == found and len(asked) > 1 and targets[-1] != -1
        assert all(distance[at] > task.distance for at in asked)
        assert sum(distance) == sum(distance[at] for at in asked)


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_no_question_gives_an_answer_away(task):
    rows = task.sample(torch.Generator().manual_seed(4), ROWS)
    answers = set(rows.targets.unique().tolist()) - {-1}
    starts = {CONTEXT_A, CONTEXT_B, THE, IS}
    for idx, targets in zip(rows.idx.tolist(), rows.targets.tolist(), strict=True):
        first = next(at for at, target in enumerate(targets) if target != -1)
        asking = idx[first:] if task.name != "switching" else [t for t, q in zip(idx, targets, strict=True) if q != -1]
        assert not answers & set(asking)
        assert task.name == "switching" or not starts & set(asking)


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)
def test_guessing_scores_the_chance_level(task):
    targets = task.sample(torch.Generator().manual_seed(5), 400).targets
    shares = torch.bincount(targets[targets >= 0]).double()
    shares = shares[shares > 0] / shares.sum()
    assert len(shares) == round(1 / task.chance) and shares.max() < 1.25 * task.chance


@pytest.mark.parametrize("name", TASKS)
def test_rows_follow_from_the_seed(name):
    task, generator = tiny(name), torch.Generator().manual_seed(7)
    first, targets = task.batch(7, 8)
    assert torch.equal(task.batch(generator, 8)[0], first) and torch.equal(
        task.sample(torch.Generator().manual_seed(7), 8).targets, targets
    )
    assert not torch.equal(task.batch(generator, 8)[0], first) and not torch.equal(task.batch(8, 8)[0], first)
    assert len({tuple(row) for row in first.tolist()}) == 8


def test_the_distance_of_a_task_moves_its_questions():
    for name in TASKS:
        near, far = tiny(name, spread=0), tiny(name, spread=0).at(30)
        a, b = (task.sample(torch.Generator().manual_seed(1), 8) for task in (near, far))
        assert far.length > near.length and b.distance[b.targets >= 0].min() == a.distance[a.targets >= 0].min() + 21


def test_told_things_begin_at_different_places():
    rows = tiny("recall", spread=4).sample(torch.Generator().manual_seed(0), ROWS)
    words = (rows.idx >= SPECIAL + 5).int().argmax(1)
    assert set(words.tolist()) == {1, 2, 3, 4, 5}


def test_a_copy_keeps_the_value_that_its_source_had():
    task = tiny("binding")
    rows = task.sample(torch.Generator().manual_seed(2), ROWS)
    for idx, group in zip(rows.idx.tolist(), rows.group.tolist(), strict=True):
        stops = [at for at, token in enumerate(idx) if token == STOP]
        answers = {idx[at]: value for at, value, _, _ in binding_answers(task, idx)}
        copy, change = stops[-2], stops[-1]
        assert idx[change - 3] == idx[copy - 1] and answers[idx[copy - 3]] != answers[idx[change - 3]] == idx[change - 1]
        assert sum(group) >= 1


def test_b_maps_every_key_of_a_elsewhere():
    task = tiny("switching")
    for row in task.sample(torch.Generator().manual_seed(2), ROWS).idx.tolist():
        said = {(row[at - 1], row[at]): value for at, value, _, _ in switching_answers(task, row)}
        a, b = ({key: value for (context, key), value in said.items() if context == mark} for mark in (CONTEXT_A, CONTEXT_B))
        assert a.keys() == b.keys() and len(a) == task.pairs and all(a[key] != b[key] for key in a)


def names_of(task: Facts, rows: int) -> torch.Tensor:
    idx = task.sample(torch.Generator().manual_seed(9), rows).idx
    return torch.stack([idx[idx == THE].new_tensor(row[at + 1 : at + 1 + task.name_length]) for row in idx.tolist() for at in starts(row)])


def starts(row: list[int]) -> list[int]:
    return [at for at, token in enumerate(row) if token == THE]


@pytest.mark.parametrize("length", [2, 3])
def test_held_out_names_are_new_but_made_of_known_syllables(length):
    task = tiny("facts", name_length=length)
    shown, kept = (names_of(one, 300) - SPECIAL - task.fillers for one in (task, task.unseen()))
    assert (kept.sum(1) % HELD_OUT == 0).all() and (shown.sum(1) % HELD_OUT != 0).all()
    for place in range(length):
        assert set(shown[:, place].tolist()) == set(kept[:, place].tolist()) == set(range(task.syllables))
    everything = [one._names(torch.arange(one.num_names)) for one in (task, task.unseen())]
    assert len(torch.cat(everything).unique(dim=0)) == task.syllables**length


def test_names_of_a_row_differ_and_sessions_share_none():
    task = tiny("facts").unseen()
    for row in task.sample(torch.Generator().manual_seed(1), ROWS).idx.tolist():
        assert len({tuple(row[at + 1 : at + 4]) for at in starts(row)}) == task.facts
    sessions = task.sessions(1, 20, lead=2)
    names = [tuple(row[at + 1 : at + 4]) for row in sessions.told.tolist() for at in starts(row)]
    assert len(set(names)) == len(names) == 20 * task.facts


def test_the_second_session_asks_about_what_the_first_one_told():
    task = tiny("facts").unseen()
    sessions = task.sessions(1, 20, lead=2)
    assert ASK not in sessions.told.flatten().tolist() and THE not in sessions.asked.flatten().tolist()
    for told, asked, answer in zip(*(part.tolist() for part in sessions), strict=True):
        assert asked[0] == told[0] == BEGIN and asked[3:5] == [WHAT, OF] and asked[-1] == ASK
        found = [(at, value) for at, value, _, _ in facts_answers(task, told + asked)]
        assert found == [(len(told) + len(asked) - 1, answer)]


def test_draws_without_repetition_are_uniform():
    drawn = distinct(torch.Generator().manual_seed(0), 6000, 2, 3)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9)[[1, 2, 3, 5, 6, 7]]
    assert (counts - 1000).abs().max() < 150


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Recall(distance=0), "recall.distance=0 is out of bounds"),
        (lambda: Recall(pairs=9, keys=8), "recall.keys=8 is less than recall.pairs=9"),
        (lambda: Binding(variables=5, names=4), "binding.names=4"),
        (lambda: Facts(syllables=12), "use 10 or 15"),
        (lambda: Facts(facts=200, syllables=5, name_length=2), "more than there are names"),
        (lambda: Facts(syllables=5).sessions(0, 51), "use more syllables"),
        (lambda: Switching(pairs=3, refresh=4), "switching.refresh=4"),
    ],
)
def test_bad_settings_are_one_line(make, said):
    with pytest.raises(UserError, match="^[^\n]*$") as error:
        make()
    assert said in str(error.value)


def test_measured_rows_are_the_task_itself_where_nothing_is_kept_back():
    for name in TASKS:
        task = tiny(name)
        assert task.unseen() == (dataclasses.replace(task, held_out=True) if name == "facts" else task)
