"""The page in a real browser."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from bio_inspired_nanochat.engine import reply
from tests.engine.speakers import speaker, tokenizer
from tests.web.conftest import serving, tiny

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]
HOSTILE = (
    '# Title\n\n**bold** <img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> <svg onload="window.hacked=3"></svg>\n\n'
    "[bad](javascript:window.hacked=4) [good](https://example.org) ![pic](https://example.org/p.png)\n\n"
    '<form action="https://example.org"><input></form><iframe srcdoc="<script>parent.hacked=5</script>"></iframe>\n\n'
    "```\n<b>code</b>\n```\n\n<div style='position:fixed;inset:0'>cover</div>\n"
)


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(15000)
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(server.url)
    until(page, "document.querySelector('#model').textContent.includes('layers')")
    yield page
    problems = [text for text in page.problems if "status of 4" not in text]
    context.close()
    assert problems == []


def until(page, condition: str, seconds: float = 15.0) -> None:
    """Wait for a condition in the page. The driver's own wait compiles it inside of the page, which the policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def ask(page, text: str, tokens: int = 12, wait: bool = True) -> str:
    """Type a message, send it by Enter; the answer as it is shown."""
    page.fill("#max_tokens", str(tokens))
    page.fill("#input", text)
    page.press("#input", "Enter")
    if not wait:
        return ""
    finished(page)
    return page.locator(".message.assistant .body").last.inner_text()


def finished(page) -> None:
    page.wait_for_selector("#send:visible")


def says(monkeypatch, text: str) -> None:
    """Let every answer be this text."""
    ids = [*tokenizer().encode(text), tokenizer().special("<|assistant_end|>")]
    stream = itertools.cycle(ids)
    monkeypatch.setattr(reply, "next_tokens", lambda logits, *_: [next(stream) for _ in logits])


def test_typing_a_message_streams_an_answer(page, server):
    page.fill("#seed", "4")
    whole = server.ask("the king said", max_tokens=12, seed=4, temperature=0.8).json()["choices"][0]["message"]["content"]
    page.check("#memory")
    page.uncheck("#memory")
    shown = ask(page, "the king said")
    assert "".join(shown.split()) == "".join(whole.split())
    assert page.locator(".message.user .body").inner_text() == "the king said"
    assert "longest answer" in page.locator(".message.assistant .about").inner_text()


def test_nothing_is_loaded_from_elsewhere(page, server):
    ask(page, "the king")
    assert page.requests and all(url.startswith((server.url, "data:", "blob:")) for url in page.requests)


def test_stop_ends_the_answer_and_frees_the_worker(page, server):
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        ask(page, "the king", 400, wait=False)
        until(page, "document.querySelector('.message.assistant:last-child .body')?.textContent.length > 5")
        stop()
        finished(page)
        assert page.locator(".message.assistant .about").last.inner_text() == "stopped"
        assert server.idle(2.0)


def test_regenerate_edit_and_copy(page):
    page.fill("#seed", "")
    first = ask(page, "the bird", 30)
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    second = page.locator(".message.assistant .body").inner_text()
    assert page.locator(".message").count() == 2 and second != first
    page.press("#input", "ArrowUp")
    page.locator(".message textarea").fill("the river")
    page.locator(".message textarea").press("Enter")
    finished(page)
    assert page.locator(".message.user .body").all_inner_texts() == ["the river"]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".message.user").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "the river"


def test_vitals_change_while_it_answers(page):
    ask(page, "the king said to his old friend", 200, wait=False)
    page.wait_for_selector("#vital-calcium")
    texts = set()
    for _ in range(40):
        texts.add(page.locator("#vital-calcium").get_attribute("aria-label"))
        page.wait_for_timeout(25)
        if len(texts) > 3:
            break
    assert len(texts) > 3
    page.click("#stop")
    finished(page)
    colours = "canvas => new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    for quantity in ("calcium", "vesicles", "fast"):
        assert page.locator(f"#vital-{quantity}").evaluate(colours) > 4
    assert "not in this model" in page.locator("#vitals").inner_text(), "this model has no energy"


def test_uncertainty_tints_tokens(page):
    page.evaluate("document.querySelector('#samples').value = 4; document.querySelector('#samples').dispatchEvent(new Event('input'))")
    ask(page, "the king said to his old friend", 20)
    tints = page.locator(".tinted span").evaluate_all("spans => spans.map((span) => span.style.backgroundColor)")
    assert len(set(tints)) > 2


def test_markdown_is_shown_and_cannot_act(page, monkeypatch):
    says(monkeypatch, HOSTILE)
    ask(page, "show me", 900)
    body = page.locator(".message.assistant .body")
    assert body.locator("h1").inner_text() == "Title" and body.locator("strong").inner_text() == "bold"
    assert body.locator("pre").inner_text().strip() == "<b>code</b>"
    for tag in ("img", "script", "svg", "form", "input", "iframe", "[style]", "[onerror]", "a[href^=javascript]"):
        assert body.locator(tag).count() == 0, tag
    good = body.locator("a[href^='https:']")
    assert good.first.get_attribute("rel") == "noopener noreferrer"
    assert "<img src=x" in body.inner_text(), "HTML is shown, not obeyed"
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None


def test_the_sanitiser_alone_would_do(page):
    """The second line of defence, behind the Markdown reader; the policy of the page is the third."""
    script = "async (html) => { const box = document.createElement('div'); box.append((await import('/page/render.js')).clean(html)); return box.innerHTML }"
    html = page.evaluate(
        script,
        "<h1 id=x>T</h1><img src=x onerror=window.hacked=1><p style='color:red' onclick=a()>P</p><form><a href='javascript:1'>A</a></form>",
    )
    assert html == '<h1>T</h1><p>P</p><a target="_blank" rel="noopener noreferrer">A</a>'
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    page.problems.clear()  # the policy reports the handlers that the sanitiser removed


