"""Fine-tuning: what is learned, that packed conversations do not meet, that everything else is pre-training's."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from bio_inspired_nanochat.checkpoint import load_checkpoint, load_optimizer
from bio_inspired_nanochat.config import GPTConfig, SynapticConfig, from_dict
from bio_inspired_nanochat.data.conversations import CALL, RESULT, TEXT, Part, dialogue
from bio_inspired_nanochat.data.rows import RowLoader, Transcript
from bio_inspired_nanochat.engine import Message, load, render, transcript
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.training import Callback, TuneConfig, loop, train, tune
from bio_inspired_nanochat.training.gradients import WARM_RUNS
from bio_inspired_nanochat.training.tune import alignment, conversations
from scripts import base_train, chat_cli, chat_sft
from tests.contract import SIZES, make_model
from tests.engine.speakers import tokenizer
from tests.training.tape import Tape, Taped
from tests.training.tiny import small

KINDS = {
    "vanilla": {},
    "synaptic": {"synapses": True},
    "fast": {"synapses": True, "syn_cfg": dataclasses.replace(SynapticConfig(), hebb="delta", rank_eligibility=4)},
    "experts": {"synapses": True, "num_experts": 3, "window_pattern": "SL"},
}
DATA = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    for asked, said in (("the king", "said"), ("a bird", "sang"), ("who", "nobody knew"), ("so", "it was"))
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Four small pre-trained models and a file of conversations."""
    folder = tmp_path_factory.mktemp("tune")
    for name, changes in KINDS.items():
        train(small(folder, run_name=name, max_seq_len=48, eval_tokens=0, num_iterations=3, log_every=0, **changes))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, DATA * 5)))
    return folder


def tuning(home: Path, out: Path, kind: str = "vanilla", **changes) -> TuneConfig:
    places = {"checkpoint_dir": str(out / "sft"), "log_dir": str(out / "runs"), "source": str(home / "checkpoints" / kind)}
    data = {"data": str(home / "chats.jsonl"), "embedded": False, "num_iterations": 6, "log_every": 1, "eval_every": 0, "device": "cpu"}
    return TuneConfig(**{**places, **data, **changes})


# --- what is learned ---------------------------------------------------------------------------------------------------------------


def test_the_assistants_words_calls_and_ends_are_learned_and_nothing_else():
    call = [Part(CALL, "1+1"), Part(RESULT, "2"), Part(TEXT, "two")]
    ids, learned = transcript(dialogue("how much", call, "and now", "so"), tokenizer())
    said = tokenizer().decode([token for token, own in zip(ids, learned, strict=True) if own])
    assert said == "<|python_start|>1+1<|python_end|>two<|assistant_end|>so<|assistant_end|>"
    assert tokenizer().decode(ids) == (
        "<|bos|><|user_start|>how much<|user_end|><|assistant_start|><|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>two"
        "<|assistant_end|><|user_start|>and now<|user_end|><|assistant_start|>so<|assistant_end|>"
    )


def test_a_prompt_is_written_as_in_the_training():
    ids = transcript(dialogue("the king", "said", "who", "a bird"), tokenizer()).ids
    messages = [Message("user", "the king"), Message("assistant", "said"), Message("user", "who")]
    prompt = render(messages, tokenizer(), "chat")
    assert ids[: len(prompt)] == prompt
    assert tokenizer().decode(ids[len(prompt) :]) == "a bird<|assistant_end|>"


def parts(count: int) -> list[Transcript]:
    """Conversations of random tokens and lengths, some with a single target."""
    rng, made = random.Random(5), []
    for number in range(count):
        length = rng.randint(2, 23)
        learned = [place == length - 1 if number % 3 == 0 else place > 0 and rng.random() < 0.5 for place in range(length)]
        learned[-1] = True
        made.append(Transcript([SIZES["bos_token_id"], *(rng.randrange(1, SIZES["vocab_size"]) for _ in range(length - 1))], learned))
    return made


MODELS = {
    "vanilla": {},
    "default": {},
    "full": {},
    "all_fast": {},
    "all_hebb": {},
    "experts": {"num_experts": 4, "expert_slots": 5},
}


