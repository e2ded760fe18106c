"""SynapticLinear: fast weights that belong to a sequence, their gates, and what happens to them between sessions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bio_inspired_nanochat.config import GPTConfig, SynapticConfig
from bio_inspired_nanochat.config.synaptic import FAST_LAYERS
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.gpt import GPT
from bio_inspired_nanochat.registry import config_with
from bio_inspired_nanochat.synaptic import MLP, Extras, SynapticLinear, SynapticMLP
from tests.contract import SIZES, make_ids, make_model, remembering

RULES = ("delta", "hebb")
ALL = {"camkii_gain": 1.5, "pp1_gain": 1.0, "bdnf_gamma": 1.0, "camkii_read": 2.0, "psd95_slots": 1.0, "fast_init": True}
rules = pytest.mark.parametrize("rule", RULES)


def config(rule: str = "delta", *mechanisms: str, **changes) -> SynapticConfig:
    return config_with(f"fast_{rule}", *mechanisms, **{"tick": 4, "rank_eligibility": 6, **changes})


def layer_of(cfg: SynapticConfig, n_in: int = 12, n_out: int = 10, seed: int = 0) -> SynapticLinear:
    """A layer in float64 whose fast weights are read."""
    layer = SynapticLinear(n_in, n_out, cfg, cfg.fast_layers[0]).double()
    layer.density.init_weights(seed, "layer")
    layer.weight.data = torch.randn(n_out, n_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    remembering(layer.density)
    return layer


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the layer ---------------------------------------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("gates", [{}, ALL, ALL | {"camkii_latch": True}], ids=["plain", "gates", "latch"])
@torch.no_grad()
def test_the_layer_is_its_equations(rule, gates):
    """Token by token, as the definition reads."""
    cfg = config(rule, **gates)
    layer, x = layer_of(cfg), inputs(1, 11, 12)
    den, r = layer.density, 6
    values = {name: value.item() for name, value in den.constants().items()}
    gamma = torch.exp(-1 / den.decay_time()).double()
    memory = den.start.clone() if cfg.fast_init else torch.zeros(r, r, dtype=torch.float64)
    k = p = d = total = 0.0
    want = []
    for t, row in enumerate(x[0]):
        if t and t % cfg.tick == 0:
            k, p, d = _molecules(k, p, d, total / cfg.tick, cfg)
            total = 0.0
        base = layer.weight @ row
        u, m = den.pre @ row, den.post @ base
        u = u / u.norm()
        write = torch.sigmoid(den.write_gate @ row)
        z = memory @ u
        drive = values.get("camkii_gain", 0.0) * k - values.get("pp1_gain", 0.0) * p
        eta = min(1.0, values["hebb_rate"] / (1 + math.exp(-drive)) * (1 + values.get("bdnf_gamma", 0.0) * d) * float(write))
        memory = memory * gamma + eta * torch.outer(m - gamma * z if rule == "delta" else m, u)
        total += float(m.norm() / math.sqrt(r) * write)
        if cfg.psd95_slots:
            z = (1 + k) * cfg.psd95_slots * torch.tanh(z / ((1 + k) * cfg.psd95_slots))
        kappa = cfg.camkii_read + float(den.camkii_read) if cfg.camkii_read else 0.0
        want.append(base + den.out @ (z / (z.square().mean() + 1).sqrt() * torch.sigmoid(den.read_gate @ row + kappa * k)))
    torch.testing.assert_close(layer(x)[0], torch.stack(want), rtol=1e-5, atol=1e-5)  # |u| has a small floor


def _molecules(k: float, p: float, d: float, calcium: float, cfg: SynapticConfig) -> tuple[float, float, float]:
    from bio_inspired_nanochat.kernels.density import DensityParams, DensityState, density_step

    params = DensityParams(cfg.tick, cfg.camkii_latch, cfg.tau_camkii, cfg.tau_pp1, cfg.tau_bdnf)
    state = DensityState(*(torch.tensor([value], dtype=torch.float64) for value in (k, p, d, 0.0)))
    return tuple(float(part) for part in density_step(state, torch.tensor([calcium], dtype=torch.float64), params)[:3])


@rules
@pytest.mark.parametrize("parts", [{}, ALL], ids=["plain", "gates"])
def test_gradients_match_finite_differences(rule, parts):
    layer, x = layer_of(config(rule, **parts)), inputs(2, 9, 12).requires_grad_()
    doc = torch.tensor([[0] * 9, [0] * 3 + [1] * 6])
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def outputs(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, Extras(doc)))

    assert torch.autograd.gradcheck(outputs, (x, *parameters), fast_mode=True)


@rules
def test_the_first_token_reads_nothing(rule):
    layer, x = layer_of(config(rule)), inputs(3, 5, 12)
    y, plain = layer(x), x @ layer.weight.T
    torch.testing.assert_close(y[:, 0], plain[:, 0])
    layer.density.out.data *= 2
    louder = layer(x)
    assert torch.equal(y[:, 0], louder[:, 0]) and not torch.allclose(y[:, 1:], louder[:, 1:])


@pytest.mark.parametrize("parts", [{}, ALL], ids=["plain", "all parts"])
@rules
def test_documents_start_afresh_and_from_the_learned_weights(rule, parts):
    """A document in a packed row computes what it does alone, at the same offset within a tick; also across a call's boundary."""
    layer = layer_of(config(rule, **parts))
    x = inputs(1, 150, 12)
    doc = (torch.arange(150) >= 72).long()[None]
    packed = layer(x, Extras(doc))
    torch.testing.assert_close(packed[:, :72], layer(x[:, :72]))
    torch.testing.assert_close(packed[:, 72:], layer(x[:, 72:]))
    assert not torch.allclose(layer(x)[:, 73:], packed[:, 73:])


