"""Fetch the shards that a manifest lists and check them: `python -m scripts.download_data --manifest shards.json --out data/web --num_shards 8`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bio_inspired_nanochat.common import check_writable, print_json_line
from bio_inspired_nanochat.config.cli import parse
from bio_inspired_nanochat.data.download import DownloadConfig, Patience, download, read_manifest, write_manifest
from bio_inspired_nanochat.errors import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, or make a manifest. Exit code 1 when files are missing at the end; they are listed under `failed`."""
    with exit_on_user_error():
        config = parse(DownloadConfig, argv, prog="scripts.download_data", description="Fetch shards by a manifest with sizes and sha256.")
        path = Path(config.manifest).expanduser()
        if config.make_manifest:
            check_writable("manifest", path)
            files = write_manifest(Path(config.make_manifest).expanduser(), config.base_url, path)
            print_json_line({"manifest": str(path), "files": files})
            return
        manifest = read_manifest(path, config.base_url).first(config.num_shards)
        out = Path(config.out).expanduser()
        result = download(manifest, out, config.workers, Patience(config.timeout, config.attempts, config.pause))
        print_json_line({**result, "out": str(out)})
    if result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
