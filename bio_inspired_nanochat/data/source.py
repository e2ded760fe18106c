"""Where training text comes from: a folder of shards, a named dataset, or the embedded demo corpus; and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from bio_inspired_nanochat.common import base_dir, progress, say
from bio_inspired_nanochat.data.demo import prepare_demo
from bio_inspired_nanochat.data.shards import DamagedShard, ShardPart, fingerprint, list_shards, open_shard, read_rows
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bio_inspired_nanochat.data.loader import PackedLoader

TOKENIZER_CHARS = 200_000_000
_DOCUMENT_CHARS = 10_000  # of one document for the tokenizer, so that a few long ones do not outweigh the rest
_SMALL_SHARE, _LARGE_SHARE, _ROW_SHARE = 0.02, 0.2, 0.05


@dataclass(frozen=True)
class DataSource:
    """A checked corpus. The parts count as paths (`os.fspath`) and can be given to `PackedLoader`.

    fingerprint: digest of the content of all parts; quarantined: one line for each shard that was left out.
    """

    train_paths: tuple[ShardPart, ...]
    val_path: ShardPart
    fingerprint: str
    quarantined: tuple[str, ...] = ()

    def parts(self, split: str) -> tuple[ShardPart, ...]:
        """The parts of a split, `train` or `val`. Raises UserError for another name."""
        if split not in ("train", "val"):
            raise UserError(f"split={split!r} is not valid: one of train, val")
        return self.train_paths if split == "train" else (self.val_path,)

    def loader(
        self,
        split: str,
        tokenizer: Tokenizer,
        batch_size: int,
        sequence_len: int,
        rank: int = 0,
        world: int = 1,
        loop: bool = True,
        **options: Any,
    ) -> PackedLoader:
        """The packed batches of a split; `options` are the further arguments of `PackedLoader`."""
        from bio_inspired_nanochat.data.loader import PackedLoader  # imported late: preparing text needs no PyTorch

        return PackedLoader(self.parts(split), tokenizer, batch_size, sequence_len, rank, world, loop, **options)

    def texts(self, split: str, max_chars: int | None = None, document_chars: int | None = None) -> Iterator[str]:
        """Documents of a split in order, the first `document_chars` of each, `max_chars` in all. Unreadable shards end early."""
        left = max_chars if max_chars is not None else float("inf")
        for part in self.parts(split):
            try:
                for text in read_rows(part):
                    if left <= 0:
                        return
                    if text:
                        text = text[: int(min(left, document_chars or len(text)))]
                        left -= len(text)
                        yield text
            except DamagedShard as error:
                say(f"notice: {error}: the rest of this shard is left out")


def resolve_data(data_dir: str | Path | None = None, dataset: str | None = None) -> DataSource:
    """The corpus of `data_dir` (a folder of shards), of `dataset` (a name for the datasets package), or the demo corpus.

    The last shard is the validation set. A single shard trains and gives up its last rows for validation, which is said. An
    unreadable shard among several is left out with a notice. Raises UserError for both arguments at once, a missing folder or
    column, an unreadable validation shard, and no text.
    """
    if data_dir and dataset:
        raise UserError(f"data_dir={data_dir} and dataset={dataset} are both given: give one of them")
    if dataset:
        from bio_inspired_nanochat.data.hf import prepare_dataset

        return open_corpus(prepare_dataset(dataset))
    return open_corpus(Path(data_dir).expanduser() if data_dir else prepare_demo())


def open_corpus(folder: Path) -> DataSource:
    """Check the shards of a folder; see `resolve_data`. Raises UserError when a split is left with nothing to read."""
    paths = list_shards(folder)
    opened: list[ShardPart] = []
    quarantined: list[str] = []
    for path in paths:
        try:
            opened.append(open_shard(path))
        except DamagedShard as error:
            if path == paths[-1]:
                role = "the only shard" if len(paths) == 1 else "the validation shard"
                raise UserError(f"{error}: it is {role}, restore it or remove it") from None
            quarantined.append(str(error))
            say(f"notice: {error}: this shard is left out ({len(quarantined)} of {len(paths)} so far)")
    train, val = (opened[:-1], opened[-1]) if len(opened) > 1 else _hold_out_rows(opened[0])
    train = [part for part in train if len(part)]
    _check_readable(opened[-1], val)
    if not train:
        raise UserError(f"data_dir={folder} has no training documents: the only rows are in the validation shard {val.path.name}")
    return DataSource(tuple(train), val, fingerprint([*train, val]), tuple(quarantined))


def _hold_out_rows(part: ShardPart) -> tuple[list[ShardPart], ShardPart]:
    """Split the only shard: its last row groups validate, or its last rows where a row group would be too much."""
    rows = len(part)
    if rows < 2:
        raise UserError(f"{part.path} is the only shard and has {rows} documents: at least 2 are needed, one of them for validation")
    held = 0
    for group in reversed(part.groups):
        held += group
        if held >= _SMALL_SHARE * rows:
            break
    whole = held <= _LARGE_SHARE * rows
    if not whole:
        held = max(1, round(_ROW_SHARE * rows))
    say(
        f"notice: {part.path.name} is the only shard: its last {held} of {rows} documents{' (whole row groups)' if whole else ''} are held out for validation"
    )
    return [part.slice(0, rows - held)], part.slice(rows - held, rows)


def _check_readable(shard: ShardPart, val: ShardPart) -> None:
    """Read the shard that validates to its end: everything is compared on it, so a damaged one must not pass."""
    try:
        texts = sum(row >= val.start and bool(text) for row, text in enumerate(read_rows(shard)))
    except DamagedShard as error:
        raise UserError(f"{error}: it holds the validation text, restore it or remove it") from None
    if not texts:
        raise UserError(f"{val.path} has no text in its validation rows: the last shard must hold validation documents")


def ensure_tokenizer(source: DataSource, vocab_size: int, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `path` if given, else the one of this corpus and size, trained on the training split when missing.

    Stored under `<base>/tokenizers/<fingerprint>-<vocab_size>/tokenizer.json`; processes that start together train it once. A
    small corpus may support fewer ids than `vocab_size`, which is said: go by the `vocab_size` of the result.
    Raises UserError for a damaged file and a size out of bounds.
    """
    if path:
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size != vocab_size:
            say(f"notice: the tokenizer {path} has {tokenizer.vocab_size} ids, not vocab_size={vocab_size}: its own number counts")
        return tokenizer
    file = tokenizer_path(source, vocab_size)
    folder = file.parent.parent
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f".{file.parent.name}.lock"):
        if file.exists():
            return Tokenizer.load(file)
        tokenizer = train_tokenizer(source, vocab_size)
        tokenizer.save(file)
    say(f"tokenizer: {tokenizer.vocab_size} ids, stored as {file}")
    return tokenizer


def tokenizer_path(source: DataSource, vocab_size: int) -> Path:
    """Where the tokenizer of a corpus and size is stored."""
    return base_dir() / "tokenizers" / f"{source.fingerprint[:16]}-{vocab_size}" / "tokenizer.json"


def train_tokenizer(source: DataSource, vocab_size: int, max_chars: int = TOKENIZER_CHARS) -> Tokenizer:
    """Train on at most `max_chars` characters of the training split, with progress; a smaller result than asked is said."""
    with progress(None, "tokenizer", "characters") as bar:

        def counted() -> Iterator[str]:
            for text in source.texts("train", max_chars, _DOCUMENT_CHARS):
                bar.advance(len(text))
                yield text

        tokenizer = Tokenizer.train(counted(), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        say(f"notice: the text supports only {tokenizer.vocab_size} of {vocab_size} token ids: vocab_size is {tokenizer.vocab_size}")
    return tokenizer
