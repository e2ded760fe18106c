"""The one-page report of a speedrun: `report.md` with its pictures in `report_files/` beside it."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.common import write_atomic
from bio_inspired_nanochat.common.console import duration
from bio_inspired_nanochat.config.tables import markdown_table
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.training.comparison import KINDS, Findings, Outcome, difference, pooled
from bio_inspired_nanochat.training.lesson import SHOWN
from bio_inspired_nanochat.training.pictures import GAIN_TITLES, TIMES, draw_loss, draw_synapses

PICTURES = "report_files"
# Standard deviation of the vanilla model's validation loss over the three seeds of RESULTS.md (two CPU cores, 0.5 M tokens).
SEED_BPB, SEED_NATS = 0.006, 0.012


def write_report(found: Findings, copy: Path) -> Path:
    """Write the report into `found.folder` and copy it, with its pictures, to `copy`. Returns `copy`.

    Raises UserError when a place cannot be written.
    """
    try:
        pictures = found.folder / PICTURES
        draw_loss(found, pictures / "loss.png")
        if found.synapses.gains:
            draw_synapses(found, pictures / "synapses.png")
        write_atomic(found.folder / "report.md", report_text(found))
        if copy.resolve() != (found.folder / "report.md").resolve():
            for picture in pictures.iterdir():
                write_atomic(copy.parent / PICTURES / picture.name, picture.read_bytes())
            write_atomic(copy, report_text(found))
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {error.filename} ({error.strerror}): choose another --report or --log_dir"
        ) from None
    return copy


def table_rows(found: Findings) -> list[list[Any]]:
    """Rows of the side-by-side table: quantity, vanilla, synaptic, and how far synaptic is from vanilla."""
    first, second = found.vanilla, found.synaptic
    gap, error = difference(first.blocks, second.blocks)
    return [
        ["validation, bits per byte", *(f"{pooled(each.blocks).bpb:.4f}" for each in (first, second)), with_error(gap, error)],
        ["training loss, nats per token", *_pair(found, "final_loss", "{:.3f}"), _change(found, "final_loss", "{:+.3f}")],
        ["tokens per second", *_pair(found, "tok_per_s", "{:,.0f}"), _ratio(found, "tok_per_s")],
        ["parameters", *_pair(found, "params", "{:,}"), _change(found, "params", "{:+,}")],
        ["seconds of training and evaluation", *_pair(found, "seconds", "{:,.1f}"), _ratio(found, "seconds")],
        ["steps", *_pair(found, "steps", "{:,}"), "the same"],
        ["training tokens", *_pair(found, "tokens", "{:,}"), "the same"],
    ]


def with_error(value: float, error: float) -> str:
    """`-0.0123 ± 0.0020`, without the error where there is none."""
    return f"{value:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _pair(found: Findings, name: str, form: str) -> list[str]:
    values = [outcome.record[name] for _, outcome in found.outcomes]
    return ["-" if value is None else form.format(value) for value in values]


def _change(found: Findings, name: str, form: str) -> str:
    first, second = (outcome.record[name] for _, outcome in found.outcomes)
    return "-" if first is None or second is None else form.format(second - first)


def _ratio(found: Findings, name: str) -> str:
    first, second = (outcome.record[name] for _, outcome in found.outcomes)
    return f"x {second / first:.3g}" if first and second else "-"


# --- the page ----------------------------------------------------------------------------------------------------------------------


def report_text(found: Findings) -> str:
    """The page as Markdown."""
    parts = [_head(found), _synapses(found), _samples(found), _lesson(found), _circumstances(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Findings) -> str:
    plan, record = found.vanilla.plan, found.vanilla.record
    model = plan.model
    same = f"Both read the same {record['tokens']:,} tokens in the same order, with the same seed and learning rates."
    what = (
        f"Two models of {model.n_layer} layers and width {model.n_embd}. The vanilla one has ordinary attention; in the synaptic one every "
        f"attention layer has presynaptic terminals. {same}"
    )
    caution = (
        f"Lower bits per byte are better. The ± is the standard error over {len(found.vanilla.blocks)} parts of the validation text "
        f"({pooled(found.vanilla.blocks).tokens:,} tokens). Another seed moves the numbers too: for scale, by {SEED_BPB} bits per byte or "
        f"{SEED_NATS} nats per token (standard deviation over the three seeds in RESULTS.md). Try `--seed=1` before you trust less."
    )
    lines = [
        "# Speedrun: vanilla and synaptic, side by side",
        "",
        what,
        "",
        markdown_table(table_rows(found), ["", *KINDS, "difference"]).rstrip(),
        "",
        caution,
        "",
        f"![loss curves of both models]({PICTURES}/loss.png)",
    ]
    return "\n".join(lines)


def _synapses(found: Findings) -> str:
    gains, times = found.synapses.gains, found.synapses.times
    if not gains:
        return ""
    names = list(dict.fromkeys(name for layer in gains for name in layer))
    columns = ["layer", *(GAIN_TITLES.get(name, name) for name in names)]
    rows = [[str(i), *(_spread(layer.get(name, []), 3) for name in names)] for i, layer in enumerate(gains)]
    if times:
        columns += [f"{label} {name} (tokens)" for name, label in TIMES.items()]
        rows = [row + [_spread(layer[name], 0) for name in TIMES] for row, layer in zip(rows, times, strict=True)]
    whole, without = pooled(found.synaptic.blocks), pooled(found.synapses.zeroed)
    raised, error = difference(found.synaptic.blocks, found.synapses.zeroed, "nats_per_token")
    verdict = (
        "the model relies on its synapses"
        if raised > 2 * error
        else "the model has not come to rely on its synapses in this short training"
    )
    cfg = found.synaptic.plan.model.syn_cfg
    effect = (
        f"Gains at zero mean ordinary attention. Setting all of them to zero in the trained model changes its validation loss from "
        f"{whole.nats_per_token:.4f} to {without.nats_per_token:.4f} nats per token ({with_error(raised, error)}): {verdict}."
    )
    meaning = (
        f"At birth g_f is {cfg.lambda_loge:g}, g_d 0 and s_B {cfg.barrier_strength:g}. g_f > 0 strengthens a key that is read a lot "
        "(facilitation), g_f < 0 weakens it (habituation); g_d > 0 weakens a key whose vesicles are used up; s_B scales the forgetting gate."
    )
    lines = [
        "## What the synapses learned",
        "",
        effect,
        "",
        "Trained values per layer: mean over heads (smallest … largest).",
        "",
        markdown_table(rows, columns).rstrip(),
        "",
        meaning,
        "",
        f"![gains and time constants per layer and head]({PICTURES}/synapses.png)",
        "",
        "A dot is a head, a bar the mean of its layer, a dashed line the value at birth.",
    ]
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    """`0.12 (-0.03 … 0.31)`, or a dash where a layer has none."""
    if not values:
        return "-"
    low, mean, high = min(values), sum(values) / len(values), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def _samples(found: Findings) -> str:
    lines = ["## Samples", "", "The same prompts and the same random numbers for both."]
    for kind, outcome in found.outcomes:
        lines += ["", f"**{kind}**"]
        for prompt, text in outcome.samples:
            lines += ["", *quote(prompt + text)]
    return "\n".join(lines)


def _lesson(found: Findings) -> str:
    lesson = found.lesson
    if lesson is None:
        return ""
    record = lesson.record
    what = (
        f"The synaptic model was then tuned on the embedded conversations for {record['steps']:,} steps ({record['tokens']:,} tokens, "
        f"{duration(record['seconds'])}). {lesson.ended} of its answers to {len(lesson.answers)} prompts, none of which it was taught, end "
        "with the end token; whether they make sense is another question."
    )
    command = f"python -m scripts.chat_cli --source={record['checkpoint']}"
    lines = ["## Talk to it", "", what, "", "```bash", command, "```"]
    for answer in lesson.answers[:SHOWN]:
        lines += ["", *quote(f"{answer.prompt}\n> {answer.text}")]
    return "\n".join(lines)


def quote(text: str) -> list[str]:
    """Lines of a Markdown code block that `text` cannot end, whatever it holds."""
    fence = "```"
    while fence in text:
        fence += "`"
    printable = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    return [fence + "text", *printable.split("\n"), fence]


def _circumstances(found: Findings) -> str:
    plan = found.vanilla.plan
    model = plan.model
    heads = f"{model.n_head} heads of {model.head_dim}"
    facts = [
        ("model", f"{model.n_layer} layers x {model.n_embd}, {heads}, context {model.sequence_len}, vocabulary {model.vocab_size}"),
        ("synapses", f"preset {found.synaptic.plan.config.syn_preset}, tick of {found.synaptic.plan.model.syn_cfg.tick} tokens"),
        ("batch", f"{plan.tokens_per_step:,} tokens per step ({plan.rows} rows x {plan.accumulation} accumulated)"),
        ("text", found.data),
        ("seed", str(found.seed)),
        ("device", f"{found.machine}, {str(plan.dtype).removeprefix('torch.')}"),
        ("versions", f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("time", f"{duration(found.seconds)} for everything"),
        *((f"{kind} checkpoint", _checkpoint(outcome)) for kind, outcome in found.outcomes),
    ]
    lines = ["## How it was run", "", markdown_table([[name, value] for name, value in facts], ["", ""])]
    lines += ["Again, with as many steps:", "", "```bash", found.command, "```"]
    return "\n".join(lines)


def _checkpoint(outcome: Outcome) -> str:
    return f"`{outcome.record['checkpoint']}`"
