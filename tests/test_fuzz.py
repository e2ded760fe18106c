"""Whatever a user types or puts into a file: a result, or one line and exit code 2. Never a traceback, and never code from a file."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bio_inspired_nanochat.checkpoint import MANIFEST, find_checkpoint, load_checkpoint, load_optimizer
from bio_inspired_nanochat.common import sha256_file
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, cli, from_dict, to_dict
from bio_inspired_nanochat.data.download import read_manifest
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import Engram
from bio_inspired_nanochat.tokenizer import Tokenizer
from bio_inspired_nanochat.training import TrainConfig, train
from tests.test_architecture import ROOT
from tests.training.ranks import EXPERTS
from tests.training.tiny import corpus, small

# The doctor reads its flags with the standard library alone; tests/upkeep/test_doctor.py has its wrong ones.
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "def main(" in path.read_text() and path.stem != "doctor")
COMMANDS = {
    "tune_bio_params": ("sanity", "sensitivity", "optimize", "report", "best"),
    "eval_matrix": ("plan", "run", "resume", "speed", "report", "pack", "unpack"),
}
SCRIPTS = [f"{name} {command}".strip() for name in SCRIPTS for command in COMMANDS.get(name, ("",))]
QUICK = settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


# --- command lines -----------------------------------------------------------------------------------------------------------------


def outcome(script: str, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script's main; a script may be one with its command."""
    name, *command = script.split()
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"scripts.{name}").main([*command, *argv])
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


@cache
def flags_of(script: str) -> dict[str, cli.Flag]:
    """The flags of a script, as its own parser has them."""
    seen: list[type] = []
    whole = cli._flags_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_flags_of", lambda cls, prefix="": (seen.append(cls), whole(cls, prefix))[1])
        assert outcome(script, ["--no_such_flag_at_all=1"])[0] == 2
    return whole(seen[0])


def outside(flag: cli.Flag) -> st.SearchStrategy[str]:
    """Values that a flag cannot take; nothing for free text."""
    record, base = flag.record, flag.kind.base
    legal = {record.none} if flag.kind.optional else set()
    if record.choices is not None:
        bad = TEXTS.filter(lambda text: text not in record.choices)
    elif record.path is not None:
        bad = TEXTS.map(lambda text: f"/no/such/place/{text.replace(chr(0), '')}x")
    elif base is bool:
        bad = st.one_of(TEXTS, st.integers().map(str)).filter(lambda text: text not in ("0", "1"))
    elif base in (int, float):
        words = st.one_of(st.sampled_from(["nan", "inf", "-inf", "", "1e999", "1_0", " 1", "0x1", "one", "1;2", "9" * 400]), TEXTS)
        bad = words.filter(lambda text: not _number(text))
        low, high = record.lo, record.hi
        ends = [-(10**18) if low is None else low - 1, 10**18 if high is None else high + 1]
        beyond = [st.integers(-(10**19), int(ends[0])).map(str)] if low is not None else []
        beyond += [st.integers(int(ends[1]) + 1, 10**25).map(str)] if high is not None else []
        bad = st.one_of(bad, *beyond) if not flag.kind.many else bad.filter(lambda text: text.strip(", ") == text != "")
    else:
        return st.nothing()
    return bad.filter(lambda text: text not in legal)


def _number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return abs(float(text.replace("_", "x").strip() if text.strip() == text else "x")) < 1e300
    return False


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_bad_value_of_every_flag_is_one_line_and_exit_code_2(script):
    if script == "chat_web":
        pytest.importorskip("fastapi")
    flags = flags_of(script)
    wrong = [(name, values) for name, flag in flags.items() if not (values := outside(flag)).is_empty]
    names = st.text("abcdefghijklmnopqrstuvwxyz_-.=0 \n\t\x00é", min_size=1, max_size=12)
    unknown = names.filter(lambda name: name.partition("=")[0].replace("-", "_") not in flags and name.strip("-") not in ("h", "help"))
    words = [unknown.map(lambda name: f"--{name}=1")]
    words += [values.map(lambda text, name=name: f"--{name}={text}") for name, values in wrong]

    @QUICK
    @given(st.one_of(words), st.lists(st.one_of(words), max_size=2))
    def check(word: str, more: list[str]) -> None:
        code, out, err = outcome(script, [word, *more])
        assert code == 2 and out == "", (word, more, out)
        assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1 and len(err) < 700, err

    check()


