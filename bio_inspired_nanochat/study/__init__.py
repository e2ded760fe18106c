"""Studies: many small trainings that answer one question, with their statistics."""

from bio_inspired_nanochat.study.memory import MemoryStudyConfig, memory_study
from bio_inspired_nanochat.study.models import VARIANTS, LinearMemory, build_variant

__all__ = ["VARIANTS", "LinearMemory", "MemoryStudyConfig", "build_variant", "memory_study"]
