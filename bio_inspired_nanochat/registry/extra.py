"""Mechanisms that live in a file of their own, outside of the package: their registration, and the files that a user names.

`examples/dendrites.py` is one. What they may add is a further drive of the barrier's gate; other parts of a synapse have a place in the
equations of a terminal, which the kernels are generated from.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bio_inspired_nanochat.config.synaptic import SynapticConfig
from bio_inspired_nanochat.errors import UserError, nearest
from bio_inspired_nanochat.registry.mechanisms import MECHANISMS, Mechanism

if TYPE_CHECKING:
    from torch import nn

    from bio_inspired_nanochat.config import GPTConfig

VARIABLE = "NANOCHAT_MECHANISMS"


def add_gate_drive(name: str, doc: str, source: str, build: Callable[[GPTConfig], nn.Module]) -> None:
    """Register a mechanism that adds to the logit of the forgetting gate; `--syn_cfg.extra=NAME` turns it on.

    build: makes the module of one layer. It maps the block's input [B, T, n_embd] to [B, T, n_head] in the same dtype, position by
    position, and has `init_weights(generator)`; what it adds at birth should be zero. source: where its equation comes from.
    Raises UserError for the name of a mechanism of the package. A name that was registered before stands for the new one.
    """
    if name in MECHANISMS and MECHANISMS[name].build is None:
        raise UserError(f"mechanism={name!r} is one of the package: choose another name")
    MECHANISMS[name] = Mechanism(name, doc, {"extra": (name,)}, {"extra": ()}, source, needs=("barrier_gated",), build=build)


def check_extra(config: SynapticConfig) -> None:
    """Raise UserError for a name in `config.extra` that neither is registered nor becomes so by the files of NANOCHAT_MECHANISMS."""
    if any(name not in MECHANISMS for name in config.extra):
        _load_files()
    added = [name for name, mechanism in MECHANISMS.items() if mechanism.build is not None]
    for name in config.extra:
        if name not in added:
            known = f"one of {', '.join(added)}{nearest(name, added)}" if added else "none is registered"
            raise UserError(f"syn_cfg.extra={name!r} is not known ({known}): name the file that defines it in {VARIABLE}=FILE.py")
    if len(set(config.extra)) < len(config.extra):
        raise UserError(f"syn_cfg.extra={','.join(config.extra)} names a mechanism twice: name each once")


def _load_files() -> None:
    """Run the Python files of the variable, which are separated as in PATH."""
    for text in filter(None, os.environ.get("NANOCHAT_MECHANISMS", "").split(os.pathsep)):
        path = Path(text).expanduser()
        if path.suffix != ".py" or not path.is_file():
            raise UserError(f"{VARIABLE}={text!r} is not a Python file: give the path of a file like examples/dendrites.py")
        spec = importlib.util.spec_from_file_location(f"mechanisms_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{VARIABLE}={text!r} cannot be run ({type(error).__name__}: {error}): mend that file") from error
