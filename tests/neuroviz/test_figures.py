"""NeuroViz draws what the model did: the numbers in the pictures are the model's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from bio_inspired_nanochat.engine import load
from bio_inspired_nanochat.errors import UserError
from bio_inspired_nanochat.neuroviz import figures
from bio_inspired_nanochat.neuroviz.gallery import MOST_TOKENS
from bio_inspired_nanochat.neuroviz.reading import read, read_text
from bio_inspired_nanochat.synaptic import vitals
from bio_inspired_nanochat.training.vitals import constants, embedding, expert_rows, plane
from scripts import neuroviz
from tests.structural.colony import batch, colony


@pytest.fixture(scope="module")
def loaded(trained):
    return load(trained.record["checkpoint"], torch.device("cpu"))


@pytest.fixture(scope="module")
def reading(loaded):
    return read_text(loaded.model, loaded.tokenizer, attention=True)


def images(axes) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def test_a_reading_holds_the_states_that_the_running_model_has(loaded, reading):
    """Tick by tick as in one pass, against the state of a sequence that is fed token by token."""
    model, ids = loaded.model, loaded.tokenizer.encode("The king said to his friend that", bos=True)[:17]
    seen = read(model, ids, ["x"] * len(ids))
    state = model.init_state(1, len(ids))
    for token in ids[:-1]:
        model.step(torch.tensor([[token]]), state)
    for told, course in zip(vitals(state), seen.course, strict=True):
        last = course["calcium"][:, -1, :16].mean(-1)
        assert told["calcium"] == pytest.approx(last.tolist(), rel=1e-3, abs=1e-4)


def test_attention_weights_are_those_of_the_output(loaded, reading):
    for weights in reading.attention:
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
        assert weights.triu(1).abs().max() == 0
    model = loaded.model
    idx = torch.tensor([loaded.tokenizer.encode("the king", bos=True)])
    before = model(idx)
    read(model, idx[0].tolist(), ["x"] * idx.shape[1], attention=True)
    assert torch.equal(model(idx), before) and "attend" not in vars(model.blocks[0].attn), "the model is left as it was"


def test_a_map_of_states_shows_heads_over_tokens(reading):
    axes, bar = figures.state_map(reading, "vesicles").axes
    wanted = torch.cat([layer["vesicles"][:, -1] for layer in reading.course])
    assert np.allclose(images(axes), wanted.numpy()) and wanted.std() > 0.01
    assert axes.get_xlabel() == "token (key)" and bar.get_ylabel() == "vesicle pool (share of full)"
    assert [label.get_text() for label in axes.get_xticklabels()] == reading.tokens


def test_a_raster_shows_ticks_of_terminals_that_exist(reading):
    picture = figures.raster(reading, 1)
    first = images(picture.axes[0])
    born = np.arange(first.shape[1])[None] < reading.tick * np.arange(1, len(first) + 1)[:, None]
    assert (np.ma.getmaskarray(np.ma.masked_invalid(first)) == ~born).all()
    assert np.allclose(np.ma.filled(first, 0)[born], reading.course[1]["calcium"][0].numpy()[born])
    assert f"a tick is {reading.tick} tokens" in picture.axes[-4].get_xlabel() + picture.axes[-3].get_xlabel()


def test_the_expert_map_shows_load_health_and_age():
    layer = colony(slots=6).experts()[0]
    layer.accounts.load[:4] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    layer.accounts.energy[:4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    layer.accounts.age[:4] = torch.tensor([0, 10, 20, 40])
    rows = [{"layer": 0, **row} for row in expert_rows(layer)]
    axes, bar = figures.expert_map(rows, figures.arrange(embedding(layer))).axes
    (points,) = axes.collections
    assert (np.diff(points.get_sizes()) > 0).all() and (np.diff(points.get_array()) > 0).all()
    assert (np.diff(points.get_edgecolors()[:, 0]) < 0).all(), "older is darker"
    assert "health" in bar.get_ylabel() and axes.get_xlabel() == "PCA 1"
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2", "3"]


def test_the_plane_keeps_the_two_largest_spreads():
    points = torch.zeros(5, 7)
    points[:, 3], points[:, 5] = torch.tensor([-4.0, -2, 0, 2, 4]), torch.tensor([1.0, -1, 0, -1, 1])
    assert torch.allclose(plane(points), torch.stack([points[:, 3], points[:, 5]], dim=1), atol=1e-5)


def test_umap_without_its_package_is_one_clear_line():
    with pytest.raises(UserError, match="umap-learn"):
        figures.arrange(torch.randn(9, 4), "umap")


def test_radar_kinetics_and_similarity_show_the_models_numbers(loaded):
    model = loaded.model
    rows = [{"layer": index, **row} for index, layer in enumerate(model.experts()) for row in expert_rows(layer)]
    best = max(rows, key=lambda row: row["contribution"])
    first = figures.radar(rows).axes[0].lines[0]
    assert first.get_label() == f"layer {best['layer']} expert {best['id']}" and first.get_ydata()[0] == 1.0
    learned = constants(model)
    panels = {axes.get_title(): axes for axes in figures.kinetics(learned).axes}
    drawn = panels["tau_c"].lines[0].get_ydata()
    assert list(drawn) == learned[0]["tau_c"] and panels["tau_c"].get_ylabel() == "tokens"
    assert drawn == pytest.approx(model.blocks[0].attn.synapse.params().tau_c.tolist())
    points = torch.cat([embedding(layer) for layer in model.experts()])
    cosines = images(figures.similarity(rows, points).axes[0])
    assert np.allclose(cosines, torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=-1).numpy(), atol=1e-5)


def test_the_script_draws_every_picture(trained, tmp_path, capsys):
    neuroviz.main([f"--checkpoint={trained.record['checkpoint']}", f"--out={tmp_path}", "--sentence=The king said", "--device=cpu"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = {
        "raster_layer0",
        "raster_layer1",
        "calcium",
        "vesicles",
        "bias",
        "energy",
        "attention",
        "kinetics",
        "experts",
        "radar",
        "similarity",
    }
    assert set(record["pictures"]) == names
    for path in record["pictures"].values():
        pixels = matplotlib.image.imread(io.BytesIO(Path(path).read_bytes()))
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05, path
    assert MOST_TOKENS == 64


def test_a_text_longer_than_the_context_is_refused(loaded):
    with pytest.raises(UserError, match="between 1 and 32"):
        read(loaded.model, [1] * 33, ["x"] * 33)


def test_a_vanilla_model_has_nothing_to_draw():
    model = colony(synapses=False, experts=0, slots=0)
    seen = read(model, batch(0)[0][0, :8].tolist(), ["x"] * 8, attention=True)
    assert seen.course == [] and len(seen.attention) == 1
    with pytest.raises(UserError, match="synapses=1"):
        figures.raster(seen, 0)
