"""The pictures of a speedrun's report: loss curves of both models, and what the synapses of every layer learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bio_inspired_nanochat.training.comparison import Findings, Outcome

COLOURS = {"vanilla": "#3b6fb6", "synaptic": "#d9622b"}
TIMES = {"tau_c": "calcium decay", "tau_rrp": "vesicle refill"}
GAIN_TITLES = {
    "gain_release": "release gain g_f",
    "gain_depletion": "depletion gain g_d",
    "barrier_strength": "barrier strength s_B",
}
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def draw_loss(found: Findings, path: Path) -> None:
    """Training loss and validation bits per byte of both models against the tokens that they have read."""
    ends: dict[str, tuple[float, float]] = {}
    with _Figure(path, 2, 10.0, 4.2) as (left, right):
        for kind, outcome in found.outcomes:
            tokens = outcome.plan.tokens_per_step / _unit(outcome)[0]
            steps, losses = zip(*outcome.curve.train, strict=True) if outcome.curve.train else ((), ())
            left.plot([step * tokens for step in steps], losses, color=COLOURS[kind], lw=0.9, alpha=0.35)
            left.plot([step * tokens for step in steps], smooth(losses), color=COLOURS[kind], lw=2.0, label=kind)
            steps, values = zip(*outcome.curve.val, strict=True) if outcome.curve.val else ((), ())
            right.plot([step * tokens for step in steps], values, "o-", color=COLOURS[kind], lw=2.0, ms=5, label=kind)
            if values:
                ends[kind] = (steps[-1] * tokens, values[-1])
        unit = _unit(found.vanilla)[1]
        for axes, title, label in (
            (left, "Training loss", "nats per token"),
            (right, f"Validation, {found.val_tokens:,} tokens", "bits per byte"),
        ):
            axes.set(title=title, xlabel=f"tokens read ({unit})", ylabel=label)
            axes.set_xlim(left=0)
            axes.legend()
        _limit_to_the_interesting(left, found)
        right.margins(y=0.12)
        right.set_xlim(right=1.15 * max([x for x, _ in ends.values()], default=1.0))
        _label_ends(right, ends)


def _unit(outcome: Outcome) -> tuple[float, str]:
    return (1e6, "millions") if outcome.record["tokens"] >= 2_000_000 else (1e3, "thousands")


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write the last values to the right of their points, apart from each other where the points are close."""
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda kind: ends[kind][1])
    close = len(ends) == 2 and ends[order[1]][1] - ends[order[0]][1] < 0.07 * (high - low)
    for kind, (x, y) in ends.items():
        lift = 0 if not close else 7 if kind == order[1] else -7
        style = {"color": COLOURS[kind], "fontweight": "bold", "va": "center", "annotation_clip": False}
        axes.annotate(f"{y:.3f}", (x, y), xytext=(7, lift), textcoords="offset points", **style)


def _limit_to_the_interesting(axes: Any, found: Findings) -> None:
    """Cut off the steep first steps, where both curves are alike, once there is enough behind them."""
    shown = [loss for _, outcome in found.outcomes for _, loss in smooth_points(outcome)[len(outcome.curve.train) // 12 :]]
    if len(shown) >= 16:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def smooth_points(outcome: Outcome) -> list[tuple[int, float]]:
    """The training curve as it is drawn."""
    losses = smooth([loss for _, loss in outcome.curve.train])
    return [(step, loss) for (step, _), loss in zip(outcome.curve.train, losses, strict=True)]


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a tenth of the curve around every point, fewer at the ends, so that the curve neither lags nor jumps."""
    half = len(values) // 20
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def draw_synapses(found: Findings, path: Path) -> None:
    """Every learned gain and time constant: a dot per head, a bar at the mean of its layer, a dashed line at the value of birth."""
    gains, times = found.synapses.gains, found.synapses.times
    cfg = found.synaptic.plan.model.syn_cfg
    birth = {"gain_release": cfg.lambda_loge, "barrier_strength": cfg.barrier_strength}
    names = list(dict.fromkeys(name for layer in gains for name in layer))
    panels = len(names) + bool(times)
    with _Figure(path, panels, 3.1 * panels + 0.4, 3.6) as all_axes:
        for axes, name in zip(all_axes, names, strict=False):
            _strip(axes, [layer.get(name, []) for layer in gains], COLOURS["synaptic"], 0.0, None)
            axes.axhline(birth.get(name, 0.0), color="#555555", ls="--", lw=1)
            axes.set(title=GAIN_TITLES.get(name, name), xlabel="layer")
        if times:
            for shift, colour, (name, label) in zip((-0.17, 0.17), ("#5b8c5a", "#7d5ba6"), TIMES.items(), strict=True):
                _strip(all_axes[-1], [layer[name] for layer in times], colour, shift, label)
                all_axes[-1].axhline(getattr(cfg, name), color=colour, ls="--", lw=1)
            _token_axis(all_axes[-1], [value for layer in times for values in layer.values() for value in values], cfg)


def _strip(axes: Any, layers: Sequence[Sequence[float]], colour: str, shift: float, label: str | None) -> None:
    for layer, values in enumerate(layers):
        if not values:
            continue
        width = 0.22 if shift == 0 else 0.12
        spread = [layer + shift + width * (2 * i / max(1, len(values) - 1) - 1) * 0.8 for i in range(len(values))]
        axes.scatter(spread, values, s=22, color=colour, alpha=0.55, lw=0, label=label if layer == 0 else None)
        mean = sum(values) / len(values)
        axes.plot([layer + shift - width, layer + shift + width], [mean, mean], color=colour, lw=2.5)
    step = max(1, len(layers) // 8)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in range(0, len(layers), step)])
    axes.set_xlim(-0.6, len(layers) - 0.4)


def _token_axis(axes: Any, values: Sequence[float], cfg: Any) -> None:
    """A logarithmic axis with plain numbers, and room for the legend."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    everything = [*values, cfg.tau_c, cfg.tau_rrp]
    low, high = min(everything) * 0.9, max(everything) * 1.45
    ticks = [base * 10**power for power in range(6) for base in (1, 1.5, 2, 3, 5, 7) if low <= base * 10**power <= high]
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set(title="time constants (tokens)", xlabel="layer")
    axes.legend(loc="upper center", ncols=1, fontsize=9.5, handletextpad=0.2, borderaxespad=0.1)


class _Figure:
    """A row of axes that is written to `path` at the end; the process's own matplotlib settings stay as they are."""

    def __init__(self, path: Path, panels: int, width: float, height: float) -> None:
        self._path, self._panels, self._size = path, panels, (width, height)

    def __enter__(self) -> Sequence[Any]:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        self._figure = Figure(figsize=self._size, dpi=130)
        FigureCanvasAgg(self._figure)
        return list(self._figure.subplots(1, self._panels, squeeze=False)[0])

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._figure.savefig(self._path)
        finally:
            self._style.__exit__(None, None, None)
