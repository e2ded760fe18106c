"""The dashboard: what its API says, and its page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch
import uvicorn

from bio_inspired_nanochat.engine import load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.inspector import inspect, scaled, sliders
from bio_inspired_nanochat.training import EvalRecord, StepRecord
from bio_inspired_nanochat.training.callbacks import JsonLog, Run
from bio_inspired_nanochat.training.vitals import look
from bio_inspired_nanochat.web.config import DashboardConfig
from bio_inspired_nanochat.web.dashboard import make_dashboard
from tests.neuroviz.conftest import trained  # noqa: F401 (a fixture)
from tests.training.tiny import small

SENTENCE = "the king said"
STEPS = 50_000


@contextmanager
def serving(folder: Path, **flags) -> Iterator[httpx2.Client]:
    """A running dashboard of a log folder, and a client of it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = make_dashboard(DashboardConfig(log=str(folder), port=0, **flags))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
        end = time.monotonic() + 20
        while time.monotonic() < end and not server.started:
            time.sleep(0.01)
        try:
            yield client
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def dashboard(trained):  # noqa: F811
    with serving(trained.logs) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(trained):  # noqa: F811
    return load(trained.record["checkpoint"], torch.device("cpu"))


# --- the inspector ------------------------------------------------------------------------------------------------------------------


def test_the_inspector_says_what_the_model_does(loaded):
    seen = inspect(loaded, SENTENCE, 1)
    idx = torch.tensor([loaded.tokenizer.encode(SENTENCE, bos=True)])
    course = loaded.model.course(idx)[1]
    assert len(seen["tokens"]) == idx.shape[1] and seen["changed"] is None
    for name in ("calcium", "vesicles", "released", "bias"):
        assert torch.allclose(torch.tensor(seen["own"]["values"][name]), course[name][0], atol=1e-4), name
    likely = torch.softmax(loaded.model(idx)[0, -1], -1).max().item()
    assert seen["own"]["next"][0][1] == pytest.approx(likely, abs=1e-3)


def test_a_faster_pump_leaves_less_calcium_and_the_model_as_it_was(loaded):
    before = inspect(loaded, SENTENCE, 0)
    seen = inspect(loaded, SENTENCE, 0, {"tau_c": 0.1})
    own, changed = (torch.tensor(seen[side]["values"]["calcium"]) for side in ("own", "changed"))
    assert 0 < changed.sum() < 0.8 * own.sum()
    assert inspect(loaded, SENTENCE, 0) == before
    fast = {one["name"]: one["mean"] for one in sliders(loaded.model)}
    with scaled(loaded.model, {"tau_rrp": 0.5}):
        slow = {one["name"]: one["mean"] for one in sliders(loaded.model)}
    assert slow["tau_rrp"] == pytest.approx(fast["tau_rrp"] / 2, rel=1e-3) and slow["tau_c"] == fast["tau_c"]


@pytest.mark.parametrize(
    ("text", "layer", "factors", "said"),
    [
        (SENTENCE, 7, {}, "layers 0 to 1"),
        ("x" * 200, 0, {}, "shorten it"),
        (SENTENCE, 0, {"tau_x": 2.0}, "no kinetic constant"),
        (SENTENCE, 0, {"tau_c": 1e9}, "tau_c"),
        (SENTENCE, 0, {"tau_c": float("nan")}, "tau_c"),
    ],
)
def test_what_cannot_be_inspected_is_one_clear_line(loaded, text, layer, factors, said):
    with pytest.raises(UserError, match=said):
        inspect(loaded, text, layer, factors)


# --- the API ------------------------------------------------------------------------------------------------------------------------


def test_the_api_serves_the_run_its_family_and_its_model(dashboard, trained):  # noqa: F811
    run = dashboard.get("/api/run").json()
    assert run["state"] == "finished" and run["step"] == trained.record["steps"]
    assert [layer["layer"] for layer in dashboard.get("/api/family").json()["layers"]] == [0, 1]
    model = dashboard.get("/api/model").json()
    assert model["layers"] == 2 and {"tau_c", "tau_rrp", "alpha_ca"} <= {one["name"] for one in model["sliders"]}
    seen = dashboard.post("/api/inspect", json={"text": SENTENCE, "layer": 1, "factors": {"release_rate": 2.0}}).json()
    assert seen["step"] == trained.record["steps"] and seen["changed"]["values"]["vesicles"] != seen["own"]["values"]["vesicles"]


