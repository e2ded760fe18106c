"""Checkpoints of upstream nanochat (`model_NNNNNN.pt` beside `meta_NNNNNN.json`) as weights and a configuration of this project.

What carries over, tensor by tensor, is `NAMES`. Both models compute the same function wherever this module does not refuse:

    ids beyond vocab_size      upstream pads its tables to a multiple of 64 and crops the logits; the padding is cut off
    no resid_lambdas, x0_...   1 and 0, as upstream itself reads its older checkpoints
    no value embeddings        value_embeds=False
    bfloat16 tables            float32 of the same value
    window letters             S is ceil(T / 4) rounded up to 128 tokens and the query's own; where that covers all of T it becomes L,
                               elsewhere refused: a short window here has T // 4 tokens
    smear, backout             refused unless their factor is 0: there is no such term here
    rotary base, QK scale,     constants of upstream's code that its checkpoints do not state. Smear and backout came after the last
    logit soft cap             change of them (100000, 1.2, 15), so their parameters vouch for these values. Before, a gate of 12
                               channels had QK scale 1.15, and older versions rotary base 10000 and QK scale 1: refused, unless the
                               caller vouches (`constants="current"`)
    anything else              another parameter, configuration field or shape is refused by name
    optimizer state            not read: its groups and shards are those of upstream's code
    tokenizer                  upstream keeps a pickle, which can run code, so none is read. Whoever trusts theirs writes it once:
                               `Tokenizer(sorted(e._mergeable_ranks, key=e._mergeable_ranks.get), e._pat_str,
                               sorted(e._special_tokens, key=e._special_tokens.get)).save("tokenizer.json")` with e the unpickled
                               encoding, and gives that file
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.common.files import finite
from bio_inspired_nanochat.config import GPTConfig
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.gpt import GATE_CHANNELS, GPT, SOFTCAP
from bio_inspired_nanochat.synaptic import LEAST_SHARE
from bio_inspired_nanochat.synaptic.glue import QK_SCALE
from bio_inspired_nanochat.synaptic.layers import ROPE_BASE

# Upstream's name of every parameter and the one here; {i} is the layer.
NAMES = {
    "transformer.wte.weight": "embed.weight",
    "transformer.h.{i}.attn.c_q.weight": "blocks.{i}.attn.q.weight",
    "transformer.h.{i}.attn.c_k.weight": "blocks.{i}.attn.k.weight",
    "transformer.h.{i}.attn.c_v.weight": "blocks.{i}.attn.v.weight",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attn.o.weight",
    "transformer.h.{i}.attn.ve_gate.weight": "blocks.{i}.value_embed.gate",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.w_in.weight",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.w_out.weight",
    "value_embeds.{i}.weight": "blocks.{i}.value_embed.table.weight",
    "resid_lambdas": "resid_scale",
    "x0_lambdas": "x0_scale",
    "lm_head.weight": "head.weight",
}
FACTORS = {"smear_lambda": "smear", "backout_lambda": "backout"}  # a term of upstream's forward that vanishes with its factor
UNUSED = {"smear_gate.weight", *FACTORS}  # without effect where the factors are 0
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
CONSTANTS = (100_000.0, 1.2, 15.0)  # rotary base, QK scale and soft cap of upstream's code since it has smear and backout
SPECIALS = 9  # special tokens, the last ids of its vocabulary; the first of them is BOS

_MODEL = re.compile(r"model_(\d+)\.pt")
_LAYER = re.compile(r"\.(\d+)\.")
# A damaged stream raises whatever its bytes happen to mean.
_DAMAGE = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)
_DAMAGE += (struct.error, ImportError)
_COMPILED = "_orig_mod."  # what torch.compile puts before every name


class Imported(NamedTuple):
    """An upstream checkpoint in this project's terms. weights: float32 on the CPU; meta: the rest of upstream's metadata."""

    path: Path
    step: int
    config: GPTConfig
    weights: dict[str, Tensor]
    meta: dict[str, Any]


def is_nanochat(path: Path) -> bool:
    """Whether `path` is a file or folder of upstream's layout, or a folder of such folders."""
    if not path.is_dir():
        return path.is_file() and _MODEL.fullmatch(path.name) is not None
    return bool(_models(path) or _tags(path))


