"""The report of a matrix: Markdown tables, plots, CSV and JSON small enough to commit, negative results included."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import say, table, write_atomic
from bio_inspired_nanochat.config import knob
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.registry import markdown_table
from bio_inspired_nanochat.study.plan import FolderConfig, fewest_tokens, read_plan
from bio_inspired_nanochat.study.plots import draw_curves, draw_differences
from bio_inspired_nanochat.study.predictions import PREDICTIONS
from bio_inspired_nanochat.study.records import ByDepth, Records, collect, viewed
from bio_inspired_nanochat.study.scorecard import VERDICTS, Score, score
from bio_inspired_nanochat.study.sources import STUDIED, kernel_facts, memory_values
from bio_inspired_nanochat.study.statistics import Paired, Rule, judge, paired
from bio_inspired_nanochat.study.views import VIEWS

HEADLINE = "val_loss"
CAUTION = (
    "What these figures do not say: with three seeds the interval runs from the smallest difference to the largest, which holds the true mean "
    "in three cases of four, not in 95 of 100. A run that is read before its end is read at a learning rate that has yet to fall, so equal "
    "FLOPs and equal time favour the run that has ended, the cheaper one; a model trained to a budget (vanilla_flops) is the fair rival. "
    "Seeds that are added after a look at the report make chance findings likelier than alpha.\n\n"
)
ONE_BY_ONE = (
    "Predictions are judged one by one, with no correction for their number: numbers as thresholds are held against means, whatever their "
    "spread, and the rule is applied to one comparison alone.\n\n"
)
MARK = "**Smoke test of the machinery: not a result.**\n\n"


@dataclass(frozen=True)
class ReportConfig(FolderConfig):
    """Tables, plots and scorecard of what was run; what may not enter a table is listed apart."""

    bench: str | None = knob(None, "record of `bench_kernels --json=FILE`, for the prediction about its kernels", path="file", none="none")
    memory: str | None = knob(None, "records of `memory_study --out=FILE`, for the predictions about its models", path="file", none="none")


@dataclass(frozen=True)
class Line:
    """One comparison of one quantity at one depth. metric: its name, or `view.tokens`, `view.flops`, `view.seconds`."""

    set: str
    depth: int
    condition: str
    reference: str
    what: str
    metric: str
    result: Paired


def report(config: ReportConfig) -> dict[str, Any]:
    """Write report.md, comparisons.csv, runs.csv, scorecard.json and plots into `report/` of the folder; returns the script's last line.

    Raises UserError without a plan, and for records of another rule, plan or text.
    """
    folder = config.folder()
    plan = read_plan(folder)
    rule, records, facts = Rule(**plan["rule"]), collect(folder, plan), kernel_facts(config.bench)
    studied = memory_values(config.memory)
    values = records.values()
    lines = compare(plan, records, values, rule)
    own = [one for one in PREDICTIONS if not str(one.condition).startswith(STUDIED)]
    scores = score(values, plan["aliases"], rule, facts, own, diverged=records.diverged(plan))
    scores += score(studied, {}, rule, predictions=[one for one in PREDICTIONS if one not in own])
    out = folder / "report"
    try:
        _write(out, plan, records, lines, scores)
    except OSError as error:
        raise UserError(f"out={str(folder)!r} cannot be written ({error.strerror}): make it writable") from None
    headline = [line for line in lines if line.metric == HEADLINE]
    shown = [(line.set, line.depth, line.what, _number(line.result.mean), line.result.verdict) for line in headline]
    if shown:
        table(("set", "depth", "what differs", "nats", "by the rule"), shown)
    counts = {verdict: sum(one.verdict == verdict for one in scores) for verdict in VERDICTS}
    say(f"{len(records.counted)} runs count, {len(records.apart)} are listed apart, {len(records.missing)} are missing")
    return {
        "report": str(out / "report.md"),
        "smoke": plan["smoke"],
        "runs": len(plan["runs"]),
        "counted": len(records.counted),
        "apart": len(records.apart),
        "missing": len(records.missing),
        "failed": sorted(records.failed),
        "comparisons": len(headline),
        "decided": sum(line.result.verdict in ("lower", "higher") for line in headline),
        "scorecard": counts,
    }


def compare(plan: Mapping[str, Any], records: Records, values: ByDepth, rule: Rule) -> list[Line]:
    """Every comparison of the plan in every metric and view; a family for Holm's correction is a metric or view, a depth and a set."""
    curves, found = records.curves(), []
    sets = list(dict.fromkeys(one["set"] for one in plan["comparisons"]))
    for depth, by_metric in sorted(values.items()):
        quantities = [HEADLINE, *(f"view.{view}" for view in VIEWS), *sorted(set(by_metric) - {HEADLINE})]
        for quantity in quantities:
            for name in sets:
                family = []
                for one in (one for one in plan["comparisons"] if one["set"] == name):
                    if quantity.startswith("view."):
                        ours, theirs = viewed(curves, depth, one["condition"], one["reference"], quantity.removeprefix("view."))
                    else:
                        ours, theirs = (
                            {seed: value for seed, (value, _) in by_metric[quantity].get(one[side], {}).items()}
                            for side in ("condition", "reference")
                        )
                    if ours and theirs:
                        family.append((one, paired(ours, theirs, rule)))
                judged = judge([result for _, result in family], rule)
                found += [Line(depth=depth, metric=quantity, result=result, **one) for (one, _), result in zip(family, judged, strict=True)]
    return found


