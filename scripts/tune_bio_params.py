"""Search the constants of a synapse by CMA-ES.

    python -m scripts.tune_bio_params sanity
    python -m scripts.tune_bio_params sensitivity --run_dir=tuning/screen
    python -m scripts.tune_bio_params optimize --screening=tuning/screen/sensitivity.json --run_dir=tuning/phase1
    python -m scripts.tune_bio_params report --run_dir=tuning/phase1
    python -m scripts.tune_bio_params best --run_dir=tuning/phase1 --out=tuned.json

Also under torchrun, where every rank trains a share of the candidates. The last line of stdout is a JSON record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.common import print_json_line, this_rank
from bio_inspired_nanochat.config import SynapticConfig, parse_command
from bio_inspired_nanochat.errors import UserError, exit_on_user_error
from bio_inspired_nanochat.tuning.config import BestConfig, OptimizeConfig, ReportConfig, SanityConfig, SearchConfig, SensitivityConfig
from bio_inspired_nanochat.tuning.evolver import optimize
from bio_inspired_nanochat.tuning.monitor import watchers_of
from bio_inspired_nanochat.tuning.report import best, report
from bio_inspired_nanochat.tuning.sanity import sanity
from bio_inspired_nanochat.tuning.sensitivity import sensitivity
from bio_inspired_nanochat.tuning.space import Space, make_space
from bio_inspired_nanochat.tuning.workers import follow, make_evaluator

COMMANDS = {
    "sanity": SanityConfig,
    "sensitivity": SensitivityConfig,
    "optimize": OptimizeConfig,
    "report": ReportConfig,
    "best": BestConfig,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, do what it says, print the record."""
    with exit_on_user_error():
        name, config = parse_command(
            COMMANDS,
            argv,
            prog="scripts.tune_bio_params",
            description="Search the constants of a synapse by CMA-ES, on small models that are trained as one.",
            presets={"syn_preset": ("syn_cfg", SynapticConfig.preset)} if argv_tunes(argv) else None,
        )
        if isinstance(config, SearchConfig) and not this_rank().first:
            follow(config, config.device, config.eval_timeout)
            return
        print_json_line(_run(name, config))


def argv_tunes(argv: Sequence[str] | None) -> bool:
    """Whether a command line is one of a command that has synapses to begin with."""
    import sys

    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--"]
    return bool(words) and issubclass(COMMANDS.get(words[0], ReportConfig), SearchConfig)


def _run(name: str, config: Any) -> dict[str, Any]:
    if isinstance(config, ReportConfig):
        return report(config)
    if isinstance(config, BestConfig):
        return best(config)
    space = _space(config)
    folder, evaluator = config.folder(name), make_evaluator(config)
    try:
        if isinstance(config, SanityConfig):
            return sanity(config, space, evaluator, folder)
        if isinstance(config, SensitivityConfig):
            return sensitivity(config, space, evaluator, folder)
        return optimize(config, space, evaluator, folder, watchers_of(config))
    finally:
        evaluator.close()


def _space(config: SearchConfig) -> Space:
    """The space of the flags; with --screening that of the knobs that it named."""
    if not isinstance(config, OptimizeConfig) or config.screening is None:
        return config.space()
    try:
        names = json.loads(Path(config.screening).read_text(encoding="utf-8"))["top"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"screening={config.screening!r} is not a sensitivity.json of `tune_bio_params sensitivity`") from None
    return make_space(config.syn_cfg, names)


if __name__ == "__main__":
    main()
