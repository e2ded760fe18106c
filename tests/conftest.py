"""What every test can rely on: one torch thread, fixed seeds, no network, and artefacts in a folder of this run only."""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Dozens of processes import the same modules, and nobody compiled some of the packages.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before any test module is imported, because libraries read these when they load.
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The few compiled programs of a run do not earn back ten seconds of compiling their headers once.
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")

import pytest

from tests import forked

forked.run_of_the_tests()  # those that tests are handed out to inherit it


@pytest.fixture(autouse=True)
def _fixed_seeds() -> Iterator[None]:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def pytest_collection(session: pytest.Session) -> None:
    """Before any test module is imported. The process that hands tests out to others needs nothing of this and starts sooner so.

    There is no garbage collection while modules are imported and tests are made: nearly all of that stays.
    """
    if session.config.pluginmanager.hasplugin("dsession"):
        return
    gc.disable()
    import hypothesis
    import torch

    torch.set_num_threads(1)
    hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """Later collections, one for every training run, do not walk over what was imported and collected."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # libraries look at the end for what was not freed


def chromium() -> str | None:
    """The browser that tests drive: $CHROMIUM, or the first one on the path."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = driver.chromium.launch(executable_path=chromium(), args=flags)
        yield running
        running.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    import torch

    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "needs a CUDA device"
    if chromium() is None:
        lacking["browser"] = "needs Chromium: install the package chromium, or name a browser in CHROMIUM"
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter) -> None:
    """One line for the browser tests that were skipped."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "needs Chromium" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} browser tests skipped: install the Debian package chromium, or name a browser in CHROMIUM"
        )


def pytest_unconfigure() -> None:
    """Remove this process's artefacts."""
    shutil.rmtree(os.environ["NANOCHAT_BASE_DIR"], ignore_errors=True)