# --- writing --------------------------------------------------------------------------------------------------------------------------


def _write(out: Path, plan: Mapping[str, Any], records: Records, lines: Sequence[Line], scores: Sequence[Score]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    mark = "SMOKE TEST, " if plan["smoke"] else ""
    depths, sets = sorted({line.depth for line in lines}), list(dict.fromkeys(line.set for line in lines))
    pictures = []
    for depth in depths:
        for name in sets:
            rows = [(line.what, line.result) for line in lines if (line.depth, line.set, line.metric) == (depth, name, HEADLINE)]
            if rows:
                pictures.append(out / f"differences-d{depth}-{name}.png")
                draw_differences(rows, f"{mark}{name}, depth {depth}", pictures[-1])
        pictures.append(out / f"curves-d{depth}.png")
        draw_curves(records.curves(), depth, list(plan["conditions"]), f"{mark}depth {depth}", pictures[-1])
    pictures = [path for path in pictures if path.exists()]
    write_atomic(out / "comparisons.csv", _comparisons_csv(lines))
    write_atomic(out / "runs.csv", _runs_csv(records))
    write_atomic(out / "scorecard.json", json.dumps(_scorecard_json(plan, records, scores), indent=1) + "\n")
    write_atomic(out / "report.md", _markdown(plan, records, lines, scores, pictures))


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:+z.{digits}f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _markdown(plan: Mapping[str, Any], records: Records, lines: Sequence[Line], scores: Sequence[Score], pictures: Sequence[Path]) -> str:
    parts = ["# Evaluation matrix\n\n", MARK if plan["smoke"] else ""]
    rule = plan["rule"]
    parts.append(
        f"{len(records.counted)} runs count, {len(records.apart)} are listed apart, {len(records.missing)} are missing. Differences are condition "
        f"minus reference in nats of validation loss, paired by seed; negative is better. The rule, fixed before the runs (digest {plan['digest']}): "
        f"{rule['statement']}; here alpha = {rule['alpha']}, margin = {rule['margin']}, min_seeds = {rule['min_seeds']}. Equal FLOPs and equal time "
        "compare losses where the shorter of both runs ends, the other's read from its curve, linear in the logarithm between evaluations. "
        f"Detectable: the smallest difference found with power {rule['power']} at the seen spread, before Holm's correction.\n\n{CAUTION}"
    )
    notices = [*records.notices, *_twofold(plan, lines)]
    parts += [f"- notice: {line}\n" for line in notices] + (["\n"] if notices else [])
    parts += [_set_table(plan, lines, name, depth) for name, depth in dict.fromkeys((line.set, line.depth) for line in lines)]
    parts.append(f"## Scorecard\n\n{ONE_BY_ONE}" + _score_table(scores))
    parts += [f"![{path.stem}]({path.name})\n" for path in pictures]
    parts.append("\n## Listed apart\n\n")
    apart = [(record["id"], reason, _number(record["metrics"].get(HEADLINE))) for record, reason in records.apart]
    apart += [(name, f"failed: {attempt['why']}", "–") for name, attempt in records.failed.items()]
    parts.append(markdown_table(apart, ["run", "why", "validation loss"]) if apart else "Nothing.\n")
    least = ", ".join(f"{fewest_tokens(depth):,} at depth {depth}" for depth in sorted({run["depth"] for run in plan["runs"]}))
    parts.append(f"\nNo table holds runs of fewer tokens than {least}, or conditions of fewer than {rule['min_seeds']} seeds.\n")
    return "".join(parts)


def _runs_of(plan: Mapping[str, Any], line: Line) -> tuple[tuple[str, ...], ...]:
    """Ids of the runs of both sides: equal for comparisons that are the same under other names."""
    runs = [run for run in plan["runs"] if run["depth"] == line.depth]
    return tuple(tuple(run["id"] for run in runs if name in run["conditions"]) for name in (line.condition, line.reference))


def _twofold(plan: Mapping[str, Any], lines: Sequence[Line]) -> list[str]:
    """What to say of comparisons that stand in several sets with several verdicts."""
    found: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        if line.metric == HEADLINE:
            found.setdefault((line.depth, _runs_of(plan, line)), []).append(line)
    return [
        f"{same[0].condition} − {same[0].reference} at depth {same[0].depth} is judged in several sets, each with its own correction: "
        + ", ".join(f"{line.result.verdict} in {line.set} (p {_p(line.result.p_holm)})" for line in same)
        for same in found.values()
        if len({line.result.verdict for line in same}) > 1
    ]


def _family(plan: Mapping[str, Any], family: Sequence[Line]) -> str:
    """How many comparisons of a set Holm's correction is over, and which of them are the same runs."""
    planned = sum(one["set"] == family[0].set for one in plan["comparisons"])
    tested = sum(line.result.p_holm is not None for line in family)
    said = f"Holm's correction is over {tested} comparisons of {planned} planned"
    said += "; those that are missing will change it.\n" if tested < planned else ".\n"
    same: dict[tuple[Any, ...], list[str]] = {}
    for line in family:
        same.setdefault(_runs_of(plan, line), []).append(f"{line.condition} − {line.reference}")
    for names in (names for names in same.values() if len(names) > 1):
        said += f"{' and '.join(names)} are the same runs and count {len(names)} times in it, which only makes it stricter.\n"
    return said + "\n"


def _set_table(plan: Mapping[str, Any], lines: Sequence[Line], name: str, depth: int) -> str:
    by = {
        (line.what, line.condition, line.reference, line.metric): line.result for line in lines if (line.set, line.depth) == (name, depth)
    }
    rows = []
    for (what, condition, reference, metric), one in by.items():
        if metric != HEADLINE:
            continue
        views = [by.get((what, condition, reference, f"view.{view}")) for view in VIEWS[1:]]
        interval = "–" if one.low is None else f"{one.low:+z.4f} … {one.high:+z.4f}"
        tests = (_p(one.p_t), _p(one.p_holm), _p(one.p_wilcoxon), _number(one.g_z, 2), _p(one.detectable))
        seen = [f"{_number(view.mean)} ({view.verdict})" if view else "–" for view in views]
        rows.append((what, f"{condition} − {reference}", str(len(one.seeds)), _number(one.mean), interval, *tests, one.verdict, *seen))
    if not rows:
        return ""
    columns = [
        "what differs",
        "difference",
        "seeds",
        "nats",
        "interval",
        "p (t)",
        "p (Holm)",
        "p (Wilcoxon)",
        "g_z",
        "detectable",
        "by the rule",
    ]
    family = _family(plan, [line for line in lines if (line.set, line.depth, line.metric) == (name, depth, HEADLINE)])
    return f"## {name}, depth {depth}\n\n{family}" + markdown_table(rows, [*columns, "equal FLOPs", "equal time"]) + "\n"


def _score_table(scores: Sequence[Score]) -> str:
    known = {one.id: one for one in PREDICTIONS}
    rows = []
    for one in scores:
        prediction = known[one.id]
        notes = prediction.source + (f". Ours: {prediction.ours}" if prediction.ours else "")
        runs = ", ".join(one.runs) or "–"
        rows.append((prediction.statement, "–" if one.depth is None else str(one.depth), one.verdict, one.why, notes, runs))
    return markdown_table(rows, ["prediction", "depth", "verdict", "found", "thresholds", "decided by"]) + "\n"


def _scorecard_json(plan: Mapping[str, Any], records: Records, scores: Sequence[Score]) -> dict[str, Any]:
    return {
        "smoke": plan["smoke"],
        "digest": plan["digest"],
        "rule": plan["rule"],
        "data": plan["data"],
        "matches": plan["matches"],
        "predictions": {one.id: {"statement": one.statement, "source": one.source, "ours": one.ours} for one in PREDICTIONS},
        "scores": [one.record() for one in scores],
        "apart": [{"run": record["id"], "why": reason} for record, reason in records.apart],
        "missing": records.missing,
        "failed": {
            name: {"why": attempt["why"], "last_line": (attempt["last_lines"] or [""])[-1]} for name, attempt in records.failed.items()
        },
    }


def _comparisons_csv(lines: Sequence[Line]) -> str:
    names = ("mean", "sd", "low", "high", "p_t", "p_holm", "p_wilcoxon", "d_z", "g_z", "detectable")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["set", "depth", "metric", "condition", "reference", "what", "seeds", *names, "verdict"])
    for line in lines:
        numbers = ["" if getattr(line.result, name) is None else f"{getattr(line.result, name):.6g}" for name in names]
        seeds = " ".join(map(str, line.result.seeds))
        writer.writerow(
            [line.set, line.depth, line.metric, line.condition, line.reference, line.what, seeds, *numbers, line.result.verdict]
        )
    return file.getvalue()


def _runs_csv(records: Records) -> str:
    every = [(record, "") for record in records.counted] + list(records.apart)
    metrics = sorted({name for record, _ in every for name in record["metrics"]})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "conditions", "depth", "seed", "tokens", "device", "git", "apart", *metrics])
    for record, reason in every:
        numbers = ["" if record["metrics"].get(name) is None else f"{record['metrics'][name]:.6g}" for name in metrics]
        about = (
            record["id"],
            " ".join(record["conditions"]),
            record["depth"],
            record["seed"],
            record["tokens"],
            record["device"],
            record["git"],
        )
        writer.writerow([*about, reason, *numbers])
    return file.getvalue()