def inside(flag: cli.Flag) -> st.SearchStrategy[str]:
    """Values that a flag can take, often at its bounds."""
    record, base = flag.record, flag.kind.base
    if record.choices is not None:
        values = st.sampled_from(record.choices)
    elif base is bool:
        values = st.sampled_from(["0", "1"])
    elif base in (int, float):
        low, high = record.lo if record.lo is not None else 0, record.hi if record.hi is not None else 1 << 40
        middle = [value for value in (0, 1, 2, 3, 8, 64, 1000, 0.5) if low <= value <= high and (base is float or value == int(value))]
        values = st.sampled_from([low, high, *middle]).map(lambda value: str(base(value)))
    else:
        values = st.sampled_from(["", "L", "SL", "x", "../x", "a/b"])
    return st.one_of(values, st.just(record.none)) if flag.kind.optional else values


PLANNED = {
    name: flag
    for name, flag in cli._flags_of(TrainConfig).items()
    if flag.record.path is None and name not in ("print_config", "dry_run", "dataset", "device")
}


@settings(QUICK, max_examples=60)
@given(
    st.dictionaries(st.sampled_from(sorted(PLANNED)), st.none(), max_size=5).flatmap(
        lambda names: st.fixed_dictionaries({name: inside(PLANNED[name]) for name in names})
    )
)
def test_any_mixture_of_valid_values_is_a_plan_or_one_line(given_flags):
    synaptic = [] if "synapses" in given_flags else ["--synapses=1"]
    argv = ["--print_config=1", "--device=cpu", *synaptic, *(f"--{name}={text}" for name, text in given_flags.items())]
    code, out, err = outcome("base_train", argv)
    if code == 0:
        assert json.loads(out.splitlines()[-1])["params"] > 0
    else:
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("ending", ["--dry_run=1", "--num_iterations=1"])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_made(ending, tmp_path):
    code, _, err = outcome(
        "base_train",
        [
            "--depth=200",
            "--n_embd=65536",
            "--device=cpu",
            ending,
            f"--data_dir={corpus()}",
            f"--log_dir={tmp_path}",
            f"--checkpoint_dir={tmp_path}",
        ],
    )
    assert code == 2 and "GiB" in err and "smaller --depth" in err and len(err.splitlines()) == 1


