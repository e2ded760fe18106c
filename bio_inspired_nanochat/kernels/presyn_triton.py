"""Triton execution of `presyn`: one program walks the ticks of a block of keys (kernels made by `presyn_codegen`).

Dimensions: B batch, H query heads, N ticks, Tk keys; S state variables, P per-head constants, O outputs per tick.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bio_inspired_nanochat.kernels.noise import ReleaseNoise
from bio_inspired_nanochat.kernels.presyn_codegen import BLOCK, LAUNCH, Spec, constants_of, signature_of, states_of
from bio_inspired_nanochat.kernels.presyn_kernels import kernels_for
from bio_inspired_nanochat.kernels.tiles import launch
from bio_inspired_nanochat.kernels.types import PresynParams, PresynState


def obstacle(p: PresynParams, noise: ReleaseNoise | None, drive: Tensor) -> str | None:
    """Why the kernel cannot serve a call with a drive [B, H, N, Tk], or None."""
    if drive.dtype != torch.float32:
        return f"the kernel computes in float32, not {drive.dtype}"
    if noise is not None and p.sampler is not None and p.sampler.mode != "normal_reparam":
        return f"stochastic_mode={p.sampler.mode} draws every vesicle (only normal_reparam runs in the kernel)"
    if p.endo_slots > 16:
        return f"an endocytosis ring of {p.endo_slots} ticks is longer than 16"
    return None


def _run(signature: str, drive: Tensor, constants: Tensor, start: Tensor, noise: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    kernels = kernels_for(signature)
    batch, heads, ticks, keys = drive.shape
    states, every = len(kernels.spec.states), kernels.spec.every(ticks)
    size = batch * heads * keys
    out = drive.new_empty(len(kernels.spec.outputs), batch, heads, ticks, keys)
    final = torch.empty_like(start)
    check = drive.new_empty(-(-ticks // every), states, batch, heads, keys)
    grid = (batch * heads, -(-keys // BLOCK))
    launch(
        kernels.forward, grid, drive, constants.contiguous(), start, out, final, check, ticks, keys, heads, size, every, *noise, **LAUNCH
    )
    return out, final, check


@torch.library.custom_op("bio_inspired_nanochat::presyn", mutates_args=())
def presyn_op(
    drive: Tensor, constants: Tensor, start: Tensor, signature: str, key: Tensor | None, first: Tensor | None, layer: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """All ticks: drive [B, H, N, Tk], constants [C, H], start [S, B, H, Tk] to outputs [O, B, H, N, Tk], final state, stored states."""
    noise = [] if key is None else [key, first, layer]
    return _run(signature, drive.contiguous(), constants, start.contiguous(), noise)


@presyn_op.register_fake
def _(drive, constants, start, signature, key, first, layer):
    spec, ticks = Spec.parse(signature), drive.shape[2]
    check = drive.new_empty(-(-ticks // spec.every(ticks)), *start.shape)
    return drive.new_empty(len(spec.outputs), *drive.shape), torch.empty_like(start), check


@torch.library.custom_op("bio_inspired_nanochat::presyn_adjoint", mutates_args=())
def presyn_adjoint(
    drive: Tensor,
    constants: Tensor,
    check: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    signature: str,
    key: Tensor | None,
    first: Tensor | None,
    layer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of drive, constants and start, of their shapes, from those of the outputs and of the final state.

    drive [B, H, N, Tk]; grad_out [outputs, B, H, N, Tk]; check: the states at every `Spec.every`-th tick, kept by the forward.
    """
    kernels = kernels_for(signature)
    batch, heads, ticks, keys = drive.shape
    states, every = len(kernels.spec.states), kernels.spec.every(ticks)
    constants = constants.contiguous()
    drive, grad_drive = drive.contiguous(), torch.empty_like(drive, memory_format=torch.contiguous_format)
    grad_start = drive.new_empty(states, batch, heads, keys)
    scratch = drive.new_empty(every, states, batch, heads, keys)
    grid = (batch * heads, -(-keys // BLOCK))
    partial = drive.new_empty(kernels.derived, *grid)
    noise = [] if key is None else [key, first, layer]
    launch(
        kernels.backward,
        grid,
        *(
            drive,
            constants,
            check,
            scratch,
            grad_out.contiguous(),
            grad_final.contiguous(),
            grad_drive,
            grad_start,
            partial,
        ),
        *(ticks, keys, heads, batch * heads * keys, every, *noise),
        **LAUNCH,
    )
    grad_constants = torch.empty_like(constants)
    launch(kernels.finish, (heads, 1), constants, partial, grad_constants, batch, heads, grid[1], **LAUNCH)
    return grad_drive, grad_constants, grad_start


@presyn_adjoint.register_fake
def _(drive, constants, check, grad_out, grad_final, signature, key, first, layer):
    return torch.empty_like(drive, memory_format=torch.contiguous_format), torch.empty_like(constants), torch.empty_like(grad_final)


def _setup(ctx, inputs, output) -> None:
    drive, constants, _, ctx.signature, key, first, layer = inputs
    ctx.save_for_backward(drive, constants, output[2], key, first, layer)


def _backward(ctx, grad_out, grad_final, _):
    drive, constants, check, *noise = ctx.saved_tensors
    grads = presyn_adjoint(drive, constants, check, grad_out, grad_final, ctx.signature, *noise)
    return *grads, None, None, None, None


presyn_op.register_autograd(_backward, setup_context=_setup)


def run(
    drive: Tensor, p: PresynParams, state: PresynState, outputs: list[str], noise: ReleaseNoise | None = None, young: bool = False
) -> tuple[dict[str, Tensor], PresynState]:
    """Advance over all ticks of `drive` [B, H, N, Tk] float32: the wanted outputs, [B, H, N, Tk] each, and the final state.

    outputs: bias, activity, released, or a part of the state at the start of a tick. young: state is at rest, key j has no drive
    before tick j // c, and outputs are bias, activity and released only.
    """
    variables = states_of(state)
    noisy = noise is not None and p.sampler is not None
    signature = signature_of(p, list(variables), outputs, noisy, "young" if young else "any")
    constants, start = torch.stack(list(constants_of(p).values())), torch.stack(list(variables.values()))
    key, first, layer = noise_tensors(noise, drive) if noisy else (None, None, None)
    out, final, _ = presyn_op(drive, constants, start, signature, key, first, layer)
    plain = [name for name in variables if not name.startswith("ring")]
    values = dict(zip(plain, final, strict=False))
    ring = None if state.ring is None else torch.stack(list(final[len(plain) :]), dim=-1)
    return dict(zip(outputs, out, strict=True)), PresynState(**values, open_drive=torch.zeros_like(state.open_drive), ring=ring)


def noise_tensors(noise: ReleaseNoise, beside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key [B, 2], first tick [B] and layer [1], int64, as the kernels take them; beside: a tensor [B, ...] on the device."""
    key = torch.stack([word.flatten() for word in noise.key], dim=1)
    first, layer = (
        value.to(torch.int64) if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=beside.device)
        for value in (noise.first_tick, noise.layer)
    )  # filled on the device: a recorded step cannot copy from the host
    return key, first.expand(beside.shape[0]).contiguous(), layer.reshape(1)
