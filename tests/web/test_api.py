"""The API: OpenAI's format, memories, and clear refusals."""

import json
import shutil
import threading
import time

import httpx2
import pytest

from bio_inspired_nanochat.engine import Sampling, generate, stop_ids
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.web import WebConfig, make_app
from tests.engine.speakers import speaker, tokenizer
from tests.web.conftest import serving, tiny

TEXT = [{"role": "user", "content": "the king said"}]


def expected(prompt: str, count: int, seed: int) -> list[int]:
    ids = tokenizer().encode(prompt)
    ids = [tokenizer().special("<|user_start|>"), *ids, tokenizer().special("<|user_end|>"), tokenizer().special("<|assistant_start|>")]
    drawn = generate(tiny().model, [tokenizer().bos_id, *ids], count, 1.0, 50, 1.0, seed, stop_ids(tokenizer()))
    return list(drawn)


def test_the_official_client_talks_to_it(server):
    import openai  # takes a second and a half, which no other test needs

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        talk(client, openai.BadRequestError)


def talk(ai, refusal: type[Exception]) -> None:
    (model,) = ai.models.list().data
    whole = ai.chat.completions.create(model=model.id, messages=TEXT, max_tokens=12, seed=4, temperature=1.0)
    assert whole.choices[0].message.content == tokenizer().decode(expected("the king said", 12, 4))
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 12)
    stream = ai.chat.completions.create(
        model=model.id, messages=TEXT, max_tokens=12, seed=4, temperature=1.0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"
    with pytest.raises(refusal, match="temperature"):
        ai.chat.completions.create(model=model.id, messages=TEXT, temperature=-1)


def test_an_answer_through_the_api_is_that_of_the_engine(server):
    body = server.ask("the bird", max_tokens=10, seed=9, x_synapse={"return_tokens": True}).json()
    assert body["x_synapse"]["tokens"] == [expected("the bird", 10, 9)] and Sampling().seed == 0


def test_a_stream_ends_with_done_and_tells_the_synapses(server):
    body = {"messages": TEXT, "max_tokens": 12, "seed": 1, "stream": True, "x_synapse": {"vitals_every": 4, "samples": 3}}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    vitals = [chunk["x_synapse"]["vitals"] for chunk in chunks if "vitals" in chunk.get("x_synapse", {})]
    assert len(vitals) >= 3 and vitals[0] != vitals[-1]
    assert len(vitals[0]) == 2 and {"calcium", "vesicles", "fast"} <= set(vitals[0][0])
    assert any(chunk.get("x_synapse", {}).get("uncertainty", 0) > 0 for chunk in chunks)


def test_several_answers_and_stop_texts(server):
    texts = [choice["message"]["content"] for choice in server.ask(n=3, max_tokens=20).json()["choices"]]
    assert len(set(texts)) == 3
    stop = texts[0][4:6]
    (choice,) = server.ask(max_tokens=20, stop=stop).json()["choices"]
    assert choice["message"]["content"] == texts[0].split(stop)[0] and choice["finish_reason"] == "stop"


# --- memory ----------------------------------------------------------------------------------------------------------------------


def test_a_memory_is_used_kept_forgotten_and_restored(server):
    def said(memory: str | None) -> str:
        extension = {"memory": memory} if memory else {}
        return server.ask("the river", max_tokens=24, x_synapse=extension).json()["choices"][0]["message"]["content"]

    path = "/v1/x_synapse/memories/mine"
    fresh = said(None)
    assert said("mine") == fresh, "an empty memory changes nothing"
    assert server.client.get(path).json()["turns"] == 1
    file = server.client.get(f"{path}/file").content
    taught = said("mine")
    assert taught != fresh and said("yours") == fresh == said(None), "a memory is its owner's"
    server.client.delete(path)
    assert said("mine") == fresh
    assert server.client.put(f"{path}/file", content=file).status_code == 200
    assert said("mine") == taught


@pytest.mark.parametrize("change", ["forget", "replace"])
def test_an_answer_that_ends_later_does_not_bring_a_forgotten_memory_back(server, change):
    path = f"/v1/x_synapse/memories/{change}"
    server.ask(x_synapse={"memory": change})
    norm = server.client.get(path).json()["norm"]
    file = server.client.get(f"{path}/file").content
    body = {"messages": [{"role": "user", "content": "the king"}], "max_tokens": 300, "stream": True, "x_synapse": {"memory": change}}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        said = (line for line in response.iter_lines() if line.startswith("data:"))
        for _ in range(3):
            next(said)
        if change == "forget":
            assert server.client.delete(path).status_code == 200
        else:
            assert server.client.put(f"{path}/file", content=file).status_code == 200
        list(said)
    assert server.client.get(path).json() | {"available": True} == {
        "memory": change,
        "available": True,
        "turns": 0,
        "norm": [] if change == "forget" else norm,
    }


def test_turns_of_one_conversation_start_where_it_began(server):
    def said(conversation: str) -> str:
        extension = {"memory": "turns", "conversation": conversation}
        return server.ask("the river", max_tokens=24, x_synapse=extension).json()["choices"][0]["message"]["content"]

    first = said("a")
    assert said("a") == first and said("b") != first and said("a") == first


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_memory_is_refused(server, content):
    answer = server.client.put("/v1/x_synapse/memories/x/file", content=content)
    assert answer.status_code == 400 and "tmp" not in answer.json()["error"]["message"]


def test_old_memories_make_room(server):
    with serving(max_memories=2) as small:
        for name in ("a", "b", "c"):
            small.ask(x_synapse={"memory": name})
        turns = [small.client.get(f"/v1/x_synapse/memories/{name}").json()["turns"] for name in ("a", "b", "c")]
    assert turns == [0, 1, 1]


# --- limits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4000}, "max_tokens=4000 is above this server's limit 1024"),
        ({"temperature": 101}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n: "),
        ({"tools": []}, "tools: Extra inputs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "end the conversation with"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "shorten it by"),
        ({"x_synapse": {"memory": "../x"}}, "x_synapse.memory"),
        ({"x_synapse": {"samples": 1}}, "samples=1"),
        ({"x_synapse": {"conversation": "a"}}, "needs x_synapse.memory"),
        ({"seed": 1.5}, "seed"),
        ({"stream": 1}, "stream"),
    ],
)
def test_what_cannot_be_served_is_named(server, fields, said):
    answer = server.ask(**fields)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


def test_old_turns_are_dropped_on_request(server):
    turns = [{"role": role, "content": "the small bird sang near the river"} for _ in range(300) for role in ("user", "assistant")]
    body = {"messages": [*turns, *TEXT], "x_synapse": {"overflow": "drop_oldest"}}
    assert server.ask(**body).json()["x_synapse"]["dropped_messages"] > 0


def test_bodies_have_a_limit_and_a_type(server):
    for size in ((1 << 20) + 1, 1 << 22):
        answer = server.client.post("/v1/chat/completions", content=b"{" + b" " * size, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "1024 KiB" in answer.json()["error"]["message"]
    for content, kind, status in ((b"{}", "text/plain", 415), (b"{", "application/json", 400), (b"[]", "application/json", 400)):
        answer = server.client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
        assert answer.status_code == status and answer.json()["error"]["message"]

    def endless():
        while True:
            yield b" " * 65536

    with pytest.raises(httpx2.TransportError):
        answer = httpx2.post(
            f"{server.url}/v1/chat/completions", content=endless(), headers={"content-type": "application/json"}, timeout=10
        )
        assert answer.status_code == 413
        raise httpx2.TransportError("refused in time")


def test_unknown_places_are_404_in_the_same_format(server):
    assert server.client.get("/v1/none").json()["error"]["code"] == 404
    assert server.client.get("/v1/chat/completions").json()["error"]["code"] == 405


# --- health ------------------------------------------------------------------------------------------------------------------------


def test_health_says_503_until_the_model_is_there():
    begin = threading.Event()

    def slow():
        begin.wait(10)
        return tiny()

    with serving(slow, wait=False) as starting:
        health = starting.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        asked = starting.ask()
        assert asked.status_code == 503 and asked.headers["retry-after"]
        begin.set()
        end = time.monotonic() + 10
        while starting.client.get("/health").status_code != 200 and time.monotonic() < end:
            time.sleep(0.02)
        assert starting.ask().status_code == 200


def test_a_model_that_cannot_be_loaded_is_named():
    def broken():
        raise UserError("no checkpoint here")

    with serving(broken) as failed:
        assert failed.client.get("/health").json()["error"] == "no checkpoint here"
        assert failed.ask().json()["error"]["message"] == "no checkpoint here"


def test_a_request_that_fails_does_not_end_the_service(monkeypatch, capfd):
    with serving(lambda: speaker("vanilla")) as running:
        whole = running.worker.loaded.model.step
        monkeypatch.setattr(running.worker.loaded.model, "step", lambda *_: 1 / 0)
        assert running.ask().status_code == 500
        monkeypatch.setattr(running.worker.loaded.model, "step", whole)
        assert running.ask().status_code == 200


def test_conversations_are_written_down_only_when_asked(tmp_path, capfd):
    with serving(log_conversations=str(tmp_path / "log.jsonl")) as running:
        answer = running.ask("a secret").json()["choices"][0]["message"]["content"]
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["request"]["messages"][0]["content"] == "a secret" and record["answers"] == [answer]
    with serving() as running:
        running.ask("another secret")
    assert "secret" not in "".join(capfd.readouterr())


def test_a_log_that_cannot_be_written_is_refused_at_the_start_and_later_costs_no_answer(tmp_path, capfd):
    with pytest.raises(UserError, match="log_conversations"):
        make_app(WebConfig(log_conversations=str(tmp_path / "none" / "log.jsonl")), tiny)
    (folder := tmp_path / "logs").mkdir()
    with serving(log_conversations=str(folder / "log.jsonl")) as running:
        shutil.rmtree(folder)
        assert running.ask().status_code == 200
        assert running.ask(stream=True).text.endswith("data: [DONE]\n\n")
    assert "was not written" in capfd.readouterr().out


def test_the_flags_are_checked():
    for flags, said in (
        ({"host": "0.0.0.0"}, "add --api_key"),
        ({"api_key": "a b"}, "printable"),
        ({"api_key": ""}, "is empty"),
        ({"port": 70000}, "port"),
    ):
        with pytest.raises(UserError, match=said):
            WebConfig(**flags)
    assert WebConfig(host="::1") and WebConfig(host="0.0.0.0", api_key="k")
