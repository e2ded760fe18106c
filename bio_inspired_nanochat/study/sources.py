"""Measurements beside the matrix that some predictions are about: the record of a benchmark, and the records of a memory study."""

from __future__ import annotations

import json
from pathlib import Path

from bio_inspired_nanochat.common.files import read_json_lines
from bio_inspired_nanochat.errors import damaged_file

STUDIED = "memory:"  # what names of the memory study's variants begin with, as conditions of a prediction


def kernel_facts(path: str | None) -> dict[str, tuple[float, str]]:
    """`kernel.forward_gain`: 1 - forward time of a layer as `fused` over that as `triton`, from the record of bench_kernels, at the largest
    context up to 2048 that has both. Raises UserError for a file that is no such record."""
    if path is None:
        return {}
    with damaged_file(path, "give the file that `bench_kernels --json=FILE` wrote"):
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        cells: dict[tuple[int, int, int], dict[str, float]] = {}
        for row in rows:
            wanted = row["operator"] == "layer" and row["backend"] in ("fused", "triton") and row["context"] <= 2048
            if wanted and row.get("forward_ms"):
                cells.setdefault((row["context"], row["head_dim"], row["tick"]), {})[row["backend"]] = row["forward_ms"]
        both = {cell: times for cell, times in cells.items() if len(times) == 2}
        if not both:
            return {}
        cell = max(both)
        where = f"{Path(path).name}: T={cell[0]}, D={cell[1]}, c={cell[2]}"
        return {"kernel.forward_gain": (1 - both[cell]["fused"] / both[cell]["triton"], where)}


def memory_values(path: str | None) -> dict[int, dict[str, dict[str, dict[int, tuple[float, str]]]]]:
    """Accuracies of a memory study as the scorecard takes values: by layers, metric, condition and seed.

    The metrics are `memory.TASK` and, where answers come in groups, `memory.TASK.GROUP`; the conditions are `memory:VARIANT`. Failed runs are
    left out. Raises UserError for a file that holds no such records.
    """
    if path is None:
        return {}
    found: dict[int, dict[str, dict[str, dict[int, tuple[float, str]]]]] = {}
    fix = "give the file that `memory_study --out=FILE` wrote"
    with damaged_file(path, fix):
        records = read_json_lines(Path(path))
        if not records:
            raise ValueError("no record in it")
        for record in records:
            if record["failed"] is not None:
                continue
            where = f"{Path(path).name}: {record['task']} {record['variant']} seed {record['seed']}"
            values = {f"memory.{record['task']}": record["accuracy"]}
            values |= {f"memory.{record['task']}.{group}": value for group, value in record["by_group"].items()}
            of_depth = found.setdefault(int(record["config"]["n_layer"]), {})
            for metric, value in values.items():
                of_depth.setdefault(metric, {}).setdefault(f"{STUDIED}{record['variant']}", {})[int(record["seed"])] = (float(value), where)
    return found
