"""Speed and memory of the operators, of a training step and of decoding, vanilla against synaptic."""

from bio_inspired_nanochat.benchmarks.decoding import BenchDecodeConfig, bench_decode
from bio_inspired_nanochat.benchmarks.kernels import BenchKernelsConfig, bench_kernels
from bio_inspired_nanochat.benchmarks.train import BenchTrainConfig, bench_train

__all__ = ["BenchDecodeConfig", "BenchKernelsConfig", "BenchTrainConfig", "bench_decode", "bench_kernels", "bench_train"]
