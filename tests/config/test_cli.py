"""The command line: names, values and one line for everything that is wrong."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bio_inspired_nanochat.config import (
    PRESETS,
    REQUIRED,
    GPTConfig,
    SynapticConfig,
    knob,
    parse,
    parse_command,
    parse_with_given,
    validate,
)
from bio_inspired_nanochat.config.knobs import format_number
from bio_inspired_nanochat.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Run:
    """A run of a small script."""

    depth: int = knob(4, "the one dial", lo=1, hi=64, unit="blocks")
    n_embd: int | None = knob(None, "width of the model", lo=8, hi=4096, aliases=("width",))
    lr: float = knob(0.02, "learning rate", lo=1e-6, hi=10.0, log=True)
    clip: float | None = knob(None, "gradient norm limit", lo=0.0)
    synapses: bool = knob(False, "synaptic attention")
    device: str = knob("auto", "where to run", choices=("auto", "cpu", "cuda"))
    data_dir: str | None = knob(None, "folder of shards", path="dir")
    resume: str | None = knob(None, "what to go on from", none="none")
    note: str = knob("", "free text")
    contexts: tuple[int, ...] = knob((256, 1024), "context lengths", lo=1, hi=65536)
    syn_preset: str = knob("default", "named synapse constants")
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses")

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd is not None and self.n_embd % 8:
            raise UserError(f"n_embd={self.n_embd} is not a multiple of 8")


@dataclass(frozen=True)
class Chat:
    """Ask a model."""

    prompt: str = knob(REQUIRED, "what to say first")


PRESET_FLAGS = {"syn_preset": ("syn_cfg", SynapticConfig.preset)}


def run(*argv: str) -> Run:
    return parse(Run, argv, prog="scripts.run", description="Runs.", presets=PRESET_FLAGS)


def complaint(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        run(*argv)
    message = str(caught.value)
    assert message.splitlines() == [message] and len(message) < 400
    return message


def test_no_flags_give_the_defaults() -> None:
    assert run() == Run()
    assert parse(GPTConfig, [], prog="x", description="x") == GPTConfig()


def test_hyphen_and_underscore_equals_and_blank_are_the_same() -> None:
    wanted = Run(data_dir=None, n_embd=64, syn_cfg=SynapticConfig(tau_rrp=100.0))
    for name in ("n_embd", "n-embd"):
        for nested in ("syn_cfg.tau_rrp", "syn-cfg.tau-rrp", "syn-cfg.tau_rrp"):
            assert run(f"--{name}=64", f"--{nested}=100.0") == wanted
            assert run(f"--{name}", "64", f"--{nested}", "100.0") == wanted


def test_a_leading_separator_is_ignored() -> None:
    assert run("--", "--depth=3") == run("--depth=3") == Run(depth=3)
    assert "unexpected" in complaint("--depth=3", "--")


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--depth=+7", "depth", 7),
        ("--lr=1e-3", "lr", 1e-3),
        ("--lr=1", "lr", 1.0),
        ("--lr=.5", "lr", 0.5),
        ("--synapses=1", "synapses", True),
        ("--synapses=0", "synapses", False),
        ("--clip=auto", "clip", None),
        ("--clip=0.5", "clip", 0.5),
        ("--n_embd=auto", "n_embd", None),
        ("--resume=auto", "resume", "auto"),
        ("--resume=none", "resume", None),
        ("--note=a=b --c", "note", "a=b --c"),
        ("--note=--help", "note", "--help"),
        ("--note=", "note", ""),
        ("--note=auto", "note", "auto"),
        ("--contexts=64, 128", "contexts", (64, 128)),
        ("--contexts=", "contexts", ()),
    ],
)
def test_values_become_the_type_of_their_field(flag: str, field: str, value: Any) -> None:
    got = getattr(run(flag), field)
    assert got == value and type(got) is type(value)


def test_a_negative_number_may_follow_its_flag() -> None:
    assert run("--syn_cfg.theta", "-1.5").syn_cfg.theta == -1.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--detph=3"], "unknown flag --detph (did you mean '--depth'?)"),
        (["--Depth=3"], "did you mean '--depth'?"),
        (["--tau_rrp=3"], "did you mean '--syn_cfg.tau_rrp'?"),
        (["--syn-cfg.tau-rp=3"], "did you mean '--syn_cfg.tau_rrp'?"),
        (["--syn_cfg=3"], "--syn_cfg is a group of flags"),
        (["--no-synapses"], "--synapses=0"),
        (["--qqqqqq=1"], "unknown flag --qqqqqq: --help"),
        (["--=1"], "unknown flag"),
        (["--depth=abc"], "--depth=abc is not a whole number: [1, 64]"),
        (["--depth=1e3"], "not a whole number in digits (1000, not 1e3)"),
        (["--depth=4.0"], "not a whole number in digits"),
        (["--depth="], "--depth='' is not a whole number"),
        (["--depth=65"], "--depth=65 is out of bounds [1, 64]"),
        (["--depth=" + "9" * 5000], "not a whole number"),
        (["--lr=fast"], "--lr=fast is not a number: [1e-06, 10]"),
        (["--lr=nan"], "not finite"),
        (["--lr=1e999"], "not finite"),
        (["--lr=0"], "out of bounds"),
        (["--synapses=True"], "write --synapses=0 or --synapses=1"),
        (["--synapses"], "--synapses has no value: write --synapses=VALUE (0 or 1)"),
        (["--depth", "--lr=1"], "--depth has no value: write --depth=VALUE (whole number, 1 to 64 blocks)"),
        (["--device=cdua"], "one of auto, cpu, cuda (did you mean 'cuda'?)"),
        (["depth=3"], "unexpected depth=3: flags are written --name=value (did you mean '--depth'?)"),
        (["-depth=3"], "did you mean '--depth'?"),
        (["--contexts=64,0"], "--contexts=0 is out of bounds [1, 65536]"),
        (["--data_dir=/nowhere/at/all"], "--data_dir='/nowhere/at/all' does not exist: give an existing folder"),
        (["--data_dir="], "does not exist"),
        (["--n_embd=12"], "n_embd=12 is not a multiple of 8"),
        (["--syn_cfg.tau_rrp=0"], "--syn_cfg.tau_rrp=0.0 is out of bounds [1, 4096]"),
        (["--syn_preset=pilto"], "did you mean 'pilot'?"),
        (["--n_embd=8", "--width=16"], "--n_embd and --width are the same setting but differ"),
        (["a\nb"], "unexpected 'a\\nb'"),
    ],
)
def test_everything_wrong_is_one_line_with_the_bounds_and_the_nearest_name(argv: list[str], words: str) -> None:
    assert words in complaint(*argv)


def test_the_last_of_repeated_flags_counts() -> None:
    assert run("--depth=3", "--depth", "5", "--syn-cfg.tick=2", "--syn_cfg.tick=4") == Run(depth=5, syn_cfg=SynapticConfig(tick=4))


def test_an_alias_sets_its_field_and_may_repeat_it() -> None:
    assert run("--width=64") == run("--width=64", "--n_embd=064") == run("--width=8", "--width=64") == Run(n_embd=64)


def test_a_path_must_exist_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("--data_dir=~/shards").data_dir == str(tmp_path / "shards")
    assert "did you mean 'shards'?" in complaint("--data_dir=~/shard")
    assert "is not a folder" in complaint(f"--data_dir={tmp_path / 'file'}")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_base_that_nested_flags_override(name: str) -> None:
    assert run(f"--syn-preset={name}").syn_cfg == SynapticConfig.preset(name)
    mixed = run("--syn_cfg.tau_c=7", f"--syn_preset={name}")
    assert mixed.syn_preset == name and mixed.syn_cfg == SynapticConfig(**{**PRESETS[name], "tau_c": 7.0})


def test_given_names_the_flags_of_the_command_line_only() -> None:
    config, given_names = parse_with_given(Run, ["--width=64", "--syn-cfg.tau-c=48"], prog="x", description="x")
    assert given_names == {"n_embd", "syn_cfg.tau_c"} and config == Run(n_embd=64)


def test_a_required_flag_must_be_given() -> None:
    with pytest.raises(UserError, match="--prompt is required: what to say first"):
        parse(Chat, [], prog="x", description="x")
    assert parse(Chat, ["--prompt=hi"], prog="x", description="x") == Chat("hi")


def test_commands_choose_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {"run": Run, "chat": Chat}
    assert parse_command(commands, ["--", "run", "--depth=3"], prog="x", description="x") == ("run", Run(depth=3))
    for argv, words in (([], "a command is missing"), (["rnu"], "did you mean 'run'?"), (["--depth=3"], "unknown command")):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            parse_command(commands, argv, prog="x", description="x")
    with pytest.raises(SystemExit) as caught:
        parse_command(commands, ["--help"], prog="x", description="x")
    assert caught.value.code == 0 and "Ask a model." in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--depth=3", "--help"], ["--nonsense", "--help"]])
def test_help_names_every_flag_with_bounds_unit_and_default(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    page = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for text in (
        "--depth INT the one dial (1 to 64 blocks; default: 4)",
        "--n_embd INT|auto width of the model (8 to 4096; also --width; default: auto)",
        "--synapses {0,1} synaptic attention (default: 0)",
        "--device {auto,cpu,cuda}",
        "--contexts INT,... context lengths (1 to 65536; default: 256,1024)",
        "--syn_cfg.NAME=VALUE: constants of the synapses, ",
    ):
        assert text in page
    assert "--syn_cfg.tau_rrp" not in page and page.startswith("usage: python -m scripts.run ")


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_of_a_nested_config_is_asked_for_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    inside, everything = shown(capsys, "--help=syn_cfg"), shown(capsys, "--help=all")
    for page in (inside, everything):
        assert "--syn_cfg.tau_rrp FLOAT vesicle refill" in page and "NAME=VALUE" not in page
    assert "--depth INT the one dial" in everything and "--depth INT" not in inside
    assert "did you mean 'syn_cfg'?" in complaint("--help=syn_cgf")


def test_help_has_a_heading_per_section(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Sectioned(Run):
        SECTIONS: ClassVar = {"depth": "model", "lr": "training"}

    with pytest.raises(SystemExit):
        parse(Sectioned, ["--help"], prog="x", description="x")
    page = capsys.readouterr().out
    places = [
        page.index(text) for text in ("model options", "--depth INT", "--n_embd INT", "training options", "--lr FLOAT", "--note TEXT")
    ]
    assert places == sorted(places)


def test_help_of_synapses_begins_with_terminals_and_ends_with_experts(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "--help=syn_cfg")
    parts = (
        "terminals options",
        "--syn_cfg.tick",
        "parts options",
        "--syn_cfg.buffer",
        "memory options",
        "--syn_cfg.hebb",
        "routing options",
    )
    places = [page.index(text) for text in (*parts, "--syn_cfg.router_identity", "lifecycle options", "--syn_cfg.split_health_min")]
    assert places == sorted(places)
    assert page.count("--syn_cfg.") == len(dataclasses.fields(SynapticConfig))


def test_long_bounds_are_powers() -> None:
    assert [format_number(value) for value in (1 << 20, 1 << 40, (1 << 63) - 1, 2.0**40, (1 << 40) + 2)] == [
        "1048576",
        "2^40",
        "2^63 - 1",
        "1099511627776",
        "1099511627778",
    ]


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run("--help")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_list_of_commands_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    class Long:
        """A first line that says more about a command than a line of a terminal has room for beside its name."""

    with pytest.raises(SystemExit):
        parse_command({"long": Long}, ["--help"], prog="x", description="x")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("  long ") and max(len(first), len(second)) <= 80
    assert second.index("beside") > 0 and len(second) - len(second.lstrip()) == first.index("A first")


def test_a_wrong_flag_ends_a_script_with_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        run("--depth=0")
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err == "error: --depth=0 is out of bounds [1, 64]\n"


def test_importing_the_command_line_does_not_load_the_parser_library() -> None:
    code = "import sys, bio_inspired_nanochat.config.cli; sys.exit('tyro' in sys.modules or 'rich' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, stdin=subprocess.DEVNULL, timeout=60, check=False).returncode == 0


NAMES = ["depth", "n_embd", "n-embd", "width", "lr", "clip", "synapses", "device", "data_dir", "resume", "note", "contexts"]
NAMES += ["syn_preset", "syn_cfg.tick", "syn-cfg.tau-rrp", "syn_cfg.barrier"]
ODD_NAMES = ["syn_cfg", "help ", "tyro-print-completion", "", "-", "--", "no-synapses", "dpeth"]
VALUES = ["0", "1", "-1", "8", "64", "1e3", "0.5", "auto", "none", "pilot", "cpu", "gated", ".", "64,128"]
ODD_VALUES = ["nan", "inf", "1_0", " 8", ",", "=", "--", "-", "@x", "~x", "9" * 5000, "a\nb", "\0", "\udcff"]
ODD_TEXTS = st.one_of(
    st.sampled_from(ODD_VALUES), st.integers().map(str), st.floats().map(str), st.text(st.characters(codec=None), max_size=9)
)
USUAL = st.builds("--{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)).map(lambda word: [word])
APART = st.tuples(st.sampled_from(NAMES).map("--{}".format), st.one_of(st.sampled_from(VALUES), ODD_TEXTS)).map(list)
ODD = st.one_of(
    st.builds("--{}={}".format, st.sampled_from(NAMES), ODD_TEXTS),
    st.builds("--{}={}".format, st.one_of(st.sampled_from(ODD_NAMES), ODD_TEXTS), ODD_TEXTS),
    st.one_of(ODD_TEXTS, st.sampled_from(NAMES + ODD_NAMES).map("--{}".format)),
).map(lambda word: [word])
RIGHT = ["depth=8", "width=64", "lr=1e-3", "clip=auto", "synapses=1", "device=cpu", "data-dir=.", "contexts=8,9", "syn_preset=pilot"]
RIGHT += ["syn-cfg.tick=4", "syn_cfg.barrier=none", "syn_cfg.tau_rrp=100.0", "note=x y"]
SOUND = st.sampled_from(RIGHT).map(lambda flag: ["--" + flag])
ARGVS = st.lists(st.one_of(SOUND, SOUND, SOUND, USUAL, APART, ODD), max_size=4).map(lambda parts: [*chain.from_iterable(parts)])


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(ARGVS)
def test_any_command_line_gives_a_config_or_one_line(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        return
    try:
        config = run(*argv)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
    else:
        assert isinstance(config, Run)
