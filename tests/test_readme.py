"""README.md and docs/ tell the truth: their commands run, at a tiny scale and in their order; their tables, paths and names are those
of the code.

`python -m tests.test_readme` writes the generated tables of the pages anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from bio_inspired_nanochat.config import PRESETS
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.training.speedrun import VARIABLES
from bio_inspired_nanochat.upkeep.guard import GuardConfig
from tests import forked, standin
from tests.readme_commands import MORE_STEPS, STEPS, TINY
from tests.readme_tables import DOCS, GENERATED, RESULTS, ROOT, between, rounded, tree, with_tables
from tests.test_architecture import LAYERS
from tests.training.tiny import WORDS

PAGES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("training", "chat", "knobs", "vitals", "evaluation", "reference")))
PACKAGE = ROOT / "bio_inspired_nanochat"
LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # set by torchrun, not by people


# --- reading the page ----------------------------------------------------------------------------------------------------------------


def _page() -> str:
    """All pages, one after the other."""
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def _blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def _commands(page: str) -> list[str]:
    """The lines of all bash blocks in order, continued lines joined, without comments."""
    lines = "\n".join(_blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines if shlex.split(line, comments=True)]


def _first_column(heading: str, page: str) -> list[str]:
    """The names in backticks in the first column of the first table after a line that starts with `heading`."""
    after = page[page.index(f"\n{heading}") :].split("\n\n")
    table = next(part.strip() for part in after if part.strip().startswith("| "))
    return [row.split("`")[1] for row in table.splitlines()[2:]]


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
        place = {"cwd": folder or self.folder, "env": environment | variables, "timeout": 240}
        if words[0] == sys.executable and self.records:
            done = forked.run(words[1:], **place, python=standin.python())
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
    module = words[2]
    folder = ROOT if module == "scripts.quality_gate" else None
    session.records[line] = _script(
        session, words[2:], lambda flags: session.run([sys.executable, "-m", module, *flags], folder, **variables)
    )


def _echo(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    """`echo TEXT > FILE`, run by a shell in the session's folder."""
    assert words[2] == ">" and "/" not in words[3] and len(words) == 4, line
    session.run(["bash", "-c", line])


