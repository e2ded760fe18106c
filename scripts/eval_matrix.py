"""Train a matrix of models, several seeds each, and say which mechanisms helped.

    python -m scripts.eval_matrix plan --sets=anchors,add_one --depths=6,10 --out=study/first
    python -m scripts.eval_matrix run --out=study/first --budget_minutes=240
    python -m scripts.eval_matrix resume --out=study/first
    python -m scripts.eval_matrix speed --out=study/first --conditions=vanilla,default
    python -m scripts.eval_matrix report --out=study/first
    python -m scripts.eval_matrix pack --out=study/first --file=first.json.gz
    python -m scripts.eval_matrix unpack --file=first.json.gz --out=study/second

The plan fixes what is compared and by which rule before anything runs. The last line of stdout is a JSON record.
"""

from __future__ import annotations

from collections.abc import Sequence

from bio_inspired_nanochat.common import print_json_line
from bio_inspired_nanochat.config import parse_command
from bio_inspired_nanochat.errors import exit_on_user_error
from bio_inspired_nanochat.study.archive import PackConfig, UnpackConfig, pack, unpack
from bio_inspired_nanochat.study.plan import PlanConfig, make_matrix_plan
from bio_inspired_nanochat.study.queue import ResumeConfig, RunConfig, run_queue
from bio_inspired_nanochat.study.report import ReportConfig, report
from bio_inspired_nanochat.study.speed import SpeedConfig, measure_speed

COMMANDS = {
    "plan": PlanConfig,
    "run": RunConfig,
    "resume": ResumeConfig,
    "speed": SpeedConfig,
    "report": ReportConfig,
    "pack": PackConfig,
    "unpack": UnpackConfig,
}
WORK = {
    "plan": make_matrix_plan,
    "run": run_queue,
    "resume": run_queue,
    "speed": measure_speed,
    "report": report,
    "pack": pack,
    "unpack": unpack,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, do what it says, print the record."""
    with exit_on_user_error():
        name, config = parse_command(
            COMMANDS,
            argv,
            prog="scripts.eval_matrix",
            description="Plan, run and report many trainings that show what each mechanism is worth.",
        )
        print_json_line(WORK[name](config))


if __name__ == "__main__":
    main()