def test_a_strong_gate_writes_at_most_fully_and_slots_limit_what_a_mode_answers():
    cfg = config("hebb", "psd95", hebb_rate=16.0, psd95_slots=0.25)
    layer, x = layer_of(cfg), 50 * inputs(2, 60, 12)
    layer.density.write_gate.data.fill_(3.0)
    record: dict = {}
    y = layer(x, Extras(record=record)) - x @ layer.weight.T
    assert record["fast"][layer.key]["eta_mean"] <= 1.0 and torch.isfinite(y).all()
    assert y.abs().max() <= 2 * 0.25 * layer.density.out.abs().sum(1).max()  # slots double at most, each mode answers below them
    assert record["fast"][layer.key]["fast_weight_norm"] > 10  # which is far more than is let out


def test_camkii_raises_and_pp1_lowers_the_write_strength():
    x = inputs(2, 40, 12)

    def strength(**gains) -> float:
        layer = layer_of(config("delta", tau_camkii=8.0, tau_pp1=8.0, **gains))
        record: dict = {}
        layer(x, Extras(record=record))
        return float(record["fast"][layer.key]["eta_mean"])

    assert strength(pp1_gain=2.0) < strength() < strength(camkii_gain=2.0)
    assert strength() < strength(bdnf_gamma=2.0, tau_bdnf=16.0)


def test_decay_times_at_birth():
    spread = layer_of(config("hebb")).density.decay_time().detach()
    assert spread[0].item() == pytest.approx(16) and spread[-1].item() == pytest.approx(4096) and torch.all(spread.diff() > 0)
    assert layer_of(config("hebb", rank_eligibility=1)).density.decay_time().item() == pytest.approx(256)
    single = torch.exp(-1 / layer_of(config("delta", rho_elig=0.9)).density.decay_time())
    assert single.item() == pytest.approx(0.9)
    layer = layer_of(config("delta"))
    layer.density.decay.data.fill_(-1e9)
    assert layer.density.decay_time() >= 4.0


# --- switched off ------------------------------------------------------------------------------------------------------------------------


def test_without_fast_weights_the_layer_and_the_mlp_are_the_plain_ones():
    off = GPTConfig(**SIZES, synapses=True)
    torch.manual_seed(0)
    plain, synaptic = MLP(off), SynapticMLP(off)
    for parameter in plain.parameters():
        parameter.data.normal_()
    synaptic.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 32)
    assert torch.equal(plain(x), synaptic(x)) and [type(m) for m in synaptic.children()] == [SynapticLinear] * 2
    assert config("delta", fast_layers=("q",)).active and not SynapticConfig.preset("off").active


@rules
def test_a_model_is_born_equal_to_the_one_without(rule):
    ids = make_ids()
    without = GPT(GPTConfig(**SIZES, synapses=True), seed=4)
    cfg = dataclasses.replace(SynapticConfig(), hebb=rule, rank_eligibility=8, fast_layers=FAST_LAYERS, **ALL)
    model = GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=cfg), seed=4)
    for net in (without, model):
        for name, parameter in net.named_parameters():
            if name.endswith((".o.weight", "w_out.weight", "head.weight")):
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    assert torch.equal(without(ids), model(ids))
    added = {name for name, _ in model.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert added and all(".density." in name for name in added)
    drawn = [name for name in added if name.endswith((".pre", ".post"))]
    assert len({float(dict(model.named_parameters())[name].detach().flatten()[0]) for name in drawn}) == len(drawn)  # a seed per name


@rules
def test_gradients_at_birth_are_finite_where_the_slow_weights_are_zero(rule):
    cfg = dataclasses.replace(SynapticConfig(), hebb=rule, rank_eligibility=8, fast_layers=FAST_LAYERS, **ALL)
    net, ids = GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=cfg)), make_ids()
    net.head.weight.data.normal_()
    net(ids[:, :-1], ids[:, 1:]).backward()
    assert not net.blocks[0].mlp.w_out.weight.any() and net.blocks[0].mlp.w_out.weight.grad.any()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_eligibility": 17, "fast_layers": ("k",)}, "rank_eligibility=17 is larger than the projection k of 32 x 16: at most 16"),
        ({"fast_layers": ()}, "fast_layers is empty while hebb=delta"),
        ({"fast_layers": ("q", "q")}, "names a projection twice"),
        ({"fast_layers": ("mlp",)}, "did you mean 'mlp_in'"),
        ({"rho_elig": 0.5}, "out of bounds [0.8, 0.9999]"),
    ],
)
def test_what_does_not_fit_is_said(changes, said):
    with pytest.raises(UserError) as caught:
        GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=dataclasses.replace(SynapticConfig(), **{"hebb": "delta"} | changes)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