# --- files -------------------------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 1 << 70, 0.5, -2.5, "", "x", "../x", "0" * 64]),
    st.sampled_from([[], {}, [1], {"a": 1}]),
)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a tree of JSON."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple, leaf: Any, remove: bool) -> Any:
    """A copy of a tree with one value replaced or, where that can be, removed."""
    if not path:
        return leaf
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = leaf
    return tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint with experts and fast weights."""
    cfg = SynapticConfig(hebb="delta", rank_eligibility=4)
    record = train(small(tmp_path_factory.mktemp("trained"), **EXPERTS, syn_cfg=cfg, num_iterations=2, eval_tokens=0))
    return Path(record["checkpoint"])


def resigned(path: Path) -> None:
    """Write the manifest of a checkpoint anew, as somebody does who edits a file on purpose."""
    manifest = json.loads((path / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (path / name).stat().st_size, "sha256": sha256_file(path / name)}
    (path / MANIFEST).write_text(json.dumps(manifest))


def loads_or_says_why(use: Callable[[], Any]) -> None:
    try:
        use()
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error


@pytest.mark.parametrize("name", ["meta.json", "optim_rank0.json", "tokenizer.json", "manifest.json"])
def test_any_change_to_a_file_of_a_checkpoint_is_read_or_refused_in_one_line(trained, tmp_path, name):
    bad = tmp_path / trained.name
    shutil.copytree(trained, bad)
    tree = json.loads((trained / name).read_text())
    where = sorted(places(tree), key=lambda path: (len(path), str(path)))

    @settings(QUICK, max_examples=25)
    @given(st.sampled_from(where), LEAVES, st.booleans())
    @example((), None, False)
    @example(("model_config",) if name == "meta.json" else where[1], None, True)
    @example(("model_config", "syn_cfg") if name == "meta.json" else where[1], 3, False)
    def check(path: tuple, leaf: Any, remove: bool) -> None:
        shutil.copy(trained / MANIFEST, bad / MANIFEST)
        (bad / name).write_text(json.dumps(changed(tree, path, leaf, remove)))
        if name != MANIFEST:
            resigned(bad)
        loads_or_says_why(
            lambda: (GPT.from_checkpoint(bad), load_optimizer(bad), Tokenizer.load(load_checkpoint(bad).file("tokenizer.json")))
        )
        loads_or_says_why(lambda: train(small(tmp_path / "run", **EXPERTS, resume=str(bad), num_iterations=2, log_every=0, eval_tokens=0)))

    check()


@settings(QUICK, max_examples=200)
@given(st.sampled_from([GPTConfig, TrainConfig]), st.data())
def test_any_stored_config_is_read_or_refused_in_one_line(cls, data):
    tree = to_dict(cls(synapses=True))
    path = data.draw(st.sampled_from(sorted(places(tree), key=str)))
    loads_or_says_why(lambda: from_dict(cls, changed(tree, path, data.draw(LEAVES), data.draw(st.booleans()))))


@settings(QUICK, max_examples=100)
@given(st.data())
def test_any_download_manifest_is_read_or_refused_in_one_line(data):
    files = [{"name": "shard_00000.parquet", "size": 1, "sha256": "0" * 64}]
    tree = {"format": "bio_inspired_nanochat.manifest", "version": 1, "base_url": "https://example.org", "files": files}
    path = data.draw(st.sampled_from(sorted(places(tree), key=str)))
    file = Path(os.environ["NANOCHAT_BASE_DIR"]) / "manifest.json"
    file.write_text(json.dumps(changed(tree, path, data.draw(LEAVES), data.draw(st.booleans()))))
    loads_or_says_why(lambda: read_manifest(file))


@settings(QUICK, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["layers.0.x", "layers.9.x", "x", "layers.a.b", "layers.0.mlp.weights"]),
        st.integers(0, 3).map(lambda rows: torch.zeros(rows, 2)),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(
        st.sampled_from(["format", "layout"]),
        st.sampled_from(["", "{}", "[]", "null", "bio_inspired_nanochat.engram", '{"modes": 3}', '{"modes": [{}], "keys": []}']),
        max_size=2,
    ),
)
def test_any_file_of_fast_weights_is_read_or_refused_in_one_line(tensors, meta):
    from bio_inspired_nanochat.synaptic import engram

    file = Path(os.environ["NANOCHAT_BASE_DIR"]) / "engram.safetensors"
    for form in (meta, {**meta, "format": engram.FORMAT}):
        save_file(tensors, file, metadata=form)
        loads_or_says_why(lambda: Engram.load(file))


# --- pickles -----------------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_malicious_pickle_in_a_checkpoint_is_never_executed(trained, tmp_path):
    mark, raw = tmp_path / "executed", pickle.dumps(Trap(tmp_path / "executed"))
    pickle.loads(raw)
    mark.rmdir()  # the trap works
    archive = io.BytesIO()
    torch.save({"model": Trap(mark)}, archive)
    names = [path.name for path in trained.iterdir()]
    for name in [*names, "model.pt", "pytorch_model.bin", "optim_rank0.pt", "state.pkl"]:
        for payload in (raw, archive.getvalue()):
            root = tmp_path / "run"
            bad = root / trained.name
            shutil.copytree(trained, bad)
            (bad / name).write_bytes(payload)
            for sign in (False, True):
                if sign and name != MANIFEST:
                    resigned(bad)
                for place in (bad, root):
                    loads_or_says_why(lambda place=place: (GPT.from_checkpoint(place), load_optimizer(place), find_checkpoint(place)))
                loads_or_says_why(lambda bad=bad: Tokenizer.load(bad / "tokenizer.json"))
                loads_or_says_why(lambda bad=bad: Engram.load(bad / "model.safetensors"))
            loads_or_says_why(
                lambda bad=bad: train(small(tmp_path, **EXPERTS, resume=str(bad), num_iterations=2, log_every=0, eval_tokens=0))
            )
            shutil.rmtree(root)
            assert not mark.exists(), name
