"""Several processes started by torchrun, each out of one that has the packages loaded (`tests.standin`), and ended for certain."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from tests import standin

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PATIENCE = 600  # seconds; alone on a machine the slowest of these takes a twentieth


def launched(world: int, *words: str) -> tuple[int, str, str]:
    """Run a module in `world` processes: exit code, standard output, standard error.

    The launcher holds the port of the rendezvous and the store behind it, so nobody else takes the one and no rank that is done early
    closes the other.
    """
    python = standin.python()
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m", *words]
    process = subprocess.Popen(
        command, env=ENV | {"PYTHON_EXEC": python}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said, complaints = process.communicate(timeout=PATIENCE)
    except BaseException:
        process.terminate()  # the launcher ends its ranks, which are sessions of their own, and kills them after 30 seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()
        raise
    return process.returncode, said, complaints


def torchrun(world: int, *words: str) -> str:
    """Run a module in `world` processes, which must succeed; its standard output."""
    code, said, complaints = launched(world, *words)
    assert code == 0, complaints[-3000:]
    return said
