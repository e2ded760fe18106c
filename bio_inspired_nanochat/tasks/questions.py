"""Small generated questions with one right answer, to train and to measure chat models on, offline.

Each task is seeded and keeps a fifth of its questions from training by a hash of what they ask about, so that a score says more than
that answers were learned by heart. Free answers are judged by the text that the user sees; choices by the model's own likelihood.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.data.conversations import CALL, RESULT, TEXT, Conversation, Part, dialogue
from bio_inspired_nanochat.engine import calculate

HELD_OUT = 5  # one question in so many is kept from training


@dataclass(frozen=True)
class Question:
    """asked: what the user says; parts: the right answer, calls of the calculator included; options: what may be chosen, the right
    one first (empty: a free answer); key: what it is about, which decides whether it is held out.
    """

    asked: str
    parts: tuple[Part, ...]
    options: tuple[str, ...] = ()
    key: str = ""

    @property
    def answer(self) -> str:
        """The right answer as the user sees it."""
        return "".join(part.text for part in self.parts if part.kind == TEXT)

    def conversation(self) -> Conversation:
        """Question and right answer, to learn from."""
        return dialogue(self.asked, self.parts)

    def right(self, said: str) -> bool:
        """Whether a free answer is right: the same text, except for case, blanks around it and a final full stop."""
        return _plain(said) == _plain(self.answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".").casefold()


@dataclass(frozen=True)
class Task:
    """draw: makes a question from a generator; chance: what guessing among the options scores (0: there are none, the answer is free)."""

    name: str
    draw: Callable[[random.Random], Question]
    chance: float

    def sample(self, rng: random.Random, held_out: bool) -> Question:
        """A question from those that are kept from training, or from the others."""
        while True:
            question = self.draw(rng)
            if (stable_hash(self.name, question.key) % HELD_OUT == 0) == held_out:
                return question

    def test(self, count: int, seed: int) -> list[Question]:
        """Held-out questions, the same for a seed; repeated ones are left out where there are enough others."""
        rng, found = random.Random(stable_hash(self.name, "test", seed)), {}
        for _ in range(20 * count):
            question = self.sample(rng, held_out=True)
            found.setdefault(question.asked, question)
            if len(found) == count:
                break
        return list(found.values())


# --- free answers ------------------------------------------------------------------------------------------------------------------

_SIGNS = {"+": ("plus", "+"), "-": ("minus", "-"), "*": ("times", "*")}
_SUMS = ("What is {}?", "How much is {}?", "Calculate {}.", "{}?", "Please work out {}.")


def _called(asked: str, expression: str, key: str) -> Question:
    result = calculate(expression)
    assert result is not None, expression
    return Question(asked, (Part(CALL, expression), Part(RESULT, result), Part(TEXT, result)), key=key)


def _arithmetic(rng: random.Random) -> Question:
    sign = rng.choice(tuple(_SIGNS))
    a, b = (rng.randint(2, 12), rng.randint(2, 12)) if sign == "*" else (rng.randint(1, 99), rng.randint(1, 99))
    asked = rng.choice(_SUMS).format(f"{a} {rng.choice(_SIGNS[sign])} {b}")
    first, second = (a, b) if sign == "-" else sorted((a, b))  # 2 + 3 and 3 + 2 are held out together
    return _called(asked, f"{a}{sign}{b}", f"{first}{sign}{second}")


def _counting(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    counts: dict[int, list[str]] = {}
    for letter in sorted({*word, *"aeinrst"}):
        counts.setdefault(word.count(letter), []).append(letter)
    letter = rng.choice(counts[rng.choice(sorted(counts))])  # every number that occurs is as likely
    form = rng.choice(("How many times does {1} occur in {0}?", "How many {1} are in the word {0}?", "Count the letter {1} in {0}."))
    return _called(form.format(word, letter), f'"{word}".count("{letter}")', word)


def _spelling(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    form = rng.choice(("Spell the word {}.", "How do you spell {}?", "Spell {}, please.", "Give me the letters of {}."))
    return Question(form.format(word), (Part(TEXT, " ".join(word)),), key=word)


def _copying(rng: random.Random) -> Question:
    phrase = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    form = rng.choice(("Say: {}", "Repeat after me: {}", "Please repeat: {}", "Write down: {}"))
    return Question(form.format(phrase), (Part(TEXT, phrase),), key=phrase)


# --- choices -----------------------------------------------------------------------------------------------------------------------


def _chosen(asked: str, right: str, wrong: list[str], key: str) -> Question:
    return Question(asked, (Part(TEXT, right),), (right, *wrong), key)


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(10, 100), 2)  # with as many digits, so that the shorter answer is not the likelier one
    form = rng.choice(("Which is larger, {} or {}?", "Which number is larger: {} or {}?", "Is {} or {} the larger number?"))
    return _chosen(form.format(a, b), str(max(a, b)), [str(min(a, b))], f"{min(a, b)} {max(a, b)}")


def _kinds(rng: random.Random) -> Question:
    name, *others = rng.sample(tuple(KINDS), 4)
    right, wrong = rng.choice(KINDS[name]), [rng.choice(KINDS[other]) for other in others]
    listed = [right, *wrong]
    rng.shuffle(listed)
    return _chosen(f"Which of these is {name}: {', '.join(listed[:3])} or {listed[3]}?", right, wrong, f"{name} {' '.join(sorted(listed))}")


def _following(rng: random.Random) -> Question:
    order = rng.choice(ORDERS)
    place = rng.randrange(len(order) - 1)
    step, side = rng.choice(((1, "after"), (-1, "before")))
    here, right = (order[place], order[place + 1]) if step == 1 else (order[place + 1], order[place])
    wrong = rng.sample([word for word in order if word not in (here, right)], 3)
    return _chosen(f"What comes {side} {here}?", right, wrong, f"{side} {here}")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KINDS: dict[str, tuple[str, ...]] = {
    "a fruit": ("apple", "plum", "pear", "cherry", "grape", "lemon", "peach", "melon"),
    "an animal": ("dog", "horse", "sheep", "mouse", "rabbit", "goat", "wolf", "bear"),
    "a colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "purple"),
    "furniture": ("table", "chair", "bed", "shelf", "sofa", "desk", "bench", "stool"),
    "a part of the body": ("hand", "foot", "nose", "knee", "ear", "arm", "shoulder", "finger"),
    "something to wear": ("coat", "hat", "shirt", "shoe", "glove", "scarf", "dress", "sock"),
    "a tool": ("hammer", "saw", "knife", "spade", "needle", "rope", "drill", "brush"),
}
ORDERS: tuple[tuple[str, ...], ...] = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    _listed("January February March April May June July August September October November December"),
    _listed("one two three four five six seven eight nine ten eleven twelve"),
    tuple(str(number) for number in range(1, 61)),
    tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
)
WORDS: tuple[str, ...] = _listed(
    """
    river stone garden window table bread butter silver golden winter summer spring autumn morning evening mountain valley forest
    meadow island harbour castle tower bridge village market street corner kitchen chamber candle lantern mirror curtain pillow blanket
    letter paper pencil basket bottle copper engine wheel hammer needle thread button pocket jacket finger shoulder heart voice silence
    thunder lightning shadow sunrise sunset planet comet feather sparrow pigeon raven falcon spider beetle butterfly honey flower petal
    branch root acorn chestnut cherry lemon orange melon carrot pepper onion potato tomato cabbage sugar coffee cinnamon salt water ocean
    wave storm breeze desert canyon glacier volcano pebble sand crystal diamond ruby emerald pearl wooden leather cotton velvet ribbon
    hello friend mother father sister brother cousin teacher doctor farmer sailor baker painter writer singer dancer king queen prince
    story poem riddle song melody rhythm drum violin trumpet piano guitar flute letterbox calendar minute hour second week month year
    yellow purple green brown black white happy quiet gentle clever simple narrow broad heavy light early later almost never always
    cat dog horse sheep goat rabbit mouse tiger lion bear wolf fox deer owl duck goose hen frog snake turtle whale salmon
    """
)

GENERATIVE = (
    Task("arithmetic", _arithmetic, 0.0),
    Task("counting", _counting, 0.0),
    Task("spelling", _spelling, 0.0),
    Task("copying", _copying, 0.0),
)
CHOICE = (Task("larger", _larger, 1 / 2), Task("kinds", _kinds, 1 / 4), Task("following", _following, 1 / 4))
TASKS = {task.name: task for task in (*GENERATIVE, *CHOICE)}
