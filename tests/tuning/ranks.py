"""What the torchrun test of workers launches: sound candidates, then one that kills the worker of rank 1."""

from __future__ import annotations

import json

from bio_inspired_nanochat.common import this_rank
from bio_inspired_nanochat.config import SynapticConfig
from bio_inspired_nanochat.tuning.objectives import ObjectiveConfig
from bio_inspired_nanochat.tuning.workers import Ranks, follow
from tests.tuning.fakes import die_or_sleep


def main() -> None:
    """Rank 0 prints what came back, a line of JSON."""
    config = ObjectiveConfig()
    if not this_rank().first:
        follow(config, "cpu", 100.0, die_or_sleep)
        return
    ranks, found = Ranks(config, "cpu", 100.0, die_or_sleep), []
    for values in ((10.0, 20.0, 30.0, 40.0), (10.0, 20.0, 5.0, 40.0)):
        scores = ranks([SynapticConfig(tau_c=value) for value in values], [1])
        found.append([None if row[0].diverged else [row[0].answer_loss] for row in scores])
    ranks.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
