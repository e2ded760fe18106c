"""Injection: synapses for a trained vanilla model, which go unnoticed until training turns them up.

Every parameter that both models have keeps its value and every output gain is zero, so the synaptic model computes the vanilla one.
The source is a checkpoint of this project or one of upstream nanochat (see `nanochat_import`). What is written is a checkpoint that
`base_train --resume` goes on from: with the source's optimizer state, step and place in the data where it has them, else from step 0.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bio_inspired_nanochat.checkpoint import MANIFEST, META, MODEL, find_checkpoint, load_checkpoint, load_optimizer, save_checkpoint
from bio_inspired_nanochat.common import generator_for, say
from bio_inspired_nanochat.config import PRESETS, REQUIRED, GPTConfig, SynapticConfig, from_dict, knob, to_dict, validate
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.nanochat_import import is_nanochat, read_nanochat

TOLERANCE = 1e-5  # times max(1, |logit|): other executions of attention round differently
PROBE = (2, 128)  # rows and most tokens of the random text that both models read
START = "weights"  # kind of a checkpoint that is a place to start from: no step was made with this optimizer and these data


@dataclass(frozen=True)
class EnableConfig:
    """Which checkpoint gets which synapses."""

    source: str = knob(REQUIRED, "vanilla checkpoint: a step or run of this project, or a folder of upstream nanochat", path="exists")
    out: str = knob(REQUIRED, "new folder for the synaptic checkpoint; base_train --resume=OUT goes on from it")
    step: int | None = knob(None, "step to take from the source; auto is its highest", lo=0, hi=1 << 40)
    synapses: bool = knob(True, "give the model synapses; 0 only imports a checkpoint of upstream nanochat", off=False)
    syn_preset: str = knob("default", "named set of synaptic constants that --syn_cfg.* flags then change", choices=tuple(PRESETS))
    syn_cfg: SynapticConfig = knob(SynapticConfig, "constants of the synapses; their gains start at zero in any case")
    tokenizer: str | None = knob(None, "tokenizer.json to put into the checkpoint, for sources that have none", path="file", none="none")
    constants: str = knob(
        "auto",
        "rotary base, QK scale and soft cap of an upstream source: auto asks its parameters, current vouches for 100000, 1.2 and 15",
        choices=("auto", "current"),
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.synapses and not self.syn_cfg.active:
            raise UserError("the synapses have no mechanism on: choose another --syn_preset, or --synapses=0 for an import alone")
        if not self.synapses and self.syn_cfg != SynapticConfig():
            raise UserError("--syn_cfg.* and --syn_preset do nothing without synapses: leave out --synapses=0")


class Source(NamedTuple):
    """A vanilla model to start from. optimizer: None where the source has none that fits; files: further files by name."""

    path: Path
    step: int
    layout: str
    config: GPTConfig
    weights: dict[str, Tensor]
    meta: dict[str, Any]
    optimizer: dict[str, Any] | None
    files: dict[str, bytes]


def enable_synapses(config: EnableConfig, tokenizer: tuple[bytes, int, int] | None = None) -> dict[str, Any]:
    """Write the synaptic checkpoint of `config` and return the script's last line. Nothing is written on an error.

    tokenizer: the content of `config.tokenizer`, its number of ids and its BOS id, for a source without one.
    Raises UserError for sources that are missing, damaged, synaptic already or not representable, and for an `out` in use.
    """
    out = Path(config.out).expanduser()
    _check_free(out)
    source = _with_tokenizer(_read(config), tokenizer)
    before = _vanilla(source)
    after = inject(before, config.syn_cfg) if config.synapses else before
    difference = _difference(before, after)
    path = _write(out, source, after, config.syn_preset)
    added = after.num_params() - before.num_params()
    kind = f"{added:,} synaptic parameters, all gains at zero" if config.synapses else "no synapses"
    say(f"{path}: {after.num_params():,} parameters, {kind}; logits differ from the source's by at most {difference:.2g}")
    if "tokenizer.json" not in source.files:
        say("notice: the checkpoint has no tokenizer: training needs --tokenizer=FILE with the one that its ids are of")
    return {
        "source": str(source.path),
        "layout": source.layout,
        "out": str(path),
        "step": int(path.name.rpartition("_")[2]),
        "synapses": config.synapses,
        "params": after.num_params(),
        "added_params": added,
        "max_logit_difference": difference,
        "resumable": source.optimizer is not None,
    }


def inject(vanilla: GPT, syn_cfg: SynapticConfig) -> GPT:
    """A synaptic model with the weights of `vanilla`, its configuration in all else, and every output gain at zero.

    Shares the tensors of `vanilla`. Raises UserError when that model is synaptic.
    """
    if vanilla.config.synapses:
        raise UserError("the model is synaptic already (synapses=1): train it on by base_train --resume, or give a vanilla one")
    model = GPT(dataclasses.replace(vanilla.config, synapses=True, syn_cfg=syn_cfg)).to(vanilla.embed.weight.device)
    result = model.load_state_dict(vanilla.state_dict(), strict=False, assign=True)
    assert not result.unexpected_keys, f"a synaptic model lacks {result.unexpected_keys[0]} of the vanilla one"
    return model.zero_gains().train(vanilla.training)


# --- reading -----------------------------------------------------------------------------------------------------------------------


def _check_free(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"out={out} is in use: choose a new or empty folder, nothing is overwritten")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file: choose a new or empty folder")


def _read(config: EnableConfig) -> Source:
    path = Path(config.source).expanduser()
    if is_nanochat(path):
        found = read_nanochat(path, config.step, config.constants)
        meta = {"upstream": found.meta, "kind": START}
        return Source(found.path, found.step, "nanochat", found.config, found.weights, meta, None, {})
    checkpoint = load_checkpoint(find_checkpoint(path, config.step))
    model_config = from_dict(GPTConfig, checkpoint.meta.get("model_config", {}))
    if model_config.synapses:
        raise UserError(
            f"{checkpoint.path} is synaptic already (synapses=1): train it on by base_train --resume={checkpoint.path}, "
            "or give a vanilla checkpoint"
        )
    if not config.synapses:
        raise UserError(f"{checkpoint.path} is of this project: --synapses=0 would only copy it; leave the flag out")
    kept = json.loads((checkpoint.path / MANIFEST).read_bytes())["files"]  # not what else lies in the folder
    names = [name for name in kept if name not in (MODEL, META) and not name.startswith("optim_rank")]
    files = {name: (checkpoint.path / name).read_bytes() for name in names}
    optimizer = load_optimizer(checkpoint.path) if (checkpoint.path / "optim_rank0.json").exists() and "loop" in checkpoint.meta else None
    return Source(
        checkpoint.path, checkpoint.step, "bio_inspired_nanochat", model_config, checkpoint.model, checkpoint.meta, optimizer, files
    )


def _with_tokenizer(source: Source, tokenizer: tuple[bytes, int, int] | None) -> Source:
    if tokenizer is None:
        return source
    content, size, bos = tokenizer
    if "tokenizer.json" in source.files:
        raise UserError(f"{source.path} has its own tokenizer.json: leave out --tokenizer")
    if size != source.config.vocab_size:
        raise UserError(f"the tokenizer has {size} ids, {source.path} has vocab_size={source.config.vocab_size}: give the model's own")
    files = {**source.files, "tokenizer.json": content}
    return source._replace(config=dataclasses.replace(source.config, bos_token_id=bos), files=files)


def _vanilla(source: Source) -> GPT:
    with torch.device("meta"):
        model = GPT(source.config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(
        name for name in expected.keys() | source.weights.keys() if expected.get(name) != getattr(source.weights.get(name), "shape", None)
    )
    if wrong:
        raise UserError(f"{source.path} does not fit its own model_config: {wrong[0]} ({len(wrong)} parameters differ)")
    for name, tensor in source.weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{source.path} has values in {name} that are not finite: it is damaged or its training diverged")
    model.load_state_dict(source.weights, assign=True)
    return model.eval()


@torch.no_grad()
def _difference(before: GPT, after: GPT) -> float:
    """The largest difference of the two models' logits on random text. UserError where it is more than rounding."""
    shape = (PROBE[0], min(PROBE[1], before.config.sequence_len))
    idx = torch.randint(before.config.vocab_size, shape, generator=generator_for(0, "injection probe"))
    expected, found = before(idx), after(idx)
    gap = (found - expected).abs()
    if not bool((gap <= TOLERANCE * expected.abs().clamp(min=1)).all()):
        raise UserError(f"with all gains at zero the logits differ by {gap.max():.2g}: nothing was written; choose another --syn_preset")
    return gap.max().item()


