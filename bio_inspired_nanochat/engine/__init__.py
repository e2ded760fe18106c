"""Text from a model: sampling, streaming, conversations, sessions with memory."""

from bio_inspired_nanochat.engine.calculator import calculate
from bio_inspired_nanochat.engine.conversation import Message, fit, render, stop_ids, style_of, transcript
from bio_inspired_nanochat.engine.generation import (
    TUNED_FOLDER,
    Loaded,
    Sampling,
    context_length,
    generate,
    generate_batch,
    load,
    next_tokens,
    source_path,
)
from bio_inspired_nanochat.engine.reply import Piece, Reply, ReplyOptions
from bio_inspired_nanochat.engine.session import ChatSession

__all__ = [
    "TUNED_FOLDER",
    "ChatSession",
    "Loaded",
    "Message",
    "Piece",
    "Reply",
    "ReplyOptions",
    "Sampling",
    "calculate",
    "context_length",
    "fit",
    "generate",
    "generate_batch",
    "load",
    "next_tokens",
    "render",
    "source_path",
    "stop_ids",
    "style_of",
    "transcript",
]
