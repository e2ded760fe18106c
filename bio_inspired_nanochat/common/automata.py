"""Matrices from an elementary cellular automaton: an alternative to independent draws for initial weights.

Rule 30 is chaotic, and half of its cells are alive. Rule 116 settles within two steps into a pattern that only moves: every row is the
row before it, one cell to the right, 0.377 of the cells are alive, and neighbours are correlated (0.20 and -0.41 at distances one and
two). Its raw evolution as a matrix would repeat rows, have the wrong variance and favour a few directions. Hence three corrections,
the same for every rule:

* the matrix reads the automaton at every fifth step and in cells at least five apart, where the correlations of both rules are below 0.1;
* the columns read cells in random order from a ring twice as wide as needed, so that a pattern that moves is no circulant matrix;
* the two values of a cell are chosen for mean zero and the wanted standard deviation at the density that was found.

The singular values are then close to those of independent draws (tests hold the extremes). Source of the idea: background README,
"Cellular Automata Initialization"; it gives no construction, this one is the project's own.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor

from bio_inspired_nanochat.errors import UserError

RULES = {"rule30": 30, "rule116": 116}
APART = 5  # steps between two rows and least cells between two columns
RING = 2  # places for columns on the ring, times the larger side of the matrix
BURN_IN = 32  # steps before the first row is read
_TRIES = 8  # first rows before a pattern counts as one that dies; a small matrix may see a quiet stretch


def automaton_step(cells: Tensor, rule: int) -> Tensor:
    """The next generation of a ring of cells: uint8 of 0 and 1, shape [W], to the same.

    rule: Wolfram's number; its bit 4*left + 2*centre + right is the new cell.
    """
    neighbours = (cells.roll(1), cells, cells.roll(-1))
    products = [reduce(torch.bitwise_and, [neighbours[i] for i in product]) for product in _polynomial(rule)]
    return reduce(torch.bitwise_xor, products, torch.full_like(cells, rule & 1))


@cache
def _polynomial(rule: int) -> tuple[tuple[int, ...], ...]:
    """The rule as a sum modulo 2 of products, less the constant rule & 1: the neighbours (0 left, 1 centre, 2 right) in each product."""
    if not 0 <= rule <= 255:
        raise UserError(f"rule={rule} is out of bounds [0, 255]: rules 30 and 116 are known to work")
    odd = [bits for bits in range(1, 8) if sum(rule >> below & 1 for below in range(8) if below & bits == below) % 2]
    return tuple(tuple(i for i in range(3) if bits & 4 >> i) for bits in odd)


def automaton_matrix(rows: int, cols: int, rule: int, generator: torch.Generator, std: float = 1.0) -> Tensor:
    """A matrix [rows, cols] float32 of two values, read from the automaton: mean 0 and standard deviation `std` over its entries.

    generator: a CPU generator that draws the first row of the ring and the cell of each column; nothing else is random.
    Raises UserError when the automaton leaves all entries alike (a rule that dies out, a matrix of one entry).
    """
    assert rows > 0 and cols > 0 and std > 0, (rows, cols, std)
    for _ in range(_TRIES):
        alive = _evolution(rows, cols, rule, generator)
        density = alive.double().mean().item()
        if 0 < density < 1:
            odds = (1 - density) / density  # alive = sqrt(odds), dead = -1/sqrt(odds): mean 0, variance 1
            return torch.where(alive, std * odds**0.5, -std * odds**-0.5).float()
    raise UserError(f"rule={rule} gives a constant {rows} x {cols} matrix: rules 30 and 116 give a varied one from two entries on")


def _evolution(rows: int, cols: int, rule: int, generator: torch.Generator) -> Tensor:
    """Which entries [rows, cols] are alive."""
    places = RING * max(rows, cols)
    cells = torch.randint(0, 2, (APART * places,), generator=generator, dtype=torch.uint8, device="cpu")
    columns = APART * torch.randperm(places, generator=generator, device="cpu")[:cols]
    for _ in range(BURN_IN):
        cells = automaton_step(cells, rule)
    history = torch.empty(rows, cols, dtype=torch.uint8, device="cpu")
    for row in history:
        row.copy_(cells[columns])
        for _ in range(APART):
            cells = automaton_step(cells, rule)
    return history.bool()