def _torchrun(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    start = words.index("-m")
    options = _replaced(words[1:start], {"nproc_per_node": 2}, add=False)
    try:
        launch = get_args_parser().parse_args([*options, *words[start:]])
    except SystemExit:
        pytest.fail(f"torchrun does not know a flag of README.md: {line}")
    assert launch.module and launch.standalone, line
    module, world = launch.training_script, int(launch.nproc_per_node)

    def run(words: list[str]) -> str:
        code = f"from tests.readme_commands import ranks; ranks({world}, {module!r}, {words!r})"
        return session.run([sys.executable, "-c", code], **variables)

    session.records[line] = _script(session, [module, *launch.training_script_args], run)


def _guard(session: Session, line: str, words: list[str], variables: dict[str, str]) -> None:
    """Two sides of real benchmarks would take minutes, so only the flags and the names of the scripts are checked here."""
    config = parse(GuardConfig, words[3:], prog="", description="")
    assert all(f"scripts.{command[0]}" in TINY for command in config.commands()), line


def _script(session: Session, words: list[str], run: Callable[[list[str]], str]) -> dict:
    """A script of the project, made small and run with what follows its name; the record that it prints last."""
    flags = words[1:]
    script = " ".join(word for word in words[:2] if not word.startswith("--"))
    if script not in TINY:
        pytest.fail(f"README.md runs {script}, which this test does not know how to make small")
    changes = dict(TINY[script])
    if any(flag.startswith("--resume") for flag in flags):
        changes["num_iterations"] = MORE_STEPS
    flags = _replaced(flags, changes)
    if any(flag.startswith("--base_url=") for flag in flags):
        flags = _replaced(flags, {"base_url": session.url})
    return json.loads(run(flags).splitlines()[-1])


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
    """A folder with a user's notes.txt in it and the examples of the repository, served over HTTP."""
    texts = [" ".join(WORDS[(i * j + j * j) % len(WORDS)] for j in range(10 + i % 40)) + "." for i in range(300)]
    (tmp_path / "notes.txt").write_text("\n\n".join(texts))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
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
        "torchrun --standalone --nprocs=2 -m scripts.base_train",
        "torchrun --nproc_per_node=2 -m scripts.base_train",
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


def test_a_rank_that_fails_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        Session(tmp_path, records={"another": {}}).execute("torchrun --standalone --nproc_per_node=2 -m scripts.base_train -- --dpeth=1")


def test_the_python_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    shown = between("example", _page())  # run by tests/test_examples.py
    (tmp_path / "example.py").write_text("\n".join(_blocks("python", _page().replace(shown, ""))))
    runpy.run_path(str(tmp_path / "example.py"))


def test_every_block_of_the_page_has_a_language_that_is_checked() -> None:
    fences = re.findall(r"^```(.*)$", _page(), re.MULTILINE)
    assert set(fences[::2]) <= {"bash", "python", "text"} and set(fences[1::2]) == {""}


# --- its tables and names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_those_of_the_code(name: str) -> None:
    assert _page().count(f"<!-- {name}:begin -->") == 1
    assert between(name, _page()) == GENERATED[name](), "run python -m tests.test_readme to write the tables anew"


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


def test_the_file_tree_exists_and_has_every_module_with_rooms_in_the_order_of_imports() -> None:
    paths = [path for path, _ in tree(between("tree", _page()))]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") != (ROOT / path).is_dir()] == []
    shown = [path.split("/")[1].removesuffix(".py") for path in paths if re.fullmatch(r"bio_inspired_nanochat/[^/]+/?", path)]
    rooms = {path.stem for path in PACKAGE.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"} - {"__init__"}
    assert shown == [room for room in LAYERS if room in rooms] and set(shown) == rooms
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert sorted(modules - set(paths)) == [], "modules that the tree does not explain"


def test_a_tree_line_gives_its_whole_path() -> None:
    text = "a/  x\n  b/  x\n    c.py  x\n  d.py  x\ne.md  x\n"
    assert [path for path, _ in tree(text)] == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.md"]


def _anchors(path: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def _dead_links(page: Path) -> list[str]:
    """Links of a page into the repository that lead nowhere."""
    dead = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or (anchor and anchor not in _anchors(place)):
            dead.append(f"{target}#{anchor}")
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert _dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page, 1.5 M\n[a](page.md) [b](#a-page-15-m) [c](page.md#nowhere) [d](none.md) [e](https://example.org)\n")
    assert _dead_links(page) == ["page.md#nowhere", "none.md#"]


def test_every_page_is_one_of_those_that_are_checked_and_reached_from_the_first() -> None:
    assert {path for path in DOCS.glob("*.md")} == set(PAGES[1:])
    first = PAGES[0].read_text(encoding="utf-8")
    assert [path.name for path in PAGES[1:] if f"(docs/{path.name}" not in first] == []


def test_paths_and_modules_in_the_text_exist() -> None:
    page = _page()
    paths = re.findall(r"`((?:bio_inspired_nanochat|scripts|tests|rust_src|examples|docs)/[\w./]*)`", page)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(r"`python -m ([\w.]+)", page) + re.findall(r"`(scripts\.\w+)`", page)
    assert [module for module in modules if not (ROOT / f"{module.replace('.', '/')}.py").exists()] == []


def test_the_picture_was_drawn_from_the_figures_of_the_table(tmp_path: Path) -> None:
    digest = hashlib.sha256(RESULTS.read_bytes()).hexdigest().encode()
    picture = (DOCS / "results.png").read_bytes()
    assert digest in picture, "run python docs/draw_results.py"
    assert len(picture) < 150_000
    done = forked.run(["-m", "docs.draw_results", f"--out={tmp_path / 'again.png'}"])
    assert done.returncode == 0 and json.loads(done.stdout)["bytes"] > 10_000, done.stderr
    assert digest in (tmp_path / "again.png").read_bytes()


def test_the_figures_of_the_first_page_are_those_of_the_results() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    measured = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    losses = [" | ".join(f"{loss:.4f}" for loss in row["losses"]) for row in found["quality"]["rows"]]
    costs = [f"({rounded(row[kind], '0.01')} \N{MULTIPLICATION SIGN})" for row in found["cost"]["rows"] for kind in ("time", "memory")]
    assert [text for text in losses if f"| {text} |" not in measured] == []
    assert [text for text in (*costs, found["cost"]["command"]) if text not in measured] == []
    quoted = re.findall(r"\b2\.\d{4}\b", PAGES[0].read_text(encoding="utf-8"))
    assert [loss for loss in quoted if loss not in measured] == []


def test_flags_in_the_text_exist() -> None:
    known = "\n".join(path.read_text() for room in (PACKAGE, ROOT / "scripts") for path in room.rglob("*.py"))
    flags = set(re.findall(r"`--(\w+)[=`]", _page())) - {"help"}
    assert flags and [flag for flag in flags if not re.search(rf"^    {flag}: ", known, re.MULTILINE)] == []


def test_what_is_called_missing_is_missing() -> None:
    """When one of these is built, the page must say so."""
    missing = re.search(r"^Not built yet: (.*)\.$", _page(), re.MULTILINE)
    assert missing is not None
    words = [phrase.split()[0].split("-")[0] for phrase in missing[1].split(", ")]
    assert words == ["ultrametric", "simplicial", "gauge"]
    source = "\n".join(f"{path}\n{path.read_text()}" for path in PACKAGE.rglob("*.py")).lower()
    assert [word for word in words if re.search(rf"\b{word}", source)] == []


if __name__ == "__main__":
    for place in PAGES:
        place.write_text(with_tables(place.read_text(encoding="utf-8")), encoding="utf-8")
