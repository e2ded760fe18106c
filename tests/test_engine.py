"""Generation: what a row says depends on its prompt and its seed, and on nothing else."""

import math

import pytest
import torch

from bio_inspired_nanochat.checkpoint import save_checkpoint
from bio_inspired_nanochat.config import to_dict
from bio_inspired_nanochat.engine import Sampling, generate, generate_batch, load, next_tokens
from bio_inspired_nanochat.errors import UserError
from tests.contract import make_model
from tests.engine.speakers import tokenizer

KINDS = ["vanilla", "default"]
PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [11, 12, 13]]


def greedy(model, prompt, count):
    """The definition: the whole sequence through the model again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def columns(generation):
    return [[token for token in row if token is not None] for row in zip(*generation, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_temperature_zero_takes_the_most_likely_token(kind):
    model = make_model(kind)
    assert list(generate(model, PROMPTS[0], 12, temperature=0)) == greedy(model, PROMPTS[0], 12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind):
    model = make_model(kind)
    together = columns(generate_batch(model, PROMPTS, 12, temperature=1.0, seed=5))
    alone = [list(generate(model, prompt, 12, temperature=1.0, seed=5 + row)) for row, prompt in enumerate(PROMPTS)]
    assert together == alone


def test_a_row_that_stops_leaves_the_others_alone():
    model = make_model("default")
    free = columns(generate_batch(model, PROMPTS, 12, temperature=1.0, seed=5))
    stop = free[0][4]
    made = generate_batch(model, PROMPTS, 12, temperature=1.0, seed=5, stop_ids=[stop])
    assert columns(made) == [row[: row.index(stop)] if stop in row else row for row in free]
    assert made.finish[0] == "stop" and made.finish[1:] == ["stop" if stop in row else "length" for row in free[1:]]


def test_a_seed_repeats_and_another_seed_differs():
    model = make_model("vanilla")
    first, again, other = (list(generate(model, [3], 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_generation_neither_changes_the_model_nor_the_global_random_state():
    model = make_model("default")
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    list(generate(model, [3], 20, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_stay_on_between_two_tokens():
    stream = generate(make_model("vanilla"), [3], 4)
    next(stream)
    assert torch.is_grad_enabled()


def test_an_empty_prompt_is_the_bos_token():
    model = make_model("vanilla")
    assert list(generate(model, [], 5, seed=3)) == list(generate(model, [model.config.bos_token_id], 5, seed=3))


def test_a_full_context_ends_the_row_and_says_so():
    model = make_model("default")
    made = generate_batch(model, [[1] * 60, [2]], 100, temperature=0)
    rows = columns(made)
    assert [len(row) for row in rows] == [4, 63] and made.finish == ["context", "context"]
    assert rows[0] == greedy(model, [1] * 60, 4)


def test_a_prompt_that_fills_the_context_is_an_error():
    with pytest.raises(UserError, match="64 tokens, the context holds 64: shorten it by 1"):
        generate(make_model("vanilla"), [1] * 64).__next__()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"temperature": float("nan")}, "nan"),
    ],
)
def test_settings_out_of_bounds_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        generate_batch(make_model("vanilla"), [[1]], 3, **changes)


def test_ids_outside_of_the_vocabulary_are_named():
    with pytest.raises(UserError, match=r"token id 50 is outside of the vocabulary \[0, 49\]"):
        generate_batch(make_model("vanilla"), [[50]], 3)


def test_no_new_tokens_is_no_tokens():
    made = generate_batch(make_model("vanilla"), [[1]], 0)
    assert list(made) == [] and made.finish == ["length"]


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("sampling", "uniform", "token"),
    [
        (Sampling(temperature=1.0), 0.0, 1),
        (Sampling(temperature=1.0), 0.39, 1),
        (Sampling(temperature=1.0), 0.41, 3),
        (Sampling(temperature=1.0), 0.71, 2),
        (Sampling(temperature=1.0), 0.999, 0),
        (Sampling(temperature=1.0, top_k=2), 0.999, 3),
        (Sampling(temperature=1.0, top_p=0.65), 0.999, 3),
        (Sampling(temperature=1.0, top_p=0.4), 0.999, 1),
        (Sampling(temperature=1.0, top_p=1e-9), 0.999, 1),
        (Sampling(temperature=0.001), 0.999, 1),
        (Sampling(temperature=0.0), 0.999, 1),
    ],
)
def test_the_uniform_number_picks_a_token_by_its_share(sampling, uniform, token):
    assert next_tokens(LOGITS, sampling, [uniform]) == [token]


def test_ties_go_to_the_smaller_id():
    assert next_tokens(torch.zeros(1, 5), Sampling(temperature=1.0, top_k=1), [0.9]) == [0]
    assert next_tokens(torch.zeros(1, 5), Sampling(temperature=0.0), [0.9]) == [0]


@pytest.mark.parametrize("row", [[math.nan] * 3, [0.0, math.nan, -math.inf], [1.0, math.inf, 0.0], [-math.inf] * 3])
def test_logits_that_are_not_finite_are_an_error(row):
    for temperature in (0.0, 0.8):
        with pytest.raises(UserError, match="not finite"):
            next_tokens(torch.tensor([[0.0, 1.0, 2.0], row]), Sampling(temperature), [0.5, 0.5])
    assert next_tokens(torch.tensor([[-math.inf, 1.0, -math.inf]]), Sampling(), [0.999]) == [1], "a token may be impossible"


def test_generation_follows_documents_when_they_are_kept_apart():
    model = make_model("default", doc_mask=True)
    prompt = [0, 5, 6, 0, 7]
    assert list(generate(model, prompt, 10, temperature=0)) == greedy(model, prompt, 10)


def test_a_checkpoint_of_a_run_that_diverged_is_refused(tmp_path):
    model = make_model("default", vocab_size=tokenizer().vocab_size, bos_token_id=0)
    model.blocks[1].attn.q.weight.data[0, 0] = math.nan
    files = {"tokenizer.json": tokenizer().to_json().encode()}
    path = save_checkpoint(tmp_path, 1, dict(model.state_dict()), {"model_config": to_dict(model.config)}, files=files)
    with pytest.raises(UserError, match="blocks.1.attn.q.weight that are not finite"):
        load(path, torch.device("cpu"))


def test_a_checkpoint_with_the_tokenizer_of_a_larger_model_is_refused(tmp_path):
    """Its ids would be read beyond the end of the table of embeddings."""
    for size in (tokenizer().vocab_size, 50):
        model = make_model("vanilla", vocab_size=size, bos_token_id=0)
        files = {"tokenizer.json": tokenizer().to_json().encode()}
        save_checkpoint(tmp_path, size, dict(model.state_dict()), {"model_config": to_dict(model.config)}, files=files)
    assert load(tmp_path / f"step_{tokenizer().vocab_size:06d}", torch.device("cpu")).tokenizer.sha256 == tokenizer().sha256
    with pytest.raises(UserError, match="another model's"):
        load(tmp_path / "step_000050", torch.device("cpu"))
