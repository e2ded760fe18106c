"""Conversations: what is read, what is kept, what is forgotten, and how an answer ends."""

import pytest
import torch

from bio_inspired_nanochat.engine import ChatSession, Message, Reply, ReplyOptions, Sampling, fit, generate, render, stop_ids
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.synaptic import SynapticConfig
from tests.engine.speakers import Script, speaker, tokenizer

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, seed=3)


def special(name: str) -> int:
    return tokenizer().special(f"<|{name}|>")


def tokens(reply: Reply) -> list[list[int]]:
    """Token ids of each answer."""
    rows: list[list[int]] = [[] for _ in reply.finish]
    for pieces in reply:
        for piece in pieces:
            if piece.token >= 0:
                rows[piece.answer].append(piece.token)
    return rows


def reply(loaded, ids, stops=frozenset(), **options) -> Reply:
    return Reply(loaded.model, loaded.tokenizer, ids, ReplyOptions(**options), stops)


def text_of(made: Reply) -> str:
    return "".join(piece.text for pieces in made for piece in pieces if not piece.tool)


# --- conversations as tokens -----------------------------------------------------------------------------------------------------


def test_a_conversation_is_written_with_the_tokens_of_its_roles():
    messages = [Message("system", "be kind"), Message("user", "hi"), Message("assistant", "yes"), Message("user", "<|bos|>")]
    said = tokenizer().decode(render(messages, tokenizer(), "chat"))
    assert said == (
        "<|bos|><|user_start|>be kind\n\nhi<|user_end|><|assistant_start|>yes<|assistant_end|><|user_start|><|bos|><|user_end|><|assistant_start|>"
    )
    ids = render(messages, tokenizer(), "chat")
    assert ids.count(special("bos")) == 1, "what people write never becomes a special token"
    assert render(messages[1:2], tokenizer(), "text") == tokenizer().encode("hi", bos=True)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ([Message("assistant", "a")], "end the conversation with a message of the user"),
        ([Message("system", "a")], "end the conversation"),
        ([Message("user", "a"), Message("system", "b")], "only the first"),
        ([Message("robot", "a")], "role='robot' is unknown"),
    ],
)
def test_a_conversation_out_of_order_is_an_error(messages, said):
    with pytest.raises(UserError, match=said):
        render(messages, tokenizer(), "chat")


def test_the_oldest_turns_are_dropped_and_counted():
    messages = [Message("system", "s")]
    for turn in range(6):
        messages += [Message("user", f"the king {turn}"), Message("assistant", "the bird")]
    messages.append(Message("user", "last"))
    whole = render(messages, tokenizer(), "chat")
    with pytest.raises(UserError, match="shorten it by 1 or more"):
        fit(messages, tokenizer(), "chat", len(whole) - 1)
    ids, dropped = fit(messages, tokenizer(), "chat", len(whole) - 1, "drop_oldest")
    assert dropped == 2 and ids == render([messages[0], *messages[3:]], tokenizer(), "chat")
    short = render([messages[0], messages[-1]], tokenizer(), "chat")
    assert fit(messages, tokenizer(), "chat", len(short), "drop_oldest") == (short, 12)
    with pytest.raises(UserError, match="shorten"):
        fit(messages, tokenizer(), "chat", len(short) - 1, "drop_oldest")


def test_a_very_long_conversation_is_not_read_once_for_every_turn_that_is_dropped(monkeypatch):
    messages = [Message(("user", "assistant")[turn % 2], "the king said " * 8) for turn in range(401)]
    size = len(render(messages[-9:], tokenizer(), "chat"))
    read = []
    encode = type(tokenizer()).encode
    monkeypatch.setattr(type(tokenizer()), "encode", lambda self, text, bos=False: read.append(text) or encode(self, text, bos))
    ids, dropped = fit(messages, tokenizer(), "chat", size, "drop_oldest")
    assert (len(ids), dropped) == (size, 392) and len(read) < 4 * len(messages)


# --- one reply ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vanilla", "default", "fast_delta"])
def test_a_reply_says_what_generate_says(kind):
    loaded = speaker(kind)
    ids = tokenizer().encode("the king said", bos=True)
    expected = list(generate(loaded.model, ids, 12, temperature=1.0, seed=3, stop_ids=stop_ids(tokenizer())))
    assert tokens(reply(loaded, ids, stop_ids(tokenizer()), max_tokens=12, sampling=WARM)) == [expected]


