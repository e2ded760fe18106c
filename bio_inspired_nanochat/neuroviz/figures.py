"""NeuroViz: figures of terminals and experts, made with matplotlib from what a model was seen to do. Nothing here runs a model.

Every function returns a `matplotlib.figure.Figure`; `save` writes it as PNG.

Dimensions: H query heads, N ticks, T tokens, E experts, d width of an identity.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.config import SynapticConfig, knobs_of
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz.reading import Reading
from bio_inspired_nanochat.training.vitals import plane

UNITS = {
    "calcium": "calcium (own unit)",
    "vesicles": "vesicle pool (share of full)",
    "bias": "bias (logits)",
    "energy": "energy (share of full)",
}
UNITS |= {"released": "released in the tick (pools)", "reserve": "reserve (share of full)", "primed": "primed SNAREs (share)"}
COLOURS = {"calcium": "magma", "vesicles": "viridis", "bias": "RdBu_r", "energy": "cividis"}
LIMITS = {"vesicles": (0.0, 1.0), "energy": (0.0, 1.0)}
RASTER_QUANTITIES = ("calcium", "vesicles")
RASTER_HEADS, MAPS, RIVALS = 8, 12, 6  # how much of a large model the pictures show
SCORES = ("contribution", "efficiency", "specialization", "resilience", "load", "health")
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw in the common style, without changing what others draw in."""

    @functools.wraps(draw)
    def styled(*args: Any, **options: Any) -> Any:
        import matplotlib  # imported late: half a second

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return styled


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside of pyplot, which keeps figures alive."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def save(picture: Any, path: Path) -> Path:
    """Write a figure as PNG; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130, bbox_inches="tight")
    return path


@_styled
def state_map(reading: Reading, quantity: str) -> Any:
    """All heads of all layers (rows) over the tokens of a text (columns), at the start of its last tick. Raises UserError without it."""
    rows = [layer[quantity][:, -1] for layer in reading.course if quantity in layer]
    if not rows:
        raise UserError(f"this model's terminals have no {quantity}: they have {', '.join(reading.quantities()) or 'nothing'}")
    heads = len(rows[0])
    values = np.concatenate([row.numpy() for row in rows])
    picture = _figure(max(5.0, 0.22 * len(reading.tokens) + 2.2), min(14.0, max(2.4, 0.14 * len(values) + 1.6)))
    axes = picture.add_subplot()
    image = _heat(axes, values, quantity)
    _token_labels(axes, reading.tokens)
    axes.set_yticks([heads * layer + (heads - 1) / 2 for layer in range(len(rows))], [f"layer {layer}" for layer in range(len(rows))])
    for layer in range(1, len(rows)):
        axes.axhline(heads * layer - 0.5, color="white", lw=1)
    last = (len(reading.tokens) - 1) // reading.tick * reading.tick
    axes.set(title=f"{quantity.capitalize()} before token {last}, {heads} heads per layer", xlabel="token (key)")
    picture.colorbar(image, ax=axes, label=UNITS.get(quantity, quantity))
    return picture


@_styled
def raster(reading: Reading, layer: int) -> Any:
    """One layer while it reads: a panel per head and quantity, keys to the right, ticks downward. Terminals not yet born are blank.

    Raises UserError for a model without terminals.
    """
    held = [name for name in RASTER_QUANTITIES if reading.course and name in reading.course[layer]]
    if not held:
        raise UserError("this model has no terminals to draw: train one with --synapses=1 and terminals (preset core, default or full)")
    course = reading.course[layer]
    heads, ticks, keys = course[held[0]].shape
    heads = min(heads, RASTER_HEADS)
    born = np.arange(keys)[None] < reading.tick * np.arange(1, ticks + 1)[:, None]
    picture = _figure(len(held) * max(4.5, 0.17 * keys + 1.2), heads * max(1.1, 0.09 * ticks + 0.5) + 1.2)
    panels = picture.subplots(heads, len(held), squeeze=False, sharex=True)
    for column, name in enumerate(held):
        values = course[name][:heads].numpy()
        shared = LIMITS.get(name, (min(0.0, float(values.min())), float(values.max()) or 1.0))
        for head in range(heads):
            axes = panels[head, column]
            image = _heat(axes, np.where(born, values[head], np.nan), name, shared)
            axes.set_ylabel(f"head {head}\ntick" if column == 0 else "")
            axes.set_yticks([0, ticks - 1] if ticks > 1 else [0])
        panels[0, column].set_title(f"{name.capitalize()}, layer {layer}")
        _token_labels(panels[-1, column], reading.tokens)
        panels[-1, column].set_xlabel(f"token (key); a tick is {reading.tick} tokens")
        picture.colorbar(image, ax=panels[:, column], label=UNITS.get(name, name), aspect=40)
    return picture


@_styled
def attention_maps(reading: Reading) -> Any:
    """Attention weights of the first MAPS layers, mean over heads: queries downward, keys to the right, one colour scale of root weights."""
    shown = reading.attention[:MAPS]
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    picture = _figure(3.1 * columns + 0.8, 3.4 * rows)
    panels = picture.subplots(rows, columns, squeeze=False).flatten()
    for layer, axes in enumerate(panels):
        if layer >= len(shown):
            axes.axis("off")
            continue
        image = axes.imshow(shown[layer].mean(0).sqrt().numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set(title=f"layer {layer}", xlabel="key (token)", ylabel="query (token)")
    picture.colorbar(image, ax=list(panels), label="square root of the mean weight")  # pyrefly: ignore[unbound-name]
    return picture


@_styled
def expert_map(experts: Sequence[dict[str, float]], places: Tensor, how: str = "PCA") -> Any:
    """All living experts on the plane: size is load, colour health, number id, and the darker the rim the older.

    experts: rows as in `training.vitals.expert_rows`; places: [E, 2] (see `arrange`).
    """
    picture = _figure(8.2, 6.4)
    axes = picture.add_subplot()
    ages = np.array([row["age"] for row in experts], dtype=float)
    layers = sorted({int(row["layer"]) for row in experts})
    markers = "osD^vP*Xphd<>"
    for layer in layers:
        index = [i for i, row in enumerate(experts) if row["layer"] == layer]
        points = axes.scatter(
            places[index, 0],
            places[index, 1],
            s=[60 + 180 * min(3.0, experts[i]["load"]) for i in index],
            c=[experts[i]["health"] for i in index],
            cmap="RdYlGn",
            vmin=0,
            vmax=1,
            marker=markers[layer % len(markers)],
            edgecolors=[str(0.85 * (1 - age)) for age in (ages[index] / max(1.0, ages.max()))],
            linewidths=1.8,
            label=f"layer {layer}",
        )
    for row, (x, y) in zip(experts, places.tolist(), strict=True):
        axes.annotate(f"{int(row['id'])}", (x, y), ha="center", va="center", fontsize=7)
    axes.set(title="Experts by router embedding", xlabel=f"{how} 1", ylabel=f"{how} 2")
    if len(layers) <= 13:
        marks = axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=min(6, len(layers)))
        for handle in marks.legend_handles:
            handle.set_sizes([60])
            handle.set_facecolor("#bbbbbb")
    picture.colorbar(points, ax=axes, label="health (size: load; dark rim: old)")  # pyrefly: ignore[unbound-name]
    return picture


def arrange(identities: Tensor, method: str = "pca") -> Tensor:
    """Places [E, 2] for router embeddings [E, d]. method: pca, or umap where the package umap-learn is installed (else UserError)."""
    if method == "pca" or len(identities) < 4:
        return plane(identities)
    try:
        from umap import UMAP
    except ImportError:
        raise UserError("--method=umap needs the package umap-learn: install it, or use --method=pca") from None
    import torch

    return torch.from_numpy(
        UMAP(n_neighbors=min(15, len(identities) - 1), random_state=0, n_jobs=1).fit_transform(identities.numpy())
    ).float()


@_styled
def radar(experts: Sequence[dict[str, float]]) -> Any:
    """The RIVALS experts of largest contribution on six scores, each as a rank among all living experts: 0 is the lowest, 1 the highest."""
    best = sorted(range(len(experts)), key=lambda i: -experts[i]["contribution"])[:RIVALS]
    ranks = {}
    for name in SCORES:
        values = np.array([row[name] for row in experts])
        ranks[name] = (values[:, None] > values[None]).sum(1) / max(1, len(experts) - 1)
    angles = np.linspace(0, 2 * np.pi, len(SCORES), endpoint=False).tolist()
    picture = _figure(8.4, 5.8)
    axes = picture.add_subplot(projection="polar")
    for i in best:
        values = [ranks[name][i] for name in SCORES]
        row = experts[i]
        line = axes.plot([*angles, angles[0]], [*values, values[0]], lw=1.6, label=f"layer {int(row['layer'])} expert {int(row['id'])}")
        axes.fill(angles, values, alpha=0.08, color=line[0].get_color())
    axes.set_xticks(angles, SCORES)
    axes.tick_params(axis="x", pad=16)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"])
    axes.set_ylim(0, 1.05)
    axes.set_title(f"Top {len(best)} experts by contribution\n(rank among {len(experts)}, 1 is the highest)")
    picture.legend(loc="outside right upper")
    return picture


@_styled
def kinetics(constants: Sequence[dict[str, list[float]]]) -> Any:
    """Every learned constant: a panel each, a column of dots per layer, a dot per head, a bar at the layer's mean, the knob's default dashed.

    Raises UserError for a model without such constants.
    """
    names = list(dict.fromkeys(name for layer in constants for name in layer))
    if not names:
        raise UserError("this model has no learned constants of terminals: train one with --synapses=1")
    knobs, defaults = knobs_of(SynapticConfig), SynapticConfig()
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    picture = _figure(3.2 * columns, 2.2 * rows + 0.4)
    panels = picture.subplots(rows, columns, squeeze=False).flatten()
    for axes, name in zip(panels, [*names, *[None] * (len(panels) - len(names))], strict=True):
        if name is None:
            axes.axis("off")
            continue
        for layer, values in enumerate(constants):
            held = values.get(name, [])
            axes.plot([layer] * len(held), held, "o", ms=3.5, alpha=0.6, color="#3b6fb6")
            if held:
                axes.plot([layer - 0.3, layer + 0.3], [np.mean(held)] * 2, color="#d9622b", lw=2)
        if name in knobs and isinstance(getattr(defaults, name), float):
            axes.axhline(getattr(defaults, name), color="#999999", lw=0.8, ls="--")
        unit = (knobs[name].unit if name in knobs else "") or ("gain" if name.startswith("gain_") else "no unit")
        axes.set(title=name, ylabel=unit, xlabel="layer")
        axes.set_xticks(range(len(constants)) if len(constants) <= 12 else range(0, len(constants), 4))
        axes.margins(x=0.15)
    picture.suptitle("What the heads have learned (dots: heads; bars: mean of the layer; dashed: default of the knob)")
    return picture


@_styled
def similarity(experts: Sequence[dict[str, float]], identities: Tensor) -> Any:
    """Cosines of the router embeddings of all living experts, [E, E]; lines between layers."""
    unit = F.normalize(identities, dim=-1)
    picture = _figure(7.0, 6.0)
    axes = picture.add_subplot()
    image = axes.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    labels = [f"L{int(row['layer'])} #{int(row['id'])}" for row in experts]
    if len(labels) <= 60:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
    for i in range(1, len(experts)):
        if experts[i]["layer"] != experts[i - 1]["layer"]:
            axes.axhline(i - 0.5, color="black", lw=0.8)
            axes.axvline(i - 0.5, color="black", lw=0.8)
    axes.set_title("Similarity of experts' router embeddings")
    picture.colorbar(image, ax=axes, label="cosine")
    return picture


def _heat(axes: Any, values: np.ndarray, quantity: str, limits: tuple[float, float] | None = None) -> Any:
    low, high = limits or LIMITS.get(quantity, (min(0.0, float(np.nanmin(values))), float(np.nanmax(values)) or 1.0))
    if quantity == "bias":
        high = max(abs(low), abs(high), 1e-6)
        low = -high
    return axes.imshow(values, aspect="auto", cmap=COLOURS.get(quantity, "viridis"), vmin=low, vmax=high, interpolation="nearest")


def _token_labels(axes: Any, tokens: Sequence[str]) -> None:
    every = max(1, math.ceil(len(tokens) / 72))
    plain = [token.replace("$", r"\$") for token in tokens]
    axes.set_xticks(range(0, len(tokens), every), plain[::every], rotation=90, fontsize=6.5, family="DejaVu Sans Mono")
