"""What the benchmarks share: how a device is named, where a record goes, why something cannot run."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.benchmarks.timing import Spread
from bio_inspired_nanochat.common import check_writable, compute_dtype, say, write_atomic
from bio_inspired_nanochat.errors import UserError

MIB = 1 << 20


def failures() -> tuple[type[Exception], ...]:
    """What a competitor that cannot run raises: a refusal (UserError is a ValueError), an allocation, a compiler or a missing package."""
    found: list[type[Exception]] = [ValueError, RuntimeError, ImportError]
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return tuple(found)
    return (*found, TritonError)


def reason(error: Exception) -> str:
    """An error in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of memory"
    return text if len(text) <= 160 else text[:157] + "..."


def free_unused(device: torch.device) -> None:
    """Give back what the last measurement held, so that the next one finds the memory whole."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a flag names; `auto` is the device's."""
    return compute_dtype(device) if name == "auto" else getattr(torch, name)


def place(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Where the figures were measured, for the record; said in one line where they mean little."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if device.type != "cuda":
        say(f"{name}: small sizes unless flags say otherwise; the figures tell nothing about a GPU")
    return {"device": name, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}


def quartiles(spread: Spread | None) -> list[float | None] | None:
    """The quartiles for the record, at four significant digits."""
    return None if spread is None else [short(spread.low), short(spread.high)]


def short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def shown(spread: Spread | None) -> str | None:
    """Quartiles in a table."""
    return None if spread is None else f"{spread.low:.4g}-{spread.high:.4g}"


def check_record_path(path: str | None) -> None:
    """UserError for a place that cannot take the record, before anything is measured."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise UserError(f"json={path!r} is not a file in an existing folder: give --json=FILE")
    if path is not None:
        check_writable("json", path)


def keep_record(path: str | None, record: dict[str, Any]) -> None:
    """Write the record to a file too, when asked."""
    if path is not None:
        write_atomic(Path(path), json.dumps(record, indent=1) + "\n")


def say_skipped(skipped: Iterable[tuple[str, str]]) -> None:
    """What did not run, one line for each (what, why), however often it happened."""
    for (what, why), times in Counter(skipped).items():
        say(f"skipped: {what}{f' ({times} sizes)' if times > 1 else ''}: {why}")


def nearest_to(wanted: int, measured: Sequence[int]) -> int:
    """The measured size to report: the wanted one, else the largest."""
    return wanted if wanted in measured else max(measured)
