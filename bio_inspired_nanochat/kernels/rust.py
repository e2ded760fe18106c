"""CPU kernels compiled from `rust_src`: the `rust` backend. The extension is optional: without it everything runs on PyTorch.

`available()` and `why_not()` tell whether it can serve; `notice()` says once, in one line, that it cannot. Nothing here is
differentiable. As many threads work as torch.get_num_threads() says.

Dimensions: B batch, H query heads, Hkv key heads, T tokens, N ticks, D head size, L cache length, t new tokens.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bio_inspired_nanochat import __version__
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.kernels.masks import QStart, num_ticks
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState

_FIX = "run `bash scripts/env.sh` with a Rust toolchain on PATH"


# What is called of the extension; sources change more often than versions.
_NAMES = ("Terminals", "Layer", "advance", "run_terminals", "tick_drive", "attend", "phi")
_NAMES += ("Router", "mix_experts", "routing_sums", "settle_accounts")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it cannot be used."""
    try:
        module = importlib.import_module("bio_inspired_nanochat._rust")
    except ImportError as error:
        return None, f"the Rust extension is not built or does not load ({error})"
    if module.version() != __version__:
        return None, f"the Rust extension was built for version {module.version()}, the package is {__version__}"
    if lacking := [name for name in _NAMES if not hasattr(module, name)]:
        return None, f"the Rust extension was built from older sources (it has no {lacking[0]})"
    return module, ""


def available() -> bool:
    """Whether the extension is built, loads, and belongs to this version of the package."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the extension cannot be used, as one line with the fix; empty when it can."""
    reason = _load()[1]
    return f"{reason}: {_FIX}" if reason else ""


@functools.cache
def notice() -> None:
    """Print one line, once per process, when the extension is missing and PyTorch does its work."""
    if not available():
        print(f"PyTorch does the work of the CPU kernels: {why_not()}", flush=True)


def _missing() -> UserError:
    return UserError(f"backend='rust' is not available: {why_not()}; or use backend='reference'")


def phi(x: Tensor) -> Tensor:
    """`kernels.phi` (0 below -1, (x+1)^2/4 in between, x above 1) of a float32 CPU tensor of any shape, not differentiable.

    Returns a new tensor of x's shape; the interpreter lock is free meanwhile. UserError when the extension is missing or
    cannot take x.
    """
    if not available():
        raise _missing()
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.requires_grad:
        given = f"{x.dtype} on {x.device}" + (" with requires_grad" if x.requires_grad else "")
        raise UserError(f"backend='rust' takes float32 CPU tensors without gradients, not {given}: use backend='reference'")
    return torch.from_numpy(_call("phi", x.reshape(-1).contiguous().numpy())).view(x.shape)


# --- the operators of `kernels` ------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16)
# Order of the constants that the extension takes.
_CONSTANTS = ("tau_c", "tau_rrp", "alpha_ca", "k_fast", "k_slow", "syt_mix", "syt_gain", "release_bias", "release_rate")
_CONSTANTS += ("gain_release", "gain_depletion")


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why the extension cannot take these tensors at all, or None: it must be there, and they in main memory and without gradients."""
    if not available():
        return why_not()
    if torch.compiler.is_compiling():
        return "it does not run inside of a compiled graph"
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cpu":
            return f"the tensors are on {x.device.type}, not on cpu"
        if x.dtype not in DTYPES:
            return f"it takes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
        if x.requires_grad and torch.is_grad_enabled():
            return "it computes no gradients (use torch.no_grad())"
    return None


def terminal_obstacle(p: PresynParams, random: bool) -> str | None:
    """Why the extension cannot run these terminals, or None. random: release is to be drawn."""
    if not p.core:
        return "the terminals have optional parts (see PresynParams.core)"
    return "release is drawn at random" if random and p.sampler is not None else None


def drive_obstacle(q: Tensor, k: Tensor, theta: Tensor, doc: Tensor | None) -> str | None:
    """Why the extension's `tick_drive` cannot serve a call, as half a sentence for a message, or None. Shapes are those of the operator."""
    return _document_obstacle(doc) or obstacle(q, k, theta) or _single(theta, "thresholds")


def presyn_obstacle(
    drive: Tensor, p: PresynParams, state: PresynState | None, noise: object | None, record: object | None = None
) -> str | None:
    """Why the extension's `presyn` cannot serve a call, or None; noise and record count only by being there."""
    tensors = [value for value in p if isinstance(value, Tensor)] + list((state or PresynState(drive, drive, drive)).parts().values())
    if record is not None:
        return "it keeps no record of the terminals' course"
    return terminal_obstacle(p, noise is not None) or obstacle(drive, *tensors) or _single(drive, "drives")


def attention_obstacle(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, doc: Tensor | None) -> str | None:
    """Why the extension's `tick_biased_attention` cannot serve a call, or None; beta may be in float32 alone."""
    found = _document_obstacle(doc) or obstacle(q, k, v, beta)
    return found if found or beta is None else _single(beta, "biases")


def _document_obstacle(doc: Tensor | None) -> str | None:
    return None if doc is None else "documents are kept apart"


def _single(x: Tensor, name: str) -> str | None:
    return None if x.dtype == torch.float32 else f"{name} are {x.dtype}, not float32"


def _call(name: str, *args: Any) -> Any:
    """A function of the extension, whose complaints are those of a user's call."""
    module = _load()[0]
    if module is None:
        raise _missing()
    try:
        return getattr(module, name)(*args)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"backend='rust': {error}") from None


