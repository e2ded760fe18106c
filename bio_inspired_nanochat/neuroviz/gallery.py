"""All NeuroViz pictures of one checkpoint, as PNG files in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bio_inspired_nanochat.common import pick_device, say
from bio_inspired_nanochat.config import device_knob, knob, validate
from bio_inspired_nanochat.engine import Loaded, load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz import figures
from bio_inspired_nanochat.neuroviz.reading import SENTENCE, read_text
from bio_inspired_nanochat.training.vitals import constants, embedding, expert_rows

MOST_TOKENS = 64  # that a raster can show legibly


@dataclass(frozen=True)
class GalleryConfig:
    """What to draw, of which checkpoint."""

    checkpoint: str | None = knob(None, "checkpoint: a step, a run or a folder of runs; auto is the newest of all runs", path="exists")
    out: str = knob("pictures", "folder for the pictures")
    sentence: str = knob(SENTENCE, f"what the model reads for rasters and attention; its first {MOST_TOKENS} tokens count")
    method: str = knob("pca", "how experts are arranged on their map; umap needs the package umap-learn", choices=("pca", "umap"))
    device: str = device_knob()

    def __post_init__(self) -> None:
        validate(self)


def draw_gallery(config: GalleryConfig) -> dict[str, Any]:
    """Draw everything that the checkpoint has; the script's last line. Raises UserError for a model without synapses and experts."""
    loaded = load(config.checkpoint, pick_device(config.device))
    found = draw(loaded, Path(config.out), config.sentence, config.method)
    if not found:
        raise UserError(f"{loaded.path} has neither synapses nor experts, so there is nothing to draw: train with --synapses=1")
    for path in found.values():
        say(f"drawn {path}")
    return {"checkpoint": str(loaded.path), "pictures": {name: str(path) for name, path in found.items()}}


def draw(loaded: Loaded, folder: Path, sentence: str = SENTENCE, method: str = "pca") -> dict[str, Path]:
    """The pictures that this model has something for, by name, written as `<name>.png`. Raises UserError for a folder that cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another --out") from None
    return {name: figures.save(make(), folder / f"{name}.png") for name, make in _makers(loaded, sentence, method).items()}


def _makers(loaded: Loaded, sentence: str, method: str) -> dict[str, Callable[[], Any]]:
    model = loaded.model
    makers: dict[str, Callable[[], Any]] = {}
    if model.config.synapses:
        reading = read_text(model, loaded.tokenizer, sentence, attention=True, most=MOST_TOKENS)
        for layer in range(len(reading.course)):
            makers[f"raster_layer{layer}"] = lambda layer=layer: figures.raster(reading, layer)
        for name in ("calcium", "vesicles", "bias", "energy"):
            if name in reading.quantities():
                makers[name] = lambda name=name: figures.state_map(reading, name)
        makers["attention"] = lambda: figures.attention_maps(reading)
        learned = constants(model)
        if any(learned):
            makers["kinetics"] = lambda: figures.kinetics(learned)
    if layers := model.experts():
        rows = [{"layer": index, **row} for index, layer in enumerate(layers) for row in expert_rows(layer)]
        points = torch.cat([embedding(layer) for layer in layers]).cpu()
        makers["experts"] = lambda: figures.expert_map(rows, figures.arrange(points, method), method.upper())
        makers["radar"] = lambda: figures.radar(rows)
        makers["similarity"] = lambda: figures.similarity(rows, points)
    return makers
