"""Keeping the repository in order: the quality gate, the doctor, the guard of the benchmarks."""
