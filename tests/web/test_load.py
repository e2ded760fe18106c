"""Many clients at once: answers stay what they are alone, the queue is bounded, whoever leaves frees the worker."""

import asyncio
import json
import time
from types import SimpleNamespace

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bio_inspired_nanochat.engine import ReplyOptions
from bio_inspired_nanochat.engine.reply import PREFILL
from bio_inspired_nanochat.web.memory import MemoryStore
from bio_inspired_nanochat.web.schema import ChatRequest
from bio_inspired_nanochat.web.worker import Job, Worker
from tests.web.conftest import serving, tiny

SYNAPSE = {"return_tokens": True}


def body(client: int, **fields) -> dict:
    text = ["the king said", "a small bird sang near the river", "his old friend"][client % 3] * (1 + client % 4)
    extension = SYNAPSE | ({"memory": f"m{client}"} if client % 2 else {})
    tokens = 3 + client % 4
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "seed": client, "x_synapse": extension} | fields


async def together(server, requests: list[dict]) -> list[httpx2.Response]:
    async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=httpx2.Limits(max_connections=100)) as client:
        return await asyncio.gather(*(client.post("/v1/chat/completions", json=request) for request in requests))


def test_fifty_clients_get_what_each_would_get_alone(server):
    requests = [body(client) for client in range(50)]
    crowd = asyncio.run(together(server, requests))
    for request, answer in zip(requests, crowd, strict=True):
        assert answer.status_code == 200
        if memory := request["x_synapse"].get("memory"):
            server.client.delete(f"/v1/x_synapse/memories/{memory}")
        alone = server.client.post("/v1/chat/completions", json=request).json()
        assert answer.json()["x_synapse"]["tokens"] == alone["x_synapse"]["tokens"]


def test_a_full_queue_says_when_to_come_back():
    with serving(max_active=2, max_waiting=3) as small:
        answers = asyncio.run(together(small, [body(client, max_tokens=60) for client in range(20)]))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 5
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)
        assert small.idle() and small.ask().status_code == 200


def test_who_left_the_full_queue_makes_room_and_leaves_nothing_behind():
    async def leave_and_come() -> int:
        async with httpx2.AsyncClient(base_url=small.url, timeout=60) as client:
            first, left = (asyncio.create_task(client.post("/v1/chat/completions", json=body(0, max_tokens=400))) for _ in range(2))
            while small.worker.busy() != {"active": 1, "waiting": 1}:
                await asyncio.sleep(0.01)
            job = small.worker._waiting[0]
            left.cancel()
            while not job.cancelled:
                await asyncio.sleep(0.01)
            status = (await client.post("/v1/chat/completions", json=body(0))).status_code
            await first
            return status

    with serving(max_active=1, max_waiting=1) as small:
        assert asyncio.run(asyncio.wait_for(leave_and_come(), 30)) == 200
        assert small.idle() and small.requests() == 0


def test_clients_take_turns(server):
    """A short question behind long answers does not wait for them."""

    async def race() -> tuple[float, float]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            began = time.monotonic()

            async def timed(request: dict) -> float:
                await client.post("/v1/chat/completions", json=request)
                return time.monotonic() - began

            long = [asyncio.create_task(timed(body(client, max_tokens=80))) for client in range(4)]
            await asyncio.sleep(0.05)
            short = await timed(body(1, max_tokens=3))
            return short, min(await asyncio.gather(*long))

    short, long = asyncio.run(race())
    assert short < long / 3