def test_several_answers_share_one_prefill_and_equal_those_made_alone():
    loaded = speaker("fast_delta")
    ids = tokenizer().encode("the king said", bos=True)
    read = []
    step, loaded.model.step = loaded.model.step, lambda idx, *a, **k: (read.append(tuple(idx.shape)), step(idx, *a, **k))[1]
    together = tokens(reply(loaded, ids, max_tokens=8, n=3, sampling=WARM))
    assert read[0] == (1, len(ids)) and all(shape == (3, 1) for shape in read[1:])
    alone = [tokens(reply(loaded, ids, max_tokens=8, sampling=Sampling(temperature=1.0, seed=3 + i)))[0] for i in range(3)]
    assert together == alone and len(set(map(tuple, alone))) == 3


def test_an_answer_that_ends_leaves_the_others_alone():
    loaded = speaker("default")
    ids = tokenizer().encode("the king", bos=True)
    free = tokens(reply(loaded, ids, max_tokens=10, n=3, sampling=WARM))
    stop = free[1][3]
    made = reply(loaded, ids, {stop}, max_tokens=10, n=3, sampling=WARM)
    assert tokens(made) == [row[: row.index(stop)] if stop in row else row for row in free]
    assert made.finish == ["stop" if stop in row else "length" for row in free]


def test_cancelling_ends_before_the_next_token():
    loaded = speaker()
    made = reply(loaded, tokenizer().encode("the king", bos=True), max_tokens=50, sampling=WARM)
    seen = 0
    for pieces in made:
        seen += len(pieces)
        if seen == 3:
            made.cancel()
    assert (seen, made.finish, made.made) == (3, ["cancelled"], [3])


def test_cancelling_ends_a_long_prompt_too():
    loaded = speaker(sequence_len=1200)
    made = reply(loaded, [1] * 1000, max_tokens=5)
    assert next(made) == []
    made.cancel()
    assert list(made) == [[]] and made.state.pos.tolist() == [256] and made.finish == ["cancelled"]


def test_a_full_context_ends_an_answer():
    loaded = speaker(sequence_len=16)
    made = reply(loaded, [1] * 12, max_tokens=50, sampling=WARM)
    assert len(tokens(made)[0]) == 4 and made.finish == ["context"]
    with pytest.raises(UserError, match="16 tokens, the context holds 16"):
        reply(loaded, [1] * 16)


def test_a_stop_text_is_cut_off_wherever_the_tokens_fall():
    loaded, free = speaker(), tokenizer().encode("say abc then abcd and more")
    for stop, shown in (("abcd", "say abc then "), ("n abcd", "say abc the"), ("and more!", "say abc then abcd and more"), ("s", "")):
        script = Script(loaded, [*free, special("assistant_end")])
        script.prompt = 1
        made = Reply(script, tokenizer(), [1], ReplyOptions(max_tokens=60, sampling=GREEDY, stop=(stop, "zzz")), stop_ids(tokenizer()))
        assert text_of(made) == shown and made.finish == ["stop"]


def test_half_a_character_is_never_shown():
    script = Script(speaker(), [*tokenizer().encode("aé🙂"), special("assistant_end")])
    script.prompt = 1
    made = Reply(script, tokenizer(), [1], ReplyOptions(max_tokens=60, sampling=GREEDY), stop_ids(tokenizer()))
    pieces = [piece.text for step in made for piece in step]
    assert "".join(pieces) == "aé🙂" and "\ufffd" not in "".join(pieces)


def test_half_a_character_does_not_cross_the_border_of_a_call():
    """Bytes of a euro sign before, in and behind a call: each side shows its own half as one sign of replacement, or not at all."""
    first, second, third = "€".encode()
    says = [first, second, special("python_start"), third, first, special("python_end"), *tokenizer().encode("done")]
    script = Script(speaker(), [*says, special("python_start"), *tokenizer().encode("1"), first, special("assistant_end")])
    script.prompt = 1
    made = Reply(script, tokenizer(), [1], ReplyOptions(max_tokens=90, sampling=GREEDY), stop_ids(tokenizer()))
    pieces = [piece for step in made for piece in step]
    assert "".join(piece.text for piece in pieces if not piece.tool) == "\ufffddone"
    assert "€" not in "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(("expression", "result"), [("12*12", "144"), ("import os", None)])
