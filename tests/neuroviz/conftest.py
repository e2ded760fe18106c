"""A short run with every mechanism on, which most tests of this folder look at."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import pytest

from bio_inspired_nanochat.common import base_dir
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.neuroviz.tensorboard import TensorBoard
from bio_inspired_nanochat.training import train
from tests.training.tiny import small

MEMORY = {"hebb": "delta", "rank_eligibility": 8, "camkii_gain": 1.0, "pp1_gain": 1.0, "bdnf_gamma": 1.0, "fast_layers": ("q", "mlp_in")}
LIFE = {"expert_youth": 2, "split_health_min": 0.5, "death_health_max": 0.45, "twin_overlap": 1.0}
EVERYTHING = dataclasses.replace(SynapticConfig.preset("full"), tick=4, theta=-1.0, **MEMORY, **LIFE)
RUN = {
    "synapses": True,
    "syn_cfg": EVERYTHING,
    "num_experts": 4,
    "splitmerge_every": 5,
    "vitals_every": 5,
    "log_every": 5,
    "eval_every": 10,
    "sample_every": 10,
    "consolidate_every": 10,
    "num_iterations": 20,
    "save_every": 10,
    "keep_checkpoints": 0,
}


@dataclasses.dataclass
class Trained:
    """record: the last line of the run; logs: its log folder; folder: where all of it lies."""

    record: dict
    logs: Path
    folder: Path


@functools.cache
def everything() -> Trained:
    """The run, once per process; leave it as it is."""
    folder = Path(tempfile.mkdtemp(dir=base_dir()))
    record = train(small(folder, **RUN), [TensorBoard(share=0.0)])
    return Trained(record, Path(record["log_dir"]), folder)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """See `everything`."""
    return everything()


@pytest.fixture
def show(browser):
    """Opens a file; fails at the end when the page complained or asked for anything else."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))

    def opened(path):
        page.goto(path.as_uri())
        page.wait_for_function("document.body.dataset.ready", timeout=60_000)
        return page

    yield opened
    context.close()
    assert problems == [] and len(requests) == 1