@pytest.mark.parametrize("body", [{"text": ""}, {"text": SENTENCE, "layer": 9}, {"text": SENTENCE, "factors": {"x": 1}}, {"txt": SENTENCE}])
def test_bad_requests_are_answered_with_a_reason(dashboard, body):
    answer = dashboard.post("/api/inspect", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_strangers_are_refused(trained):  # noqa: F811
    with pytest.raises(UserError, match="api_key"):
        DashboardConfig(log=str(trained.logs), host="0.0.0.0")
    with serving(trained.logs, api_key="secret") as client:
        assert client.get("/api/run").status_code == 401
        assert client.get("/api/run", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421
        assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def test_an_empty_run_folder_is_told_of(tmp_path):
    with serving(tmp_path) as client:
        assert "wait for its first step" in client.get("/api/run").json()["message"]
        answers = [client.get("/api/family"), client.get("/api/model"), client.post("/api/inspect", json={"text": "a"})]
        assert [answer.status_code for answer in answers] == [400, 400, 400]
        assert "no checkpoint yet" in answers[1].json()["error"]["message"]
        (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 5.0}\n{"kind": "ste')
        assert client.get("/api/run").json()["step"] == 1


# --- the page -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def show(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" and "status of 4" not in line.text else None)

    def opened(client):
        page.goto(str(client.base_url))
        until(page, "document.body.dataset.ready === '1'")
        return page

    yield opened
    context.close()
    assert problems == []


def until(page, condition: str, seconds: float = 30.0) -> None:
    """Wait for a condition in the page, whose policy forbids the driver's own wait."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


@pytest.mark.browser
@pytest.mark.timeout(240)
def test_the_page_shows_the_run(show, dashboard, trained):  # noqa: F811
    page = show(dashboard)
    assert f"finished · step {trained.record['steps']}" in page.locator("#head").inner_text()
    assert page.locator("[data-tag=calcium_mean] path").count() == 3, "the model and its two layers"
    page.click("[data-tab=experts]")
    living = sum(trained.record["experts"])
    assert page.locator("#map .expert").count() == living and page.locator("#leaders tbody tr").count() == min(20, living)
    page.click("[data-tab=family]")
    until(page, "document.querySelectorAll('#tree .life').length > 0")
    family = dashboard.get("/api/family").json()
    assert page.locator("#tree .life").count() == sum(len(layer["experts"]) for layer in family["layers"])
    child = next(one for one in family["layers"][0]["experts"] if one["parents"])
    page.locator(f"#tree svg >> nth=0 >> [data-id='{child['parents'][0]}']").dispatch_event("click")
    assert str(child["id"]) in page.eval_on_selector_all("#tree .lit", "all => all.map(one => one.dataset.id)")
    page.click("[data-tab=samples]")
    assert page.locator("#samples pre").count() > 0


@pytest.mark.browser
@pytest.mark.timeout(240)
def test_a_slider_of_the_inspector_changes_what_is_seen(show, dashboard):
    page = show(dashboard)
    page.click("[data-tab=inspector]")
    until(page, "document.body.dataset.inspected === '1' || document.querySelector('#about').textContent.includes('shorten')")
    page.fill("#text", SENTENCE)
    page.press("#text", "Enter")
    until(page, "document.querySelectorAll('#maps canvas').length === 4")
    columns = "() => { const all = document.querySelector('.tokens'); return all.getBoundingClientRect().width / all.children.length; }"
    middles = """() => [...document.querySelectorAll('.tokens')[0].children].map((one) => {
        const [text, line] = [document.createRange(), one.parentNode.getBoundingClientRect()];
        text.selectNodeContents(one);
        const box = text.getBoundingClientRect();
        return (box.left + box.right) / 2 - line.left;
    })"""
    width = page.evaluate(columns)
    assert page.evaluate(middles) == [pytest.approx((i + 0.5) * width, abs=2) for i in range(len(page.evaluate(middles)))]
    pixels = "quantity => [...document.querySelectorAll(`canvas[data-quantity=${quantity}]`)].map(one => one.toDataURL())"
    page.select_option("#constant", "tau_c")
    page.evaluate("() => { const one = document.getElementById('factor'); one.value = 2; one.dispatchEvent(new Event('input')); }")
    until(page, "document.querySelectorAll('#maps canvas').length === 8")
    own, changed = page.evaluate(pixels, "calcium")
    assert own != changed and "× 4" in page.locator("#factor-value").inner_text()
    page.evaluate("() => { const one = document.getElementById('tick'); one.value = 0; one.dispatchEvent(new Event('input')); }")
    first, _ = page.evaluate(pixels, "calcium")
    assert first != own, "another tick is another picture"


def long_run(folder: Path, steps: int) -> None:
    """The log of a long run, as training writes it; the looks are those of one model."""
    from tests.structural.colony import batch, colony

    model = colony(slots=6, n_layer=3, presyn=True)
    log, seen = JsonLog(), look(model, batch(0)[0], 0)
    assert seen is not None
    log.on_start(Run(small(folder), model, 0, steps, folder))
    for step in range(10, steps + 1, 10):
        log.on_step(StepRecord(step, 5 - step / steps, 1.0, 0.5, 1000.0, None, 1.0, 0.0, 0, step, 1.0))
        if step % 100 == 0:
            log.on_look(dataclasses.replace(seen, step=step))
        if step % 250 == 0:
            log.on_eval(EvalRecord(step, 2.0, 3.0, 1000))
    log.close()


@pytest.mark.browser
@pytest.mark.timeout(240)
def test_a_run_of_fifty_thousand_steps_loads_in_two_seconds(show, tmp_path):
    long_run(tmp_path, STEPS)
    with serving(tmp_path) as client:
        began, busy = time.perf_counter(), os.times()
        page = show(client)
        until(page, "document.querySelectorAll('figure.chart path').length > 20")
        took = time.perf_counter() - began
        assert f"step {STEPS}" in page.locator("#head").inner_text()
        assert took < 2 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), (took, os.times().user - busy.user)
        assert len(json.dumps(client.get("/api/run").json())) < 2_000_000


@pytest.mark.browser
@pytest.mark.timeout(120)
def test_the_page_of_an_empty_folder_says_what_it_waits_for(show, tmp_path):
    with serving(tmp_path) as client:
        page = show(client)
        assert "wait for its first step" in page.locator("#message").inner_text()
        (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 5.0}\n')
        until(page, "document.querySelector('#head').textContent.includes('step 1')")
