"""The list of what a run reports: every tag of its logs with unit, expected range and meaning.

`training.vitals` measures the scalars of the synapses and experts, `neuroviz.tensorboard` writes all of them, the README's list is
generated from here, and a test trains with every mechanism on and holds each tag to its range.

A tag that is said to be per layer is written for the whole model under its own name, and for every layer as `<tag>/layer<n>`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One tag.

    kind: how TensorBoard shows it; low, high: expected range, inclusive (None: no number, or unbounded on that side); group: the
    chapter of the list and of the custom-scalars page; when: what a model or run must have for the tag to be written (empty: every
    run); layers: also per layer; total: how the whole model's number comes from those of the layers; rests: it may stand still.
    """

    tag: str
    unit: str
    low: float | None
    high: float | None
    meaning: str
    group: str
    when: str = ""
    kind: str = "scalar"
    layers: bool = False
    total: str = "mean"
    rests: bool = False

    def tags(self, layers: int) -> list[str]:
        """The names under which a model of so many layers writes it; a name with further placeholders stays as it is."""
        return [self.tag, *(f"{self.tag}/layer{layer}" for layer in range(layers))] if self.layers else [self.tag]

    @property
    def range(self) -> str:
        """The expected range as text."""
        if self.low is None and self.high is None:
            return ""
        ends = ("-inf" if self.low is None else f"{self.low:g}", "inf" if self.high is None else f"{self.high:g}")
        return f"[{', '.join(ends)}]"


def _layered(group: str, when: str, rows: dict[str, tuple]) -> tuple[Metric, ...]:
    return tuple(Metric(tag, *row[:4], group=group, when=row[4] if len(row) > 4 else when, layers=True) for tag, row in rows.items())


TERMINALS, FAST, EXPERTS, SCORES = "terminals", "fast weights", "experts", "scores"

# The quantity of `synaptic.LayerTelemetry` behind each tag.
OF_TERMINALS = {
    "calcium_mean": "calcium",
    "rrp_mean": "vesicles",
    "release_mean": "released",
    "bias_abs_mean": "bias_abs",
    "energy_mean": "energy",
    "reserve_mean": "reserve",
    "primed_mean": "primed",
    "buffer_mean": "buffer",
    "clamp_mean": "clamp",
}
OF_FAST = {name: name for name in ("fast_weight_norm", "camkii_mean", "pp1_mean", "bdnf_mean", "eta_mean")}