# --- writing -----------------------------------------------------------------------------------------------------------------------


def _write(out: Path, source: Source, model: GPT, preset: str) -> Path:
    """The checkpoint: the source's metadata and files, the new model's configuration and weights, and the optimizer state if any."""
    optimizer, step = source.optimizer, source.step if source.optimizer is not None else 0
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    meta = {**source.meta, "step": step, "model_config": to_dict(model.config)}
    meta["train_config"] = dict(source.meta.get("train_config") or _train_config(model.config))
    if model.config.synapses:
        meta["train_config"] |= {"synapses": True, "syn_preset": preset, "syn_cfg": to_dict(model.config.syn_cfg)}
    meta["made_from"] = {"path": str(source.path), "layout": source.layout, "step": source.step}
    if optimizer is None:
        meta = {name: value for name, value in meta.items() if name != "loop"} | {"kind": START}
    else:
        new = {name: {"shape": list(value.shape), "state": {}} for name, value in weights.items() if name not in source.weights}
        optimizer = {**optimizer, "parameters": {**optimizer["parameters"], **new}}
    return save_checkpoint(out, step, weights, meta, optimizer, source.files)


def _train_config(config: GPTConfig) -> dict[str, Any]:
    """The settings of a training run that give a model of this configuration, synapses aside; n_head follows from the others."""
    other = ("n_layer", "sequence_len", "n_head", "bos_token_id", "synapses", "syn_cfg")
    values = {name: value for name, value in to_dict(config).items() if name not in other}
    return values | {"depth": config.n_layer, "max_seq_len": config.sequence_len, "head_dim": config.head_dim}
