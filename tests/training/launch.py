"""Runs a module of the tests as several processes of one group, without a launcher: forks that have imported torch already."""

import json
import os
import subprocess
from pathlib import Path

from torch.distributed import TCPStore

from tests import forked

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PATIENCE = 600  # seconds; alone on a machine the slowest of these takes a twentieth


def run_ranks(world: int, module: str, *words: str) -> list[str]:
    """What each of `world` processes, with the variables that torchrun sets, has printed. All must succeed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # held here: nobody else takes the port
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environments = [ENV | place | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(world)]
    try:
        ended = forked.run_together(["-m", module, *words], environments, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not all ranks came to an end: {error.stderr.decode()[-3000:]}") from None
    assert not any(one.returncode for one in ended), "".join(f"rank {i}:\n{one.stderr[-2000:]}\n" for i, one in enumerate(ended))
    return [one.stdout for one in ended]


def seen_by(world: int, module: str, *words: str, out: Path) -> list[dict]:
    """What each of `world` processes, told `out` as its last word, has left there in rankN.json."""
    run_ranks(world, module, *words, str(out))
    return [json.loads((out / f"rank{index}.json").read_text()) for index in range(world)]
