"""The family tree: its data say what the lineage log says, and its page works in a real browser, without a network."""

from __future__ import annotations

import itertools
import json
import time

import pytest

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.phylo import family, read_family, write_page
from bio_inspired_nanochat.neuroviz.rundir import MetricsTail, read_metrics
from bio_inspired_nanochat.structural import NeuroPhylo, read_lineage
from scripts import neurophylo
from tests.neuroviz import saga

MANY = 10_000


def test_every_expert_of_the_log_is_in_the_tree(trained):
    found = read_family(trained.logs)
    assert found["last"] == trained.record["steps"] and found["events"] == trained.record["lineage_events"]
    for layer in found["layers"]:
        tree = NeuroPhylo(read_lineage(trained.logs), layer["layer"])
        assert {one["id"]: one["parents"] for one in layer["experts"]} == tree.parents
        assert [one["id"] for one in layer["experts"] if one["end"] is None] == tree.living()


def test_health_and_load_come_from_the_looks_of_the_run(trained):
    rows = [line for line in read_metrics(trained.logs) if line["kind"] == "vitals"][-1]["experts"]
    found = {(layer["layer"], one["id"]): one["track"] for layer in read_family(trained.logs)["layers"] for one in layer["experts"]}
    for row in rows:
        assert found[row["layer"], row["id"]][-1] == [trained.record["steps"], row["health"], row["load"]]


def test_no_two_experts_share_a_lane_at_a_time(tmp_path):
    (layer,) = read_family(saga.write(tmp_path, 600))["layers"]
    for lane in {one["lane"] for one in layer["experts"]}:
        own = sorted((one for one in layer["experts"] if one["lane"] == lane), key=lambda one: one["born"][0])
        assert all(a["end"] and a["end"][0] <= b["born"][0] for a, b in itertools.pairwise(own))
    assert max(one["lane"] for one in layer["experts"]) < saga.MOST


def test_lives_tell_of_the_parents_health():
    events = [
        {"step": 0, "layer": 0, "event": "founding", "experts": 1},
        {"step": 5, "layer": 0, "event": "split", "id": 1, "parents": [0], "health": [0.9, 0.0]},
    ]
    (layer,) = family(events)["layers"]
    assert layer["experts"][0]["events"] == [[5, "split parent 1", 0.9]] and layer["experts"][1]["born"] == [5, "split"]


def test_a_run_without_experts_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_family(tmp_path)
    with pytest.raises(UserError, match="no events"):
        family([])


def test_a_log_is_read_as_it_grows(tmp_path):
    path, tail = tmp_path / "metrics.jsonl", MetricsTail(tmp_path)
    assert tail.poll() == []
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert [line["step"] for line in tail.poll()] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\n')
    assert [line["step"] for line in tail.poll()] == [2] and len(tail.lines) == 2
    (tmp_path / "new").write_text('{"kind": "step", "step": 9}\n')
    (tmp_path / "new").rename(path)  # as a resumed run does
    assert [line["step"] for line in tail.poll()] == [9] and len(tail.lines) == 1
    path.write_text('{"kind": "step", "step": 1}\nnonsense\n{"kind": "step", "step": 2}\n')
    tail = MetricsTail(tmp_path)
    with pytest.raises(UserError, match="no record of training"):
        tail.poll()
    assert tail.poll() == [] and [line["step"] for line in tail.lines] == [1, 2], "damage hides nothing but itself"


# --- the page -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    folder = saga.write(tmp_path_factory.mktemp("saga"), MANY)
    return write_page(read_family(folder), folder / "family.html")


def place(page, step: float, lane: int) -> tuple[float, float]:
    """Where a step and a lane are on the screen."""
    return tuple(
        page.evaluate(
            """([step, lane]) => { const box = document.querySelector('.nsewdrag').getBoundingClientRect();
            const { xaxis, yaxis } = document.getElementById('plot')._fullLayout;
            return [box.left + xaxis.d2p(step), box.top + yaxis.d2p(lane)]; }""",
            [step, lane],
        )
    )


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_pointing_tells_a_life_and_clicking_lights_up_descendants(show, trained, tmp_path, capsys):
    neurophylo.main([f"--log={trained.logs}", f"--out={tmp_path / 'family.html'}"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["events"] == trained.record["lineage_events"]
    page = show(tmp_path / "family.html")
    layer = read_family(trained.logs)["layers"][0]
    tree = NeuroPhylo(read_lineage(trained.logs), 0)
    parent = next(one for one in layer["experts"] if tree.children(one["id"]))
    (x, y) = place(page, parent["born"][0] + 1, parent["lane"])
    page.mouse.move(x, y)
    tip = page.locator("#tip").inner_text()
    assert f"#{parent['id']}: " in tip and "health" in tip and "load" in tip
    page.mouse.click(x, y)
    todo, wanted = [parent["id"]], set()
    while todo:
        new = [number for number, parents in tree.parents.items() if todo[-1] in parents and number not in wanted]
        todo.pop()
        wanted |= set(new)
        todo += new
    assert json.loads(page.evaluate("document.getElementById('plot').dataset.lit")) == sorted(wanted) != []
    page.mouse.click(x, y)
    assert page.evaluate("document.getElementById('plot').dataset.lit") == ""


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_time_runs_by_slider_and_by_play_and_hides_the_future(show, trained, tmp_path):
    page = show(write_page(read_family(trained.logs), tmp_path / "family.html"))
    layer = read_family(trained.logs)["layers"][0]
    last = trained.record["steps"]
    page.evaluate(
        "t => { const time = document.getElementById('time'); time.value = t; time.dispatchEvent(new Event('input')); }", last // 2
    )
    living = sum(one["born"][0] <= last // 2 and not (one["end"] and one["end"][0] <= last // 2) for one in layer["experts"])
    assert f"step {last // 2} of {last} · {living} living" in page.locator("#now").inner_text()
    survivor = next(one for one in layer["experts"] if one["end"] is None and one["born"][0] < last // 2)
    page.mouse.move(*place(page, 0.75 * last, survivor["lane"]))
    assert not page.locator("#tip").is_visible()
    box = page.locator("#future").bounding_box()
    assert abs(box["x"] - place(page, last // 2, 0)[0]) < 3 and box["width"] > 300
    page.click("#play")
    page.wait_for_timeout(400)
    assert int(page.locator("#time").input_value()) > last // 2
    page.click("#play")


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_ten_thousand_events_stay_fluid(show, long_page):
    page = show(long_page)
    assert page.evaluate("JSON.parse(document.getElementById('data').textContent).events") == MANY
    move = """() => { const time = document.getElementById('time'), began = performance.now();
        for (let n = 0; n < 50; n++) { time.value = n * time.max / 50; time.dispatchEvent(new Event('input')); time.getBoundingClientRect(); }
        return (performance.now() - began) / 50; }"""
    assert page.evaluate(move) < 30, "milliseconds per move of the slider"
    page.evaluate("() => { const time = document.getElementById('time'); time.value = time.max; time.dispatchEvent(new Event('input')); }")
    layer = read_family(long_page.parent)["layers"][0]
    parent = max(layer["experts"], key=lambda one: len(one["events"]))
    point = place(page, (parent["born"][0] + parent["end"][0]) / 2, parent["lane"])
    began = time.perf_counter()
    page.mouse.click(*point)
    assert time.perf_counter() - began < 5
    assert page.locator("#story").inner_text().startswith("#")