def test_health_answers_while_it_generates(server):
    async def probe() -> list[float]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            work = [asyncio.create_task(client.post("/v1/chat/completions", json=body(i, max_tokens=100))) for i in range(4)]
            await asyncio.sleep(0.1)
            waits = []
            for _ in range(10):
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                waits.append(time.monotonic() - began)
                await asyncio.sleep(0.01)
            assert not all(task.done() for task in work), "it was still generating"
            await asyncio.gather(*work)
            return waits

    waits = sorted(asyncio.run(probe()))
    assert waits[len(waits) // 2] < 0.1


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_frees_the_worker(server, stream):
    made = []
    step = type(server.worker)._step

    def counted(self, job):
        made.append(job)
        return step(self, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(server.worker), "_step", counted)
        if stream:
            with server.client.stream("POST", "/v1/chat/completions", json=body(1, max_tokens=400, stream=True)) as response:
                said = (line for line in response.iter_lines() if line.startswith("data:"))
                for _ in range(3):  # the first one comes before there is a reply
                    next(said)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                server.client.post("/v1/chat/completions", json=body(1, max_tokens=400), timeout=0.2)
        assert server.idle(2.0)
    assert made[-1].reply.finish == ["cancelled"] and made[-1].reply.made[0] < 400


@pytest.mark.parametrize("steps", [1, 3])
def test_half_a_question_leaves_nothing_in_a_memory(steps):
    """A client that leaves while its prompt is read, and one that leaves during the answer."""
    worker = Worker(tiny, 1, 1, 1)
    worker.loaded = tiny()
    worker.memories = MemoryStore(worker.loaded.model, 1)
    nobody = SimpleNamespace(call_soon_threadsafe=lambda *_: None)
    job = Job([5] * (PREFILL + 9), ReplyOptions(max_tokens=9), memory="m", loop=nobody)
    assert all(worker._step(job) for _ in range(steps))
    job.cancel()
    while worker._step(job):
        pass
    assert worker.memories.describe("m")["turns"] == (steps == 3)


def test_cancelled_and_new_requests_mix(server):
    async def leave(client: httpx2.AsyncClient, number: int) -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body(number, max_tokens=300, stream=True)) as response:
            count = 0
            async for _ in response.aiter_lines():
                count += 1
                if count > number % 5:
                    break

    async def storm() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, limits=httpx2.Limits(max_connections=100)) as client:
            leavers = [asyncio.create_task(leave(client, number)) for number in range(20)]
            stay = [asyncio.create_task(client.post("/v1/chat/completions", json=body(2 * number))) for number in range(10)]
            await asyncio.gather(*leavers)
            return await asyncio.gather(*stay)

    answers = asyncio.run(storm())
    for number, answer in enumerate(answers):
        alone = server.client.post("/v1/chat/completions", json=body(2 * number)).json()
        assert answer.json()["x_synapse"]["tokens"] == alone["x_synapse"]["tokens"]
    assert server.idle()


def test_it_stops_under_load_and_starts_again():
    for _ in range(2):
        with serving() as running:

            async def crowd(server=running) -> list:
                tasks = asyncio.gather(*(together(server, [body(i, max_tokens=400)]) for i in range(6)))
                await asyncio.sleep(0.3)
                server.worker.stop(5)
                assert not server.worker._thread.is_alive()
                return await tasks

            for answer in asyncio.run(crowd()):
                assert answer[0].status_code == 503
            assert running.ask().status_code == 503, "who comes too late does not wait for ever"


# --- malformed requests, made from the schema that the server publishes -------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "", "x" * 300, -1, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(schema: dict, definitions: dict, path: tuple = ()) -> list[tuple]:
    """Paths of all fields of a body."""
    schema = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    found = [path] if path else []
    for name, field in schema.get("properties", {}).items():
        found += places(field, definitions, (*path, name))
    for part in schema.get("anyOf", []):
        found += [place for place in places(part, definitions, path) if place != path]
    if "items" in schema:
        found += places(schema["items"], definitions, (*path, 0))
    return found


SCHEMA = ChatRequest.model_json_schema()
PLACES = places(SCHEMA, SCHEMA["$defs"])


def test_the_schema_covers_the_request(server):
    published = server.client.get("/openapi.json").json()["components"]["schemas"]
    assert set(published["ChatRequest"]["properties"]) == set(SCHEMA["properties"])
    assert ("messages", 0, "content") in PLACES and ("x_synapse", "memory") in PLACES


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PLACES), ANY), min_size=1, max_size=3), st.booleans())
def test_malformed_requests_are_refused_and_nothing_breaks(server, changes, extra):
    request: dict = body(0, max_tokens=1)
    for path, value in changes:
        holder = request
        for key in path[:-1]:
            try:
                if isinstance(holder, dict) and key not in holder:
                    holder[key] = {}
                holder = holder[key]
            except (KeyError, IndexError, TypeError):
                break
        if isinstance(holder, dict) and path[-1] != 0:
            holder[path[-1]] = value
    if extra:
        request["unheard_of"] = 1
    content = json.dumps(request).encode("ascii")
    answer = server.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message
    if extra:
        assert answer.status_code == 400
