"""Learning rate and momentum against the step number."""

from __future__ import annotations


def lr_multiplier(step: int, total: int, warmup: int, decay_frac: float, final: float) -> float:
    """The factor on every learning rate at `step` (0 ... total - 1): warm-up, constant, linear decay.

    Warm-up is (step + 1) / warmup and reaches 1 at step warmup - 1. The decay takes the last round(decay_frac * total) steps: it is 1 at its
    first step and would be `final` at step `total`, so that the last step still trains; later steps stay at `final`. Where both
    overlap, the smaller one holds.
    """
    assert total >= 1 and step >= 0 and warmup >= 0, f"step {step} of {total}, warm-up {warmup}"
    assert 0.0 <= decay_frac <= 1.0 and 0.0 <= final <= 1.0, f"decay_frac {decay_frac}, final {final}"
    rise = 1.0 if step >= warmup else (step + 1) / warmup
    decay = round(decay_frac * total)
    if decay == 0 or step <= total - decay:
        return rise
    left = max(0, total - step) / decay
    return min(rise, left + (1.0 - left) * final)


def muon_momentum(step: int, warmup: int, start: float, peak: float) -> float:
    """Momentum of Muon at `step`: linear from `start` at step 0 to `peak` at step `warmup`, constant from there."""
    assert step >= 0 and warmup >= 0, f"step {step}, warm-up {warmup}"
    if step >= warmup:
        return peak
    return start + (peak - start) * (step / warmup)
