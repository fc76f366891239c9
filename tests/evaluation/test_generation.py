"""Texts that are written and judged: by hand, by `transformers`, and by a model of ours."""

import math
import sys

import numpy as np
import pytest
import torch
from parity import random_model

from esolm_megatron import load_pretrained
from esolm_megatron.config import ConfigError
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.evaluation.generation import Generation, distinct, entropy, mauve_of
from esolm_megatron.evaluation.judges import load_judge
from esolm_megatron.evaluation.shares import shared
from esolm_megatron.model.pretrained import save_model
from esolm_megatron.objective.likelihood import log_likelihood

TEXTS = ["the cat sat on the mat", "xyzzy", "a", ""]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder with a model of bytes, as `esolm convert` writes it."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    tokenizer = load_tokenizer("bytes")
    model = random_model(torch.float32, vocab_size=tokenizer.vocab_size + 1, seq_length=16)
    tokenizer.save(folder.parent / "tokenizer")
    save_model(
        folder,
        model.shape,
        0.5,
        model.named_parameters(),
        dtype=torch.float32,
        tokenizer_folder=folder.parent / "tokenizer",
    )
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with a GPT-2 of `transformers`, of few words, with random weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("theirs")
    words = ["<unk>", "<end>", "the", "cat", "sat", "on", "mat", "xyzzy", "a"]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=5, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_model_of_ours_judges_left_to_right_in_parts(ours):
    judge = load_judge(str(ours), 5, torch.device("cpu"))
    found, model = judge(TEXTS), load_pretrained(ours)
    ids = model.tokenizer.encode(TEXTS[0])
    exact = 0.0
    for first in range(0, len(ids), 5):
        part = torch.tensor([ids[first : first + 5]])
        order = torch.arange(part.shape[1])[None]
        exact -= log_likelihood(model.model, part, order, scored=order > 0).item()
    assert found.nats[0] == pytest.approx(exact, rel=1e-6)
    assert found.tokens.tolist() == [22 - 5, 4, 0, 0], "the first of a part has nothing before it"
    assert "parts of at most 5 tokens" in judge.said
    assert "16 tokens" in load_judge(str(ours), None, torch.device("cpu")).said


def test_transformers_judge_as_the_reference_counts(theirs):
    """Its loss by its own arithmetic; of several ends of a text only the first counts."""
    import transformers

    judge = load_judge(str(theirs), None, torch.device("cpu"))
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs)
    texts = ["the cat sat on the mat", "a <end> cat <end> <end>", "a", ""]
    found = judge(texts)
    whole = [torch.tensor([[2, 3, 4, 5, 2]]), torch.tensor([[6]])]
    assert found.nats[0] == pytest.approx(4 * model(whole[0], labels=whole[0]).loss.item(), rel=1e-5)
    ids = torch.tensor([[8, 1, 3, 1, 1]])
    log_p = model(ids).logits.log_softmax(-1)[0]
    assert found.nats[1] == pytest.approx(-(log_p[0, 1] + log_p[1, 3]).item(), rel=1e-5)
    assert found.tokens.tolist() == [4, 2, 0, 0], "of a single token, or none, nothing is told"
    hidden = model(whole[1], output_hidden_states=True).hidden_states[-1][0, -1].detach().numpy()
    assert np.allclose(found.features[0], hidden, atol=1e-5), "of the last token"
    assert "gpt2" in judge.said
    with pytest.raises(ConfigError, match="judge_length = 9: must be 2 to 5"):
        load_judge(str(theirs), 9, torch.device("cpu"))


def test_a_judge_of_pickled_weights_is_not_read(theirs, tmp_path):
    import shutil

    shutil.copytree(theirs, tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load_judge(str(tmp_path / "pickled"), None, torch.device("cpu"))


def test_variety_by_hand():
    assert entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert entropy([7] * 9) == 0
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1]], 2) == 1


def test_what_is_written_is_what_sample_gives_in_any_number_of_parts(ours):
    model = load_pretrained(ours)
    judge = load_judge(str(ours), None, torch.device("cpu"))
    fields = {"alpha_0": 0.5, "seed": 3, "top_p": 0.9}
    found = {}
    for size in (2, 5):
        job = Generation(model, judge, 5, 12, [3, 12], size, fields)
        parts = shared(job)
        assert (job.count, job.tokens) == (2 * (3 if size == 2 else 1), 120)
        found[size] = job.result(parts)
        texts = [text for part in parts[job.batches :] for text in part["texts"]]
        assert texts == [model.tokenizer.decode(row) for row in model.sample(5, 12, 12, **fields)[0].tolist()]
    for a, b in zip(found[2], found[5], strict=True):
        assert (a.steps, a.num_samples, a.entropy, a.distinct) == (b.steps, b.num_samples, b.entropy, b.distinct)
        assert a.nats_per_token == pytest.approx(b.nats_per_token)
        assert a.standard_error > 0
        assert a.tokens_per_second > 0
        assert a.mauve is None
    assert found[2][0].passes < found[2][1].passes


def test_mauve_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ConfigError, match=r"reference: needs the package mauve; pip install 'esolm-megatron\[mauve\]'"):
        mauve_of([[0.0]], [[0.0]])


def test_mauve_tells_same_from_different(theirs, ours):
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    a, b, far = rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), rng.normal(size=(60, 8)) + 9
    assert mauve_of(a.tolist(), b.tolist()) > 0.8 > 0.2 > mauve_of(a.tolist(), far.tolist())
    judge = load_judge(str(theirs), None, torch.device("cpu"))
    job = Generation(load_pretrained(ours), judge, 20, 8, [8], 20, {"alpha_0": 1.0, "seed": 1}, ["the cat sat"] * 20)
    assert job.count == 2
    (found,) = job.result(shared(job))
    assert 0 <= found.mauve <= 1
