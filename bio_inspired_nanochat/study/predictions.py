"""The falsifiable predictions about the mechanisms, as entries that the scorecard judges.

They come from the feasibility review among the background documents, restated; `source` names its section. Where the review gives
thresholds they are its own; `ours` says what this project had to add because the review says nothing, or two things at once.

`condition` against `reference` are conditions of the matrix (any name that was given to one), or both None for a measurement of its own.
`kind` says what is computed from the metric of both, over paired seeds:

    change     condition - reference
    relative   condition / reference - 1, of the seeds' means
    level      the condition's mean alone
    rule       the verdict of the statistics' rule, `success` and `failure` as the direction of the better side
    peak       the best of several conditions, inside or at an end
    halves     gains of the first and the second half of a series of conditions
    count      how many metrics got better or worse by a share
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bio_inspired_nanochat.study.matrix import FRACTIONS, TEMPERATURES

Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class Prediction:
    """One prediction.

    metrics: names of the same quantity, the first one that was measured counts. success, failure: open intervals (low, high) of the
    computed number, None for no bound; outside of both it is neutral. guards: further (metric, kind, success, failure), all of which
    must succeed for a success, and one of which is enough for a failure. better: which side of zero is the predicted one, for `rule`.
    horizon: what the review wanted to wait for.
    """

    id: str
    statement: str
    source: str
    kind: str
    metrics: tuple[str, ...]
    condition: str | None = None
    reference: str | None = None
    success: Bounds = (None, None)
    failure: Bounds = (None, None)
    better: str = ""
    guards: tuple[tuple[tuple[str, ...], str, Bounds, Bounds], ...] = ()
    series: tuple[str, ...] = field(default=())
    ours: str = ""
    horizon: str = ""


GINI = ("experts.gini", "experts/gini")
DEAD = ("experts.dead", "experts/dead")
ECE = ("calibration.ece",)
PERPLEXITY = ("perplexity",)
LOSS = ("val_loss",)
FAR = ("needle.accuracy_2048", "needle.accuracy_1024", "needle.accuracy_512", "needle.accuracy_256")
COPY = ("copy.accuracy_2048", "copy.accuracy_1024", "copy.accuracy_512", "copy.accuracy_256")
_BASE = f"release:{round(100 * FRACTIONS[0])}"
_CALM = (PERPLEXITY, "relative", (None, 0.02), (0.10, None))


def _release(fraction: float) -> Prediction:
    percent = round(100 * fraction)
    return Prediction(
        f"release-{percent}",
        f"Raising the share of random releases from 12 % to {percent} % improves calibration and leaves perplexity alone.",
        "review, part 4, prediction 2: ECE down by over 5 % while perplexity rises by under 2 %; failure: perplexity up by over 10 %",
        "relative",
        ECE,
        f"release:{percent}",
        _BASE,
        success=(None, -0.05),
        guards=(_CALM,),
        ours="" if percent == 50 else "the review states the thresholds for 50 %; the same are applied along its path 12, 25, 50, 100 %",
        horizon="a loss that diverges after 10,000 steps",
    )


PREDICTIONS: tuple[Prediction, ...] = (
    Prediction(
        "bdnf-gini",
        "BDNF makes experts specialise: the Gini coefficient of their loads rises.",
        "review, part 4, prediction 1: success above +0.10, neutral within 0.05, failure when it falls",
        "change",
        GINI,
        "experts_bdnf",
        "experts_static",
        success=(0.10, None),
        failure=(None, -0.05),
        ours="a fall of less than 0.05 is neutral (the review calls it both), and so is a rise between 0.05 and 0.10",
        horizon="unchanged after 50,000 steps means that BDNF is not used",
    ),
    *(_release(fraction) for fraction in FRACTIONS[1:]),
    Prediction(
        "release-25-perplexity",
        "A quarter of the releases at random improves perplexity by 1 to 3 % over 12 %.",
        "review, part 3, tier 0, item 2",
        "relative",
        PERPLEXITY,
        "release:25",
        _BASE,
        success=(None, -0.01),
        failure=(0.01, None),
        ours="failure: worse by over 1 %",
    ),
    Prediction(
        "kernel-single-pass",
        "One pass over the keys instead of several makes the forward of the synaptic layer faster by more than 15 %.",
        "review, part 4, prediction 3: success above 15 %, neutral 5 to 15 %, failure below 5 %",
        "level",
        ("kernel.forward_gain",),
        success=(0.15, None),
        failure=(None, 0.05),
        ours="the several passes are the operators one by one (`triton`), the single pass is `fused`; any batch that the benchmark ran",
    ),
    Prediction(
        "fast-recall",
        "A model with fast weights finds at a distance what one without has forgotten.",
        "review, section 3.9: without fast weights a guess, with them the answer; equal results mean that they are not used",
        "rule",
        FAR,
        "default_fast",
        "default",
        better="higher",
        ours="better or worse is decided by the rule of the statistics, at the largest length up to 2048 that was measured",
    ),
    Prediction(
        "calcium-gate-far",
        "Reading fast weights through a calcium gate improves work at long context by 3 to 7 %.",
        "review, part 3, tier 1, item 3",
        "relative",
        COPY,
        "default_fast_gate",
        "default_fast",
        success=(0.03, None),
        failure=(None, -0.03),
        ours="measured by copies at the largest length up to 2048; failure: worse by over 3 %",
    ),
    Prediction(
        "life-dead",
        "The life cycle leaves fewer dead experts than a fixed set, without making training unstable.",
        "review, sections 4.2, 4.11 and 7.2: fewer dead experts, variance of the loss below 2 x that of the baseline",
        "change",
        DEAD,
        "experts_life",
        "experts_static",
        success=(None, 0.0),
        failure=(0.0, None),
        guards=((("train.loss_variance",), "relative", (None, 1.0), (1.0, None)),),
        ours="no change, also where neither has a dead expert, is neutral",
    ),
    Prediction(
        "life-loss",
        "The life cycle uses its parameters better: a lower loss at the same number of active ones.",
        "review, sections 5.3 and 7.2: parameter efficiency",
        "rule",
        LOSS,
        "experts_life",
        "experts_static",
        better="lower",
        ours="by the rule of the statistics",
    ),
    Prediction(
        "release-gradient-variance",
        "Random release keeps the variance of the gradient below five times that of expectations.",
        "review, sections 1.7 and 7.2: below 5 x; 10 x is the danger zone",
        "relative",
        ("train.grad_norm_variance",),
        _BASE,
        "default",
        success=(None, 4.0),
        failure=(9.0, None),
        ours="measured as the variance of the gradient's norm from log line to log line, over the second half of training",
    ),
    Prediction(
        "temperature",
        "There is a best temperature of the relaxed release between 0.1 and 1.",
        "review, section 1.7, item 3: temperatures 0.1, 0.3, 0.5, 0.7, 1.0; is there a zone that is just right?",
        "peak",
        LOSS,
        reference="default",
        series=tuple(f"temperature:{value}" for value in TEMPERATURES),
        ours="success: an inner temperature is better than both ends by the rule; failure: every one is worse than no noise by the rule",
    ),
    Prediction(
        "uncertainty",
        "The spread over random releases tells wrong answers from right ones with an AUROC above 0.7.",
        "review, section 7.2",
        "level",
        ("calibration.mc_auroc_information", "calibration.mc_auroc"),
        _BASE,
        success=(0.7, None),
        failure=(None, 0.5),
        ours="failure: no better than a guess",
    ),
    Prediction(
        "release-calibration",
        "Random release reduces the calibration error by more than 10 % against expectations.",
        "review, section 7.2 (the other way to pass beside AUROC)",
        "relative",
        ECE,
        _BASE,
        "default",
        success=(None, -0.10),
        failure=(0.10, None),
        ours="failure: worse by over 10 %",
    ),
    Prediction(
        "bdnf-perplexity",
        "BDNF improves validation perplexity by at least 2 %.",
        "review, section 7.2 (the other way to pass beside the Gini coefficient)",
        "relative",
        PERPLEXITY,
        "default_fast_bdnf",
        "default_fast",
        success=(None, -0.02),
        failure=(0.0, None),
        ours="failure: any rise",
    ),
    Prediction(
        "bdnf-relearn",
        "With BDNF a pattern that was unlearned is learned anew faster.",
        "review, section 2.9: A, then B, then A again; no difference means that BDNF is dead weight",
        "rule",
        ("memory.switching.A again",),
        "memory:delta_bdnf",
        "memory:delta",
        better="higher",
        ours="by the rule of the statistics, of right answers about A after B in models of `memory_study` with fast weights by the delta rule",
    ),
    Prediction(
        "dropout-suffices",
        "The current model with dropout 0.1 is as good as all mechanisms together (the simpler solution).",
        "review, section 6.1",
        "rule",
        LOSS,
        "default_dropout",
        "all_on",
        better="not higher",
        ours="success: its loss is higher by less than 0.01 nats at the end of the interval; failure: all mechanisms are better by the rule",
    ),
    Prediction(
        "saturation",
        "More mechanisms give less and less: the second half of them gains less than the first.",
        "review, section 6.2",
        "halves",
        LOSS,
        reference="vanilla",
        series=("cumulative",),
        ours="success: the second half gains less than half of what the first gains; failure: it gains more than the first",
    ),
    Prediction(
        "time",
        "All mechanisms together do not double the time of training.",
        "review, section 7.3: doubled training time is a red flag",
        "relative",
        ("seconds_per_token",),
        "all_on",
        "vanilla",
        success=(None, 1.0),
        failure=(1.0, None),
    ),
    Prediction(
        "overall",
        "The mechanisms improve at least two benchmarks by more than 10 %.",
        "review, closing statement: neutral is under 5 % everywhere, failure is a regression or instability",
        "count",
        ("perplexity", "calibration.ece", "needle.accuracy_*", "copy.accuracy_*", "core.core", "pairs.accuracy", "memory.*_accuracy"),
        "all_on",
        "vanilla",
        success=(0.10, None),
        failure=(None, -0.05),
        ours="a benchmark of several lengths or tasks is one, by its mean over them; failure: none gains over 10 % and one loses over 5 %; "
        "everything else is neutral",
    ),
    Prediction(
        "goal-vanilla",
        "The default preset is at least 0.02 nats better than vanilla with its parameters, at equal tokens.",
        "goal of this project",
        "change",
        LOSS,
        "default",
        "vanilla_params_default",
        success=(None, -0.02),
        failure=(0.0, None),
        ours="at every depth that was run",
    ),
    Prediction(
        "goal-barrier",
        "The default preset is better than vanilla with the forgetting gate alone.",
        "goal of this project",
        "rule",
        LOSS,
        "default",
        "add:barrier_gated",
        better="lower",
        ours="by the rule of the statistics",
    ),
    Prediction(
        "goal-clock",
        "A step of the default preset takes at most 1.05 times a vanilla step.",
        "goal of this project (the long-term one)",
        "relative",
        ("seconds_per_token",),
        "default",
        "vanilla",
        success=(None, 0.05),
        failure=(0.5, None),
        ours="failure: above 1.5 times",
    ),
)
