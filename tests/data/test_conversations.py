"""Conversations from files, and as rows in which they do not meet."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bio_inspired_nanochat.data.conversations import CALL, RESULT, TEXT, Part, dialogue, read_conversations
from bio_inspired_nanochat.data.rows import RowLoader, Transcript, pack
from bio_inspired_nanochat.errors import UserError

BOS = 99
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


# --- files -------------------------------------------------------------------------------------------------------------------------


def test_lines_are_lists_of_messages_or_objects_with_them(tmp_path):
    path = write(tmp_path / "a.jsonl", HELLO, "", {"messages": HELLO, "id": 3})
    assert read_conversations(path) == [dialogue("Hello", "Hi!")] * 2
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_conversations(path) == [dialogue("Hello", "Hi!")] * 2, "as some editors write it"


def test_a_folder_is_read_in_name_order_and_other_files_are_left(tmp_path):
    write(tmp_path / "b.jsonl", [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}])
    write(tmp_path / "a.jsonl", HELLO)
    write(tmp_path / "c.txt", "no conversation")
    assert [conversation[0].parts[0].text for conversation in read_conversations(tmp_path)] == ["Hello", "2"]


def test_an_answer_may_have_parts(tmp_path):
    parts = [{"type": "text", "text": "So "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    (found,) = read_conversations(write(tmp_path / "a.jsonl", [HELLO[0], {"role": "assistant", "content": parts}]))
    assert found[1].parts == (Part(TEXT, "So "), Part(CALL, "1+1"), Part(RESULT, "2"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2 is not JSON"),
        ({"text": "hello"}, "line 2 has no messages"),
        ([], "line 2 has no messages"),
        ([{"role": "robot", "content": "x"}], "message 1 has role 'robot': one of system, user, assistant"),
        (["hello"], "message 1 is no object"),
        ([HELLO[0]], "line 2 has no answer"),
        ([HELLO[0], HELLO[0]], "line 2 has user as speaker 2"),
        ([HELLO[1]], "line 2 has assistant as speaker 1"),
        ([HELLO[0], {"role": "system", "content": "x"}], "line 2 has system as speaker 2"),
        ([HELLO[0], {"role": "assistant", "content": ""}], "message 2 is empty"),
        ([HELLO[0], {"role": "assistant", "content": 3}], "message 2 has no content"),
        ([{"role": "user", "content": [{"type": "python", "text": "1"}]}, HELLO[1]], "part of type 'python' that is none of text"),
    ],
)
def test_what_is_no_conversation_is_one_line_with_its_place(tmp_path, line, said):
    with pytest.raises(UserError) as raised:
        read_conversations(write(tmp_path / "a.jsonl", HELLO, line))
    assert said in str(raised.value) and "a.jsonl" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl", "latin.jsonl"])
def test_files_without_conversations_are_refused(tmp_path, name):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(UserError, match=name):
        read_conversations(tmp_path / name)


# --- rows --------------------------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=400),
    align=st.sampled_from([1, 4, 8]),
)
def test_every_item_is_packed_once_and_fits(lengths, align):
    rows = pack(lengths, range(len(lengths)), 17, align)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    for row in rows:
        start = 0
        for item in row:
            start = -(-start // align) * align + lengths[item]
            assert start <= 17


def transcripts(count: int, longest: int = 14) -> list[Transcript]:
    made = []
    for number in range(count):
        length = 3 + number * 5 % longest
        made.append(Transcript([BOS, *range(1, length)], [place >= length // 2 for place in range(length)]))
    return made


def test_targets_are_the_next_learned_tokens_and_nothing_else():
    loader = RowLoader(transcripts(6), BOS, 3, 32, align=4)
    idx, targets = loader.next_batch()
    assert idx.shape == targets.shape == (3, 32) and (targets >= 0).any(dim=1).all()
    row = torch.cat([idx[0], torch.tensor([BOS])])
    learned = targets[0] >= 0
    assert torch.equal(targets[0][learned], row[1:][learned]) and BOS not in targets[0]
    starts = [place for place in range(31) if idx[0, place] == BOS and idx[0, place + 1] != BOS]
    assert len(starts) > 1 and all(place % 4 == 0 for place in starts)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_pass_shows_every_conversation_once(batch):
    made = transcripts(40)
    loader = RowLoader(made, BOS, batch, 24, loop=False)
    seen = 0
    with pytest.raises(StopIteration):
        while True:
            seen += int((loader.next_batch()[1] >= 0).sum())
    assert seen == sum(sum(transcript.learned) for transcript in made)


def test_ranks_share_the_batches_of_one_process():
    alone = RowLoader(transcripts(50), BOS, 4, 24)
    pair = [RowLoader(transcripts(50), BOS, 2, 24, rank=rank, world=2) for rank in (0, 1)]
    for _ in range(12):
        whole = alone.next_batch()[0]
        assert torch.equal(whole, torch.cat([loader.next_batch()[0] for loader in pair]))
    assert alone.epoch == pair[0].epoch == pair[1].epoch > 1


def test_passes_differ_and_resume_exactly():
    loader = RowLoader(transcripts(50), BOS, 4, 24, seed=3)
    for _ in range(loader.rows // 4 + 2):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state_dict()))
    assert loader.epoch == 1
    again = RowLoader(transcripts(50), BOS, 4, 24, seed=3)
    again.load_state_dict(state)
    for _ in range(10):
        assert torch.equal(loader.next_batch()[1], again.next_batch()[1])
    assert again.state_dict() == loader.state_dict()
    first, second = (RowLoader(transcripts(50), BOS, 4, 24, seed=seed).next_batch()[0] for seed in (3, 4))
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match="other conversations"):
        RowLoader(transcripts(49), BOS, 4, 24, seed=3).load_state_dict(state)


def test_long_conversations_lose_their_end_and_those_without_an_answer_are_left_out():
    late = Transcript([BOS, *range(1, 60)], [False] * 50 + [True] * 10)
    loader = RowLoader([*transcripts(3, 40), late], BOS, 2, 8)
    assert loader.left_out == 1 and loader.cut == 1
    with pytest.raises(UserError, match="longer --max_seq_len"):
        RowLoader([late], BOS, 2, 8)
