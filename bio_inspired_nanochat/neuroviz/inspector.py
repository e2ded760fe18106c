"""The state inspector: what a model's terminals do with a sentence, and what changes when a kinetic constant is another one.

Dimensions: H heads, N ticks, T tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat.config import knobs_of
from bio_inspired_nanochat.engine import Loaded
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import evaluating
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.neuroviz.reading import read, shown

QUANTITIES = {"calcium": "own unit", "vesicles": "share of full", "released": "pools in the tick", "bias": "logits"}
MOST_TOKENS = 128
LIKELY = 5


def sliders(model: GPT) -> list[dict[str, Any]]:
    """The kinetic constants that can be changed: name, meaning, unit and their mean over all heads; none without terminals."""
    found: list[dict[str, Any]] = []
    synapses = [synapse for block in model.blocks if (synapse := getattr(block.attn, "synapse", None)) is not None and synapse.cfg.presyn]
    if not synapses:
        return []
    knobs = knobs_of(model.config.syn_cfg)
    learned = [synapse.constants() for synapse in synapses]
    for name in synapses[0].positive:
        mean = float(torch.stack([values[name] for values in learned]).mean())
        found.append({"name": name, "about": knobs[name].doc, "unit": knobs[name].unit, "mean": float(f"{mean:.4g}")})
    return found


@contextlib.contextmanager
def scaled(model: GPT, factors: Mapping[str, float]) -> Iterator[None]:
    """Within it the named kinetic constants of all heads are so many times as large. Raises UserError for other names and bad values.

    A constant is its knob times what was learned, so the knob is what changes.
    """
    known = {one["name"] for one in sliders(model)}
    for name in factors:
        if name not in known:
            raise UserError(f"{name!r} is no kinetic constant of this model: it has {', '.join(sorted(known)) or 'none'}")
    synapses = [synapse for block in model.blocks if (synapse := getattr(block.attn, "synapse", None)) is not None]
    kept = [synapse.cfg for synapse in synapses]
    changed = [dataclasses.replace(cfg, **{name: getattr(cfg, name) * factor for name, factor in factors.items()}) for cfg in kept]
    for synapse, cfg in zip(synapses, changed, strict=True):
        synapse.cfg = cfg
    try:
        yield
    finally:
        for synapse, cfg in zip(synapses, kept, strict=True):
            synapse.cfg = cfg


def inspect(loaded: Loaded, text: str, layer: int, factors: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What layer `layer` does with `text`, as it is and, with factors (see `scaled`), as it would be; ready for JSON.

    tokens, tick; own and changed (or None): quantities [H][N][T] and the likeliest next tokens. Not safe for several threads at once.
    Raises UserError for a model without terminals, a layer that does not exist, and a text that is too long.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if not sliders(model):
        raise UserError("this model has no presynaptic terminals to look into: train one with --synapses=1")
    if not 0 <= layer < len(model.blocks):
        raise UserError(f"layer={layer} does not exist: this model has layers 0 to {len(model.blocks) - 1}")
    ids = tokenizer.encode(text, bos=True)
    most = min(MOST_TOKENS, model.config.sequence_len)
    if len(ids) > most:
        raise UserError(f"the text has {len(ids)} tokens, the inspector takes {most}: shorten it")
    tokens = [shown(tokenizer, one) for one in ids]
    changed = None
    if factors:
        with scaled(model, factors):
            changed = _seen(loaded, ids, tokens, layer)
    own = _seen(loaded, ids, tokens, layer)
    return {"tokens": tokens, "tick": model.config.syn_cfg.tick, "layer": layer, "units": QUANTITIES, "own": own, "changed": changed}


def _seen(loaded: Loaded, ids: list[int], tokens: list[str], layer: int) -> dict[str, Any]:
    reading = read(loaded.model, ids, tokens)
    values = {name: _rounded(reading.course[layer][name]) for name in QUANTITIES}
    with evaluating(loaded.model):
        idx = torch.tensor([ids], device=loaded.model.embed.weight.device)
        likely = torch.softmax(loaded.model(idx)[0, -1], dim=-1).topk(LIKELY)
    following = [
        [shown(loaded.tokenizer, token), round(value, 4)]
        for token, value in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]
    return {"values": values, "next": following}


def _rounded(values: Tensor) -> list:
    return values.double().mul(1e4).round().div(1e4).tolist()
