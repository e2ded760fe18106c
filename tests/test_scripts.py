"""base_train, base_eval and chat_cli end to end, as a user runs them: each ends with one JSON line, or with one line of complaint."""

import io
import json
import signal
from pathlib import Path

import pytest

from bio_inspired_nanochat.engine import Piece, Reply
from bio_inspired_nanochat.engine.terminal import Turn
from scripts import base_eval, base_train, chat_cli, enable_synapses
from tests.training.tiny import flags


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, dict]:
    """The records of a vanilla and a synaptic run of 8 steps, the synaptic one newer."""
    folder, records = tmp_path_factory.mktemp("trained"), {}
    with pytest.MonkeyPatch.context() as patch:
        for name, synapses in (("vanilla", 0), ("synaptic", 1)):
            patch.setattr("sys.stdout", out := io.StringIO())
            base_train.main(flags(folder, synapses=synapses, num_iterations=8, **{"optim.matrix_lr": 0.05}))
            records[name] = json.loads(out.getvalue().splitlines()[-1])
    return records


@pytest.fixture
def home(trained, monkeypatch) -> None:
    """A base folder whose checkpoints are those two runs."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(Path(trained["synaptic"]["checkpoint"]).parents[2]))


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def complaint(capsys, script, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        script.main(list(words))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and len(said.err.strip().splitlines()) == 1
    return said.err


@pytest.mark.parametrize("kind", ["vanilla", "synaptic"])
def test_training_prints_the_record_that_scripts_rely_on(trained, kind):
    record = trained[kind]
    assert {"final_loss", "val_bpb", "tok_per_s", "steps", "params", "checkpoint", "first_loss", "resumed_from", "lineage_events"} <= set(
        record
    )
    assert record["final_loss"] < record["first_loss"] and (Path(record["checkpoint"]) / "manifest.json").exists()
    assert record["run_name"] == {"vanilla": "d2", "synaptic": "d2-synaptic"}[kind]


def test_aliases_hyphens_and_the_separator_are_accepted(tmp_path, capsys):
    words = [word for word in flags(tmp_path) if not word.startswith(("--n_embd", "--device_batch_size", "--num_iterations"))]
    base_train.main(["--", *words, "--width=32", "--batch-size", "2", "--max_steps=2"])
    assert last_line(capsys)["tokens"] == 2 * 2 * 32


def test_a_preset_with_a_change_trains(tmp_path, capsys):
    base_train.main([*flags(tmp_path, num_iterations=1), "--synapses=1", "--syn_preset=core", "--syn_cfg.tau_rrp=100.0"])
    record = last_line(capsys)
    config = json.loads((Path(record["log_dir"]) / "config.json").read_text())
    assert record["run_name"] == "d2-synaptic-core"
    assert (config["syn_cfg"]["tau_rrp"], config["syn_cfg"]["barrier"]) == (100.0, "none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--syn_cfg.tau_rrp=100.0"], "add --synapses=1"),
        (["--syn_cfg.tau_rrp=96.0"], "add --synapses=1"),
        (["--synapses=2"], "--synapses=2 is a switch"),
        (["--deptth=3"], "did you mean '--depth'"),
        (["--device_batch_size=0"], "--device_batch_size=0"),
        (["--data_dir=/does/not/exist"], "--data_dir='/does/not/exist' does not exist"),
        (["--resume=/does/not/exist"], "/does/not/exist does not exist"),
        (["--save_every=-2"], "--save_every=-2"),
    ],
)
def test_training_refuses_in_one_line(tmp_path, capsys, words, said):
    assert said in complaint(capsys, base_train, *flags(tmp_path), *words)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_and_a_printed_config_end_with_a_record_too(tmp_path, capsys):
    base_train.main([*flags(tmp_path), "--dry_run=1"])
    assert last_line(capsys)["dry_run"] is True
    base_train.main([*flags(tmp_path), "--print_config=1"])
    assert last_line(capsys)["config"]["depth"] == 2 and not list(tmp_path.iterdir())


def notices(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice: --syn_cfg")]


@pytest.mark.parametrize("stop", [{"print_config": 1}, {"dry_run": 1}, {"num_iterations": 1}])
def test_a_flag_that_changes_nothing_is_named_in_one_line(tmp_path, capsys, stop):
    words = flags(tmp_path, synapses=1, syn_preset="core", save_every=-1, **stop)
    base_train.main([*words, "--syn_cfg.tau_buf=9.0", "--syn_cfg.tau_c=9.0"])
    assert notices(capsys) == ["notice: --syn_cfg.tau_buf has no effect while buffer is off: add --syn_cfg.buffer=1"]


def test_the_notice_follows_the_model_that_is_resumed(tmp_path, capsys):
    words = ["--synapses=1", "--syn_cfg.tau_buf=9.0"]
    base_train.main([*flags(tmp_path, num_iterations=1), *words, "--syn_cfg.buffer=1"])
    base_train.main([*flags(tmp_path, num_iterations=2), *words, "--resume=auto"])
    out = capsys.readouterr().out
    assert "resumed from step 1" in out and "notice: --syn_cfg" not in out


def test_a_flag_that_changes_nothing_in_new_synapses_is_named(trained, tmp_path, capsys):
    enable_synapses.main([f"--source={trained['vanilla']['checkpoint']}", f"--out={tmp_path / 'out'}", "--syn_cfg.barrier_strength=2.0"])
    assert notices(capsys) == []
    enable_synapses.main(
        [
            f"--source={trained['vanilla']['checkpoint']}",
            f"--out={tmp_path / 'core'}",
            "--syn_preset=core",
            "--syn_cfg.barrier_strength=2.0",
        ]
    )
    (line,) = notices(capsys)
    assert "barrier_strength has no effect" in line and "add --syn_cfg.barrier=linear or --syn_cfg.barrier=gated" in line


def test_evaluation_takes_the_newest_checkpoint_and_repeats_its_number(home, trained, capsys):
    base_eval.main(["--eval_tokens=256", "--device=cpu", "--zero_synapses=1", "--max_tokens=8"])
    record = last_line(capsys)
    assert record["checkpoint"] == trained["synaptic"]["checkpoint"] and record["step"] == 8
    assert record["val_bpb"] == pytest.approx(trained["synaptic"]["val_bpb"], rel=1e-6)
    assert record["zero_gains_difference"] == pytest.approx(record["val_bpb_zero_gains"] - record["val_bpb"])
    assert record["val_bpb_zero_gains"] != record["val_bpb"] and len(record["samples"]) == 3


def test_evaluation_of_a_named_run(home, trained, capsys):
    base_eval.main([f"--checkpoint={Path(trained['vanilla']['checkpoint']).parent}", "--eval_tokens=256", "--samples=0"])
    record = last_line(capsys)
    assert record["val_bpb"] == pytest.approx(trained["vanilla"]["val_bpb"], rel=1e-6) and record["samples"] == []


def test_evaluation_refuses_in_one_line(home, trained, capsys, monkeypatch, tmp_path):
    assert "needs a synaptic model" in complaint(capsys, base_eval, f"--checkpoint={trained['vanilla']['checkpoint']}", "--zero_synapses=1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert "train a model with python -m scripts.base_train" in complaint(capsys, base_eval)


def test_chat_continues_one_prompt_the_same_way_twice(home, capsys):
    texts = []
    for _ in range(2):
        chat_cli.main(["--prompt=the king", "--max_tokens=12", "--temperature=0.9"])
        out = capsys.readouterr().out
        record = json.loads(out.splitlines()[-1])
        assert record["text"] in out and record["tokens"] == 12 and record["finish"] == "length"
        texts.append(record["text"])
    assert texts[0] == texts[1]


def test_chat_takes_an_empty_prompt_and_says_when_the_context_is_full(home, capsys):
    chat_cli.main(["--prompt=", "--max_tokens=100", "--temperature=0"])
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["finish"] == "stop" or (record["finish"] == "context" and "[the context is full]" in out)


def test_chat_reads_lines_until_quit(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/help\nthe king\n\n/qit\n" + "long " * 90 + "\n/quit\nnever read\n"))
    chat_cli.main(["--max_tokens=3"])
    out = capsys.readouterr().out
    assert "/quit  end" in out and "did you mean '/quit'" in out and "error: the conversation has" in out
    assert json.loads(out.splitlines()[-1])["tokens"] <= 3


def test_chat_ends_with_its_input(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    chat_cli.main([])
    assert last_line(capsys)["tokens"] == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(home, capsys, monkeypatch):
    drawn = Reply._draw

    def interrupted(self):
        if self.made == [2]:
            signal.raise_signal(signal.SIGINT)
        return drawn(self)

    monkeypatch.setattr(Reply, "_draw", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("the king\n/quit\n"))
    chat_cli.main(["--max_tokens=10", "--temperature=0.9"])
    out = capsys.readouterr().out
    assert "[stopped]" in out and json.loads(out.splitlines()[-1])["finish"] == "interrupted"


def test_what_a_model_says_cannot_command_the_terminal(home, capsys, monkeypatch):
    monkeypatch.setattr(Turn, "__iter__", lambda _: iter([Piece(0, 1, "red \x1b[31m\x07 and\ttab\n")]))
    monkeypatch.setattr(Turn, "finish", "stop")
    chat_cli.main(["--prompt=a"])
    assert "red [31m and\ttab\n" in capsys.readouterr().out


def test_chat_commands_change_the_conversation(home, capsys, monkeypatch, tmp_path):
    lines = [
        "the king \\",
        "said",
        '"""',
        "a block",
        "of two lines",
        '"""',
        f"/save {tmp_path / 'talk.json'}",
        "/temp 0.5",
        "/temp hot",
        "/temp -1",
        "/memory",
        "/memory off",
        "/memory maybe",
        "/save",
        "/save memory.safetensors",
        "/reset",
        "/consolidate",
        "/rollback",
        "/load /does/not/exist",
        f"/load {tmp_path / 'talk.json'}",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    chat_cli.main(["--max_tokens=3", "--temperature=0.9"])
    out = capsys.readouterr().out
    turns = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert turns[-2]["content"] == "a block\nof two lines" and "[the oldest 2 messages did not fit into the context]" in out
    for said in (
        "temperature 0.5",
        "error: 'hot' is not a number",
        "error: temperature=-1",
        "memory on, this model has no fast weights",
        "memory off",
        "/memory maybe is unknown",
        "a file name is missing",
        "no memory to save",
        "new conversation",
        "error: there is nothing to consolidate yet",
        "error: nothing was consolidated",
        "cannot be read",
        "new conversation from",
    ):
        assert said in out, said
