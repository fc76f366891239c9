"""Llama- and Qwen-shaped checkpoints, as transformers writes them, come in as the same function of clean tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import autoregressive
from checkpoints_conversion.autoregressive import ForeignModel, import_autoregressive, next_token_log_likelihood
from esolm_megatron.data.tokenizer import load_tokenizer
from esolm_megatron.inference import load_pretrained
from esolm_megatron.model.pretrained import load_model, read_config

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 19, "initializer_range": 0.3,
}  # fmt: skip
THETA = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
KINDS = {
    "llama": ("Llama", {}),
    "llama_tied_biased": ("Llama", {"tie_word_embeddings": True, "mlp_bias": True, **THETA}),
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "qwen3_wide_heads": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True, **THETA}),
}


def theirs(kind, dtype=torch.float64, **more):
    name, values = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | values | more)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms that matter
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
    return model.to(dtype).eval()


def their_log_likelihood(model, tokens):
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, tokens[:, 1:, None])[..., 0].sum(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_likelihood_is_the_sources(tmp_path, kind, dtype, bound):
    """To 1e-6: transformers takes norms and rotations in fp32 whatever the model's dtype. The probe's other side does not."""
    source = theirs(kind, dtype)
    source.save_pretrained(tmp_path / "ar", max_shard_size="20KB")
    report = import_autoregressive(tmp_path / "ar", tmp_path / "out")
    assert report.max_difference < bound
    model = load_model(tmp_path / "out", dtype)
    tokens = torch.randint(0, 41, (5, 17), generator=torch.Generator().manual_seed(1))
    expected = their_log_likelihood(source, tokens)
    mine = next_token_log_likelihood(model, tokens)
    assert ((mine - expected) / expected).abs().max() < 1e-6
    assert (read_config(tmp_path / "out").alpha_0, report.read_out) == (0, "next token")
    embedding = model.embedding.weight
    assert torch.allclose(embedding[41], embedding[:41].mean(0))
    mine.sum().backward()
    assert embedding.grad.abs().sum() > 0


def test_masks_are_not_the_source_and_the_documentation_says_so(tmp_path):
    """The ordinary read-out at masks is another function: what docs/conversion.md proves, seen."""
    source = theirs("llama")
    source.save_pretrained(tmp_path / "ar")
    import_autoregressive(tmp_path / "ar", tmp_path / "out")
    tokens = torch.randint(0, 41, (1, 17), generator=torch.Generator().manual_seed(1))
    m = load_pretrained(tmp_path / "out", torch.float64)
    at_masks = m.log_likelihood(tokens, torch.arange(17)[None])
    assert (at_masks - their_log_likelihood(source, tokens)).abs() > 1


def test_bf16_padding_of_the_vocabulary_length_and_tokenizer(tmp_path):
    theirs("qwen2", torch.bfloat16, vocab_size=300).save_pretrained(tmp_path / "ar")
    load_tokenizer("bytes").save(tmp_path / "ar")
    report = import_autoregressive(tmp_path / "ar", tmp_path / "out", vocab_size=258, length=7)
    info = read_config(tmp_path / "out")
    assert (info.dtype, info.model.vocab_size, info.model.seq_length) == (torch.bfloat16, 258, 7)
    assert report.max_difference < 1e-4
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["mask_token"] == "[MASK]"
    with pytest.raises(ForeignModel, match="vocab_size = 302: .* has 300 ids"):
        import_autoregressive(tmp_path / "ar", tmp_path / "b", vocab_size=302)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': only llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias = True: this network has no such thing"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing, .* needs \(24,\)"),
        ({"num_hidden_layers": 2}, "tensor model.layers.2.* has no place"),
        ({"vocab_size": 40}, r"embed_tokens.weight is \(41, 24\), .* needs \(40, 24\)"),
        ({"hidden_size": "wide"}, "does not describe a network"),
    ],
)
def test_what_this_network_has_not_is_refused_by_name(tmp_path, changes, words):
    theirs("llama").save_pretrained(tmp_path / "ar")
    config = tmp_path / "ar" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ForeignModel, match=words):
        import_autoregressive(tmp_path / "ar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ar"]


def test_damaged_wrong_and_hostile_files_are_refused(tmp_path):
    theirs("llama").save_pretrained(tmp_path / "ar")
    path = tmp_path / "ar" / "model.safetensors"
    whole, state = path.read_bytes(), load_file(path)
    save_file({n: t.to(torch.int8) if "norm" in n else t for n, t in state.items()}, tmp_path / "wrong")
    for content, words in (
        (whole[:-5], "is no whole safetensors file"),
        ((tmp_path / "wrong").read_bytes(), "norm.weight is I8; weights must be one of F64"),
        (b"\x80\x04cos\nsystem\n", "is no whole safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ForeignModel, match=words):
            import_autoregressive(tmp_path / "ar", tmp_path / "out")
    path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(ForeignModel, match="missing.* pytorch_model.bin is a pickle, which is never opened"):
        import_autoregressive(tmp_path / "ar", tmp_path / "out")
    (tmp_path / "ar" / "config.json").write_text("{")
    with pytest.raises(ForeignModel, match="cannot be read as JSON"):
        import_autoregressive(tmp_path / "ar", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("wrong", ["q_proj", "k_proj", "gate_proj", "norm.weight"])
def test_a_failed_probe_leaves_nothing(tmp_path, monkeypatch, wrong):
    """A converter that turns one tensor's rows around."""
    theirs("llama").save_pretrained(tmp_path / "ar")
    real = autoregressive._converter

    def broken(source):
        read = source.tensors.read
        turned = type("Turned", (), {"read": staticmethod(lambda n: read(n).flip(0) if wrong in n else read(n))})
        return real(autoregressive._Source(source.tree, turned, source.model, source.kept))

    monkeypatch.setattr(autoregressive, "_converter", broken)
    with pytest.raises(ForeignModel, match="does not answer as the source does: largest difference"):
        import_autoregressive(tmp_path / "ar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ar"]


def test_a_network_without_a_head_says_that_one_is_missing_and_can_be_tied(tmp_path):
    whole = theirs("llama")
    whole.model.save_pretrained(tmp_path / "headless")
    for folder, words in (("headless", "a model without a head wrote it"), ("lost", "lm_head.weight is missing")):
        if folder == "lost":
            whole.save_pretrained(tmp_path / folder)
            path = tmp_path / folder / "model.safetensors"
            save_file({n: t for n, t in load_file(path).items() if n != "lm_head.weight"}, path)
        with pytest.raises(ForeignModel, match=f"{words}.*save the ...ForCausalLM, or, .*tie_word_embeddings = true"):
            import_autoregressive(tmp_path / folder, tmp_path / "out")
