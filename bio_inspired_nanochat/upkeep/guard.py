"""The guard of the benchmarks: the working tree against a git revision, in turns, by the ratios that benchmarks report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import progress, say, table
from bio_inspired_nanochat.config import knob, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.git import git
from bio_inspired_nanochat.upkeep import changes

# Fields of the benchmarks' records that compare one thing with another in one run, so that the machine's mood cancels; +1: less is better.
FIGURES = {
    "step_ratio": 1,
    "memory_ratio": 1,
    "fwd_bwd_ratio": 1,
    "decode_speedup": -1,
    "step_speedup": -1,
    "efficiency": -1,
}
RESAMPLES = 4000
RUST_SOURCES = ("rust_src", "Cargo.toml")


@dataclass(frozen=True)
class GuardConfig:
    """What is compared with what."""

    against: str = knob("main", "git revision to compare the working tree with")
    run: str = knob(
        "bench_train --seconds=5; bench_decode --seconds=5; bench_kernels --seconds=5",
        "scripts with their flags, separated by semicolons; both sides get the same ones",
    )
    rounds: int = knob(5, "runs of each side", lo=3, hi=200)
    tolerance: float = knob(5.0, "worsening of a median that is let pass", lo=0.0, hi=1000.0, unit="percent")
    certainty: float = knob(0.9, "share of bootstrap resamples whose median must be beyond the tolerance", lo=0.5, hi=1.0)
    minutes: float = knob(20.0, "longest time for one run of a benchmark", lo=0.05, hi=600.0, unit="minutes")
    seed: int = knob(0, "seed of the resampling", lo=0, hi=(1 << 31) - 1)

    def __post_init__(self) -> None:
        validate(self)
        self.commands()

    def commands(self) -> list[list[str]]:
        """The benchmarks as words, `scripts.` left out. Raises UserError for what is no command."""
        try:
            split = [shlex.split(part) for part in self.run.split(";")]
        except ValueError as error:
            raise UserError(f"run={self.run!r} cannot be split into words ({error}): close the quotation") from None
        found = [[words[0].removeprefix("scripts."), *words[1:]] for words in split if words]
        if not found:
            raise UserError("run is empty: name at least one script, --run='bench_decode --context=64'")
        for words in found:
            if not words[0].isidentifier():
                raise UserError(
                    f"run={self.run!r}: {words[0]!r} is no name of a script: write --run='bench_decode --context=64; bench_train'"
                )
        return found


@dataclass(frozen=True)
class Verdict:
    """One figure. worsening: median over rounds of new over old, turned so that more than 1 is worse; certainty: see `judge`."""

    figure: str
    old: float
    new: float
    worsening: float
    certainty: float
    outcome: str


def guard(config: GuardConfig, folder: Path | None = None) -> dict[str, Any]:
    """Run the benchmarks of both sides in turns, print the table; the record has `ok`.

    The revision is checked out into a temporary folder, which is removed however this ends. folder: somewhere inside the
    repository. Raises UserError outside of one, for an unknown revision, or a benchmark that the working tree lacks.
    """
    root = changes.repository((folder or Path.cwd()).resolve())
    for words in config.commands():
        if not (root / "scripts" / f"{words[0]}.py").is_file():
            raise UserError(f"run={config.run!r}: there is no scripts/{words[0]}.py in {root}")
    verdicts: list[Verdict] = []
    skipped: dict[str, str] = {}
    broken: dict[str, str] = {}
    with checkout(root, config.against) as (old, commit):
        _share_extension(root, old, commit, 60 * config.minutes)
        for words in config.commands():
            name = shlex.join(words)
            if not (old / "scripts" / f"{words[0]}.py").is_file():
                skipped[name] = f"{config.against} has no scripts/{words[0]}.py"
                continue
            _compare(config, words, old, root, verdicts, skipped, broken)
    for name, why in {**skipped, **broken}.items():
        say(f"{'failed' if name in broken else 'skipped'}: {name}: {why}")
    columns = ("figure", config.against, "now", "change %", "certainty", "verdict")
    table(columns, [(v.figure, v.old, v.new, 100 * (v.worsening - 1), v.certainty, v.outcome) for v in verdicts])
    worse = [verdict.figure for verdict in verdicts if verdict.outcome == "worse"]
    if not verdicts:
        say("guard: nothing could be compared, so nothing is shown to be as good as before")
    if any(verdict.outcome == "unsure" for verdict in verdicts):
        say(f"notice: unsure is beyond the tolerance, but in less than {config.certainty:.0%} of the resamples: give more --rounds")
    return {
        "ok": bool(verdicts) and not worse and not broken,
        "against": commit,
        "rounds": config.rounds,
        "tolerance": config.tolerance,
        "worse": worse,
        "skipped": skipped,
        "broken": broken,
        "figures": {verdict.figure: {key: value for key, value in vars(verdict).items() if key != "figure"} for verdict in verdicts},
    }


@contextlib.contextmanager
def checkout(root: Path, revision: str) -> Iterator[tuple[Path, str]]:
    """A revision as a working tree in a temporary folder, and its commit. Removed at the end, also after Ctrl-C or SIGTERM.

    Raises UserError for an unknown revision.
    """
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except UserError:
        raise UserError(f"against={revision!r} is no revision of {root}: name a commit, tag or branch") from None
    temporary = Path(tempfile.mkdtemp(prefix="bench-guard-"))
    place = temporary / "old"
    with _ended_by_signals():
        try:
            git(root, "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", "--quiet", str(place), commit)
            yield place, commit
        finally:
            with contextlib.suppress(UserError):
                git(root, "worktree", "remove", "--force", str(place))
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(UserError):
                git(root, "worktree", "prune")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that `finally` is reached. Signals can be caught in the main thread only."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _share_extension(root: Path, old: Path, commit: str, seconds: float) -> None:
    """Give the other side a Rust extension when this one has one: the same file when the sources are the same, else one of its own.

    Raises UserError when it cannot be built, because a side without it would lose to one with it.
    """
    built = sorted((root / changes.PACKAGE).glob("_rust*.so"))
    if not built:
        return
    source = built[0]
    if git(root, "diff", "--name-only", commit, "--", *RUST_SOURCES).strip():
        say("the Rust sources differ: building the extension of the revision (a minute or two)")
        source = _build(old, seconds)
    shutil.copy2(source, old / changes.PACKAGE / built[0].name)


def _build(tree: Path, seconds: float) -> Path:
    """The Rust extension of a tree, built inside it."""
    command = ["cargo", "build", "--quiet", "--release", "--features", "python", "--target-dir", str(tree / "target")]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, "PYO3_PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        said = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    except FileNotFoundError:
        said = "cargo is not on PATH"
    except subprocess.TimeoutExpired:
        said = f"not done within --minutes={seconds / 60:g}"
    found = [path for pattern in ("lib*_rust.so", "lib*_rust.dylib") for path in (tree / "target/release").glob(pattern)]
    if said or not found:
        raise UserError(
            f"the Rust extension of the other revision cannot be built ({said or 'no library came out'}): install a Rust toolchain, or remove "
            f"{changes.PACKAGE}/_rust*.so here, so that both sides run without it"
        )
    return found[0]


def _compare(
    config: GuardConfig,
    words: Sequence[str],
    old: Path,
    new: Path,
    verdicts: list[Verdict],
    skipped: dict[str, str],
    broken: dict[str, str],
) -> None:
    """Run one benchmark in turns (the first of a round alternates) and judge the figures that both sides report in all rounds."""
    name, found = shlex.join(words), {old: [], new: []}
    with progress(2 * config.rounds, words[0], "runs") as bar:
        for turn in range(config.rounds):
            for side in (old, new) if turn % 2 == 0 else (new, old):
                record = _run(words, side, 60 * config.minutes)
                if isinstance(record, str):
                    (skipped if side == old else broken)[name] = f"{config.against if side == old else 'the working tree'}: {record}"
                    return
                found[side].append(figures(record))
                bar.advance()
    shared = [figure for figure in found[old][0] if all(figure in one for side in found.values() for one in side)]
    if not shared:
        skipped[name] = f"both sides report none of {', '.join(FIGURES)}"
    for figure in shared:
        before, after = ([one[figure] for one in found[side]] for side in (old, new))
        verdicts.append(judge(f"{words[0]} {figure}", before, after, FIGURES[figure.partition(".")[0]], config))


def _run(words: Sequence[str], side: Path, seconds: float) -> dict[str, Any] | str:
    """The record of one run in a process of its own with the modules of that side, or why there is none."""
    variables = {**os.environ, "PYTHONPATH": str(side)}
    command = [sys.executable, "-m", f"scripts.{words[0]}", *words[1:]]
    try:
        done = subprocess.run(
            command, cwd=side, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done within --minutes={seconds / 60:g}"
    if done.returncode:
        return f"exit code {done.returncode}: {' '.join((done.stderr.strip().splitlines() or ['no message'])[-1].split())[:200]}"
    try:
        record = json.loads((done.stdout.splitlines() or [""])[-1])
    except ValueError:
        record = None
    return record if isinstance(record, dict) else "its last line is not a JSON record"


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record that are positive numbers; of nested ones the names are joined by dots."""
    found: dict[str, float] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{name}.{key}", inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            found[name] = float(value)

    for name in FIGURES:
        collect(name, record.get(name))
    return found


def judge(figure: str, before: Sequence[float], after: Sequence[float], direction: int, config: GuardConfig) -> Verdict:
    """The verdict on one figure from its values per round; direction: +1 where less is better, -1 where more is.

    A round gives one worsening, (after / before)^direction. certainty: the share of bootstrap resamples of the rounds whose median
    is beyond the tolerance. "worse": the median is, with at least `config.certainty`; "unsure": it is, with less; else "ok".
    """
    worsenings = [(b / a) ** direction for a, b in zip(before, after, strict=True)]
    limit = 1 + config.tolerance / 100
    draw = random.Random(f"{config.seed} {figure}")
    medians = [statistics.median(draw.choices(worsenings, k=len(worsenings))) for _ in range(RESAMPLES)]
    certainty, median = sum(value > limit for value in medians) / RESAMPLES, statistics.median(worsenings)
    outcome = "ok" if median <= limit else "worse" if certainty >= config.certainty else "unsure"
    return Verdict(figure, statistics.median(before), statistics.median(after), median, certainty, outcome)
