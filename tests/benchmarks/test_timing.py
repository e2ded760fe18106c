"""Competitors take turns, ratios are those of runs side by side, and the floor is what the arithmetic says."""

import math

import pytest
import torch

from bio_inspired_nanochat.benchmarks.floor import floor_of, peaks
from bio_inspired_nanochat.benchmarks.records import reason
from bio_inspired_nanochat.benchmarks.timing import (
    FEWEST_ROUNDS,
    ColdCache,
    Competitor,
    Course,
    Spread,
    Tried,
    interleave,
    memory_of,
    paired_ratio,
    set_strides,
    warm_up,
)

CPU = torch.device("cpu")


def competitors(log: list[str], *names: str) -> dict[str, Competitor]:
    """Competitors of two phases that write down what happens."""

    def one(name: str) -> Competitor:
        def run(mark) -> None:
            log.append(name)
            mark()

        return Competitor(run, prepare=lambda: log.append(f"prepare {name}"))

    return {name: one(name) for name in names}


def test_competitors_take_turns_for_the_rounds_asked_for():
    log: list[str] = []
    courses = interleave(competitors(log, "a", "b"), CPU, seconds=60.0, most=4)
    assert log == ["prepare a", "a", "prepare b", "b"] * 4
    for course in courses.values():
        assert len(course.rounds) == 4 and all(len(phases) == 2 and min(phases) >= 0 for phases in course.rounds)


def test_time_that_is_over_still_leaves_a_few_rounds():
    courses = interleave(competitors([], "a"), CPU, seconds=0.0)
    assert courses["a"].spread().count == FEWEST_ROUNDS


def test_a_slow_competitor_sits_out_rounds_and_is_paired_with_those_it_ran_in():
    log: list[str] = []
    group = competitors(log, "quick", "slow")
    set_strides(group, {"quick": Tried(0.0, 1.0), "slow": Tried(0.0, 24.0)})
    assert (group["quick"].stride, group["slow"].stride) == (1, 3)
    courses = interleave(group, CPU, seconds=60.0, most=7)
    assert [phases is not None for phases in courses["slow"].rounds] == [True, False, False, True, False, False, True]
    assert paired_ratio(courses["slow"].total(), courses["quick"].total()).count == 3


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians():
    ratio = paired_ratio([2.0, 30.0, 4.0, None], [1.0, 10.0, 1.0, 5.0])
    assert ratio == Spread(3.0, 2.5, 3.5, 3)
    assert paired_ratio([None], [1.0]) is None


def test_phases_add_up_to_whole_runs():
    course = Course([(1.0, 2.0), None, (3.0, 4.0)])
    assert course.phase(0) == [1.0, None, 3.0] and course.total() == [3.0, None, 7.0]
    assert course.spread(1) == Spread(3.0, 2.5, 3.5, 2) and course.spread().times(10).median == 50.0


def test_warming_up_runs_without_marks_and_ignores_the_first_run():
    log: list[str] = []
    tried = warm_up(competitors(log, "a")["a"], CPU, runs=3)
    assert log == ["prepare a", "a"] * 3 and 0 <= tried.host <= tried.whole


def test_a_cpu_has_no_cache_to_flush_and_no_allocator_to_ask():
    cold = ColdCache(CPU)
    assert cold.flushes_for(1.0) == 0 and cold.buffer is None
    assert memory_of(competitors([], "a")["a"], CPU) is None and peaks(CPU, torch.float32) == (None, None)


def test_the_floor_counts_what_causality_leaves():
    pairs, tokens, dim, tick = 3, 8, 4, 2
    seen = 8 * 9 / 2
    plane = 4 * sum(2 * (n + 1) for n in range(4))  # tick n sees 2 (n + 1) keys
    attention = floor_of("attention", pairs, tokens, dim, tick, 2)
    assert attention.forward_bytes == pairs * 4 * tokens * dim * 2 and attention.forward_flops == pairs * 2 * 2 * dim * seen
    assert attention.backward_flops == 2.5 * attention.forward_flops
    assert floor_of("layer", pairs, tokens, dim, tick, 2) == attention
    assert floor_of("presyn", pairs, tokens, dim, tick, 2) == (pairs * 2 * plane, pairs * 3 * plane, 0, 0)
    biased = floor_of("biased attention", pairs, tokens, dim, tick, 2)
    assert biased.forward_bytes - attention.forward_bytes == pairs * plane


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    floor = floor_of("attention", 1, 8, 4, 2, 2)
    assert floor.seconds(None, None) is None
    assert floor.seconds(None, 1.0) == floor.forward_bytes + floor.backward_bytes
    assert floor.seconds(math.inf, 1.0) == floor.forward_bytes + floor.backward_bytes
    assert floor.seconds(1.0, 1.0) == max(floor.forward_bytes, floor.forward_flops) + max(floor.backward_bytes, floor.backward_flops)


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("a\n b"), "a b"), (torch.OutOfMemoryError("Tried to"), "out of memory"), (ImportError(), "ImportError")],
)
def test_a_reason_is_one_line(error, said):
    assert reason(error) == said and len(reason(RuntimeError("x" * 999))) <= 160
