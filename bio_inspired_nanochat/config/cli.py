"""The command line of a configuration, generated from its knobs.

`parse(Config, argv)` reads `--name=value` and `--name value`, with hyphens and underscores alike; a field that is a config
itself becomes `--field.<name>`. Everything wrong is one UserError that names the flag, its bounds and the nearest valid name.
Tyro builds the parser, the typed values and the help text; what decides between names (aliases, presets, repeated flags) happens
before, because tyro's own messages are boxes of several lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from bio_inspired_nanochat.config.knobs import REQUIRED, Kind, Knob, check_path, check_value, format_number, kinds_of, knobs_of, sections_of
from bio_inspired_nanochat.errors import UserError, nearest

Config = TypeVar("Config")
Presets = Mapping[str, tuple[str, Callable[[str], Any]]]

MANY = 12  # flags of a nested config that --help alone does not list
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)")


@dataclass(frozen=True)
class Flag:
    """One flag: its dotted path (`syn_cfg.tau_rrp`), its Knob, its Kind, and whether a config as a whole stands behind it."""

    path: str
    record: Knob
    kind: Kind


def parse(cls: type[Config], argv: Sequence[str] | None = None, *, prog: str, description: str, presets: Presets | None = None) -> Config:
    """The config that a command line describes; see `parse_with_given`."""
    return parse_with_given(cls, argv, prog=prog, description=description, presets=presets)[0]


def parse_with_given(
    cls: type[Config], argv: Sequence[str] | None = None, *, prog: str, description: str, presets: Presets | None = None
) -> tuple[Config, set[str]]:
    """The config that a command line describes, and the dotted paths of the flags that were given.

    argv: the words after the program's name (None: those of this process). presets: for a flag, the nested config that it sets and
    the function from the flag's value to it: `{"syn_preset": ("syn_cfg", SynapticConfig.preset)}`; explicit `--syn_cfg.*` flags
    override the preset. `--help` prints the flags and exits with 0: those of a nested config only by name where there are many, with
    `--help=syn_cfg` and `--help=all` to see them. Raises UserError, one line, for everything that is wrong.
    """
    flags = _flags_of(cls)
    words = _words(argv)
    helping = [word for word in words if word in ("-h", "--help") or word.startswith("--help=")]
    given = {} if helping else _read(words, flags)
    values = _convert_all(flags, given, prog, description) if given else {}
    defaults = _defaults(cls, _preset_configs(presets or {}, values))
    if helping:
        _print_help(cls, helping[0].partition("=")[2], defaults, prog, description)
        raise SystemExit(0)
    missing = [path for path, value in (defaults | values).items() if value is REQUIRED]
    if missing:
        raise UserError(f"--{missing[0]} is required: {flags[missing[0]].record.doc}")
    return _build(cls, defaults | values), set(values)


def parse_command(
    commands: Mapping[str, type],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    presets: Presets | None = None,
) -> tuple[str, Any]:
    """For a script with sub-commands: `(name, config)` where the first word names the command and the others are its flags.

    Raises UserError for a missing or unknown command, and as `parse` does; `--help` prints and exits.
    """
    words = _words(argv)
    if not words or words[0] in ("-h", "--help"):
        if not words:
            raise UserError(f"a command is missing: {_started(prog)} followed by one of {', '.join(commands)}")
        lines = [f"usage: {_started(prog)} COMMAND [OPTIONS]", "", _wrapped(description), "", "commands (each has its own --help):"]
        lines += [_wrapped(f"  {name:<14} {_about(cls)}", indent=17) for name, cls in commands.items()]
        _print_page("\n".join(lines) + "\n")
        raise SystemExit(0)
    name = words[0]
    if name not in commands:
        raise UserError(f"unknown command {_shown(name)}: one of {', '.join(commands)}{nearest(name[:60], commands)}")
    return name, parse(commands[name], words[1:], prog=f"{prog} {name}", description=_about(commands[name]), presets=presets)


def _about(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _words(argv: Sequence[str] | None) -> list[str]:
    words = list(sys.argv[1:] if argv is None else argv)
    while words and words[0] == "--":  # `torchrun -m script -- --flag=1` hands the separator on
        words.pop(0)
    return words


def _flags_of(cls: type, prefix: str = "") -> dict[str, Flag]:
    flags: dict[str, Flag] = {}
    kinds = kinds_of(cls)
    for name, record in knobs_of(cls).items():
        path = prefix + name
        if kinds[name].nested:
            flags |= _flags_of(kinds[name].base, path + ".")
        else:
            flags[path] = Flag(path, record, kinds[name])
    return flags


def _read(words: list[str], flags: dict[str, Flag]) -> dict[str, str]:
    """The text given for every flag, by path. A repeated flag: the last one counts; a flag and its alias must agree."""
    names = {path: path for path in flags}
    for path, flag in flags.items():
        parent = path.rpartition(".")[0]
        for alias in flag.record.aliases:
            spelled = f"{parent}.{alias}" if parent else alias
            assert names.setdefault(spelled, path) == path, f"{spelled} names two flags"
    spellings: dict[str, dict[str, str]] = {}
    queue = iter(enumerate(words))
    for i, word in queue:
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {_shown(word)}: flags are written --name=value{_suggest(word.lstrip('-'), names)}")
        name, assigned, text = word[2:].partition("=")
        path = names.get(name.replace("-", "_"))
        if path is None:
            raise _unknown(name, names)
        if not assigned:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise UserError(f"--{_shown(name)} has no value: write --{name}=VALUE ({_expected(flags[path])})")
            text = next(queue)[1]
        spellings.setdefault(path, {})[name.replace("-", "_")] = text
    given = {}
    for path, texts in spellings.items():
        read = {name: _convert(flags[path], text) for name, text in texts.items()}
        first, *others = read
        for other in others:
            if read[other] != read[first] and not isinstance(read[first], UserError):
                raise UserError(f"--{first} and --{other} are the same setting but differ: give one of them")
        given[path] = texts[first]
    return given


def _suggest(name: str, names: dict[str, str]) -> str:
    """` (did you mean '--depth'?)` for a mistyped flag. The bare name of a nested flag finds its full path."""
    wanted = name[:60].partition("=")[0].replace("-", "_").strip("_").lower()
    full = {spelled.rpartition(".")[2]: spelled for spelled in reversed(names)} | {spelled: spelled for spelled in names}
    match = difflib.get_close_matches(wanted, full, n=1, cutoff=0.6)
    return f" (did you mean '--{full[match[0]]}'?)" if match else ""


def _unknown(name: str, names: dict[str, str]) -> UserError:
    plain = name.replace("-", "_")
    inside = [path for path in names if path.startswith(plain + ".")]
    if inside:
        return UserError(f"--{plain} is a group of flags: write --{inside[0]}=..., and see --help={plain} for the others")
    if plain.startswith("no_") and plain[3:] in names:
        return UserError(f"unknown flag {_shown('--' + name)}: a switch is turned off by --{plain[3:]}=0")
    return UserError(f"unknown flag {_shown('--' + name)}{_suggest(name, names)}: --help=all lists all flags")


def _shown(text: str) -> str:
    """Text from the command line in a message: bounded, printable, on one line."""
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if text.isprintable() and len(text.split()) == 1 and " " not in text else ascii(text)


def _expected(flag: Flag) -> str:
    """What a value must be, in words: `0 or 1`, `whole number, 1 to 64`, `one of none, linear, gated`."""
    record, base = flag.record, flag.kind.base
    if base is bool:
        return "0 or 1"
    if record.choices is not None or record.path is not None:
        return record.bounds()
    kind = {int: "whole number", float: "number", Path: "path"}.get(base, "text")
    return ", ".join(filter(None, [kind, _range(record)]))


def _range(record: Knob) -> str:
    """The bounds of a number with its unit: `1 to 1024 tokens`, `at least 0`, or nothing."""
    if record.choices is not None or record.path is not None:
        return ""
    lo, hi = ("" if bound is None else format_number(bound) for bound in (record.lo, record.hi))
    text = f"{lo} to {hi}" if lo and hi else f"at least {lo}" if lo else f"at most {hi}" if hi else ""
    return f"{text} {record.unit}".strip()


def _convert(flag: Flag, text: str) -> Any:
    """The value that a text stands for, or the UserError that says why it stands for none (tyro would print a raised one)."""
    try:
        if flag.kind.optional and text == flag.record.none:
            return None
        if flag.kind.many:
            return tuple(_convert_one(flag, part.strip()) for part in text.split(",")) if text.strip() else ()
        return _convert_one(flag, text)
    except UserError as error:
        return error


def _convert_one(flag: Flag, text: str) -> Any:
    name, record, base = f"--{flag.path}", flag.record, flag.kind.base
    bounds = record.bounds()
    hint = "" if bounds == "any" else f": {bounds}"
    value: Any = text
    if base is bool:
        if text not in ("0", "1"):
            raise UserError(f"{name}={_shown(text)} is a switch: write {name}=0 or {name}=1")
        return text == "1"
    if base is int:
        if not _WHOLE.fullmatch(text):
            digits = " in digits (1000, not 1e3)" if _DECIMAL.fullmatch(text) else ""
            raise UserError(f"{name}={_shown(text)} is not a whole number{digits}{hint}")
        value = int(text)
    elif base is float:
        if not _DECIMAL.fullmatch(text):
            raise UserError(f"{name}={_shown(text)} is not a number{hint}")
        value = float(text)
    elif record.path is not None or base is Path:
        text = os.path.expanduser(text)  # the shell leaves ~ alone after an equals sign
        check_path(name, text, record)
        value = Path(text) if base is Path else text
    check_value(name, value, record, base)
    return value


def _preset_configs(presets: Presets, values: dict[str, Any]) -> dict[str, Any]:
    return {target: make(values[flag]) for flag, (target, make) in presets.items() if values.get(flag) is not None}


def _defaults(cls: type, bases: dict[str, Any], base: Any = None, prefix: str = "") -> dict[str, Any]:
    """The default of every flag by path; `bases` holds the nested configs that a preset replaces."""
    defaults: dict[str, Any] = {}
    kinds, records = kinds_of(cls), knobs_of(cls)
    for field in dataclasses.fields(cls):
        assert field.name in records or not field.init, f"{cls.__name__}.{field.name} is not made by knob()"
        if field.name not in records:
            continue
        path = prefix + field.name
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        value = bases[path] if path in bases else made if base is None else getattr(base, field.name)
        if kinds[field.name].nested:
            defaults |= _defaults(kinds[field.name].base, bases, value, path + ".")
        else:
            defaults[path] = value
    return defaults


def _build(cls: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    kinds = kinds_of(cls)
    kwargs = {
        name: _build(kinds[name].base, values, f"{prefix}{name}.") if kinds[name].nested else values[prefix + name]
        for name in knobs_of(cls)
    }
    return cls(**kwargs)


def _convert_all(flags: dict[str, Flag], given: dict[str, str], prog: str, description: str) -> dict[str, Any]:
    """The typed values of the given flags, read by tyro. Raises the UserError of the first wrong one."""
    words = [f"--{path}={text}" for path, text in given.items()]
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            view = _run_tyro({path: flags[path] for path in given}, dict.fromkeys(given), words, prog, description)
    except SystemExit:
        raise UserError(f"the command line cannot be read: {_shown(' '.join(words))}; see --help") from None
    values = {}
    for path in given:
        value: Any = view
        for name in path.split("."):
            value = getattr(value, name)
        if isinstance(value, UserError):
            raise value
        values[path] = value
    return values


def _print_help(cls: type, topic: str, defaults: dict[str, Any], prog: str, description: str) -> None:
    """The flags of a config. topic: empty, `all`, or the nested config to show."""
    flags = _flags_of(cls)
    nested = {name: record.doc for name, record in knobs_of(cls).items() if kinds_of(cls)[name].nested}
    sizes = {name: sum(path.startswith(f"{name}.") for path in flags) for name in nested}
    if topic not in ("", "all", *nested):
        raise UserError(f"--help={_shown(topic)} shows nothing: one of {', '.join(['all', *nested])}{nearest(topic[:60], nested)}")
    folded = [name for name, size in sizes.items() if size > MANY and not topic]
    shown = {path: flag for path, flag in flags.items() if path.partition(".")[0] not in folded}
    if topic in nested:
        shown = {path: flag for path, flag in flags.items() if path.startswith(f"{topic}.")}
    page = io.StringIO()
    page.isatty = sys.stdout.isatty  # type: ignore[method-assign]  # keeps the colours of a terminal
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _run_tyro(shown, defaults, ["--help"], _started(prog), description, _sections(cls, shown))
    plain = page.getvalue().replace(description, _wrapped(description), 1)
    lines = [line.rstrip() for line in plain.rstrip().splitlines()]
    for name in folded:
        lines += ["", _wrapped(f"--{name}.NAME=VALUE: {nested[name]}, {sizes[name]} flags; --help={name} shows them.")]
    _print_page("\n".join(lines))


def _started(prog: str) -> str:
    """How a program is started: `python -m scripts.base_train`."""
    return f"python -m {prog}" if prog.startswith("scripts.") else prog


def _wrapped(text: str, indent: int = 0) -> str:
    return textwrap.fill(text, shutil.get_terminal_size().columns, subsequent_indent=" " * indent, break_on_hyphens=False)


def _sections(cls: type, flags: dict[str, Flag]) -> dict[str, str]:
    """The section that each flag is shown in, from `sections_of` its config; a flag of a config without sections has none."""
    found: dict[str, str] = {}
    for title, names in sections_of(cls).items():
        for name in names:
            if kinds_of(cls)[name].nested:
                inside = {path.partition(".")[2]: flag for path, flag in flags.items() if path.startswith(f"{name}.")}
                found |= {f"{name}.{path}": inner for path, inner in _sections(kinds_of(cls)[name].base, inside).items()}
            elif title and name in flags:
                found[name] = title
    return found


def _print_page(text: str) -> None:
    from bio_inspired_nanochat.common import say

    say(text.rstrip("\n"))


def _run_tyro(
    flags: dict[str, Flag],
    defaults: dict[str, Any],
    words: list[str],
    prog: str,
    description: str,
    sections: Mapping[str, str] | None = None,
) -> Any:
    import tyro  # a quarter of a second that `import bio_inspired_nanochat` need not pay

    view = _view("Flags", "", flags, defaults)
    if sections:
        groups: dict[str, Any] = {}
        for title in dict.fromkeys(sections.values()):
            leaves = [
                (f"leaf{i}", _leaf(path, flags[path], defaults[path]), None) for i, path in enumerate(flags) if sections.get(path) == title
            ]
            inside = dataclasses.make_dataclass(title, leaves)
            groups[title] = Annotated[inside, tyro.conf.OmitArgPrefixes]
        rest = _view("Flags", "", {path: flag for path, flag in flags.items() if path not in sections}, defaults)
        fields = [(name, kind, dataclasses.field(default_factory=typing.get_args(kind)[0])) for name, kind in groups.items()]
        view = dataclasses.make_dataclass("Flags", [*fields, *((f.name, f.type, f) for f in dataclasses.fields(rest))])
    return tyro.cli(view, args=words, prog=prog, description=description, use_underscores=True, config=(tyro.conf.FlagConversionOff,))


def _view(title: str, prefix: str, flags: dict[str, Flag], defaults: dict[str, Any]) -> type:
    """The dataclass that tyro sees: the same tree of flags, each with its reader and its help text."""
    fields: dict[str, Any] = {}
    for path, flag in flags.items():
        if not path.startswith(prefix):
            continue
        name, dot, _ = path[len(prefix) :].partition(".")
        if dot:
            if name not in fields:
                nested = _view(name, f"{prefix}{name}.", flags, defaults)
                fields[name] = (name, nested, dataclasses.field(default_factory=nested))
            continue
        fields[name] = (name, _leaf(name, flag, defaults[path]), dataclasses.field(default=None))
    return dataclasses.make_dataclass(title, list(fields.values()))


def _leaf(name: str, flag: Flag, default: Any) -> Any:
    """One flag as tyro sees it: its name, its reader, its help text."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=_metavar(flag),
        instance_from_str=lambda texts: _convert(flag, texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [_default_text(flag, value)],
    )
    return Annotated[Any, spec, tyro.conf.arg(name=name, help=flag.record.doc, help_behavior_hint=_facts(flag, default))]


def _metavar(flag: Flag) -> str:
    if flag.record.choices is not None:
        text = "{" + ",".join(flag.record.choices) + "}"
    elif flag.record.path is not None:
        text = "PATH"
    else:
        text = {bool: "{0,1}", int: "INT", float: "FLOAT", Path: "PATH"}.get(flag.kind.base, "TEXT")
    if flag.kind.many:
        text += ",..."
    return f"{text}|{flag.record.none}" if flag.kind.optional else text


def _default_text(flag: Flag, value: Any) -> str:
    if value is None:
        return flag.record.none if flag.kind.optional else "none"
    if flag.kind.base is bool:
        return str(int(value))
    if flag.kind.many:
        return ",".join(map(str, value)) or "empty"
    return format_number(value) if isinstance(value, float) else str(value) or "empty"


def _facts(flag: Flag, default: Any) -> str:
    """What stands in brackets behind a flag's meaning: bounds with the unit, further names, default."""
    facts = [_range(flag.record)] if _range(flag.record) else []
    if flag.record.aliases:
        facts.append("also " + ", ".join(f"--{alias}" for alias in flag.record.aliases))
    facts.append("required" if default is REQUIRED else f"default: {_default_text(flag, default)}")
    return "(" + "; ".join(facts) + ")"
