"""Experts while tokens are decoded one by one: what of a layer is the same for all of them, as the kernel of the route takes it.

Dimensions: D width, E slots for experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from bio_inspired_nanochat.kernels.scan import for_inference


@torch.no_grad()
def router_of(layer: Any, standing: Any, dtype: torch.dtype) -> Any:
    """The `kernels.route_triton.Router` of a `SynapticMoE` as it is now, for activations of this dtype, or None where the kernel cannot serve.

    standing: of the layer. Everything is a copy: half of a layer before a step of training and half of it behind one would be no layer.
    Waits for the device.
    """
    kept, synapse, traits = layer.accounts, layer.synapse, standing.traits
    if not for_inference(kept.energy) or dtype not in (torch.float32, torch.bfloat16) or kept.energy.dtype != torch.float32:
        return None
    from bio_inspired_nanochat.kernels import route_triton  # imported late: a machine without Triton never gets here

    places = torch.arange(layer.slots, device=kept.lead.device)
    twins = not (torch.equal(kept.lead, places) and torch.equal(kept.child, places))
    if twins or layer.slots > route_triton.MOST_EXPERTS:
        return None
    maps, parts = [layer.router], {}
    if synapse is not None:
        cfg = synapse.cfg
        if (p := traits.kinetics) is not None:  # whose gains are the parameters themselves
            parts["kinetics"] = p._replace(gain_release=p.gain_release.clone(), gain_depletion=p.gain_depletion.clone())
        if traits.identity is not None:
            maps.append(synapse.gate_probe)
            parts |= {"identity": traits.identity.contiguous(), "identity_gain": synapse.identity_gain.item()}
        if traits.snare is not None:
            maps.append(synapse.gate_cargo)
            parts |= {"snare": traits.snare.contiguous(), "snare_gain": synapse.snare_gain.item()}
        if traits.near is not None:
            parts["near"] = (synapse.expert_lateral * traits.near).contiguous()
        if cfg.nmda:
            parts["nmda"] = (synapse.nmda_gain.item(), math.exp(-cfg.tick / cfg.tau_nmda))
        if cfg.expert_plasticity and cfg.vesicle_output:
            parts["vesicle_gain"] = synapse.vesicle_gain.item()
    tick, sees = 1 if synapse is None else synapse.cfg.tick, torch.cat(maps).to(dtype)
    return route_triton.Router(layer.k, tick, layer.fair, sees, standing.shut, standing.bank, kept.balance.clone(), **parts)
