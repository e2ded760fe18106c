"""Speed and memory of the operators, of a training step, of several processes, of decoding and of a CPU, vanilla against synaptic."""

from bio_inspired_nanochat.benchmarks.cpu import BenchCpuConfig, bench_cpu
from bio_inspired_nanochat.benchmarks.decoding import BenchDecodeConfig, bench_decode
from bio_inspired_nanochat.benchmarks.kernels import BenchKernelsConfig, bench_kernels
from bio_inspired_nanochat.benchmarks.scaling import BenchScalingConfig, bench_scaling
from bio_inspired_nanochat.benchmarks.train import BenchTrainConfig, bench_train

__all__ = [
    "BenchCpuConfig",
    "BenchDecodeConfig",
    "BenchKernelsConfig",
    "BenchScalingConfig",
    "BenchTrainConfig",
    "bench_cpu",
    "bench_decode",
    "bench_kernels",
    "bench_scaling",
    "bench_train",
]
