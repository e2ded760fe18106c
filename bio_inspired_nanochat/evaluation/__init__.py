"""Measurements of a trained model: bits per byte, benchmarks, memory tasks, calibration."""

from bio_inspired_nanochat.evaluation.base import BaseEvalConfig, evaluate_base
from bio_inspired_nanochat.evaluation.bpb import Bpb, bits_per_byte
from bio_inspired_nanochat.evaluation.chat import ChatEvalConfig, evaluate_chat

__all__ = ["BaseEvalConfig", "Bpb", "ChatEvalConfig", "bits_per_byte", "evaluate_base", "evaluate_chat"]
