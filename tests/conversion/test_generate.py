"""transformers' `generate` on an export is this package's sampler: same tokens, its own words for options, pipelines."""

import pytest
import torch
from conversion.test_export import random_model, run_config

from checkpoints_conversion import hub
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import load_pretrained
from esolm_megatron.model.pretrained import save_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("generate")
    load_tokenizer("bytes").save(top / "tokenizer")
    config = run_config(vocab_size=258, seq_length=64).model
    save_model(
        top / "m", config, 0.5, random_model(config, 0).named_parameters(), tokenizer_folder=top / "tokenizer",
        extra=hub.files(config, 0.5, {}, top / "tokenizer"), extra_config=hub.config_fields(config),
    )  # fmt: skip
    return top / "m"


@pytest.fixture(scope="module", params=["export", "package"])
def model(folder, request):
    """By the code in the export, and by that of the installed package."""
    kind = transformers.AutoModelForCausalLM
    if request.param == "package":
        from esolm_megatron.huggingface import EsoLMForMaskedLM as kind
    found = kind.from_pretrained(folder, trust_remote_code=True).eval()
    assert found.generation_config.eos_token_id == 256
    return found


def test_tokens_are_those_of_the_sampler(folder, model):
    ours = load_pretrained(folder)
    prompt = torch.tensor([[97, 98, 99], [100, 101, 102]])
    fields = {"steps": 4, "alpha_0": 1.0, "seed": 3, "top_p": 0.9, "temperature": 0.7}
    made = model.generate(prompt, max_new_tokens=8, do_sample=True, num_return_sequences=2, eos_token_id=None, **fields)
    expected = ours.sample(4, 11, prompt=prompt.repeat_interleave(2, 0), **fields)[0]
    assert torch.equal(made, expected)
    likeliest = model.generate(prompt, max_new_tokens=8, eos_token_id=None, seed=9)
    assert torch.equal(likeliest, ours.sample(2, 11, prompt=prompt, temperature=0.0, seed=9)[0])
    transformers.set_seed(5)
    first = model.generate(prompt, max_new_tokens=8, do_sample=True)
    transformers.set_seed(5)
    assert torch.equal(first, model.generate(prompt, max_new_tokens=8, do_sample=True))
    assert not torch.equal(first, model.generate(prompt, max_new_tokens=8, do_sample=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    """Rows of different lengths together, and each alone."""
    rows = [torch.tensor([97, 98]), torch.tensor([100, 101, 102, 103])]
    ids, mask = torch.full((2, 4), 256), torch.zeros(2, 4, dtype=torch.long)
    for n, row in enumerate(rows):
        at = slice(4 - len(row), 4) if side == "left" else slice(len(row))
        ids[n, at], mask[n, at] = row, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, alpha_0=0.0)
    for n, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=6, alpha_0=0.0)[0]
        assert torch.equal(together[n, 4:], alone[len(row) :])
    assert torch.equal(together[:, :4], ids)


def test_rows_of_different_lengths_have_random_numbers_of_their_own(folder, model):
    """What is sampled apart is numbered on: no two rows of a call draw by the same words."""
    ours, rows = load_pretrained(folder), [torch.tensor([97, 98]), torch.tensor([100, 101, 102, 103])]
    ids, mask = torch.full((2, 4), 256), torch.zeros(2, 4, dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, 4 - len(row) :], mask[n, 4 - len(row) :] = row, 1
    made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True, seed=4, eos_token_id=None)
    for n, row in enumerate(rows):
        alone = ours.sample(1, len(row) + 6, prompt=row, seed=4, first_row=n)[0][0]
        assert torch.equal(made[n, 4:], alone[len(row) :])


def test_holes_are_filled_and_what_follows_the_end_is_padding(model):
    ids = torch.tensor([[97, 257, 99, 257, 100]])
    made = model.generate(ids, max_new_tokens=3, do_sample=True, seed=1, eos_token_id=None)
    assert made[0, [0, 2, 4]].tolist() == [97, 99, 100]
    assert (made < 257).all()
    ends = 0
    for seed in range(40):
        row = model.generate(
            torch.tensor([[97]]), max_new_tokens=30, do_sample=True, seed=seed, top_k=200, pad_token_id=7
        )[0, 1:].tolist()
        if 256 in row:
            ends += 1
            assert set(row[row.index(256) + 1 :]) <= {7}
    assert ends, "some text ends"


def test_what_the_sampler_does_not_have_is_refused(model):
    ids = torch.tensor([[97]])
    for options, words in (
        ({"num_beams": 4}, "num_beams = 4"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"stepz": 3}, "stepz = 3"),
    ):
        with pytest.raises(ValueError, match=f"generate: {words}.*has no such option"):
            model.generate(ids, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="max_new_tokens = 0: there is no token to make"):
        model.generate(ids, max_length=1)
    with pytest.raises(ValueError, match="steps"):
        model.generate(ids, max_new_tokens=2, steps=0)


def test_pipelines(folder, model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (made,) = write("def f", max_new_tokens=8, do_sample=True, top_p=0.9)
    assert made["generated_text"].startswith("def f")
    assert len(made["generated_text"]) > 5
    fill = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert [guess["sequence"][:2] for guess in fill("ab[MASK]d")] == ["ab"] * 5
    mapped = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, device_map="cpu")
    assert mapped.device.type == "cpu"


def test_low_rank_adapters_attach_and_learn(folder):
    """peft's LoRA finds the linears of the blocks; what is trained is nothing else."""
    peft = pytest.importorskip("peft")
    from esolm_megatron.huggingface import EsoLMForMaskedLM

    torch.manual_seed(0)
    whole = EsoLMForMaskedLM.from_pretrained(folder)
    model = peft.get_peft_model(whole, peft.LoraConfig(target_modules=["qkv", "out", "fc1", "fc2"], r=4))
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in learnt} == {"qkv", "out", "fc1", "fc2"}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids, labels = torch.tensor([[97, 257, 99, 257]]), torch.tensor([[-100, 98, -100, 100]])
    optimizer, losses = torch.optim.AdamW(learnt.values(), lr=0.05), []
    for _ in range(20):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("adapters", [False, True])
def test_blocks_are_computed_again_in_backward_and_gradients_are_the_same(folder, adapters):
    """transformers' gradient_checkpointing_enable, with and without LoRA: twice the blocks' forward passes, equal gradients."""
    from esolm_megatron.huggingface import EsoLMForMaskedLM

    calls = []
    ids, labels = torch.tensor([[97, 257, 99, 257]]), torch.tensor([[-100, 98, -100, 100]])
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        whole = EsoLMForMaskedLM.from_pretrained(folder)
        model = whole
        if adapters:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(whole, peft.LoraConfig(target_modules=["qkv", "out", "fc1", "fc2"], r=4))
        if again:
            model.gradient_checkpointing_enable()
        calls.clear()
        for block in whole.layers.values():
            block.norm1.register_forward_hook(lambda *_: calls.append(1))
        model.train()
        model(input_ids=ids, labels=labels).loss.backward()
        found.append((len(calls), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
        calls.clear()
        model.eval()
        model(input_ids=ids, labels=labels).loss.backward()
        assert len(calls) == len(whole.layers), "only in training"
    (once, plain), (twice, same) = found
    assert (once, twice) == (len(whole.layers), 2 * len(whole.layers))
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[name], same[name]) for name in plain)
