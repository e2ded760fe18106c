"""Text to batches: shards, corpora, tokenizers for them, and the packed loader."""

from bio_inspired_nanochat.data.loader import PackedLoader
from bio_inspired_nanochat.data.source import DataSource, ensure_tokenizer, resolve_data
from bio_inspired_nanochat.data.streams import StreamLoader, count_streams, join_states

__all__ = ["DataSource", "PackedLoader", "StreamLoader", "count_streams", "ensure_tokenizer", "join_states", "resolve_data"]