def test_the_result_of_a_calculation_is_put_into_the_answer(expression, result):
    call = [special("python_start"), *tokenizer().encode(expression), special("python_end")]
    answer = [] if result is None else [special("output_start"), *tokenizer().encode(result), special("output_end")]
    # What the script "says" while the result is read does not matter: those tokens are given, not drawn.
    script = Script(speaker(), [*call, *[1] * len(answer), *tokenizer().encode("done"), special("assistant_end")])
    script.prompt = 1
    made = Reply(script, tokenizer(), [1], ReplyOptions(max_tokens=90, sampling=GREEDY), stop_ids(tokenizer()))
    pieces = [piece for step in made for piece in step]
    assert [piece.token for piece in pieces][: len(call) + len(answer)] == call + answer
    assert "".join(piece.text for piece in pieces if not piece.tool) == "done"
    assert "".join(piece.text for piece in pieces if piece.tool == "output") == (result or "")


def test_without_tools_a_call_is_left_alone():
    call = [special("python_start"), *tokenizer().encode("1+1"), special("python_end"), special("assistant_end")]
    script = Script(speaker(), call)
    script.prompt = 1
    made = Reply(script, tokenizer(), [1], ReplyOptions(max_tokens=90, sampling=GREEDY, tools=False), stop_ids(tokenizer()))
    assert tokens(made) == [call[:-1]]


def test_vitals_are_those_of_the_state():
    loaded = speaker("default", syn_cfg=SynapticConfig(hebb="delta", tick=4, theta=-1.0, alpha_ca=0.5))
    made = reply(loaded, tokenizer().encode("the king said to his friend", bos=True), max_tokens=12, sampling=WARM, vitals_every=4)
    seen = []
    for _ in made:
        if made.vitals is not None and made.vitals not in seen:
            seen.append(made.vitals)
    assert len(seen) >= 3
    layer, state = seen[-1][0], made.state.layers[0]
    assert len(layer["calcium"]) == 4 and 0 < min(layer["vesicles"]) <= 1 and "energy" not in layer
    assert any(value > 0 for value in layer["calcium"]) and set(layer["fast"]) == set(state.fast)
    vanilla = reply(speaker("vanilla"), [1], max_tokens=3, vitals_every=1)
    assert [vanilla.vitals for _ in vanilla][-1] == [{}, {}]


def test_random_releases_give_an_uncertainty_and_repeat():
    loaded = speaker("full")
    ids = tokenizer().encode("the king said to his old friend", bos=True)
    pieces = [[piece for step in reply(loaded, ids, max_tokens=16, samples=4, sampling=WARM) for piece in step] for _ in range(2)]
    assert pieces[0] == pieces[1] and any(piece.uncertainty > 0 for piece in pieces[0])
    with pytest.raises(UserError, match="no vesicle at random"):
        reply(speaker("default"), ids, samples=4)
    with pytest.raises(UserError, match="samples=1"):
        ReplyOptions(samples=1)


# --- sessions ------------------------------------------------------------------------------------------------------------------------


def say(session: ChatSession, text: str, count: int = 6, **options) -> list[int]:
    turn = session.ask(text, ReplyOptions(max_tokens=count, sampling=WARM, **options))
    return [piece.token for piece in turn if piece.token >= 0]


