"""Pre-training and fine-tuning: configuration, plan, loop, callbacks and the guards around it."""

from bio_inspired_nanochat.training.callbacks import Callback, EvalRecord, StepRecord
from bio_inspired_nanochat.training.config import TrainConfig
from bio_inspired_nanochat.training.run import dry_run, print_config, train
from bio_inspired_nanochat.training.tune import tune
from bio_inspired_nanochat.training.tuneconfig import TuneConfig

__all__ = ["Callback", "EvalRecord", "StepRecord", "TrainConfig", "TuneConfig", "dry_run", "print_config", "train", "tune"]