SCALARS: tuple[Metric, ...] = (
    Metric("train/loss", "nats per token", 0, 20, "mean cross-entropy since the last line", "training"),
    Metric("train/lr", "factor", 0, 1, "multiplier of every learning rate", "training"),
    Metric("train/grad_norm", "", 0, 1e4, "norm of the gradient before clipping", "training"),
    Metric("train/tok_per_s", "tokens/s", 0, 1e9, "speed since the last line", "training"),
    Metric("train/mfu", "share", 0, 1, "achieved operations over the device's peak", "training", when="a device of known peak"),
    Metric("train/mem_gib", "GiB", 0, 1e4, "largest memory so far", "training", rests=True),
    Metric("train/wait", "share", 0, 1, "time spent waiting for data", "training"),
    Metric("train/epoch", "epochs", 0, 1e6, "passes over the data so far", "training", rests=True),
    Metric("train/tokens", "tokens", 0, 1e15, "tokens read so far", "training"),
    Metric("val/bpb", "bits per byte", 0, 20, "on validation text", "training"),
    Metric("val/loss", "nats per token", 0, 20, "on validation text", "training"),
    Metric("sleep/change", "share", 0, 10, "what a consolidation added, by its norm", "training", when="`--consolidate_every`"),
    *_layered(
        TERMINALS,
        "terminals",
        {
            "calcium_mean": ("own unit", 0, 100, "calcium of a terminal at the start of a tick"),
            "rrp_mean": ("share of full", 0, 1, "readily releasable vesicles"),
            "release_mean": ("pools per tick", 0, 10, "vesicles released in a tick"),
            "bias_abs_mean": ("logits", 0, 8, "absolute bias that the terminals give attention, without the barrier"),
            "energy_mean": ("share of full", 0, 1, "energy of a terminal", "`syn_cfg.energy`"),
            "reserve_mean": ("share of full", 0, 1, "reserve vesicles", "`syn_cfg.reserve`"),
            "primed_mean": ("share", 0, 1, "primed SNAREs", "`syn_cfg.priming`"),
            "buffer_mean": ("share of full", 0, 1, "calcium held by the buffer", "`syn_cfg.buffer`"),
            "clamp_mean": ("share of birth", 0, 1, "complexin that holds release back", "`syn_cfg.clamp`"),
        },
    ),
    *_layered(
        FAST,
        "`syn_cfg.hebb`",
        {
            "fast_weight_norm": ("Frobenius", 0, 1e3, "fast weights after the last token, mean over projections"),
            "camkii_mean": ("share", 0, 1, "CaMKII after the last token", "`syn_cfg.camkii_gain`"),
            "pp1_mean": ("share", 0, 1, "PP1 after the last token", "`syn_cfg.pp1_gain`"),
            "bdnf_mean": ("share", 0, 1, "BDNF after the last token", "`syn_cfg.bdnf_gamma`"),
            "eta_mean": ("share", 0, 1, "write strength, mean over tokens"),
        },
    ),
    Metric("experts/population", "experts", 1, 8192, "living experts", EXPERTS, "`--splitmerge_every`", layers=True, total="sum"),
    *_layered(
        EXPERTS,
        "experts",
        {
            "experts/utilisation": ("share", 0, 1, "exponential of the entropy of the load, over the living"),
            "experts/health": ("share", 0, 1, "mean health: demand and account, see Experts"),
            "experts/account": ("share", 0, 1, "mean bank account"),
            "experts/dead": ("share", 0, 1, "living experts with less than a hundredth of the fair load"),
            "experts/gini": ("share", 0, 1, "inequality of the load: 0 all equal, near 1 one has everything"),
            "experts/cv": ("", 0, 91, "coefficient of variation of the load: standard deviation over mean"),
        },
    ),
    *_layered(
        SCORES,
        "experts",
        {
            "neuroscore/contribution": ("nats per token", -20, 20, "loss that would be added without an expert, mean over the living"),
            "neuroscore/best": ("nats per token", -20, 20, "contribution of the best expert"),
            "neuroscore/efficiency": ("nats per fair share", -1e3, 1e3, "contribution over load, mean"),
            "neuroscore/specialization": ("", 0, 2, "1 - cosine of an expert's mean input with that of all tokens, mean"),
            "neuroscore/resilience": ("log10", -10, 12, "logarithm of 1 / variance of the contribution over time, mean"),
        },
    ),
    Metric("gains/layer<n>/<gain>", "", -100, 100, "learned output gain, mean over heads", "learned", "synapses"),
    Metric("time_constants/<name>/layer<n>/head<h>", "tokens", 0, 1e6, "learned time constant of a head", "learned", "terminals"),
    Metric(
        "time_constants/fast_<projection>/layer<n>",
        "tokens",
        4,
        1e9,
        "learned memory of fast weights, mean over modes",
        "learned",
        "`syn_cfg.hebb`",
    ),
)
OTHERS: tuple[Metric, ...] = (
    Metric("pools/<quantity>/layer<n>", "as above", None, None, "distribution over terminals", TERMINALS, "terminals", "histogram"),
    Metric(
        "kinetics/<name>", "own unit", None, None, "distribution of a learned constant over all heads", "learned", "synapses", "histogram"
    ),
    Metric(
        "pictures/vesicles", "share of full", None, None, "pools while a sentence is read, head by head", TERMINALS, "terminals", "figure"
    ),
    Metric("pictures/calcium", "own unit", None, None, "calcium while a sentence is read, head by head", TERMINALS, "terminals", "figure"),
    Metric(
        "pictures/attention", "share", None, None, "attention weights of every layer, mean over heads", TERMINALS, "terminals", "figure"
    ),
    Metric("pictures/experts", "", None, None, "the expert map", EXPERTS, "experts", "figure"),
    Metric(
        "experts (projector)", "", None, None, "router embedding of the living, with id, age, load, health", EXPERTS, "experts", "embedding"
    ),
    Metric("lineage", "", None, None, "the family trees", EXPERTS, "`--splitmerge_every`", "text"),
    Metric("decisions/split", "", 0, 1, "does health tell who splits", EXPERTS, "a split", "PR curve"),
    Metric("decisions/end", "", 0, 1, "does a lack of health tell who dies or merges", EXPERTS, "a death or merge", "PR curve"),
    Metric("samples", "", None, None, "continued prompts", "training", "`--sample_every`", "text"),
    Metric("hparams", "", None, None, "the flags, with `val/bpb` and `train/loss`", "training", "", "hparams"),
)
METRICS: tuple[Metric, ...] = SCALARS + OTHERS


def metric_rows() -> list[tuple[str, ...]]:
    """A row per tag for the README: tag, kind, unit, expected range, what it needs, meaning."""
    return [
        (f"`{item.tag}`", item.kind + (", and per layer" if item.layers else ""), item.unit, item.range, item.when, item.meaning)
        for item in METRICS
    ]


METRIC_COLUMNS = ("tag", "kind", "unit", "expected", "with", "meaning")
