"""Bits per byte against sums by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation import bits_per_byte

TOKEN_BYTES = [1, 2, 3, 0]  # id 3 is a special token


class Fixed(nn.Module):
    """A model whose loss is 0.5 nats on id 0, 1 on id 1, 2 on id 2 and 8 on the special id 3."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 8.0]))
        self.modes: list[bool] = []

    def token_losses(self, idx, targets):
        self.modes.append(self.training)
        return torch.where(targets >= 0, self.table[targets.clamp_min(0)], 0.0)


def loader(*batches):
    """Batches of targets; the inputs do not matter."""
    queue = [torch.tensor(rows) for rows in batches]

    def next_batch():
        if not queue:
            raise StopIteration
        targets = queue.pop(0)
        return torch.zeros_like(targets), targets

    return SimpleNamespace(next_batch=next_batch)


def test_one_row_by_hand():
    found = bits_per_byte(Fixed(), loader([[0, 1, 2]]), 1, TOKEN_BYTES)
    assert found.bpb == pytest.approx((0.5 + 1 + 2) / (math.log(2) * 6), rel=1e-12)
    assert found.nats_per_token == pytest.approx(3.5 / 3)
    assert (found.tokens, found.bytes) == (3, 6)


def test_a_special_token_in_the_middle_counts_neither_nats_nor_bytes():
    found = bits_per_byte(Fixed(), loader([[0, 3, 2]]), 1, TOKEN_BYTES)
    assert found.bpb == pytest.approx((0.5 + 2) / (math.log(2) * 4), rel=1e-12)
    assert found.nats_per_token == pytest.approx((0.5 + 8 + 2) / 3), "the loss per token is the training loss, specials included"


def test_ignored_targets_count_nowhere():
    found = bits_per_byte(Fixed(), loader([[0, -1, 2], [-1, -1, -1]]), 1, TOKEN_BYTES)
    assert found.bpb == pytest.approx((0.5 + 2) / (math.log(2) * 4), rel=1e-12)
    assert found.nats_per_token == pytest.approx(1.25)
    assert found.tokens == 2


def test_batches_weigh_by_their_bytes_and_the_end_of_the_data_is_no_error():
    found = bits_per_byte(Fixed(), loader([[0, 0]], [[2, 2]]), 99, TOKEN_BYTES)
    assert found.bpb == pytest.approx(5 / (math.log(2) * 8), rel=1e-12)


def test_the_number_of_batches_is_a_limit():
    assert bits_per_byte(Fixed(), loader([[0, 0]], [[2, 2]]), 1, TOKEN_BYTES).bytes == 2


def test_the_same_rows_are_measured_whatever_the_batch_size():
    rows = [[0, 1], [2, 0], [1, 1], [2, 2], [0, 0]]
    wide = bits_per_byte(Fixed(), loader(rows[:4], rows[4:]), 2, TOKEN_BYTES, max_rows=3)
    narrow = bits_per_byte(Fixed(), loader(*[[row] for row in rows]), 5, TOKEN_BYTES, max_rows=3)
    assert wide == narrow and wide.tokens == 6


def test_the_model_comes_back_in_the_mode_it_had():
    model = Fixed().train()
    bits_per_byte(model, loader([[0]]), 1, TOKEN_BYTES)
    assert model.modes == [False] and model.training


def test_text_without_bytes_is_an_error_and_not_infinity():
    with pytest.raises(UserError, match="at least one byte"):
        bits_per_byte(Fixed(), loader([[3, -1]]), 1, TOKEN_BYTES)
