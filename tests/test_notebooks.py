"""The notebooks run, and what is stored in them was made by running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE_BYTES = 300_000


def _cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def _run(path: Path, changes: dict[str, str]) -> dict[str, Any]:
    """Run the cells of a notebook one after the other in one namespace, with other values for some of its constants; the namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(_cells(path)):
        source = "".join(cell["source"])
        for old in [old for old in changes if old in source]:
            source = source.replace(old, changes.pop(old))
        exec(compile(source, f"{path.name}, cell {number}", "exec"), names)  # noqa: S102 (our own file)
    assert not changes, f"{path.name} has no {', '.join(changes)}"
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed_small_and_private(path: Path) -> None:
    pictures, counts = 0, []
    for cell in _cells(path):
        counts.append(cell["execution_count"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            pictures += len("".join(output.get("data", {}).get("image/png", "")))
    assert counts == list(range(1, len(counts) + 1)), "run all cells from a fresh kernel, then save"
    assert 0 < pictures < PICTURE_BYTES
    assert str(ROOT) not in path.read_text() and "/home/" not in path.read_text() and "/tmp/" not in path.read_text()


def test_a_terminal_facilitates_and_fast_weights_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    matplotlib.use("agg", force=True)
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())))
    names = _run(ROOT / "notebooks/one_terminal.ipynb", {"STEPS = 800": "STEPS = 200"})
    plt.close("all")
    assert shown == [1, 2]
    first, second = (float(names["released"][place]) for place in names["returns"])
    assert second > 1.2 * first > 0, "calcium that is left raises the next release"
    key, pool = names["key"], names["pool"]
    assert pool[key] == 1 and pool[names["returns"][1] + 1] < 0.95 < pool[-1] + 0.02, "release empties the pool, which refills"
    chance = names["chance"]
    assert names["runs"]["vanilla"]["accuracy"] < 2 * chance and names["runs"]["delta"]["accuracy"] > 3 * chance
