"""The embedded conversations: small talk, small facts and generated questions, a few turns each, the same ones for a seed."""

from __future__ import annotations

import random

from bio_inspired_nanochat.common import stable_hash
from bio_inspired_nanochat.data.conversations import SYSTEM, TEXT, Conversation, Part, Turn, dialogue
from bio_inspired_nanochat.tasks.questions import TASKS
from bio_inspired_nanochat.tasks.smalltalk import ASKINGS, FACTS, PROMPTS, TALK

CONVERSATIONS = 3000
VALIDATION = 150
SYSTEM_SHARE = 0.05
SYSTEMS = ("You are a friendly small model.", "Be short.", "Answer in one sentence.", "You are helpful and honest.")
_TURNS = (1, 1, 1, 2, 2, 3)
_SOURCES = ("talk", "talk", "talk", "facts", *TASKS)


def embedded_conversations(seed: int = 0) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train and to validate on. Held-out questions (`Task.sample`) occur in the latter alone, PROMPTS in neither."""
    made = []
    for count, held_out in ((CONVERSATIONS, False), (VALIDATION, True)):
        rng = random.Random(stable_hash(seed, "dialogues", held_out))
        made.append([_conversation(rng, held_out) for _ in range(count)])
    return made[0], made[1]


def _conversation(rng: random.Random, held_out: bool) -> Conversation:
    turns: Conversation = ()
    for _ in range(rng.choice(_TURNS)):
        turns += _exchange(rng, held_out)
    if rng.random() < SYSTEM_SHARE:
        return (Turn(SYSTEM, (Part(TEXT, rng.choice(SYSTEMS)),)), *turns)
    return turns


def _exchange(rng: random.Random, held_out: bool) -> Conversation:
    while True:
        exchange = _drawn(rng, held_out)
        if exchange[0].parts[0].text not in PROMPTS:
            return exchange


def _drawn(rng: random.Random, held_out: bool) -> Conversation:
    source = rng.choice(_SOURCES)
    if source == "talk":
        said, answers = rng.choice(TALK)
        return dialogue(rng.choice(said), rng.choice(answers))
    if source == "facts":
        asked, answer = rng.choice(FACTS)
        return dialogue(rng.choice(ASKINGS).format(asked), answer)
    return TASKS[source].sample(rng, held_out).conversation()
