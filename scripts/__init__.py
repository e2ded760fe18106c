"""Entry points: thin scripts that parse a configuration and call the library (`python -m scripts.NAME --help`)."""