@pytest.mark.parametrize(("length", "rows"), [(23, 1), (50, 3)])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_loses_the_token_weighted_mean_of_its_conversations(kind, length, rows):
    alone = make_model("default" if kind == "experts" else kind, **MODELS[kind]).double()
    model = GPT(dataclasses.replace(alone.config, doc_mask=True)).double().eval()
    model.load_state_dict(alone.state_dict())
    made = parts(12)
    loader = RowLoader(made, SIZES["bos_token_id"], rows, length, align=alignment(alone.config), loop=False)
    total, count = 0.0, 0
    with torch.no_grad():
        while True:
            try:
                idx, targets = loader.next_batch()
            except StopIteration:
                break
            total += float(model.run(idx, targets).loss) * int((targets >= 0).sum())
            count += int((targets >= 0).sum())
        single, single_count = 0.0, 0
        for ids, learned in made:
            tokens = torch.tensor([list(ids)])
            targets = torch.where(torch.tensor([list(learned)]), tokens, -1)
            single += float(alone.token_losses(tokens[:, :-1], targets[:, 1:].contiguous()).double().sum())
            single_count += sum(learned)
    assert count == single_count
    assert total / count == pytest.approx(single / count, abs=1e-6)


# --- runs --------------------------------------------------------------------------------------------------------------------------


