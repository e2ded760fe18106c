"""How several processes share one model: whole copies with averaged gradients (DDP), or parameters divided among them (FSDP2).

    ddp    every rank holds everything; gradients travel in buckets while the backward goes on
    fsdp   every rank holds its rows of the large parameters, their gradients and moments; a block's rows are gathered before it runs

Both are PyTorch's own. Under fsdp the parameters of the roles in `CUT` are divided by rows; all others (kinetics, gates, gains, routers,
fast weights: a few per cent of the values) stay whole on every rank, because the life of experts, telemetry and the synapses' own rules
read and write them between steps. Their gradients are averaged in one message after the last backward of a step.

In both modes the forwards of a step but the last leave gradients where they are: nothing travels twice.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bio_inspired_nanochat.common import cut_like, fill, is_cut, local, whole
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.synaptic import sleep
from bio_inspired_nanochat.training.config import TrainConfig
from bio_inspired_nanochat.training.plan import Plan

CUT = ("matrix", "embed", "value_embed", "head")
_FORWARDS = ("run", "token_losses")  # what gathers the root's parameters when it is called


def shard(model: GPT, plan: Plan, device: torch.device) -> GPT:
    """Divide a model's large parameters among the ranks, in place, where the plan asks for it. Returns the model. Collective.

    Call it before the optimizer is built: it replaces parameters. The rows that a rank holds stay float32. What is gathered has the dtype
    of the activations, to which the layers would round it anyway; so have the gradients before their sum (in `reduce_dtype`) is taken,
    which in bfloat16 rounds those of the embedding tables once more than ddp does.
    """
    config, dtype = plan.config, plan.dtype
    if config.parallel != "fsdp" or plan.world == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    roles = model.param_roles()
    kept = {param for name, param in model.named_parameters() if roles[name] not in CUT}
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=_reduce_dtype(config), cast_forward_inputs=False
    )
    common = {"mesh": init_device_mesh(device.type, (plan.world,)), "mp_policy": policy, "ignored_params": kept}
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=config.reshard, **common)
    fully_shard(model, reshard_after_forward=False, **common)
    for name in _FORWARDS:
        register_fsdp_forward_method(model, name)
        setattr(model, name, _released(model, getattr(model, name)))
    return model


def _released(model: GPT, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, after which nothing stays gathered when there is no backward to follow: weights may change before the next one."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:
            if not torch.is_grad_enabled():
                for module in (*model.blocks, model):
                    module.reshard()

    return call


def _reduce_dtype(config: TrainConfig) -> torch.dtype:
    return getattr(torch, config.reduce_dtype)


def _renamed() -> bool:
    """Whether this PyTorch has the newer name of DistributedDataParallel's switch, and warns of the older one."""
    return "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters


class Engine:
    """Calls an objective, a module whose `model` is the GPT, as one of the plan's processes. Alone it only calls it.

    For each micro-batch enter `micro_batch`, call the engine, and run the backward; then call `finish`: gradients are means over ranks.
    """

    def __init__(self, objective: nn.Module, plan: Plan, device: torch.device) -> None:
        config, world = plan.config, plan.world
        self.model: GPT = objective.model  # type: ignore[assignment]
        self.cut = world > 1 and any(is_cut(param) for param in self.model.parameters())
        self._whole = [param for param in self.model.parameters() if not is_cut(param)] if self.cut else []
        self._reshard = config.reshard
        self._call: nn.Module = objective
        if world > 1 and not self.cut:
            buffers = "forward_sync_buffers" if _renamed() else "broadcast_buffers"  # equal on all ranks without messages
            self._call = DistributedDataParallel(
                objective,
                device_ids=[device] if device.type == "cuda" else None,
                **{buffers: False},  # pyrefly: ignore[bad-argument-type]
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.bucket_mb,
            )
            if config.reduce_dtype != "float32":
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                self._call.register_comm_hook(None, bf16_compress_hook)

    def __call__(self, *args: Any) -> Any:
        """What the objective returns for a batch, with gradients that this engine brings together."""
        return self._call(*args)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch; `last` says that the optimizer's step follows."""
        if self.cut:
            self.model.set_requires_gradient_sync(last)
            self.model.set_reshard_after_backward(last or self._reshard)
        quiet = isinstance(self._call, DistributedDataParallel) and not last
        with self._call.no_sync() if quiet else contextlib.nullcontext():
            yield

    def finish(self) -> None:
        """After the last backward of a step, before anybody looks at gradients. Collective."""
        grads = [param.grad for param in self._whole if param.grad is not None]
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(flat.split([g.numel() for g in grads]), grads, strict=True)])


def load_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, of which a divided model takes its rows. No communication."""
    own = model.state_dict()
    model.load_state_dict(
        {name: cut_like(value.to(own[name].device), own[name]) if name in own else value for name, value in weights.items()}
    )


def whole_model(model: GPT) -> GPT:
    """The model itself, or a whole copy of one that is divided among ranks, on every rank. Collective."""
    if not any(is_cut(param) for param in model.parameters()):
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict({name: whole(value) for name, value in model.state_dict().items()}, assign=True)
    return copy.set_compute_dtype(model.compute_dtype).train(model.training)


@torch.no_grad()
def sleep_on(model: GPT, idx: Tensor, strength: float) -> float:
    """`synaptic.sleep` on this rank's idx [B, T], also for a divided model; returns the relative norm of the change. Collective.

    What the ranks have read is averaged; a divided model is put together for it, and each rank keeps its rows of the result.
    """
    read = whole_model(model)
    done = sleep(read, idx, strength)
    if read is not model:
        changed, mine = dict(read.named_parameters()), dict(model.named_parameters())
        for name in done.added:
            fill(mine[name], changed[name])
    return done.norm()


def held(model: nn.Module) -> list[Tensor]:
    """The rows that this rank holds of every parameter, whole parameters of a model that is not divided; without the empty ones."""
    return [rows for param in model.parameters() if (rows := local(param)).numel()]