@pytest.mark.parametrize("kind", ["vanilla", "fast_delta"])
def test_a_second_turn_equals_reading_the_whole_conversation(kind):
    loaded = speaker(kind)
    session = ChatSession(loaded, system="be kind")
    first = say(session, "the king")
    second = say(session, "the bird")
    ids = render([Message("user", "be kind\n\nthe king")], tokenizer(), "chat") + first + [special("assistant_end")]
    ids += render([Message("user", "the bird")], tokenizer(), "chat")[1:]
    assert tokens(reply(loaded, ids, stop_ids(tokenizer()), max_tokens=6, sampling=WARM)) == [second]
    assert [message.role for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_with_memory_the_next_conversation_starts_with_the_fast_weights_of_the_last():
    loaded = speaker("fast_delta")
    fresh = say(ChatSession(loaded), "the river", 20)
    keen, forgetful = ChatSession(loaded), ChatSession(loaded, memory=False)
    for session in (keen, forgetful):
        say(session, "the king said to his old friend that a small bird sang", 20)
        kept = session.engram()
        session.reset()
    assert say(forgetful, "the river", 20) == fresh
    state = loaded.model.init_state(1, 256, engram=keen.engram())
    assert torch.equal(state.layers[0].fast["mlp_in"].weights, kept.layers[0]["fast.mlp_in.weights"])
    assert bool(kept.layers[0]["fast.mlp_in.weights"].abs().sum() > 0)
    keen.forget()
    keen.reset()
    assert say(keen, "the river", 20) == fresh


def test_memory_survives_in_a_file(tmp_path):
    loaded = speaker("fast_delta")
    session = ChatSession(loaded)
    say(session, "the king said to his old friend", 20)
    session.save(tmp_path / "memory.safetensors")
    with pytest.raises(UserError, match="cannot be written"):
        session.save(tmp_path / "nowhere" / "memory.safetensors")
    session.reset()
    expected = say(session, "the river", 20)
    other = ChatSession(loaded)
    other.load(tmp_path / "memory.safetensors")
    assert say(other, "the river", 20) == expected
    with pytest.raises(UserError, match="another model"):
        ChatSession(speaker("fast_delta", syn_cfg=SynapticConfig(hebb="delta", rank_eligibility=3))).load(tmp_path / "memory.safetensors")
    with pytest.raises(UserError, match="no fast weights"):
        ChatSession(speaker("vanilla")).save(tmp_path / "x")


DEEP = ("deep.json", "cannot be read")


def test_a_conversation_survives_in_a_file(tmp_path):
    session = ChatSession(speaker())
    say(session, "the king")
    session.save(tmp_path / "talk.json")
    with pytest.raises(UserError, match="cannot be written"):
        session.save(tmp_path / "talk.json" / "below_a_file.json")
    other = ChatSession(speaker())
    other.load(tmp_path / "talk.json")
    assert other.messages == session.messages
    assert len(say(other, "the bird")) > 0
    say(other, "ü\udcff")  # a byte that a terminal's encoding does not have
    other.save(tmp_path / "talk.json")
    assert "ü" in (tmp_path / "talk.json").read_text()
    session.load(tmp_path / "talk.json")
    assert session.messages == other.messages
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bad.json").write_text('{"messages": 3}')
    for name, said in (("bad.json", "not a saved conversation"), ("none.json", "cannot be read"), ("none", "cannot be read"), DEEP):
        with pytest.raises(UserError, match=said):
            session.load(tmp_path / name)


def test_a_long_conversation_goes_on_without_its_oldest_turns():
    session = ChatSession(speaker(sequence_len=64))
    dropped = []
    for turn in range(8):
        made = session.ask(f"the king said {turn}", ReplyOptions(max_tokens=8, sampling=WARM))
        assert list(made)
        dropped.append(made.dropped)
    assert dropped[0] == 0 and any(dropped) and len(session.messages) < 16
    with pytest.raises(UserError, match="shorten"):
        session.ask("long " * 90)


def test_an_interrupted_answer_leaves_a_usable_conversation():
    session = ChatSession(speaker("fast_delta"))
    turn = iter(session.ask("the king", ReplyOptions(max_tokens=20, sampling=WARM)))
    next(turn)
    turn.close()
    assert [message.role for message in session.messages] == ["user", "assistant"]
    assert say(session, "the bird")


def test_only_an_explicit_call_writes_the_model_and_it_can_be_taken_back():
    loaded = speaker("fast_delta")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}

    def changed() -> list[str]:
        return [name for name, value in loaded.model.state_dict().items() if not torch.equal(value, before[name])]

    session = ChatSession(loaded)
    with pytest.raises(UserError, match="ask something first"):
        session.consolidate()
    say(session, "the king")
    assert not changed()
    assert session.consolidate(0.5) > 0 and changed()
    session.rollback()
    assert not changed()
    with pytest.raises(UserError, match="nothing was consolidated"):
        session.rollback()
