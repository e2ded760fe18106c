"""CORE: scores worked by hand on a bundle made here; bundles that are wrong, unsafe or far away."""

from __future__ import annotations

import codecs
import functools
import io
import json
import math
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation import core
from bio_inspired_nanochat.evaluation.bundle import find_bundle, read_bundle
from bio_inspired_nanochat.evaluation.likelihood import Part, PartScore
from bio_inspired_nanochat.evaluation.suite import EvaluationSetting, evaluate, evaluate_in_detail
from tests.engine.speakers import tokenizer
from tests.evaluation.planted import Planted, guess, knows

CHOICES = [
    {"query": f"the {thing} is", "choices": ["old", "small", "near", "so"], "gold": gold}
    for thing, gold in (("king", 0), ("bird", 1), ("river", 2), ("friend", 3))
]
SCHEMA = [
    {"context_options": ["the king", "the bird"], "continuation": "sang near the river", "gold": 1},
    {"context_options": ["his friend", "the river"], "continuation": "said that it was so", "gold": 0},
]
FACTS = [{"context": f"{word} ", "continuation": after} for word, after in (("said", "to his"), ("small", "bird"), ("old", "friend"))]
TASKS = """icl_tasks:
- {label: choice, icl_task_type: multiple_choice, dataset_uri: a/choice.jsonl, num_fewshot: [0]}
- {label: schema, icl_task_type: schema, dataset_uri: schema.jsonl, num_fewshot: [0]}
- {label: facts, icl_task_type: language_modeling, dataset_uri: facts.jsonl, num_fewshot: [1], continuation_delimiter: ": "}
"""
BASELINES = "Eval Task,Task Category,Random baseline\nchoice,x,25\nschema,x,50.0\nfacts,x,0\nunused,x,\n"


def files() -> dict[str, str]:
    """The bundle's files by name."""
    data = {"a/choice": CHOICES, "schema": SCHEMA, "facts": FACTS}
    found = {f"eval_data/{name}.jsonl": "".join(json.dumps(item) + "\n" for item in items) for name, items in data.items()}
    return found | {"core.yaml": TASKS, "eval_meta_data.csv": BASELINES}


def make(folder: Path, **changes: str | None) -> Path:
    """The bundle as a folder; None leaves a file out."""
    for name, content in (files() | changes).items():
        if content is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    return folder


def zipped(top: str = "eval_bundle/", **more: str) -> bytes:
    """The bundle as a zip file, in a folder of its own as the public one is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files().items():
            archive.writestr(top + name, content)
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()


# --- scores ------------------------------------------------------------------------------------------------------------------------


def test_scores_are_those_worked_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four choices, one of two schemas, one of three facts: (3/4 - 1/4) / (3/4), 0 and 1/3, whose mean is 1/3."""
    likely = ("king is old", "bird is small", "river is near", "friend is old")
    likely += ("the bird sang near the river", "the river said that it was so", "small: bird")

    def score(model: object, parts: list[Part], batch_size: int) -> list[PartScore]:
        texts = [tokenizer().decode(part.ids[1:]) for part in parts]
        good = [text.endswith(likely) for text in texts]
        return [PartScore(torch.full((part.stop - part.start,), 1.0 - g).double(), torch.tensor([g])) for part, g in zip(parts, good)]

    monkeypatch.setattr(core, "score", score)
    setting = EvaluationSetting(tokenizer=tokenizer(), eval_bundle_dir=str(make(tmp_path)))
    found = evaluate_in_detail(Planted(guess), ["core"], setting)["core"]
    tasks = found.details["tasks"]
    assert {name: one["accuracy"] for name, one in tasks.items()} == {"choice": 0.75, "schema": 0.5, "facts": pytest.approx(1 / 3)}
    assert tasks["choice"]["centred"] == pytest.approx(2 / 3) and tasks["schema"]["centred"] == 0
    assert found.values["core"] == pytest.approx(1 / 3) and found.values["accuracy"] == pytest.approx((0.75 + 0.5 + 1 / 3) / 3)


def test_a_model_that_guesses_is_at_zero_and_one_that_knows_at_one(tmp_path: Path) -> None:
    setting = EvaluationSetting(tokenizer=tokenizer(), eval_bundle_dir=str(make(tmp_path)))
    assert evaluate(Planted(guess), ["core"], setting)["core.core"] == pytest.approx(0), "ties share the point"
    right = [f"{one['context_options'][one['gold']]} {one['continuation']}" for one in SCHEMA]
    right += [f"{one['query']} {one['choices'][one['gold']]}" for one in CHOICES]
    right += [f"{one['context'].strip()}: {one['continuation']}" for one in FACTS]
    assert evaluate(Planted(knows(*right, order=30)), ["core"], setting)["core.core"] == pytest.approx(1)
    assert evaluate(Planted(guess, sequence_len=4), ["core"], setting)["core.accuracy"] is not None
    assert "lost their beginning" in evaluate_in_detail(Planted(guess, sequence_len=4), ["core"], setting)["core"].notices[0]
    few = EvaluationSetting(tokenizer=tokenizer(), eval_bundle_dir=str(tmp_path), max_per_task=2)
    assert evaluate_in_detail(Planted(guess), ["core"], few)["core"].details["tasks"]["choice"]["questions"] == 2


