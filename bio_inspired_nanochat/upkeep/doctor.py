"""What this machine has and what training would do with it, as a text for bug reports.

Nothing but the standard library is imported here, and what may crash runs in processes of its own: the doctor speaks whatever is broken.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bio_inspired_nanochat import __version__
from bio_inspired_nanochat.git import source_revision

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "bio-inspired-nanochat"
PROBES = ("torch", "triton", "rust", "execution")
_NEWEST_TESTED = (3, 14)
VARIABLES = (
    *("NANOCHAT_BASE_DIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "SHARED_LIMIT_KB", "CUDA_VISIBLE_DEVICES"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING", "NCCL_NVLS_ENABLE", "NCCL_DEBUG", "TORCH_LOGS"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHDYNAMO_DISABLE", "HF_HUB_OFFLINE", "PYTHONPATH", "LD_LIBRARY_PATH"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE"),
)
Section = dict[str, Any]


def examine(depth: int = 12, context: int = 0, timeout: float = 120.0) -> dict[str, Section]:
    """All sections by title; a section is a dictionary of lines, whose key `problem` says what is broken.

    depth, context: the model that fits and executions are told for (context 0: its default); timeout: seconds for each probe.
    """
    with ThreadPoolExecutor(2) as pool:
        probes = {
            name: pool.submit(_safely, lambda name=name: probe(name, [depth, context] if name == "execution" else [], timeout))
            for name in PROBES
        }
        found = {title: _safely(look) for title, look in LOOKS.items()}
        found |= {name: future.result() for name, future in probes.items()}
    order = ("system", "torch", "triton", "rust", "execution", "storage", "packages", "variables")
    return {title: {key: private(value) for key, value in found[title].items()} for title in order}


def problems(sections: Mapping[str, Section]) -> list[str]:
    """What is broken, one line each."""
    return [f"{title}: {section['problem']}" for title, section in sections.items() if "problem" in section]


def text(sections: Mapping[str, Section]) -> str:
    """The report for a person."""
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines += [f"  {key}: {value}" for key, value in section.items() if key != "problem"]
        lines += [f"  PROBLEM: {section['problem']}"] if "problem" in section else []
    found = problems(sections)
    return "\n".join([*lines, f"{len(found)} problem{'' if len(found) == 1 else 's'} found"])


def private(value: Any) -> Any:
    """A value without the paths of this machine: the repository and the home folder are named by their roles."""
    if not isinstance(value, str):
        return value
    for path, name in ((str(ROOT), "<repository>"), (sys.prefix, "<environment>"), (str(Path.home()), "~")):
        if len(path) > 1:
            value = re.sub(rf"{re.escape(path)}(?=$|[^\w.-])", name, value)
    return value


def probe(name: str, arguments: list[int], timeout: float) -> Section:
    """Run a probe in a process of its own; a crash, a hang or an error becomes the section's `problem`."""
    command = [sys.executable, "-m", "bio_inspired_nanochat.upkeep.probes", name, *map(str, arguments)]
    variables = dict(os.environ)
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"the probe did not end within {timeout:g} seconds"}
    if done.returncode < 0:
        return {"problem": f"the probe was ended by {_signal(-done.returncode)}"}
    said = done.stderr.strip().splitlines() or ["no message"]
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"problem": f"the probe ended with exit code {done.returncode}: {said[-1][:300]}"}
    return found if isinstance(found, dict) else {"problem": f"the probe said {str(found)[:100]}"}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _safely(look: Callable[[], Section]) -> Section:
    """A section, or what kept it from being made; the doctor must not fall ill itself."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # whatever it is, the report says it
        return {"problem": f"this part could not be examined ({type(error).__name__}: {' '.join(str(error).split())[:200]})"}


def _system() -> Section:
    found: Section = {"package": f"{__version__}, revision {source_revision() or 'unknown'}"}
    found["Python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    found["system"] = (
        f"{platform.system()} {platform.release()}, {platform.machine()}, {platform.libc_ver()[0] or 'libc'} {platform.libc_ver()[1]}".strip()
    )
    found["CPUs"] = f"{os.cpu_count()}" + (f", {len(os.sched_getaffinity(0))} for this process" if hasattr(os, "sched_getaffinity") else "")
    if hasattr(os, "sysconf"):
        page = os.sysconf("SC_PAGE_SIZE") / 2**30
        free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else float("nan")
        found["memory"] = f"{page * os.sysconf('SC_PHYS_PAGES'):.1f} GiB, {free:.1f} GiB of it unused"
    if sys.version_info[:2] > _NEWEST_TESTED:
        found["notice"] = "this Python is newer than the ones that the pinned packages were tried with"
    return found


def _storage() -> Section:
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "bio_inspired_nanochat").expanduser().absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    usage = shutil.disk_usage(there)
    found: Section = {"base folder": _shortened(str(folder)) + ("" if folder.exists() else ", not made yet")}
    found["disk"] = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK):
        found["problem"] = f"{_shortened(str(there))} cannot be written: set NANOCHAT_BASE_DIR to a folder that can"
    elif usage.free < 1 << 30:
        found["problem"] = "less than 1 GiB of disk is free where checkpoints go: make room, or set NANOCHAT_BASE_DIR"
    return found


def _packages() -> Section:
    """Versions of what is installed against constraints.txt, and what is needed but missing."""
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", _constraints(), re.MULTILINE))
    have = {name: version for name in {*pins, *_needed()} if (version := _version(name)) is not None}
    missing = sorted(name for name in _needed() if name not in have)
    others = [f"{name} {have[name]} (pinned {pins[name]})" for name in sorted(have) if name in pins and _public(have[name]) != pins[name]]
    found: Section = {}
    if pins:
        found["as pinned"] = (
            f"{sum(name in pins for name in have) - len(others)} of {sum(name in pins for name in have)} installed packages"
        )
        found["other versions"] = ", ".join(others) or "none"
    else:
        found["needed"] = ", ".join(f"{name} {have[name]}" for name in sorted(have)) or "none found"
    if missing:
        found["problem"] = (
            f"{', '.join(missing)} not installed: run bash scripts/env.sh, or pip install -c constraints.txt {' '.join(missing)}"
        )
    return found


def _public(version: str) -> str:
    """A version without its local part: `2.15.0+cpu` is as pinned when 2.15.0 is."""
    return version.partition("+")[0]


def _constraints() -> str:
    path = ROOT / "constraints.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _needed() -> list[str]:
    """Names of the packages that this one cannot do without, on this system."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        import tomllib

        listed = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        listed = importlib.metadata.requires(DISTRIBUTION) or []
    wanted = [line for line in listed if "extra ==" not in line and not ("sys_platform" in line and sys.platform != "linux")]
    return [match[0].lower() for line in wanted if (match := re.match(r"[A-Za-z0-9-]+", line))]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _variables() -> Section:
    """Those that are set and matter; of folders elsewhere only the last part is told."""
    found: Section = {}
    for name in VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            found[name] = os.pathsep.join(_shortened(part) for part in value.split(os.pathsep)) if "/" in value else value
    return found or {"set": "none"}


def _shortened(path: str) -> str:
    shown = private(path)
    return shown if not shown.startswith("/") else f".../{Path(shown).name}"


LOOKS: dict[str, Callable[[], Section]] = {"system": _system, "storage": _storage, "packages": _packages, "variables": _variables}
