"""Problems that only a memory solves: what a row tells early is asked after more tokens than attention reaches.

Every task is generated, seeded, and a language of its own with integer tokens. A row tells something, goes on with distraction
(random filler tokens), and asks. The answer is the target at the last token of a question and never part of the input, so that
one answer cannot give away the next; all other targets are -1. A model whose attention reaches n_layer * (window - 1) tokens, less
than `distance`, has no path from what was told to the question other than a memory, and stays at `chance`.

B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from bio_inspired_nanochat.config.knobs import knob, validate
from bio_inspired_nanochat.errors import UserError

BEGIN, ASK, IS, STOP, THE, HAS, WHAT, OF, CONTEXT_A, CONTEXT_B = range(10)
SPECIAL = 10  # fillers have the ids from here on, then come the task's own words
HELD_OUT = 5  # one name in so many is kept from training


class Episodes(NamedTuple):
    """Rows of a task, all [B, T] int64.

    idx: input tokens; targets: the answer where one is due, else -1; distance: tokens back from there to the last token that told
    the answer, else 0; group: index into the task's `groups`, 0 where nothing is due.
    """

    idx: Tensor
    targets: Tensor
    distance: Tensor
    group: Tensor


class Sessions(NamedTuple):
    """Two sessions of each of B sequences: what the first tells [B, T1], what the second asks [B, T2], the answer [B] to its last token."""

    told: Tensor
    asked: Tensor
    answers: Tensor


class Page:
    """Rows in the making: filler tokens behind a BEGIN, over which a task writes."""

    def __init__(self, generator: torch.Generator, rows: int, length: int, fillers: int) -> None:
        shape, device = (rows, length), generator.device
        self.idx = torch.randint(SPECIAL, SPECIAL + fillers, shape, generator=generator, device=device)
        self.idx[:, 0] = BEGIN
        self.targets = torch.full(shape, -1, dtype=torch.long, device=device)
        self.distance, self.group = torch.zeros(2, *shape, dtype=torch.long, device=device)

    def write(self, start: Tensor | int, tokens: Tensor) -> Tensor:
        """Write tokens [B, n, w], one after the other, from `start` ([B] or one for all) on; the positions [B, n, w] that they take."""
        rows, count, width = tokens.shape
        first = torch.as_tensor(start, device=self.idx.device).expand(rows)
        places = first[:, None] + torch.arange(count * width, device=self.idx.device)
        self.idx.scatter_(1, places, tokens.flatten(1))
        return places.view(rows, count, width)

    def ask(self, start: int, questions: Tensor, answers: Tensor, told: Tensor, group: Tensor | int = 0) -> None:
        """Write questions [B, n, w] from `start` on, whose answers [B, n] were told at the positions `told` [B, n]."""
        places = self.write(start, questions)[..., -1]
        self.targets.scatter_(1, places, answers)
        self.distance.scatter_(1, places, places - told)
        self.group.scatter_(1, places, torch.as_tensor(group, device=places.device).expand_as(places))

    def episodes(self) -> Episodes:
        """What has been written."""
        return Episodes(self.idx, self.targets, self.distance, self.group)


@dataclass(frozen=True)
class MemoryTask:
    """What all tasks share. A task states its vocabulary, the length of a row, what blind guessing scores, and makes rows."""

    distance: int = knob(64, "tokens of distraction between what is told and the first question", lo=1, hi=1 << 16, unit="tokens")
    spread: int = knob(16, "further tokens of distraction at most, drawn for each row", lo=0, hi=1 << 16, unit="tokens")
    fillers: int = knob(32, "words of the distraction", lo=1, hi=1 << 16)

    name: ClassVar[str]
    groups: ClassVar[tuple[str, ...]] = ("all",)
    answers: ClassVar[str] = "values"  # the field that counts the possible answers

    def __post_init__(self) -> None:
        validate(self, prefix=f"{self.name}.")

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens T of a row, the same for all rows."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the possible answers."""
        return 1 / getattr(self, self.answers)

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """`rows` fresh rows on the generator's device."""
        raise NotImplementedError

    def batch(self, source: torch.Generator | int, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and targets [rows, T] from a generator, on its device, or from a seed, on `device`."""
        return self.sample(as_generator(source, device), rows)[:2]

    def at(self, distance: int) -> Self:
        """The same task with another distance."""
        return dataclasses.replace(self, distance=distance)

    def unseen(self) -> Self:
        """The task to measure on: what training keeps back, where the task keeps something back."""
        return self

    @property
    def _words(self) -> int:
        """Id of the first of the task's own words."""
        return SPECIAL + self.fillers

    def _shift(self, generator: torch.Generator, rows: int) -> Tensor:
        """[B] how much later than at its earliest place a row begins to tell."""
        return torch.randint(self.spread + 1, (rows,), generator=generator, device=generator.device)


def as_generator(source: torch.Generator | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator as it is; a seed as a new generator on `device`."""
    return source if isinstance(source, torch.Generator) else torch.Generator(device=device).manual_seed(source)


def distinct(generator: torch.Generator, rows: int, count: int, out_of: int) -> Tensor:
    """[B, count] different numbers below `out_of` in every row, in random order (Floyd's algorithm, Bentley 1987, then a shuffle)."""
    chosen = torch.empty(rows, 0, dtype=torch.long, device=generator.device)
    for last in range(out_of - count, out_of):
        drawn = torch.randint(last + 1, (rows, 1), generator=generator, device=generator.device)
        taken = (chosen == drawn).any(1, keepdim=True)
        chosen = torch.cat([chosen, torch.where(taken, last, drawn)], dim=1)
    return chosen.gather(1, shuffle(generator, rows, count))


def shuffle(generator: torch.Generator, rows: int, count: int) -> Tensor:
    """[B, count] a permutation of 0 .. count - 1 per row."""
    return torch.rand(rows, count, generator=generator, device=generator.device).argsort(1)


def _draw(generator: torch.Generator, rows: int, count: int, below: int) -> Tensor:
    return torch.randint(below, (rows, count), generator=generator, device=generator.device)


def _phrase(*words: Tensor | int) -> Tensor:
    """[B, n, w] from w words: each a token for all, [B, n] or, for several tokens, [B, n, k]."""
    shape = next(word for word in words if isinstance(word, Tensor)).shape[:2]
    first = next(word for word in words if isinstance(word, Tensor))
    parts = [word if isinstance(word, Tensor) else first.new_full(shape, word) for word in words]
    return torch.cat([part[..., None] if part.dim() == 2 else part for part in parts], dim=-1)


@dataclass(frozen=True)
class Recall(MemoryTask):
    """Associative recall: key-value pairs, distraction, then every key once: `k v k v ... ASK k -> v`."""

    pairs: int = knob(8, "key-value pairs of a row", lo=1, hi=1024)
    keys: int = knob(32, "words that can be keys", lo=1, hi=1 << 16)
    values: int = knob(16, "words that can be values", lo=2, hi=1 << 16)

    name: ClassVar[str] = "recall"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys < self.pairs:
            raise UserError(f"recall.keys={self.keys} is less than recall.pairs={self.pairs}: every pair of a row has its own key")

    @property
    def vocab_size(self) -> int:
        """See `MemoryTask`."""
        return self._words + self.keys + self.values

    @property
    def length(self) -> int:
        """See `MemoryTask`."""
        return 1 + self.spread + self.distance + 4 * self.pairs

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """See `MemoryTask`."""
        page = Page(generator, rows, self.length, self.fillers)
        keys = self._words + distinct(generator, rows, self.pairs, self.keys)
        values = self._words + self.keys + _draw(generator, rows, self.pairs, self.values)
        told = page.write(1 + self._shift(generator, rows), _phrase(keys, values))[..., -1]
        order = shuffle(generator, rows, self.pairs)
        questions = _phrase(ASK, keys.gather(1, order))
        page.ask(self.length - 2 * self.pairs, questions, values.gather(1, order), told.gather(1, order))
        return page.episodes()


@dataclass(frozen=True)
class Binding(MemoryTask):
    """Variable binding: `x IS 3 STOP  y IS x STOP  x IS 5 STOP ... ASK y -> 3`.

    Every variable is first given a value. Then `copies` times one takes over the value of another, which is given a new one right
    after: a copy has to hold the value, not the name. All variables are asked; group `copied` are those that hold a copy.
    """

    variables: int = knob(4, "variables of a row", lo=2, hi=256)
    copies: int = knob(1, "how often a variable takes over another's value, which then changes", lo=1, hi=256)
    names: int = knob(16, "words that can be names", lo=2, hi=1 << 16)
    values: int = knob(16, "words that can be values", lo=2, hi=1 << 16)

    name: ClassVar[str] = "binding"
    groups: ClassVar[tuple[str, ...]] = ("given", "copied")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.names < self.variables:
            raise UserError(f"binding.names={self.names} is less than binding.variables={self.variables}: every variable has its own name")

    @property
    def vocab_size(self) -> int:
        """See `MemoryTask`."""
        return self._words + self.names + self.values

    @property
    def length(self) -> int:
        """See `MemoryTask`."""
        return 1 + self.spread + 4 * (self.variables + 2 * self.copies) + self.distance + 2 * self.variables

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """See `MemoryTask`."""
        page = Page(generator, rows, self.length, self.fillers)
        n, literal = self.variables, self._words + self.names
        names = self._words + distinct(generator, rows, n, self.names)
        holds = _draw(generator, rows, n, self.values)
        lines = [_phrase(names, IS, literal + holds, STOP)]
        copied = torch.zeros_like(holds)
        line = torch.arange(n, device=holds.device).repeat(rows, 1)  # which statement each variable's value is from
        for number in range(n, n + 2 * self.copies, 2):
            to = _draw(generator, rows, 1, n)
            source = (to + 1 + _draw(generator, rows, 1, n - 1)) % n
            lines.append(_phrase(names.gather(1, to), IS, names.gather(1, source), STOP))
            old = holds.gather(1, source)
            holds, copied, line = holds.scatter(1, to, old), copied.scatter(1, to, 1), line.scatter(1, to, number)
            new = (old + 1 + _draw(generator, rows, 1, self.values - 1)) % self.values
            lines.append(_phrase(names.gather(1, source), IS, literal + new, STOP))
            holds, copied, line = holds.scatter(1, source, new), copied.scatter(1, source, 0), line.scatter(1, source, number + 1)
        told = page.write(1 + self._shift(generator, rows), torch.cat(lines, dim=1))[..., 2]
        order = shuffle(generator, rows, n)
        asked, value, from_line, kind = (part.gather(1, order) for part in (names, literal + holds, line, copied))
        page.ask(self.length - 2 * n, _phrase(ASK, asked), value, told.gather(1, from_line), kind)
        return page.episodes()


@dataclass(frozen=True)
class Facts(MemoryTask):
    """The fact probe: made-up names (`zib zab ...`) have an attribute, told in one phrasing and asked in another.

    `THE name HAS attribute STOP ... WHAT OF name ASK -> attribute`. A name is a row of syllables. Training never shows the fifth of
    the names whose syllable numbers add up to a multiple of five; `unseen()` asks only about those, whose syllables are all known.
    """

    facts: int = knob(2, "names of a row, each with its attribute", lo=1, hi=256)
    syllables: int = knob(10, "syllables that names are made of, a multiple of five", lo=HELD_OUT, hi=1000)
    name_length: int = knob(3, "syllables of a name", lo=2, hi=5)
    attributes: int = knob(16, "words that can be attributes", lo=2, hi=1 << 16)
    held_out: bool = knob(False, "use the names that training does not show, and only those")

    name: ClassVar[str] = "facts"
    answers: ClassVar[str] = "attributes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.syllables % HELD_OUT:
            low = self.syllables // HELD_OUT * HELD_OUT
            raise UserError(f"facts.syllables={self.syllables} is not a multiple of {HELD_OUT}: use {low} or {low + HELD_OUT}")
        if self.facts > self.num_names:
            raise UserError(f"facts.facts={self.facts} is more than there are names ({self.num_names}): use more syllables")

    @property
    def num_names(self) -> int:
        """How many names there are, of those that are shown."""
        rest = self.syllables // HELD_OUT
        return self.syllables ** (self.name_length - 1) * (rest if self.held_out else self.syllables - rest)

    @property
    def vocab_size(self) -> int:
        """See `MemoryTask`."""
        return self._words + self.syllables + self.attributes

    @property
    def length(self) -> int:
        """See `MemoryTask`."""
        return 1 + self.spread + self.distance + self.facts * (2 * self.name_length + 7)

    def unseen(self) -> Self:
        """The task with names that training never shows."""
        return dataclasses.replace(self, held_out=True)

    def _names(self, numbers: Tensor) -> Tensor:
        """Syllables [..., name_length] (as tokens) of the names with numbers in [0, num_names)."""
        parts, rest = [], numbers
        for _ in range(self.name_length - 1):
            parts.append(rest % self.syllables)
            rest = rest // self.syllables
        # `rest` picks the last syllable: its remainder decides whether the name is held out, its quotient is free
        balance = -torch.stack(parts).sum(0)
        classes = 1 if self.held_out else HELD_OUT - 1
        remainder = (balance + (0 if self.held_out else 1 + rest % classes)) % HELD_OUT
        parts.append(rest // classes * HELD_OUT + remainder)
        return self._words + torch.stack(parts, dim=-1)

    def _tell(self, generator: torch.Generator, page: Page, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write the facts about the names [B, facts]; syllables [B, facts, name_length], attributes and their places [B, facts]."""
        names, rows = self._names(numbers), len(numbers)
        attributes = self._words + self.syllables + _draw(generator, rows, self.facts, self.attributes)
        places = page.write(1 + self._shift(generator, rows), _phrase(THE, names, HAS, attributes, STOP))[..., -2]
        return names, attributes, places

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """See `MemoryTask`."""
        page = Page(generator, rows, self.length, self.fillers)
        names, attributes, told = self._tell(generator, page, distinct(generator, rows, self.facts, self.num_names))
        order = shuffle(generator, rows, self.facts)
        asked = names.gather(1, order[..., None].expand_as(names))
        questions = _phrase(WHAT, OF, asked, ASK)
        page.ask(self.length - self.facts * (self.name_length + 3), questions, attributes.gather(1, order), told.gather(1, order))
        return page.episodes()

    def sessions(self, source: torch.Generator | int, rows: int, lead: int = 8, device: torch.device | str = "cpu") -> Sessions:
        """The probe in two sessions: the first tells and goes on with distraction, the second, after `lead` fillers, asks about the first
        of the facts. No name occurs in two rows. Raises UserError when there are not enough names.
        """
        generator = as_generator(source, device)
        if rows * self.facts > self.num_names:
            raise UserError(f"{rows} sessions of {self.facts} facts need more than the {self.num_names} names: use more syllables")
        numbers = distinct(generator, 1, rows * self.facts, self.num_names).view(rows, self.facts)
        told = Page(generator, rows, self.length - self.facts * (self.name_length + 3), self.fillers)
        names, attributes, _ = self._tell(generator, told, numbers)
        asked = Page(generator, rows, 1 + lead + self.name_length + 3, self.fillers)
        asked.write(1 + lead, _phrase(WHAT, OF, names[:, :1], ASK))
        return Sessions(told.idx, asked.idx, attributes[:, 0])


@dataclass(frozen=True)
class Switching(MemoryTask):
    """Learn mapping A, learn mapping B, go back to A: `A k v ... ASK A k -> v   B k w ... ASK B k -> w   ASK A k -> v`.

    Both map the same keys, to different values, so that B must not overwrite A. All keys are asked in each of the three phases.
    """

    pairs: int = knob(4, "keys of a row, mapped by both", lo=1, hi=1024)
    keys: int = knob(16, "words that can be keys", lo=1, hi=1 << 16)
    values: int = knob(16, "words that can be values", lo=2, hi=1 << 16)
    refresh: int = knob(0, "pairs of A that are told again when A returns", lo=0, hi=1024)

    name: ClassVar[str] = "switching"
    groups: ClassVar[tuple[str, ...]] = ("A", "B", "A again")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys < self.pairs:
            raise UserError(
                f"switching.keys={self.keys} is less than switching.pairs={self.pairs}: every pair of a mapping has its own key"
            )
        if self.refresh > self.pairs:
            raise UserError(
                f"switching.refresh={self.refresh} is more than switching.pairs={self.pairs}: that is all there is to tell again"
            )

    @property
    def vocab_size(self) -> int:
        """See `MemoryTask`."""
        return self._words + self.keys + self.values

    @property
    def length(self) -> int:
        """See `MemoryTask`."""
        return 1 + 3 * (self.spread + self.distance + 3 * self.pairs) + 3 * (2 * self.pairs + self.refresh)

    def sample(self, generator: torch.Generator, rows: int) -> Episodes:
        """See `MemoryTask`."""
        page, literal = Page(generator, rows, self.length, self.fillers), self._words + self.keys
        keys = self._words + distinct(generator, rows, self.pairs, self.keys)
        first = _draw(generator, rows, self.pairs, self.values)
        second = (first + 1 + _draw(generator, rows, self.pairs, self.values - 1)) % self.values
        start, told_a = 1, keys  # where the values of context A were told, once that is done
        for phase, (context, values) in enumerate(((CONTEXT_A, first), (CONTEXT_B, second), (CONTEXT_A, first))):
            count = self.refresh if phase == 2 else self.pairs
            shown = _phrase(context, keys, literal + values)[:, :count]
            told = page.write(start + self._shift(generator, rows), shown)[..., -1]
            told_a = told if phase == 0 else told_a
            if phase == 2:
                told = torch.cat([told, told_a[:, count:]], dim=1)
            start += self.spread + 3 * count + self.distance
            order = shuffle(generator, rows, self.pairs)
            questions = _phrase(ASK, context, keys.gather(1, order))
            page.ask(start, questions, literal + values.gather(1, order), told.gather(1, order), phase)
            start += 3 * self.pairs
        return page.episodes()


TASKS: Mapping[str, type[MemoryTask]] = {task.name: task for task in (Recall, Binding, Facts, Switching)}