def array(x: Tensor | None) -> Any:
    """A contiguous CPU tensor as a numpy array over the same memory, bfloat16 as its bits (uint16); None stays None."""
    if x is None:
        return None
    if x.requires_grad:
        x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _contiguous(x: Tensor, dtype: torch.dtype | None = None) -> Any:
    return array(x.detach().to(dtype or x.dtype).contiguous())


def _sides(q: Tensor, k: Tensor, tick: int, scale: float, q_start: QStart, counts: list[int], window: int | None) -> dict[str, Any]:
    starts = [q_start] * q.shape[0] if isinstance(q_start, int) else q_start.tolist()
    counts = [max(0, min(n, k.shape[2] - a)) for n, a in zip(counts, starts, strict=True)]
    given = {"q": _contiguous(q, torch.float32), "k": _contiguous(k), "starts": starts, "counts": counts}
    return given | {"tick": tick, "window": window, "scale": scale}


def tick_drive(
    q: Tensor,
    k: Tensor,
    theta: Tensor,
    tick: int,
    scale: float,
    *,
    q_start: QStart = 0,
    window: int | None = None,
    q_len: Tensor | None = None,
    kind: str = "phi",
) -> Tensor:
    """See `kernels.tick_drive`."""
    batch, heads, length, _ = q.shape
    counts = [length] * batch if q_len is None else q_len.tolist()
    drive = theta.new_zeros(batch, heads, num_ticks(q_start, length, tick), k.shape[2], requires_grad=False)
    sides = _sides(q, k, tick, scale, q_start, counts, window)
    _call("tick_drive", sides, theta.tolist(), kind == "softplus", array(drive), torch.get_num_threads())
    return drive


def terminals(p: PresynParams) -> Any:
    """Kinetics as the extension keeps them."""
    one = torch.ones_like(p.k_fast) if p.syt_mix is None else p.syt_mix
    p = p._replace(k_slow=p.k_fast if p.k_slow is None else p.k_slow, syt_mix=one)
    values = torch.stack([getattr(p, name).detach().float() for name in _CONSTANTS])
    return _call("Terminals", values.numpy(), p.tick, p.beta_max, p.epsilon)


def presyn(
    drive: Tensor, p: PresynParams, state: PresynState | None, closed: int | Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, PresynState]:
    """See `kernels.presyn`; the core alone, without noise."""
    batch, heads, ticks, keys = drive.shape
    young = causal and state is None
    if state is None:
        state = PresynState.rest(batch, heads, keys)
    else:
        state = PresynState(*(value.detach().clone(memory_format=torch.contiguous_format) for value in state[:3]))
    counts = closed.tolist() if isinstance(closed, Tensor) else [ticks if closed is None else closed] * batch
    beta = torch.empty(drive.shape)
    parts = (array(value) for value in (beta, state.calcium, state.vesicles, state.open_drive))
    _call("run_terminals", terminals(p), _contiguous(drive), *parts, counts, young, torch.get_num_threads())
    return beta, state


def tick_biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    tick: int,
    scale: float,
    *,
    q_start: QStart = 0,
    window: int | None = None,
) -> Tensor:
    """See `kernels.tick_biased_attention`; padding gets zeros."""
    y = torch.zeros(q.shape)
    sides = _sides(q, k, tick, scale, q_start, [q.shape[2]] * q.shape[0], window)
    bias = None if beta is None else _contiguous(beta)
    _call("attend", sides, _contiguous(v), bias, array(y), torch.get_num_threads())
    return y.to(v.dtype)


# --- a layer of running sequences ----------------------------------------------------------------------------------------------------


def layer(shape: dict[str, Any], theta: Tensor | None = None, params: PresynParams | None = None, strength: Tensor | None = None) -> Any:
    """What does not change from token to token of one layer, for `advance`.

    shape: heads, kv_heads, dim, tick, scale, window (or None), soft (drive by softplus) and barrier (none, linear or gated).
    theta [H] and params: the terminals, None without; strength [H] of the barrier, times the slope for the linear one.
    """
    given = [[] if value is None else value.detach().float().tolist() for value in (theta, strength)]
    return _call("Layer", shape, *given, None if params is None else terminals(params))


def advance(
    site: Any, q: Tensor, held: dict[str, Tensor | None], starts: list[int], counts: list[int], gate: Tensor | None
) -> tuple[Tensor, bool]:
    """Attention of new tokens whose keys and values are in the caches: drive, bias, softmax, and the ends of ticks in one pass.

    site: a `layer`. q [B, H, t, D]; held: k, v [B, Hkv, L, D] float32 or bfloat16, the terminals' calcium, vesicles, open_drive
    and beta [B, H, L] float32, and the gate's running cost barrier [B, H, L] float64, None for what the layer has not; all
    contiguous. starts, counts: position of the first new token and number of real ones, per row. gate: logits [B, t, H] float32.

    Returns y [B, H, t, D] in q's dtype (zero for padding) and whether all logits were finite; the state advances in place.
    """
    size = q.shape[2]
    y = torch.zeros(q.shape) if min(counts) < size else torch.empty(q.shape)
    tokens = {"q": _contiguous(q, torch.float32), "y": array(y), "starts": starts, "counts": counts}
    tokens["gate"] = None if gate is None else _contiguous(gate)
    finite = _call("advance", site, {name: array(value) for name, value in held.items()}, tokens, torch.get_num_threads())
    return y.to(q.dtype), finite