def read_nanochat(path: Path, step: int | None = None, constants: str = "auto") -> Imported:
    """Read an upstream checkpoint: a folder of `model_NNNNNN.pt` (highest step, or `step`), one such file, or a folder with one tag (`d12`).

    constants: "auto" takes only checkpoints that show which constants their code has; "current" vouches for those of `CONSTANTS`.
    UserError, with the reason, for a damaged file and for everything that the model here cannot compute exactly.
    """
    file, step = _find(path, step)
    meta = _read_meta(file.with_name(f"meta_{file.stem.removeprefix('model_')}.json"))
    sizes = meta.pop("model_config", None)
    if not isinstance(sizes, dict):
        raise UserError(f"the metadata beside {file} has no model_config: it is not a checkpoint of nanochat")
    state = {name.removeprefix(_COMPILED): tensor for name, tensor in _read_state(file).items()}
    _check_constants(file, state, constants)
    config = _config(file, sizes, state)
    return Imported(file, step, config, _weights(file, config, state), {"step": step, **finite(meta)})


# --- finding and reading ---------------------------------------------------------------------------------------------------------


def _models(folder: Path) -> dict[int, Path]:
    return {int(match[1]): entry for entry in folder.iterdir() if (match := _MODEL.fullmatch(entry.name))}


def _tags(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _models(entry))


