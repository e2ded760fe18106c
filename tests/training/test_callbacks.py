"""What the built-in callbacks print."""

import pytest

from bio_inspired_nanochat.training import StepRecord
from bio_inspired_nanochat.training.callbacks import step_line

RECORD = {"step": 10, "loss": 4.12344, "lr": 1.0, "grad_norm": 0.5, "tok_per_s": 12345.4, "mfu": 0.1234, "mem_gib": 1.21}
RECORD |= {"wait": 0.001, "epoch": 0, "tokens": 999, "seconds_left": 192.0}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "step 00010/00200 | loss 4.1234 | lr 1.00 | 12,345 tok/s | MFU 12.3% | mem 1.2 GiB | wait 0.1% | 3m12s left"),
        (
            {"mfu": None, "seconds_left": None},
            "step 00010/00200 | loss 4.1234 | lr 1.00 | 12,345 tok/s | MFU n/a | mem 1.2 GiB | wait 0.1% | ? left",
        ),
    ],
)
def test_a_step_is_one_line_of_a_fixed_form(changes, line):
    assert step_line(StepRecord(**{**RECORD, **changes}), 200) == line
