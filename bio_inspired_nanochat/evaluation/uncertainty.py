"""Whether a language model knows what it knows: calibration of next-token predictions, by expectations and by Monte-Carlo releases.

N predicted tokens, V vocabulary, S temperatures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bio_inspired_nanochat.evaluation.calibration import auroc, equal_mass_error
from bio_inspired_nanochat.evaluation.setting import EvaluationSetting, Found, Metric, eager, text_batches
from bio_inspired_nanochat.gpt import GPT

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
PLAIN = TEMPERATURES.index(1.0)

METRICS = (
    Metric("ece", "", "lower", "expected calibration error of the most likely token, 15 bins of equal mass"),
    Metric(
        "ece_tuned", "", "lower", "the same at the temperature of lowest loss, chosen on the first half of the tokens, on the second half"
    ),
    Metric("temperature", "", "lower", "that temperature: above 1 the model is too sure", reference=True),
    Metric("nll", "nats", "lower", "loss per token"),
    Metric("accuracy", "", "higher", "share of tokens that were the most likely ones"),
    Metric("entropy", "nats", "lower", "mean entropy of the predictions; a calibrated model's equals its loss", reference=True),
    Metric("auroc", "", "higher", "how well the entropy tells wrong predictions from right ones: 1/2 is guessing"),
    Metric("mc_ece", "", "lower", "ece of the mean probabilities over random releases"),
    Metric("mc_nll", "nats", "lower", "loss of the mean probabilities"),
    Metric("mc_entropy", "nats", "lower", "mean entropy of the mean probabilities", reference=True),
    Metric("mc_information", "nats", "higher", "mean mutual information of prediction and release: how far draws disagree", reference=True),
    Metric("mc_auroc", "", "higher", "auroc of the entropy of the mean probabilities"),
    Metric("mc_auroc_information", "", "higher", "auroc of the mutual information"),
)


def calibrate(model: GPT, setting: EvaluationSetting) -> Found:
    """The metrics above on `setting.tokens` tokens; Monte-Carlo ones from `setting.draws` passes of a model that releases at random."""
    parts: list[dict[str, Tensor]] = []
    with eager(model):
        for idx, targets, rows in text_batches(model, setting, "calibration"):
            asked = targets >= 0
            parts.append(_plain(model.logits(idx)[asked], targets[asked]))
            if model.stochastic:  # a row at a time: probabilities of all words are kept over the draws
                made = [_monte_carlo(model, idx[[row]], targets[[row]], rows[[row]], setting) for row in range(len(idx))]
                parts[-1] |= {name: torch.cat([one[name] for one in made]) for name in made[0]}
    kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    found = plain_metrics(kept)
    sweep = {str(value): equal_mass_error(kept["confidence"][:, place], kept["right"]) for place, value in enumerate(TEMPERATURES)}
    details = {"ece_by_temperature": sweep, "tokens": len(kept["right"])}
    if not model.stochastic:
        missing = {metric.name: None for metric in METRICS if metric.name.startswith("mc_")}
        return Found(
            found | missing, details, ("mc_*: this model releases nothing at random (syn_cfg.stochastic_train_frac above 0 does)",)
        )
    right = kept["mc_right"]
    found |= {
        "mc_ece": equal_mass_error(kept["mc_confidence"], right),
        "mc_nll": kept["mc_losses"].mean().item(),
        "mc_entropy": kept["mc_entropy"].mean().item(),
        "mc_information": kept["mc_information"].mean().item(),
        "mc_auroc": auroc(kept["mc_entropy"], ~right),
        "mc_auroc_information": auroc(kept["mc_information"], ~right),
    }
    return Found(found, details | {"draws": setting.draws})


def plain_metrics(kept: dict[str, Tensor]) -> dict[str, float | None]:
    """Metrics of expectations from what `_plain` keeps of N tokens: confidence and losses [N, S], right and entropy [N]."""
    right, half = kept["right"], max(1, len(kept["right"]) // 2)
    best = int(kept["losses"][:half].mean(0).argmin())
    rest = slice(half, None) if len(right) > half else slice(None)
    return {
        "ece": equal_mass_error(kept["confidence"][:, PLAIN], right),
        "ece_tuned": equal_mass_error(kept["confidence"][rest, best], right[rest]),
        "temperature": TEMPERATURES[best],
        "nll": kept["losses"][:, PLAIN].mean().item(),
        "accuracy": right.double().mean().item(),
        "entropy": kept["entropy"].mean().item(),
        "auroc": auroc(kept["entropy"], ~right),
    }


def _plain(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What is kept of logits [N, V] and targets [N], on the CPU: all float64 but `right`."""
    logits = logits.float()
    losses, confidence = [], []
    for temperature in TEMPERATURES:
        logs = F.log_softmax(logits / temperature, dim=-1)
        losses.append(-logs.gather(1, targets[:, None])[:, 0])
        confidence.append(logs.max(-1).values.exp())
    logs = F.log_softmax(logits, dim=-1)
    found = {"losses": torch.stack(losses, 1), "confidence": torch.stack(confidence, 1), "entropy": entropy(logs.exp())}
    return {name: value.cpu().double() for name, value in found.items()} | {"right": (logits.argmax(-1) == targets).cpu()}


def _monte_carlo(model: GPT, idx: Tensor, targets: Tensor, rows: Tensor, setting: EvaluationSetting) -> dict[str, Tensor]:
    """The same for the mean of probabilities; a row's draws depend on its number and the seed alone.

    In float64 where the device has it, because the information is a small difference of entropies.
    """
    asked, exact = targets >= 0, torch.float32 if idx.device.type == "mps" else torch.float64
    wanted = targets[asked]
    mean = torch.zeros(len(wanted), model.config.vocab_size, dtype=exact, device=idx.device)
    spread = torch.zeros(len(wanted), dtype=exact, device=idx.device)
    for draw in range(setting.draws):
        out = model.run(idx, noise_seed=setting.seed, noise_step=draw, sequence_ids=rows)
        probabilities = out.logits[asked].to(exact).softmax(-1)
        mean += probabilities / setting.draws
        spread += entropy(probabilities) / setting.draws
    total = entropy(mean)
    found = {
        "mc_confidence": mean.max(-1).values,
        "mc_losses": -mean.gather(1, wanted[:, None])[:, 0].clamp_min(1e-30).log(),
        "mc_entropy": total,
        "mc_information": (total - spread).clamp_min(0),
    }
    return {name: value.cpu().double() for name, value in found.items()} | {"mc_right": (mean.argmax(-1) == wanted).cpu()}


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions [..., V]: [...]."""
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
