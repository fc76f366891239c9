"""What an export encodes, ends and pads with is what training did; its loss adds up over micro-batches."""

import json

import pytest
import torch
from conversion.test_export import random_model, run_config
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from checkpoints_conversion import hub
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.model.pretrained import save_model

transformers = pytest.importorskip("transformers")
TEXTS = ["alpha beta gamma\n", "die Größe der Straße, 東京", "def f(x):\n    return x"] * 3


def learnt(engine, trainer):
    engine.train_from_iterator(TEXTS, trainer)
    return engine


def byte_level():
    """As GPT-2, with another end."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return learnt(
        engine, trainers.BpeTrainer(vocab_size=280, special_tokens=["<|im_end|>"], initial_alphabet=alphabet)
    ), "<|im_end|>"


def llama_2():
    """SentencePiece BPE with a prefix space, and a template that begins each text with <s>."""
    engine = Engine(models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    engine = learnt(engine, trainers.BpeTrainer(vocab_size=320, special_tokens=special))
    engine.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return engine, "</s>"


def llama_3():
    """Byte-level, with a template behind the byte-level processor."""
    engine, _ = byte_level()
    engine.add_special_tokens(["<|begin|>"])
    begin = engine.token_to_id("<|begin|>")
    template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", [("<|begin|>", begin)])
    engine.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return engine, "<|im_end|>"


def unigram():
    engine = Engine(models.Unigram())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>")
    engine = learnt(engine, trainer)
    engine.add_special_tokens(["<|end|>"])
    end = engine.token_to_id("<|end|>")
    engine.post_processor = processors.TemplateProcessing("$A <|end|>", "$A <|end|> $B <|end|>", [("<|end|>", end)])
    return engine, "<|end|>"


@pytest.mark.parametrize("family", [byte_level, llama_2, llama_3, unigram], ids=lambda f: f.__name__)
def test_an_export_encodes_as_training_did(tmp_path, family):
    engine, end = family()
    source = tmp_path / "tokenizer"
    source.mkdir()
    engine.save(str(source / "tokenizer.json"))
    given = {"eos_token": {"content": end, "special": True}, "chat_template": "{{ messages }}", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(given))
    ours = load_tokenizer(source)
    config = run_config(vocab_size=ours.vocab_size + 1).model
    save_model(
        tmp_path / "m", config, 0.5, random_model(config, 0).named_parameters(), tokenizer_folder=source,
        extra=hub.files(config, 0.5, {}, source), extra_config=hub.config_fields(config),
    )  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in ["alpha beta", *TEXTS[:3]]:
        assert theirs(text).input_ids == ours.encode(text) == load_tokenizer(tmp_path / "m").encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert (theirs.eos_token, theirs.eos_token_id) == (end, ours.eos_id)
    assert theirs.mask_token_id == config.mask_id
    assert theirs.model_max_length == config.seq_length
    assert theirs.chat_template == "{{ messages }}"
    made = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert (made.eos_token_id, made.pad_token_id, made.mask_token_id) == (ours.eos_id, ours.eos_id, config.mask_id)
    padded = theirs(["alpha", "alpha beta gamma"], padding=True, return_tensors="pt")
    assert padded.attention_mask[0].sum() == len(ours.encode("alpha"))
    assert load_tokenizer(tmp_path / "m").eos_id == ours.eos_id


def tiny_model(**options):
    from esolm_megatron.huggingface import EsoLMConfig, EsoLMForMaskedLM

    torch.manual_seed(0)
    return EsoLMForMaskedLM(
        EsoLMConfig(num_layers=1, hidden_size=24, num_heads=2, head_dim=12, kv_heads=2, vocab=19, mask_id=18, **options)
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_micro_batches_of_transformers_trainer_add_up(tmp_path, side):
    """The same eight rows as one batch, or as four micro-batches: one loss, one gradient."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for size in (3, 9, 4, 7, 8, 2, 6, 5):
        ids, hidden = torch.randint(0, 18, (size,), generator=generator), 9 - size
        pads, keep = torch.full((hidden,), 1), torch.ones(size, dtype=torch.long)
        parts = [(pads, ids), (0 * pads, keep), (pads * 0 - 100, ids)]
        whole = [torch.cat(pair if side == "left" else pair[::-1]) for pair in parts]
        masked = torch.where(whole[2] >= 0, 18, whole[0])
        rows.append({"input_ids": masked, "attention_mask": whole[1], "labels": whole[2]})

    def trained(batch, accumulate):
        model, seen = tiny_model(), []
        arguments = transformers.TrainingArguments(
            str(tmp_path / f"{batch}"), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1,
            use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, max_grad_norm=0, optim="sgd",
            learning_rate=0.1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        before = [p.detach().clone() for p in model.parameters()]
        trainer.train()
        seen = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return seen[0], [b - p.detach() for p, b in zip(model.parameters(), before, strict=True)]

    (loss, moved), (same, again) = trained(8, 1), trained(2, 4)
    assert same == pytest.approx(loss, rel=1e-4)
    assert any(x.any() for x in moved)
    for a, b in zip(moved, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_saved_models_come_back_and_sizes_stay(tmp_path):
    model = tiny_model().eval()
    ids = torch.tensor([[3, 18, 4, 18]])
    model.save_pretrained(tmp_path / "m")
    for dtype in (torch.float32, torch.bfloat16):
        tiny_model().to(dtype).save_pretrained(tmp_path / str(dtype))
        back = type(model).from_pretrained(tmp_path / str(dtype), dtype="auto")
        assert {p.dtype for p in back.parameters()} == {dtype}
    back = type(model).from_pretrained(tmp_path / "m").eval()
    back.tie_weights()
    with torch.no_grad():
        assert torch.equal(back(ids).logits[..., :18], model(ids).logits[..., :18])
    assert back.resize_token_embeddings() is back.resize_token_embeddings(19) is back.embedding
    with pytest.raises(ValueError, match="new_num_tokens = 20: the vocabulary has 19 ids"):
        back.resize_token_embeddings(20)