# --- the state belongs to a sequence -----------------------------------------------------------------------------------------------------


def fast_model(rule: str = "delta", **overrides) -> GPT:
    return make_model("all_hebb" if rule == "hebb" else "all_fast", **overrides)


@rules
def test_states_never_touch_each_other_nor_the_model(rule):
    net, ids = fast_model(rule), make_ids(2, 30)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    one, other = net.init_state(1, 30), net.init_state(1, 30)
    alone = net.init_state(1, 30)
    want = torch.cat([net.step(ids[:1, t : t + 5], alone) for t in range(0, 30, 5)], dim=1)
    got = []
    for t in range(0, 30, 5):
        got.append(net.step(ids[:1, t : t + 5], one))
        net.step(ids[1:, t : t + 5], other)
    assert torch.equal(torch.cat(got, dim=1), want)
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    for name, value in one.layers[0].tensors().items():
        assert value.data_ptr() != other.layers[0].tensors()[name].data_ptr()


def test_a_state_of_other_modes_is_refused_and_one_of_the_same_taken_over_in_place():
    ids = make_ids(2, 20)
    net, other = (GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=config(rank_eligibility=modes))) for modes in (6, 5))
    remembering(net.blocks[0].mlp.w_in.density)
    state, taken = net.init_state(2, 20), net.init_state(2, 20)
    net.step(ids[:, :9], state)
    with pytest.raises(UserError, match="another model"):
        other.step(ids[:, 9:], state)
    with pytest.raises(UserError, match="same model"):
        other.init_state(2, 20).copy_(state)
    places = [value.data_ptr() for value in taken.layers[0].tensors().values()]
    taken.copy_(state)
    assert torch.equal(net.step(ids[:, 9:], taken), net.step(ids[:, 9:], state))
    assert places == [value.data_ptr() for value in taken.layers[0].tensors().values()]


def test_an_evaluation_and_a_running_session_do_not_touch_training():
    net, ids = fast_model(), make_ids(2, 24)

    def gradients(interrupted: bool) -> list[torch.Tensor]:
        net.train().zero_grad()
        loss = net(ids[:, :-1], ids[:, 1:])
        if interrupted:
            state = net.init_state(2, 24)
            net.step(ids, state)
            net.eval()(ids)
            net.train()
        loss.backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_telemetry_tells_of_the_fast_weights():
    net, ids = fast_model(), make_ids()
    out = net.run(ids, telemetry=True)
    assert torch.equal(out.logits, net(ids)) and len(out.telemetry) == 2 and net.run(ids).telemetry is None
    for layer in out.telemetry:
        assert set(layer.fast) == set(FAST_LAYERS)
        for means in layer.fast.values():
            assert set(means) == {"fast_weight_norm", "eta_mean", "camkii_mean", "pp1_mean", "bdnf_mean"}
            assert all(float(value) > 0 for value in means.values())
    state = net.init_state(2, 40)
    net.step(ids, state)
    norm = torch.linalg.matrix_norm(state.layers[1].fast["q"].weights).mean()
    assert out.telemetry[1].fast["q"]["fast_weight_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_gains_tell_of_the_read_out_and_are_zeroed():
    net = fast_model()
    assert all(gains[f"fast_{key}"][0] > 0.1 for gains in net.gains() for key in FAST_LAYERS)
    assert all(value == [0.0] for gains in net.zero_gains().gains() for value in gains.values())


def test_flops_count_the_added_matrices_and_products():
    plain = GPT(GPTConfig(**SIZES))
    net = GPT(GPTConfig(**SIZES, synapses=True, syn_cfg=config()))
    added = 2 * (6 * (6 * 32 + 2 * 6 * 128 + 2 * 32) + 12 * 6**2)  # pre, post and out, both gates; read and write
    assert net.flops_per_token() == plain.flops_per_token() + added


def test_a_layer_compiles_into_one_graph():
    layer, x = layer_of(config("delta", "camkii", "pp1")), inputs(2, 9, 12)
    want = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)(x), want)
