"""Evaluation of a base model's checkpoint: bits per byte on held-out text, what the synapses add to it, and samples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from bio_inspired_nanochat.common import pick_device, say
from bio_inspired_nanochat.config import device_knob, knob, validate
from bio_inspired_nanochat.data import DataSource, resolve_data
from bio_inspired_nanochat.engine import Loaded, generate_batch, load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.evaluation.bpb import Bpb, bits_per_byte, evaluating

PROMPTS = ("The", "Once upon a time", "A: Hello, how are you?\nB:", "The king said to his")


@dataclass(frozen=True)
class BaseEvalConfig:
    """What to evaluate and on how much text."""

    checkpoint: str | None = knob(None, "checkpoint: a step, a run or a folder of runs; auto is the newest of all runs", path="exists")
    eval_tokens: int = knob(1 << 17, "tokens of held-out text; the same number for every model", lo=1, hi=1 << 40, unit="tokens")
    split: str = knob("val", "text to measure on", choices=("val", "train"))
    zero_synapses: bool = knob(False, "measure again with all synaptic gains at zero, and report the difference", off=False)
    samples: int = knob(3, "continuations of built-in prompts to print; 0 prints none", lo=0, hi=len(PROMPTS), off=0)
    max_tokens: int = knob(48, "length of a sample", lo=1, hi=1 << 20, unit="tokens")
    temperature: float = knob(0.8, "spread of the samples; 0 always takes the most likely token", lo=0.0, hi=100.0, off=0.0)
    device_batch_size: int = knob(8, "rows of one forward", lo=1, hi=1 << 20, aliases=("batch_size",))
    data_dir: str | None = knob(None, "folder of parquet shards; auto is what the model was trained on", path="exists")
    dataset: str | None = knob(None, "name of a Hugging Face dataset to use instead", none="none")
    device: str = device_knob()
    seed: int = knob(0, "seed of the samples", lo=0, hi=(1 << 63) - 1)

    def __post_init__(self) -> None:
        validate(self)


def opened(checkpoint: str | None, device: torch.device) -> tuple[Loaded, dict[str, Any]]:
    """A checkpoint (None: the newest of all runs), and what a record says of it; says the same. Raises UserError for a missing one."""
    loaded = load(checkpoint, device)
    synapses, params = loaded.model.config.synapses, loaded.model.num_params()
    say(f"checkpoint {loaded.path}: {'synaptic' if synapses else 'vanilla'}, {params:,} parameters")
    return loaded, {"checkpoint": str(loaded.path), "step": loaded.step, "synapses": synapses, "params": params}


def evaluate_base(config: BaseEvalConfig) -> dict[str, Any]:
    """Evaluate one checkpoint; returns the script's last line. Raises UserError for missing checkpoints and data."""
    began = time.perf_counter()
    device = pick_device(config.device)
    loaded, record = opened(config.checkpoint, device)
    model = loaded.model
    if config.zero_synapses and not model.gains():
        raise UserError(f"zero_synapses=1 needs a synaptic model: {loaded.path} has no synapses")
    source = text_source(config.data_dir, config.dataset, loaded.meta)
    found = _measure(config, loaded, source)
    record |= {"split": config.split, "val_bpb": found.bpb, "val_loss": found.nats_per_token, "tokens": found.tokens, "bytes": found.bytes}
    say(f"bits per byte {found.bpb:.4f}, {found.nats_per_token:.4f} nats per token on {found.tokens:,} tokens of {config.split} text")
    texts = samples(config, loaded)
    for text in texts:
        say(f"sample | {text!r}")
    if config.zero_synapses:
        model.zero_gains()
        silent = _measure(config, loaded, source)
        record |= {"val_bpb_zero_gains": silent.bpb, "zero_gains_difference": silent.bpb - found.bpb}
        say(f"bits per byte with all synaptic gains at zero {silent.bpb:.4f} ({silent.bpb - found.bpb:+.4f})")
    return record | {"samples": texts, "device": str(device), "seconds": round(time.perf_counter() - began, 3)}


def text_source(data_dir: str | None, dataset: str | None, meta: dict[str, Any]) -> DataSource:
    """The text asked for, else that of the training, which `meta` of a checkpoint names. Raises UserError when it is not there."""
    if data_dir is not None or dataset is not None:
        return resolve_data(data_dir, dataset)
    trained = meta.get("train_config", {})
    try:
        return resolve_data(trained.get("data_dir"), trained.get("dataset"))
    except UserError as error:
        raise UserError(f"the text that the model was trained on is not here ({error}): give --data_dir") from None


def _measure(config: BaseEvalConfig, loaded: Loaded, source: DataSource) -> Bpb:
    model, tokenizer = loaded.model, loaded.tokenizer
    length = model.config.sequence_len
    rows = -(-config.eval_tokens // length)
    loader = source.loader(config.split, tokenizer, min(rows, config.device_batch_size), length, loop=False)
    try:
        batches = -(-rows // min(rows, config.device_batch_size))
        return bits_per_byte(model, loader, batches, tokenizer.token_bytes(), max_rows=rows)
    finally:
        loader.close()


def samples(config: BaseEvalConfig, loaded: Loaded) -> list[str]:
    """Continuations of the first `config.samples` prompts, prompt included."""
    tokenizer = loaded.tokenizer
    prompts = [tokenizer.encode(text, bos=True) for text in PROMPTS[: config.samples]]
    prompts = [prompt[: max(1, loaded.model.config.sequence_len - 1)] for prompt in prompts]
    if not prompts:
        return []
    tokens = [list(prompt) for prompt in prompts]
    with evaluating(loaded.model):
        made = generate_batch(
            loaded.model, prompts, config.max_tokens, config.temperature, top_k=50, seed=config.seed, stop_ids=[tokenizer.bos_id]
        )
        for item in made:
            for row, token in enumerate(item):
                tokens[row] += [] if token is None else [token]
    return [tokenizer.decode(row[1:]) for row in tokens]