def test_what_people_write_is_text(page):
    ask(page, "<img src=x onerror=window.hacked=1> **not bold**", 4)
    assert page.locator(".message.user .body").inner_text().endswith("**not bold**") and page.evaluate("window.hacked") is None


def test_what_memory_was_does_not_overwrite_what_it_is(page):
    until(page, "document.querySelector('#memory-about').textContent === 'empty'")
    ask(page, "the king")
    until(page, "document.querySelector('#memory-about').textContent.startsWith('1 answers')")
    held = []

    def late(route):
        if route.request.method == "GET" and not held:
            held.append((route, route.fetch()))
        else:
            route.continue_()

    page.route(lambda url: "/memor" in url and not url.endswith("/file"), late)
    with page.expect_download():
        page.click("#memory-save")
    end = time.monotonic() + 15
    while not held and time.monotonic() < end:
        page.wait_for_timeout(20)
    page.click("#memory-reset")
    until(page, "document.querySelector('#memory-about').textContent === 'empty'")
    ((route, answer),) = held
    assert answer.json()["turns"] == 1
    route.fulfill(response=answer)
    page.wait_for_timeout(100)
    assert page.locator("#memory-about").inner_text() == "empty"


def test_memory_is_kept_reset_saved_and_loaded(page, tmp_path):
    until(page, "document.querySelector('#memory-about').textContent === 'empty'")
    ask(page, "the king")
    until(page, "document.querySelector('#memory-about').textContent.startsWith('1 answers')")
    with page.expect_download() as given:
        page.click("#memory-save")
    given.value.save_as(tmp_path / "memory.safetensors")
    page.click("#memory-reset")
    until(page, "document.querySelector('#memory-about').textContent === 'empty'")
    page.set_input_files("#memory-file", tmp_path / "memory.safetensors")
    until(page, "document.querySelector('#memory-about').textContent.includes('norm')")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    page.set_input_files("#memory-file", tmp_path / "bad.safetensors")
    until(page, "document.querySelector('#notice').textContent.includes('cannot be read')")


def test_conversations_survive_a_reload_and_travel_in_a_file(page, tmp_path):
    ask(page, "the first one")
    page.keyboard.press("Control+Shift+O")
    ask(page, "the second one")
    page.reload()
    assert page.locator("#list .title").all_inner_texts() == ["the second one", "the first one"]
    page.locator("#list .title").nth(1).click()
    assert page.locator(".message.user .body").inner_text() == "the first one"
    with page.expect_download() as given:
        page.click("#export")
    given.value.save_as(file := tmp_path / "talk.json")
    page.get_by_role("button", name="Delete the first one").click()
    page.get_by_role("button", name="Delete the second one").click()
    assert page.locator("#list .title").count() == 0
    page.set_input_files("#import-file", file)
    until(page, "document.querySelectorAll('#list .title').length === 2")
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b'{"conversations": [1]}'})
    until(page, "document.querySelector('#notice').textContent.includes('no exported conversations')")


def test_dark_light_and_a_phone(page, tmp_path):
    says_dark = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(says_dark)
    page.click("#theme")
    assert page.evaluate(says_dark) != before
    page.set_viewport_size({"width": 390, "height": 780})
    ask_box = page.locator("#input").bounding_box()
    assert ask_box["x"] >= 0 and ask_box["x"] + ask_box["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.locator("#panel").is_visible()
    page.click("#show-panel")
    assert page.locator("#panel").is_visible() and page.locator("#temperature").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel", state="hidden")


def test_a_locked_server_asks_for_its_key(browser):
    with serving(api_key="secret") as locked:
        context = browser.new_context()
        page = context.new_page()
        page.goto(locked.url)
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        until(page, "document.querySelector('#notice').textContent.includes('key')")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        until(page, "document.querySelector('#model').textContent.includes('layers')")
        assert ask(page, "the king", 6)
        context.close()


def test_a_vanilla_model_says_what_it_does_not_have(browser):
    with serving(lambda: speaker("vanilla", style="text")) as plain:
        context = browser.new_context()
        page = context.new_page()
        page.goto(plain.url)
        until(page, "document.querySelector('#model').textContent.includes('vanilla')")
        assert "continues text" in page.locator(".empty").inner_text() and page.locator("#memory-save").is_disabled()
        ask(page, "the king", 6)
        assert page.locator("#vitals").inner_text().count("not in this model") == 4
        context.close()


def test_pictures_of_the_page(browser, monkeypatch, tmp_path):
    """Written to $PAGE_PICTURES where that is set, to be looked at."""
    folder = Path(os.environ.get("PAGE_PICTURES") or tmp_path)
    text = "# Synapses\n\nA *terminal* releases vesicles:\n\n1. calcium rises\n2. vesicles **fuse**\n\n```python\nprint('spike')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    with serving(tiny) as running:
        for name, scheme, size in (("light", "light", (1280, 800)), ("dark", "dark", (1280, 800)), ("phone", "light", (390, 780))):
            context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
            page = context.new_page()
            page.goto(running.url)
            until(page, "document.querySelector('#model').textContent.includes('layers')")
            with monkeypatch.context() as patch:
                says(patch, text)
                page.fill("#input", "What does a synapse do?")
                page.press("#input", "Enter")
                page.wait_for_selector("#send:visible")
            page.screenshot(path=folder / f"{name}.png")
            assert (folder / f"{name}.png").stat().st_size > 10000
            context.close()
