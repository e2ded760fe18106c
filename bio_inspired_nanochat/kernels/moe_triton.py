"""Experts for a few tokens, for inference: two kernels in place of the sorting and padding that pay for many tokens only.

A decoded token is as long as its launches and the weights that it reads: here a product of matrix and vector per pair of token and
expert. Pairs of one expert run side by side, so its weights come from memory once. Values are computed in float32 and rounded where
they are stored, once.

Dimensions: S tokens, k choices, M = S k pairs, E experts, D width, F hidden units of an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bio_inspired_nanochat.kernels.tiles import FAST, launch

MOST_PAIRS = 64  # from more on, matrix units and shared weights win
ROWS, COLUMNS = (4, 1024) if FAST else (32, 32)  # of a matrix that a program holds at once


@triton.jit
def _product(matrix_ptr, row, rows, vector_ptr, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS] from `row` on of a matrix [rows, width] times a vector [width]."""
    at = row + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        live = column < width
        vector = tl.load(vector_ptr + column, mask=live, other=0.0).to(tl.float32)
        matrix = tl.load(matrix_ptr + at[:, None] * width + column[None, :], mask=(at < rows)[:, None] & live[None, :], other=0.0)
        total += matrix.to(tl.float32) * vector[None, :]
    return tl.sum(total, 1)


@triton.jit
def _enter(x_ptr, expert_ptr, matrix_ptr, hidden_ptr, choices, hidden, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: some hidden units of one pair, after the squared ReLU."""
    pair, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    matrix = matrix_ptr + tl.load(expert_ptr + pair) * hidden * width
    z = tl.maximum(_product(matrix, row, hidden, x_ptr + pair // choices * width, width, ROWS, COLUMNS), 0.0)
    at = row + tl.arange(0, ROWS)
    tl.store(hidden_ptr + pair * hidden + at, z * z, mask=at < hidden)


@triton.jit
def _leave(hidden_ptr, expert_ptr, gate_ptr, matrix_ptr, y_ptr, hidden, width, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: some channels of one token, the gated sum over its experts."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        matrix = matrix_ptr + tl.load(expert_ptr + pair) * hidden * width
        out = _product(matrix, row, width, hidden_ptr + pair * hidden, hidden, ROWS, COLUMNS)
        total += tl.load(gate_ptr + pair).to(tl.float32) * out
    at = row + tl.arange(0, ROWS)
    tl.store(y_ptr + token * width + at, total, mask=at < width)


def serves(x: Tensor, choices: int) -> bool:
    """Whether `mix` takes tokens x [S, D] that visit so many experts each."""
    return x.dtype in (torch.float32, torch.bfloat16) and 0 < len(x) * choices <= MOST_PAIRS


def mix(x: Tensor, expert: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """x [S, D] through expert [S, k], weighted with gates [S, k] and summed: [S, D]. w_in [E, F, D] and w_out [E, D, F] of x's dtype."""
    x, expert, gates, w_in, w_out = (part.contiguous() for part in (x, expert, gates, w_in, w_out))
    (tokens, width), k, size = x.shape, expert.shape[1], w_in.shape[1]
    hidden, y = x.new_empty(tokens * k, size), torch.empty_like(x)
    options = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
    launch(_enter, (tokens * k, triton.cdiv(size, ROWS)), x, expert, w_in, hidden, k, size, width, **options)
    launch(_leave, (tokens, triton.cdiv(width, ROWS)), hidden, expert, gates, w_out, y, size, width, K=k, **options)
    return y
