"""The tables and texts of README.md and docs/ that are made from the code, from docs/results.json and from files of the repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.evaluation.suite import EVALUATIONS
from bio_inspired_nanochat.registry import MECHANISMS, active_mechanisms, knob_table, markdown_table, owners
from bio_inspired_nanochat.synaptic.genome import protein_table
from bio_inspired_nanochat.training.metrics import METRIC_COLUMNS, metric_rows

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results.json"
EXAMPLE = ROOT / "examples/dendrites.py"


def between(name: str, page: str) -> str:
    """What stands between the marks of a generated part."""
    return page.split(f"<!-- {name}:begin -->\n")[1].split(f"<!-- {name}:end -->")[0]


def tree(text: str) -> Iterator[tuple[str, str]]:
    """Paths of an indented file tree, each with what is said about it."""
    folders: list[str] = []
    for line in text.splitlines():
        if not line or line.startswith("```"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name, *about = line.split(maxsplit=1)
        assert about or name == "bio_inspired_nanochat/", f"{name} is not explained"
        del folders[depth:]
        yield "".join(folders) + name, "".join(about)
        folders.append(name)


def with_tables(page: str) -> str:
    """A page with its generated parts written anew."""
    for name in re.findall(r"<!-- (\w+):begin -->", page):
        if name in GENERATED:
            page = page.replace(f"<!-- {name}:begin -->\n{between(name, page)}", f"<!-- {name}:begin -->\n{GENERATED[name]()}")
    return page


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


def _comparison() -> str:
    """Losses and costs of docs/results.json side by side."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    costs = {row["model"]: row for row in found["cost"]["rows"]} | {"vanilla": {"time": 1, "memory": 1}}
    vanilla, rows = found["quality"]["rows"][0]["losses"], []
    for row in found["quality"]["rows"]:
        cost = costs.get(row["model"], {})
        difference = "" if row["model"] == "vanilla" else _less(vanilla, row["losses"])
        flags = f"`{row['flags']}`"
        rows.append(
            [row["model"], flags, *(f"{loss:.4f}" for loss in row["losses"]), difference, cost.get("time", ""), cost.get("memory", "")]
        )
    columns = ["model", "flags", "loss, seed 0", "seed 1", "mean difference", "time", "memory"]
    return markdown_table([[str(cell) for cell in row] for row in rows], columns)


def rounded(value: float | Decimal, unit: str) -> Decimal:
    """A value as it is written down, to a unit like 0.01, halves away from zero."""
    return Decimal(str(value)).quantize(Decimal(unit), ROUND_HALF_UP)


def _less(vanilla: list[float], losses: list[float]) -> str:
    """The mean difference of losses that are less than vanilla's."""
    difference = sum(Decimal(str(one)) for one in vanilla) - sum(Decimal(str(one)) for one in losses)
    return f"\N{MINUS SIGN}{rounded(difference / len(vanilla), '0.0001')}"


def _course() -> str:
    """How loss and vitals of a run moved."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["course"]["rows"]
    return markdown_table(
        [[str(value) for value in row.values()] for row in rows], [name if name == "step" else f"`{name}`" for name in rows[0]]
    )


def _main_knobs() -> str:
    """The knobs of the mechanisms that the default preset has without experts, and the tick."""
    acting = {name for name in active_mechanisms(SynapticConfig()) if not MECHANISMS[name].experts}
    return markdown_table([row for row in knob_table(SynapticConfig) if row.name == "tick" or acting.intersection(owners(row.name))])


def _rooms() -> str:
    """The rooms of the package, from the file tree."""
    shown = [
        (path.split("/")[1], about)
        for path, about in tree(between("tree", (DOCS / "reference.md").read_text(encoding="utf-8")))
        if re.fullmatch(r"bio_inspired_nanochat/[^/]+/?", path)
    ]
    return markdown_table([(f"`{path}{'' if path.endswith('.py') else '/'}`", about) for path, about in shown], ["room", "what is in it"])


def _example() -> str:
    """The example without what stands before its first class."""
    text = EXAMPLE.read_text(encoding="utf-8")
    return f"```python\n{text[text.index('class ') :]}```\n"


GENERATED: dict[str, Callable[[], str]] = {
    "mechanisms": _mechanisms,
    "knobs": lambda: markdown_table(knob_table(SynapticConfig)),
    "proteins": lambda: markdown_table(protein_table()),
    "evaluations": _evaluations,
    "comparison": _comparison,
    "course": _course,
    "main_knobs": _main_knobs,
    "rooms": _rooms,
    "example": _example,
    "metrics": lambda: markdown_table(metric_rows(), METRIC_COLUMNS),
}