def test_tied_options_share_the_point() -> None:
    def scores(*losses: float) -> list[PartScore]:
        return [PartScore(torch.full((2,), loss).double(), torch.zeros(2, dtype=torch.bool)) for loss in losses]

    assert [core.judged(scores(1, 1, 2), gold) for gold in range(3)] == [0.5, 0.5, 0]
    assert [core.judged(scores(3, 2), gold) for gold in range(2)] == [0, 1]
    assert core.judged([PartScore(torch.ones(2), torch.tensor([True, False]))], None) == 0


@pytest.mark.parametrize("gold", [0, 1, None])
def test_a_model_without_finite_losses_has_no_accuracy(gold: int | None) -> None:
    parts = [PartScore(torch.tensor([loss]).double(), torch.tensor([True])) for loss in (math.nan, 1.0)]
    assert math.isnan(core.judged(parts, gold)) and math.isnan(core.judged(parts[::-1], gold))


def test_prompts_show_solved_examples_and_judge_the_answer_alone(tmp_path: Path) -> None:
    choice, schema, facts = read_bundle(make(tmp_path))
    decode = tokenizer().decode
    (part,) = core.prompt_parts(tokenizer(), facts, facts.items, 1)
    shown = decode(part.ids[1:])
    assert shown in {f"{other}\n\nsmall: bird" for other in ("said: to his", "old: friend")} and part.ids[0] == tokenizer().bos_id
    assert decode(part.ids[part.start :]).strip() == "bird"
    parts = core.prompt_parts(tokenizer(), choice, choice.items, 0)
    assert [decode(part.ids[part.start :]).strip() for part in parts] == ["old", "small", "near", "so"]
    assert all(decode(part.ids[1 : part.start]) == "the king is" for part in parts)
    parts = core.prompt_parts(tokenizer(), schema, schema.items, 0)
    assert [decode(part.ids[1:]) for part in parts] == ["the king sang near the river", "the bird sang near the river"]
    assert {decode(part.ids[part.start :]) for part in parts} == {" sang near the river"}


# --- bundles -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"core.yaml": None}, "has no core.yaml"),
        ({"core.yaml": "icl_tasks: ["}, "is not YAML"),
        ({"core.yaml": "tasks: []"}, "lacks the list icl_tasks"),
        ({"core.yaml": TASKS.replace("dataset_uri: schema.jsonl, ", "")}, r"icl_tasks\[1\] has dataset_uri=None"),
        ({"core.yaml": TASKS.replace("language_modeling", "generation")}, "icl_task_type='generation'"),
        ({"core.yaml": TASKS.replace("[1]", "[-1]")}, r"num_fewshot=\[-1\]"),
        ({"core.yaml": TASKS.replace("facts.jsonl", "../facts.jsonl")}, "leads out of the bundle"),
        ({"core.yaml": TASKS.replace("facts.jsonl", "fact.jsonl")}, "fact.jsonl cannot be read"),
        ({"core.yaml": TASKS.replace("[1]", "[3]")}, "more than its 3 examples"),
        ({"core.yaml": TASKS.replace("facts.jsonl", '"a\\0b"')}, "leads out of the bundle"),
        ({"core.yaml": TASKS + "made: 2020-13-45\n"}, "is not YAML"),
        ({"eval_meta_data.csv": None}, "eval_meta_data.csv cannot be read"),
        ({"eval_meta_data.csv": "Eval Task,Baseline\nchoice,3\n"}, "lacks"),
        ({"eval_meta_data.csv": BASELINES.replace("50.0", "half")}, "Random baseline 'half'"),
        ({"eval_meta_data.csv": BASELINES.replace("50.0", "100")}, "percentage in"),
        ({"eval_meta_data.csv": BASELINES.replace("schema", "scheme")}, "no line for the task schema"),
        ({"eval_data/schema.jsonl": "{}\n"}, "schema.jsonl line 1 has context_options"),
        ({"eval_data/facts.jsonl": "[]\n"}, "line 1 is no JSON object"),
        ({"eval_data/facts.jsonl": '{"context": "a"\n'}, "line 1 is not JSON"),
        ({"eval_data/a/choice.jsonl": json.dumps(CHOICES[0] | {"gold": 4})}, r"gold=4, out of bounds \[0, 3\]"),
        ({"eval_data/a/choice.jsonl": json.dumps(CHOICES[0] | {"choices": ["old"]})}, "fewer than two options"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_said(tmp_path: Path, changes: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        root = find_bundle(str(make(tmp_path, **changes)), None, None)
        assert root is not None
        read_bundle(root)


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_a_zip_file_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "evil.zip").write_bytes(zipped(**{name: "x"}))
    with pytest.raises(UserError, match="leads out of the bundle"):
        find_bundle(None, str(tmp_path / "evil.zip"), None)
    assert not list(base_dir().rglob("out.txt")) and not list(tmp_path.rglob("out.txt"))


def test_links_damage_and_size_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("eval_bundle/link")
    link.external_attr = 0o120777 << 16
    path = tmp_path / "b.zip"
    path.write_bytes(zipped())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="a bundle has plain files"):
        find_bundle(None, str(path), None)
    path.write_bytes(zipped()[:-40])
    with pytest.raises(UserError, match="not a whole zip file"):
        find_bundle(None, str(path), None)
    path.write_bytes(zipped(bomb="0" * 100_000))
    with pytest.raises(UserError, match="unpacks to more than 40000 bytes"):
        find_bundle(None, str(path), None, max_bytes=10_000)
    with pytest.raises(UserError, match="does not exist"):
        find_bundle(None, str(tmp_path / "none.zip"), None)
    with pytest.raises(UserError, match="both given"):
        find_bundle("a", "b", None)
    assert find_bundle(None, None, None) is None


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_inside_of_a_zip_file_is_one_line_however_it_was_packed(tmp_path: Path, packed: int) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("core.yaml", TASKS * 100)
    raw = bytearray(path.read_bytes())
    raw[45:70] = bytes(byte ^ 255 for byte in raw[45:70])
    path.write_bytes(raw)
    with pytest.raises(UserError, match="not a whole zip file"):
        find_bundle(None, str(path), None)