class First(Callback):
    """The model as it was before the first step, and the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.state: dict[str, torch.Tensor] = {}

    def on_start(self, run) -> None:
        self.state = {name: value.clone() for name, value in run.model.state_dict().items()}

    def on_step(self, record) -> None:
        self.losses.append(record.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_starts_as_the_base_and_keeps_its_whole_configuration(home, tmp_path, kind):
    first = First()
    record = tune(tuning(home, tmp_path, kind), [first])
    base, tuned = load_checkpoint(home / "checkpoints" / kind), load_checkpoint(record["checkpoint"])
    assert all(torch.equal(value, base.model[name]) for name, value in first.state.items()) and first.state.keys() == base.model.keys()
    assert tuned.meta["kind"] == "sft" and tuned.meta["model_config"] == base.meta["model_config"]
    own = {name for name, value in base.meta["train_config"].items() if tuned.meta["train_config"][name] != value}
    shape = set(base.meta["train_config"]) & {field.name for field in dataclasses.fields(GPTConfig)}
    assert not own & (shape | {"depth", "synapses", "syn_cfg", "tokenizer", "data_dir", "vocab_size", "moe_top_k"})
    assert first.losses[-1] < first.losses[0] - 0.1 and record["val_loss"] is not None
    found = load(record["checkpoint"], torch.device("cpu"))
    assert from_dict(GPTConfig, base.meta["model_config"]) == found.model.config and found.meta["kind"] == "sft"
    assert found.tokenizer.sha256 == load(base.path, torch.device("cpu")).tokenizer.sha256


def test_the_optimizer_goes_on_where_the_base_stopped(home, tmp_path):
    kept = {"num_iterations": 1, "lr_scale": 0.0}
    warm, cold = (tune(tuning(home, tmp_path / str(on), warm_start=on, **kept)) for on in (True, False))
    base = load_optimizer(home / "checkpoints" / "vanilla")["parameters"]
    states = [load_optimizer(record["checkpoint"])["parameters"] for record in (warm, cold)]
    assert [int(state["embed.weight"]["state"]["step"]) for state in states] == [4, 1]
    expected = base["embed.weight"]["state"]["exp_avg"]
    gap = [float((state["embed.weight"]["state"]["exp_avg"] - 0.8 * expected).norm()) for state in states]
    assert gap[0] == pytest.approx(float((states[1]["embed.weight"]["state"]["exp_avg"]).norm()), rel=1e-4)


@pytest.mark.parametrize(("length", "rows"), [(8, 1), (48, 1), (48, 3)])
def test_any_length_and_batch_trains_with_finite_losses(home, tmp_path, length, rows):
    first = First()
    record = tune(tuning(home, tmp_path, "synaptic", max_seq_len=length, device_batch_size=rows, num_iterations=3), [first])
    assert record["tokens"] == 3 * length * rows and all(0 < loss < 100 for loss in first.losses)


def test_accumulated_forwards_weigh_as_one_batch(home, tmp_path):
    whole, cut = First(), First()
    tune(tuning(home, tmp_path / "a", device_batch_size=4, total_batch_size=4 * 16, max_seq_len=16), [whole])
    tune(tuning(home, tmp_path / "b", device_batch_size=1, total_batch_size=4 * 16, max_seq_len=16), [cut])
    assert cut.losses == pytest.approx(whole.losses, abs=2e-4)
    assert whole.losses[-1] < whole.losses[0]


@pytest.mark.parametrize("kind", ["synaptic", "experts"])
def test_replayed_steps_tune_the_same_model(home, tmp_path, monkeypatch, kind):
    """The forwards of a step hold different numbers of targets, so that each has a share of its own."""
    batch = {"device_batch_size": 1, "total_batch_size": 3 * 16, "max_seq_len": 16, "eval_every": 3}
    told = tune(tuning(home, tmp_path / "a", kind, **batch))
    assert load_checkpoint(told["checkpoint"]).meta["train_config"]["graph"] == "0", "auto is decided: this is no GPU"
    monkeypatch.setattr(loop, "Gradients", Taped)
    monkeypatch.setattr(Tape, "played", 0)
    replayed = tune(tuning(home, tmp_path / "b", kind, **batch))
    assert Tape.played == 3 * 6 - WARM_RUNS
    ours, theirs = (load_checkpoint(record["checkpoint"]).model for record in (replayed, told))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stopping_and_resuming_changes_no_bit(home, tmp_path):
    whole, split = First(), First()
    one = tune(tuning(home, tmp_path / "a", "fast"), [whole])
    tune(tuning(home, tmp_path / "b", "fast", stop_after=3), [split])
    two = tune(tuning(home, tmp_path / "b", "fast", resume="auto"), [split], given={"resume"})
    assert two["resumed_from"] == 3 and split.losses == whole.losses and len(set(whole.losses)) == 6
    a, b = (load_checkpoint(record["checkpoint"]).model for record in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_users_own_conversations_join_the_embedded_ones_and_some_are_held_out(home):
    config = TuneConfig(data=str(home / "chats.jsonl"))
    train_part, val_part = conversations(config)
    plain = conversations(TuneConfig())
    assert (len(train_part), len(val_part)) == (len(plain[0]) + 19, len(plain[1]) + 1)
    assert len(conversations(dataclasses.replace(config, embedded=False, val_data=config.data))[1]) == 20


# --- the script --------------------------------------------------------------------------------------------------------------------


def test_the_script_tunes_and_the_model_answers_as_source_sft(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = [f"--source={home / 'checkpoints' / 'synaptic'}", "--device=cpu", "--max_steps=2", f"--log_dir={tmp_path / 'runs'}"]
    chat_sft.main([*words, "--eval_tokens=96", "--sample_every=2"])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert (record["steps"], record["stopped"]) == (2, None) and "sft_checkpoints/synaptic-sft" in record["checkpoint"]
    assert any("scripts.chat_cli --source=" in line for line in lines) and sum(line.startswith("sample") for line in lines) == 3
    chat_cli.main(["--source=sft", "--prompt=the king", "--max_tokens=3", "--device=cpu"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoint"] == record["checkpoint"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--embedded=0"], "--embedded=0 without --data"),
        (["--max_seq_len=49"], "max_seq_len=49 is longer than the context 48"),
        (["--data=nowhere.jsonl"], "data=nowhere.jsonl does not exist"),
        (["--source=nowhere"], "--source=nowhere does not exist"),
        (["--resume=7"], "resume=7"),
        (["--lr_scale=-1"], "--lr_scale=-1"),
        (["--graph=1"], "graph=1 is for one process on CUDA, and this is device=cpu"),
    ],
)
def test_the_script_refuses_in_one_line(home, tmp_path, capsys, words, said):
    places = [f"--source={home / 'checkpoints' / 'vanilla'}", f"--log_dir={tmp_path}", f"--checkpoint_dir={tmp_path}", "--device=cpu"]
    with pytest.raises(SystemExit) as stopped:
        chat_sft.main([*places, *words])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_pre_training_does_not_go_on_with_a_tuned_model_nor_tuning_with_a_base(home, tmp_path, capsys):
    record = tune(tuning(home, tmp_path, num_iterations=1))
    with pytest.raises(SystemExit):
        base_train.main([f"--resume={record['checkpoint']}", "--device=cpu"])
    assert "scripts.chat_sft --resume" in capsys.readouterr().err
    with pytest.raises(UserError, match="give it as --source"):
        tune(tuning(home, tmp_path, resume=str(home / "checkpoints" / "vanilla")))
