"""Text to batches: shards, corpora, tokenizers for them, and the packed loader. The loaders alone need PyTorch."""

from bio_inspired_nanochat.data.source import DataSource, ensure_tokenizer, resolve_data

__all__ = ["DataSource", "ensure_tokenizer", "resolve_data"]
