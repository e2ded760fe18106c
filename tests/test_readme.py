"""README.md tells the truth: its commands run, at a tiny scale and in its order; its tables, paths and names are those of the code.

`python -m tests.test_readme` writes the generated tables of the page anew.
"""

from __future__ import annotations

import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bio_inspired_nanochat.config import PRESETS, SynapticConfig
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.evaluation.suite import EVALUATIONS
from bio_inspired_nanochat.registry import MECHANISMS, knob_table, markdown_table
from bio_inspired_nanochat.synaptic.genome import protein_table
from bio_inspired_nanochat.training.metrics import METRIC_COLUMNS, metric_rows
from bio_inspired_nanochat.training.speedrun import VARIABLES
from bio_inspired_nanochat.upkeep.guard import GuardConfig
from tests import forked
from tests.test_architecture import LAYERS
from tests.training.tiny import WORDS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PACKAGE = ROOT / "bio_inspired_nanochat"
STEPS, MORE_STEPS = 3, 5
TRAINING = {
    "depth": 2,
    "n_embd": 32,
    "head_dim": 16,
    "max_seq_len": 64,
    "vocab_size": 280,
    "num_iterations": STEPS,
    "device_batch_size": 2,
    "total_batch_size": 256,
    "eval_every": 0,
    "eval_tokens": 128,
    "sample_every": 0,
    "device": "cpu",
}
# What makes each script small. A flag that the page itself gives is replaced, so that its name is still checked.
TINY: dict[str, dict[str, object]] = {
    "scripts.base_train": TRAINING,
    "scripts.base_eval": {"eval_tokens": 128, "samples": 1, "max_tokens": 4, "device": "cpu"},
    "scripts.eval_suite": {"tokens": 64, "rows": 1, "samples": 2, "sample_tokens": 8, "draws": 2, "device": "cpu"},
    "scripts.bench_kernels": {"head_dim": 16, "context": 32, "seconds": 0, "device": "cpu"},
    "scripts.bench_train": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "seconds": 0,
    },
    "scripts.bench_scaling": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "steps": 1,
        "seconds": 0,
    },
    "scripts.bench_api": {"tokens": 2, "clients": 2, "seconds": 0, "device": "cpu"},
    "scripts.bench_vitals": {
        **{name: TRAINING[name] for name in ("depth", "n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "seconds": 0,
    },
    "scripts.bench_memory": {"modes": 4, "context": 16, "rows": 1, "seconds": 0, "device": "cpu"},
    "scripts.bench_decode": {"depth": 1, "n_embd": 32, "head_dim": 16, "context": "8,16", "seconds": 0, "device": "cpu"},
    "scripts.bench_cpu": {
        "depth": 1,
        "n_embd": 32,
        "head_dim": 16,
        "vocab_size": 300,
        "context": "8,16",
        "threads": "1",
        "compiled": 0,
        "seconds": 0,
    },
    "scripts.chat_sft": {"num_iterations": STEPS, "device_batch_size": 1, "eval_tokens": 32, "device": "cpu"},
    "scripts.chat_eval": {"questions": 1, "prompts": 1, "max_tokens": 2, "tasks": "copying,larger", "device": "cpu"},
    "scripts.chat_cli": {"max_tokens": 4, "device": "cpu"},
    "scripts.chat_web": {"port": 0, "seconds": 0.5, "device": "cpu"},
    "scripts.enable_synapses": {},
    "scripts.param_census": {"steps": 2, "knobs": "barrier_strength", "device": "cpu"},
    "scripts.dashboard": {"port": 0, "seconds": 0.5},
    "scripts.lineage": {},
    "scripts.viz_export": {},
    "scripts.neurophylo": {},
    "scripts.neuroviz": {"device": "cpu"},
    "scripts.prepare_data": {},
    "scripts.tok_train": {"vocab_size": 280},
    "scripts.tok_eval": {"vocab_size": "270,280", "max_chars": 5000},
    "scripts.download_data": {"pause": 0, "attempts": 2},
    "scripts.doctor": {"depth": 1, "context": 64},
    "scripts.quality_gate": {"mode": "all", "skip": "types,imports,clippy,rustfmt,tests"},
}
TUNING: dict[str, object] = {
    "steps": 2,
    "rows": 2,
    "eval_rows": 4,
    "n_layer": 1,
    "n_embd": 16,
    "head_dim": 8,
    "tasks": "recall",
    "recall.distance": 8,
    "seeds": 1,
    "device": "cpu",
}
# Scripts with sub-commands, by both names.
TINY |= {
    "scripts.bench_stack": {
        "models": "2",
        "rows": 1,
        "context": 8,
        "n_layer": 1,
        "n_embd": 16,
        "head_dim": 8,
        "seconds": 0,
        "device": "cpu",
    },
    "scripts.tune_bio_params sanity": TUNING | {"gate_seeds": 2, "popsize": 2},
    "scripts.tune_bio_params sensitivity": TUNING | {"trajectories": 1, "points": 1},
    "scripts.tune_bio_params optimize": TUNING | {"generations": 2, "popsize": 3},
    "scripts.tune_bio_params report": {},
    "scripts.tune_bio_params best": {"confirm_seeds": 2, "device": "cpu"},
}
TINY |= {
    "scripts.eval_matrix plan": {
        **{name: TRAINING[name] for name in ("n_embd", "head_dim", "max_seq_len", "vocab_size", "device_batch_size", "device")},
        "sets": "anchors",
        "conditions": "vanilla,default",
        "depths": 2,
        "seeds": 0,
        "tokens": 256,
        "total_batch_size": 128,
        "eval_tokens": 128,
        "tok_per_s": 1000,
        "evaluations": "",
        "smoke": 1,
    },
    "scripts.eval_matrix run": {},
    "scripts.eval_matrix resume": {},
    "scripts.eval_matrix report": {},
}
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # set by torchrun, not by people


def _mechanisms() -> str:
    rows = [(f"`{name}`", item.doc, _flags(item.on), _flags(item.off), item.source) for name, item in MECHANISMS.items()]
    return markdown_table(rows, ["mechanism", "what it is", "on", "off", "where it comes from"])


def _flags(values: Mapping[str, object]) -> str:
    return " ".join(f"`{name}={value if isinstance(value, str) else format(value, 'g')}`" for name, value in values.items())


def _evaluations() -> str:
    rows = []
    for name, item in EVALUATIONS.items():
        metrics = dict.fromkeys(re.sub(r"_\d{3,}$", "_N", metric.name) for metric in item.metrics)
        rows.append((f"`{name}`", " ".join(f"`{metric}`" for metric in metrics), item.needs))
    return markdown_table(rows, ["evaluation", "metrics", "needs"])


GENERATED: dict[str, Callable[[], str]] = {
    "mechanisms": _mechanisms,
    "knobs": lambda: markdown_table(knob_table(SynapticConfig)),
    "proteins": lambda: markdown_table(protein_table()),
    "evaluations": _evaluations,
    "metrics": lambda: markdown_table(metric_rows(), METRIC_COLUMNS),
}


# --- reading the page ----------------------------------------------------------------------------------------------------------------


def _page() -> str:
    return README.read_text(encoding="utf-8")


def _blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def _commands(page: str) -> list[str]:
    """The lines of all bash blocks in order, continued lines joined."""
    lines = "\n".join(_blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def _between(name: str, page: str) -> str:
    return page.split(f"<!-- {name}:begin -->\n")[1].split(f"<!-- {name}:end -->")[0]


def _with_tables(page: str) -> str:
    """The page with its generated tables written anew."""
    for name, make in GENERATED.items():
        page = page.replace(f"<!-- {name}:begin -->\n{_between(name, page)}", f"<!-- {name}:begin -->\n{make()}")
    return page


def _first_column(heading: str, page: str) -> list[str]:
    """The names in backticks in the first column of the first table after a line that starts with `heading`."""
    after = page[page.index(f"\n{heading}") :].split("\n\n")
    table = next(part.strip() for part in after if part.strip().startswith("| "))
    return [row.split("`")[1] for row in table.splitlines()[2:]]


def _tree(text: str) -> Iterator[str]:
    """Paths of an indented file tree."""
    folders: list[str] = []
    for line in text.splitlines():
        if not line or line.startswith("```"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, *about = line.split(maxsplit=1)
        assert about or name == "bio_inspired_nanochat/", f"{name} is not explained"
        del folders[depth:]
        yield "".join(folders) + name
        folders.append(name)


# --- running its commands --------------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """A working directory in which the commands of one page run one after the other. `records`: by command, what each printed last."""

    folder: Path
    url: str = ""
    records: dict[str, dict] = field(default_factory=dict)

    def run(self, words: list[str], folder: Path | None = None, **variables: str) -> str:
        """Run a command, by default in the session's folder; its standard output. Python is a fork of a process that has imported torch,
        except for the first command."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NANOCHAT_BASE_DIR": str(self.folder / "base"), "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # many processes import the same modules
        place = {"cwd": folder or self.folder, "env": environment | variables, "timeout": 240}
        if words[0] == sys.executable and self.records:
            done = forked.run(words[1:], **place)
        else:
            done = subprocess.run(words, **place, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\nexit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def execute(self, line: str) -> None:
        """Run one command of the page at a tiny scale. Fails for a command that it does not know."""
        words = shlex.split(line, comments=True)
        variables = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        for known, handle in HANDLERS.items():
            if words[: len(known)] == list(known):
                handle(self, line, words, variables)
                return
        pytest.fail(f"README.md has a command that this test cannot check: {line}")


def _python_module(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    session.records[line] = _script(session, [sys.executable, "-m"], words[2:], variables)


def _echo(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    """`echo TEXT > FILE`, run by a shell in the session's folder."""
    assert words[2] == ">" and "/" not in words[3] and len(words) == 4, line
    session.run(["bash", "-c", line])


def _torchrun(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    start = words.index("-m")
    options = _replaced(words[1:start], {"nproc_per_node": 2}, add=False)
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, "-m"]
    session.records[line] = _script(session, launcher, words[start + 1 :], variables)


def _guard(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    """Two sides of real benchmarks would take minutes, so only the flags and the names of the scripts are checked here."""
    config = parse(GuardConfig, words[3:], prog="", description="")
    assert all(f"scripts.{command[0]}" in TINY for command in config.commands()), line


def _script(session: Session, launcher: list[str], words: list[str], variables: dict[str, str]) -> dict:
    """Run a script of the project, made small; the record that it prints last."""
    module, *flags = words
    script = " ".join(word for word in words[:2] if not word.startswith("--"))
    if script not in TINY:
        pytest.fail(f"README.md runs {script}, which this test does not know how to make small")
    changes = dict(TINY[script])
    if any(flag.startswith("--resume") for flag in flags):
        changes["num_iterations"] = MORE_STEPS
    flags = _replaced(flags, changes)
    if any(flag.startswith("--base_url=") for flag in flags):
        flags = _replaced(flags, {"base_url": session.url})
    folder = ROOT if module == "scripts.quality_gate" else None
    return json.loads(session.run([*launcher, module, *flags], folder, **variables).splitlines()[-1])


def _replaced(flags: list[str], changes: dict[str, object], add: bool = True) -> list[str]:
    """Flags `--name=value` with other values for some names, which are added where they are missing if `add`."""
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}
    kept = [flag for flag in flags if flag[2:].partition("=")[0].replace("-", "_") not in changes]
    return kept + [f"--{name}={value}" for name, value in changes.items() if add or name in given]


def _shell_script(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    """The set-up is not run from inside the suite: the file must be sound, take --help, and know the variables."""
    session.run(["bash", "-n", str(ROOT / words[1])])
    assert len(words) == 2, f"{line}: arguments are not checked"
    if words[1] == "speedrun.sh":
        said = session.run(["bash", str(ROOT / words[1]), "--help"], **variables)
        assert all(name in said and name in VARIABLES.values() for name in variables), line
    else:
        assert not variables, line


def _activate(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    assert words == ["source", ".venv/bin/activate"] and "venv=$repo/.venv\n" in (ROOT / "scripts/env.sh").read_text()


def _tensorboard(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    assert words[:2] == ["tensorboard", "--logdir"] and list((session.folder / words[2]).glob("*/events.out.tfevents.*")), line
    session.run([sys.executable, "-m", "tensorboard.main", "--version"])


Handler = Callable[[Session, str, list[str], dict[str, str]], None]
HANDLERS: dict[tuple[str, ...], Handler] = {
    ("python", "-m", "scripts.bench_guard"): _guard,
    ("python", "-m"): _python_module,
    ("torchrun",): _torchrun,
    ("bash", "speedrun.sh"): _shell_script,
    ("bash", "tests/run.sh"): _shell_script,
    ("source",): _activate,
    ("echo",): _echo,
    ("tensorboard",): _tensorboard,
}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """A folder with a user's notes.txt in it, served over HTTP."""
    texts = [" ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(10 + i % 40)) + "." for i in range(300)]
    (tmp_path / "notes.txt").write_text("\n\n".join(texts))
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Session(tmp_path, f"http://127.0.0.1:{server.server_address[1]}/data/notes")
        server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs_in_the_order_of_the_page(session: Session) -> None:
    commands = _commands(_page())
    for line in commands:
        session.execute(line)
    records = session.records
    trained = {line: record for line, record in records.items() if "final_loss" in record}
    resumed = {line: record for line, record in trained.items() if "--resume" in line}
    for line, record in trained.items():
        assert (record["steps"], record["resumed_from"]) == ((MORE_STEPS, STEPS) if line in resumed else (STEPS, None)), line
    own = [line for line in resumed if "--resume=auto" in line]
    assert own and all(re.sub(r" --resume=\S+", "", line) in trained for line in own), "a run is resumed by its own command"
    (injected,) = (record for record in records.values() if "added_params" in record)
    assert injected["added_params"] > 0 and injected["resumable"]
    assert Path(injected["out"]).parent in {Path(record["checkpoint"]).parent for record in resumed.values()}, "synapses are trained on"
    assert (session.folder / "census.md").read_text().startswith("| name | default |")
    assert any("val_bpb_zero_gains" in record for record in records.values())
    copied = sorted(path.name for path in (session.folder / "data/copy").glob("*.parquet"))
    assert copied == sorted(path.name for path in (session.folder / "data/notes").glob("*.parquet")) != []


@pytest.mark.parametrize(
    "line",
    [
        "pip install torch",
        "python -m scripts.unheard_of --a=1",
        "python train.py",
        "bash setup.sh",
        "cd data && ls",
        "source other/activate",
    ],
)
def test_a_command_that_would_not_be_run_is_found(line: str, tmp_path: Path) -> None:
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        Session(tmp_path).execute(line)


@pytest.mark.parametrize("before", [{}, {"another": {}}], ids=["an interpreter", "a fork"])
def test_a_command_that_fails_is_found(before: dict[str, dict], tmp_path: Path) -> None:
    for words in (["prepare_data", "--inptu=x"], ["prepare_data", "--input=nowhere.txt", "--out=y"])[: 1 + len(before)]:
        with pytest.raises(AssertionError, match="exit code 2"):
            Session(tmp_path, records=before).execute(f"python -m scripts.{shlex.join(words)}")


def test_the_python_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    (tmp_path / "example.py").write_text("\n".join(_blocks("python", _page())))
    runpy.run_path(str(tmp_path / "example.py"))


def test_every_block_of_the_page_has_a_language_that_is_checked() -> None:
    fences = re.findall(r"^```(.*)$", _page(), re.MULTILINE)
    assert set(fences[::2]) <= {"bash", "python", "text"} and set(fences[1::2]) == {""}


# --- its tables and names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_those_of_the_code(name: str) -> None:
    assert _between(name, _page()) == GENERATED[name](), "run python -m tests.test_readme to write the tables anew"


def test_the_list_of_presets_is_complete() -> None:
    assert _first_column("| preset", _page()) == list(PRESETS)


def test_the_list_of_scripts_is_complete() -> None:
    scripts = [f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[a-z]*.py")]
    assert sorted(_first_column("## Scripts", _page())) == sorted(scripts)


def test_the_environment_variables_are_those_that_the_code_reads() -> None:
    python = "\n".join(path.read_text() for room in (PACKAGE, ROOT / "scripts") for path in room.rglob("*.py"))
    shell = "\n".join((ROOT / name).read_text() for name in ("speedrun.sh", "scripts/env.sh"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", python)) | set(re.findall(r"\$\{([A-Z]\w+):", shell)) - {"BASH_SOURCE"}
    assert set(_first_column("## Environment", _page())) == (read | set(VARIABLES.values())) - LAUNCHER


def test_the_file_tree_exists_and_has_every_room_in_the_order_of_imports() -> None:
    paths = list(_tree(_between("tree", _page())))
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") != (ROOT / path).is_dir()] == []
    shown = [path.split("/")[1].removesuffix(".py") for path in paths if re.fullmatch(r"bio_inspired_nanochat/[^/]+/?", path)]
    rooms = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"} - {"__init__"}
    assert shown == [room for room in LAYERS if room in rooms] and set(shown) == rooms


def test_a_tree_line_gives_its_whole_path() -> None:
    assert list(_tree("a/  x\n  b/  x\n    c.py  x\n  d.py  x\ne.md  x\n")) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.md"]


def test_links_and_paths_in_the_text_exist() -> None:
    page = _page()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page)
    paths = re.findall(r"`((?:bio_inspired_nanochat|scripts|tests|rust_src)/[\w./]*)`", page)
    assert links and paths and [path for path in [*links, *paths] if not (ROOT / path).exists()] == []
    modules = re.findall(r"`python -m ([\w.]+)", page) + re.findall(r"`(scripts\.\w+)`", page)
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").exists()] == []


def test_flags_in_the_text_exist() -> None:
    known = "\n".join(path.read_text() for room in (PACKAGE, ROOT / "scripts") for path in room.rglob("*.py"))
    flags = set(re.findall(r"`--(\w+)[=`]", _page()))
    assert flags and [flag for flag in flags if not re.search(rf"^    {flag}: ", known, re.MULTILINE)] == []


def test_what_is_called_missing_is_missing() -> None:
    """When one of these is built, the page must say so."""
    page = _page()
    missing = page[page.index("Not built yet:") : page.index("## Where")]
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = set(re.findall(r"`([A-Z]\w+)`", missing))
    assert [name for name in names if re.search(rf"^class {name}\b", source, re.MULTILINE)] == []
    places = re.findall(r"not built yet; its place is `([\w/.]+)`", page)
    assert [place for place in places if (PACKAGE / place).exists()] == []


if __name__ == "__main__":
    README.write_text(_with_tables(_page()), encoding="utf-8")
