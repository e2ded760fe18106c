"""The needle in a haystack: told once, anywhere, and asked at the end."""

import torch

from bio_inspired_nanochat.tasks.memory import ASK, IS, as_generator
from bio_inspired_nanochat.tasks.needle import DEPTHS, Needle

TASK = Needle(distance=20, spread=0, fillers=5, names=3, values=4)


def test_the_answer_is_what_was_told_of_the_name_that_is_asked() -> None:
    episodes = TASK.sample(as_generator(3), 300)
    assert episodes.idx.shape == (300, TASK.length) and episodes.idx.max() < TASK.vocab_size
    asked = episodes.targets >= 0
    assert asked.sum(1).eq(1).all() and asked[:, -1].all(), "one question, at the end"
    for row, target, distance in zip(episodes.idx, episodes.targets, episodes.distance, strict=True):
        (told,) = (row == IS).nonzero().flatten().tolist()
        assert row[-2] == ASK and row[-1] == row[told - 1] and target[-1] == row[told + 1]
        assert distance[-1] == TASK.length - 1 - (told + 1)


def test_needles_lie_everywhere_and_groups_are_thirds_of_the_haystack() -> None:
    episodes = TASK.sample(as_generator(4), 2000)
    places = (episodes.idx == IS).int().argmax(1) - 1
    assert places.min() == 1 and places.max() == TASK.length - 5
    group = episodes.group[:, -1]
    assert group.unique().tolist() == list(range(len(DEPTHS)))
    assert all(places[group == i].max() < places[group == i + 1].min() for i in range(len(DEPTHS) - 1))


def test_rows_follow_from_the_seed() -> None:
    assert torch.equal(TASK.batch(5, 8)[0], TASK.batch(5, 8)[0])
    assert not torch.equal(TASK.batch(5, 8)[0], TASK.batch(6, 8)[0])