def _find(path: Path, step: int | None) -> tuple[Path, int]:
    if not path.is_dir():
        named = _MODEL.fullmatch(path.name)
        assert named is not None, "a file that the caller has recognised"
        number = int(named[1])
        if step not in (None, number):
            raise UserError(f"{path} is of step {number}, not {step}: give its folder to choose a step")
        return path, number
    models = _models(path)
    if not models:
        tags = _tags(path)
        if len(tags) != 1:
            raise UserError(f"{path} holds several models ({', '.join(tag.name for tag in tags)}): give the folder of one of them")
        models = _models(tags[0])
    chosen = max(models) if step is None else step
    if chosen not in models:
        raise UserError(f"no checkpoint of step {step} in {path}: choose one of {', '.join(map(str, sorted(models)))}")
    return models[chosen], chosen


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a checkpoint of nanochat needs it beside its model") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} is damaged: it holds no named values")
    return meta


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle protocol of files that are refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} is damaged or holds more than tensors: only tensors are read, no code is run") from None
    except _DAMAGE as error:
        reason = next(iter(str(error).splitlines()), "")[:120]
        raise UserError(f"{path} is damaged: torch cannot read it ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise UserError(f"{path} is no dictionary of parameters by name: it is not a model of nanochat")
    return state


# --- what can be represented -----------------------------------------------------------------------------------------------------


def _check_constants(file: Path, state: dict[str, Tensor], constants: str) -> None:
    """UserError unless the source's rotary base, QK scale and soft cap are known to be those of this project's model."""
    assert (ROPE_BASE, QK_SCALE, SOFTCAP) == CONSTANTS, "this model's constants have moved away from upstream's"
    if constants == "current" or set(FACTORS) <= set(state):
        return
    if not any(".ve_gate." in name for name in state):
        why = "it has no value embeddings, so its code is older, with rotary base 10000 and QK scale 1"
    else:
        why = "it has no smear and backout, and before these the QK scale was 1.15 or 1"
    raise UserError(f"{file} cannot be represented: {why}; if its code has 100000, 1.2 and soft cap 15, say so by --constants=current")


def _config(file: Path, given: dict[str, Any], state: dict[str, Tensor]) -> GPTConfig:
    known = (*SIZES, "window_pattern")
    for name in given:
        if name not in known:
            raise UserError(f"{file} cannot be represented: its model_config has {name}, unknown here{nearest(name, known)}")
    for name in SIZES:
        if not isinstance(given.get(name), int) or isinstance(given[name], bool):
            raise UserError(f"the model_config beside {file} has {name}={given.get(name)!r}: a whole number is needed")
    sizes = {name: given[name] for name in SIZES}
    return GPTConfig(
        **sizes,
        window_pattern=_pattern(file, str(given.get("window_pattern", "L")), sizes["sequence_len"], sizes["n_layer"]),
        value_embeds=any(name.startswith("value_embeds.") for name in state),
        bos_token_id=max(0, sizes["vocab_size"] - SPECIALS),
    )


def _pattern(file: Path, pattern: str, length: int, layers: int) -> str:
    """The window pattern here: `L` where upstream's short windows hide nothing in a context of `length` tokens."""
    short = -(-length // 4 // 128) * 128
    used = {pattern.upper()[layer % len(pattern)] for layer in range(layers - 1)} if pattern else {""}
    if not used <= {"S", "L"}:
        raise UserError(f"{file} cannot be represented: its window_pattern={pattern!r} has other letters than S and L")
    if "S" in used and short < length - 1:
        ours = max(1, length // 4)
        raise UserError(f"{file} cannot be represented: its short windows (S) show {short + 1} of {length} tokens, those here {ours}")
    return "L"


def _weights(file: Path, config: GPTConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's tensors under the names here, in float32. UserError for one too many, one too few and a wrong shape."""
    for factor, term in FACTORS.items():
        if factor in state and bool((state[factor] != 0).any()):
            value = state[factor].flatten()[0].item()
            raise UserError(f"{file} cannot be represented: its {term} is on ({factor}={value:.4g}), a term that this model does not have")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    weights = {}
    for name, tensor in state.items():
        if name in UNUSED:
            continue
        layer = _LAYER.search(name)
        ours = NAMES.get(_LAYER.sub(".{i}.", name), "").replace("{i}", layer[1] if layer else "")
        if ours not in expected:
            raise UserError(f"{file} cannot be represented: it has a parameter {name} {list(tensor.shape)}, unknown here")
        weights[ours] = _fitted(file, name, ours, tensor, expected[ours], config)
    depth = config.n_layer
    weights = {"resid_scale": torch.ones(depth), "x0_scale": torch.zeros(depth)} | weights
    missing = [name for name in expected if name not in weights]
    if missing:
        raise UserError(f"{file} is incomplete: it has nothing for {missing[0]} ({len(missing)} parameters are missing)")
    entering = float(weights["resid_scale"][0] + weights["x0_scale"][0])
    if entering < LEAST_SHARE:
        raise UserError(
            f"{file} cannot be represented: resid_lambdas[0] + x0_lambdas[0] is {entering:.3g}, here a model keeps it at {LEAST_SHARE} or above"
        )
    return weights


def _fitted(file: Path, name: str, ours: str, tensor: Tensor, shape: torch.Size, config: GPTConfig) -> Tensor:
    """One tensor in float32, without the padding of the vocabulary."""
    if ours.endswith((".table.weight", "embed.weight", "head.weight")) and tensor.ndim == 2:
        padded = -(-config.vocab_size // 64) * 64
        tensor = tensor[: config.vocab_size] if len(tensor) == padded else tensor
    if tensor.shape != shape:
        hint = f": a gate here reads {GATE_CHANNELS} channels and is up to 3" if name.endswith("ve_gate.weight") else ""
        raise UserError(f"{file} cannot be represented: {name} has shape {list(tensor.shape)}, here it is {list(shape)}{hint}")
    if not tensor.is_floating_point():
        raise UserError(f"{file} cannot be represented: {name} has the type {tensor.dtype}, not a floating point one")
    return tensor.float().clone()  # its own memory: a slice would keep the whole table
