"""The chat server: one model, a bounded queue, an OpenAI-compatible API and one page."""

from bio_inspired_nanochat.web.app import make_app
from bio_inspired_nanochat.web.config import WebConfig
from bio_inspired_nanochat.web.server import serve

__all__ = ["WebConfig", "make_app", "serve"]
