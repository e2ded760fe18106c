"""Text to batches: shards, corpora, tokenizers for them, and the packed loader."""

from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.data.source import DataSource, ensure_tokenizer, resolve_data

__all__ = ["DataSource", "PackedLoader", "ensure_tokenizer", "resolve_data"]