def test_tables_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    root = make(tmp_path)
    for path in (root / "eval_meta_data.csv", root / "eval_data" / "facts.jsonl"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert len(read_bundle(root)) == 3


def test_a_zip_file_is_unpacked_once_wherever_its_bundle_lies(tmp_path: Path) -> None:
    (tmp_path / "flat.zip").write_bytes(zipped(top=""))
    (tmp_path / "deep.zip").write_bytes(zipped())
    flat, deep = (find_bundle(None, str(tmp_path / name), None) for name in ("flat.zip", "deep.zip"))
    assert [task.label for task in read_bundle(flat)] == [task.label for task in read_bundle(deep)] == ["choice", "schema", "facts"]
    before = (deep / "core.yaml").stat().st_mtime_ns
    assert find_bundle(None, str(tmp_path / "deep.zip"), None) == deep and (deep / "core.yaml").stat().st_mtime_ns == before


class Server:
    """Serves bytes at /NAME and counts how often; `announced` may lie about their number, None says nothing."""

    def __init__(self, content: dict[str, bytes], announced: int | None = -1) -> None:
        self.content, self.announced, self.asked = content, announced, 0
        handler = functools.partial(_Handler, self)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{name}"


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, owner: Server, *args: object) -> None:
        self.owner = owner
        super().__init__(*args)

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.owner.asked += 1
        body = self.owner.content.get(self.path[1:])
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.owner.announced is not None:
            self.send_header("Content-Length", str(len(body) if self.owner.announced < 0 else self.owner.announced))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(content: dict[str, bytes], announced: int | None = -1) -> Server:
        servers.append(Server(content, announced))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def test_a_bundle_is_fetched_once_and_scored(serve: Callable[..., Server]) -> None:
    server = serve({"eval_bundle.zip": zipped()})
    setting = EvaluationSetting(tokenizer=tokenizer(), eval_bundle_url=server.url("eval_bundle.zip"))
    once, again = (evaluate(Planted(guess), ["core"], setting) for _ in range(2))
    assert once == again and once["core.core"] == pytest.approx(0) and server.asked == 1


@pytest.mark.parametrize(
    "content, announced, complaint",
    [
        (b"<html>not here</html>", -1, "not a whole zip file"),
        (None, -1, "HTTP 404"),
        (zipped(), 10**9, "has 1000000000 bytes, more than 5000"),
        (zipped(pad="".join(chr(33 + i * i % 90) for i in range(9000))) + b"0" * 9000, None, "has more than 5000 bytes"),
        (b"0" * 100, 400, "cannot be fetched|ended after"),
    ],
    ids=["no-zip", "missing", "announced-large", "large", "cut-off"],
)
def test_a_download_that_fails_leaves_nothing(serve: Callable[..., Server], content: bytes | None, announced: int, complaint: str) -> None:
    server = serve({} if content is None else {"b.zip": content}, announced)
    store = base_dir() / "eval_bundles"
    before = {path.name for path in store.glob("*")} | {".lock"}
    with pytest.raises(UserError, match=complaint):
        find_bundle(None, None, server.url("b.zip"), timeout=5, max_bytes=5000)
    assert {path.name for path in store.glob("*")} - before == set()
    for address in ("ftp://127.0.0.1/b.zip", "file:///etc/passwd", "b.zip"):
        with pytest.raises(UserError, match="no http or https address"):
            find_bundle(None, None, address)
