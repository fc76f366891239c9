"""Import of Llama- and Qwen-shaped autoregressive checkpoints of `transformers`, as weights to start an Eso-LM from.

Such a network predicts a token from the state of the token before it; an Eso-LM predicts it from a mask that stands at its
place. The imported network is the autoregressive one on clean tokens, exactly: `next_token_log_likelihood`. What its masks
predict is untrained. docs/conversion.md says why that cannot be otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from checkpoints_conversion import hub
from checkpoints_conversion.probe import BOUNDS, difference, folder_logits, probe_row, require
from esolm_megatron.checkpoint.tensorfile import TensorFolder, TensorFolderError
from esolm_megatron.config import ModelConfig
from esolm_megatron.model.attention import PackedAttention, PackedLayout
from esolm_megatron.model.pretrained import TOKENIZER_FILES, Progress, parameter_shapes, save_model
from esolm_megatron.model.transformer import EsoLM

KINDS = ("llama", "qwen2", "qwen3")
"""What `model_type` may say."""
_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),  # llama and qwen3: it would be on the output matrix too
    "hidden_act": (None, "silu"),
    "use_sliding_window": (None, False),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "is_decoder": (None, False, True),
}
"""Fields that must have one of these values."""


class ForeignModel(ValueError):
    """A folder that is no autoregressive checkpoint which this import knows, or a damaged one."""


@dataclass(frozen=True)
class ImportedAR:
    """An inference folder made from an autoregressive checkpoint; it passed its probe.

    read_out: what its logits are trained to predict.
    """

    folder: Path
    kind: str
    model: ModelConfig
    num_tensors: int
    max_difference: float
    tolerance: float
    read_out: str = "next token"


@dataclass(frozen=True)
class _Source:
    tree: dict[str, Any]
    tensors: TensorFolder
    model: ModelConfig
    kept: int
    """Rows of the vocabulary that are kept; the mask's comes after them."""

    def head(self) -> str:
        return "model.embed_tokens.weight" if self.model.tied_embeddings else "lm_head.weight"


def import_autoregressive(
    source: str | Path,
    out: str | Path,
    *,
    length: int | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    progress: Progress | None = None,
) -> ImportedAR:
    """Write the inference folder `out`, with alpha_0 = 0, from a folder with config.json and safetensors.

    The mask's row is added at the end of the vocabulary: in the embedding the mean of the others, in an untied head zeros.
    length: sequence length, by default what the checkpoint was made for. vocab_size: ids to keep, the mask included, where
    the vocabulary is padded beyond the tokenizer's. dtype: stored type, by default the source's. tokenizer_folder: by
    default the source's own tokenizer. Tensors are read and written one at a time.

    Raises:
        ForeignModel: it is damaged, of another kind, has what this network has not, or fails its probe.
        PretrainedError: `out` exists.
    """
    path = Path(source)
    read = _open(path, length, vocab_size)
    config, stored = read.model, read.tensors.dtypes["model.embed_tokens.weight"]
    dtype = dtype or stored
    if tokenizer_folder is None and any((path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer_folder = path
    facts = {"imported_from": path.name, "kind": read.tree["model_type"], "read_out": ImportedAR.read_out}
    found: list[tuple[float, float]] = []

    def check(folder: Path) -> None:
        tokens, positions = probe_row(config)
        theirs = source_logits(read.tree, read.tensors.read, read.head(), tokens, positions)[:, : read.kept]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mine = folder_logits(folder, tokens, positions, wide)[:, : read.kept]
        found.append(difference(mine, theirs, max(BOUNDS[dtype], BOUNDS[torch.float32]) if dtype != stored else 1e-4))
        require(*found[0], f"{path}: the imported network does not answer as the source does", out, ForeignModel)

    save_model(
        out,
        config,
        0.0,
        _converter(read),
        dtype=dtype,
        facts=facts,
        tokenizer_folder=tokenizer_folder,
        extra=hub.files(config, 0.0, facts, tokenizer_folder),
        extra_config=hub.config_fields(config),
        source=[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in read.tensors.files],
        check=check,
        progress=progress,
    )
    return ImportedAR(Path(out), facts["kind"], config, len(parameter_shapes(config)), *found[0])


def _open(folder: Path, length: int | None, vocab_size: int | None) -> _Source:
    config = folder / "config.json"
    if not config.is_file():
        raise ForeignModel(f"{config}: missing; give a folder that `save_pretrained` of transformers wrote")
    try:
        tree = json.loads(config.read_bytes())
        tensors = TensorFolder(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, TensorFolderError):
            pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
            more = f"; {pickles[0]} is a pickle, which is never opened here" if pickles else ""
            raise ForeignModel(f"{error}{more}") from error
        raise ForeignModel(f"{config}: cannot be read as JSON: {error}") from error
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind not in KINDS:
        raise ForeignModel(f"{config}: model_type = {kind!r}: only {', '.join(KINDS)} can be imported")
    refused = [(n, tree[n]) for n, allowed in _REFUSED.items() if n in tree and tree[n] not in allowed]
    refused += [("layer_types", kind) for kind in tree.get("layer_types") or () if kind != "full_attention"]
    rope = tree.get("rope_parameters") or {}
    refused += [("rope_parameters", rope)] if rope.get("rope_type", "default") != "default" else []
    if refused:
        raise ForeignModel(f"{config}: {refused[0][0]} = {refused[0][1]!r}: this network has no such thing")
    model = _model(tree, tensors, config, length)
    rows = model.vocab - 1
    kept = rows if vocab_size is None else vocab_size - 1
    if not 1 <= kept <= rows:
        raise ForeignModel(
            f"vocab_size = {vocab_size}: {folder} has {rows} ids, {rows + 1} with the mask; keep at most these"
        )
    source = _Source(tree, tensors, model.model_copy(update={"vocab_size": kept + 1}), kept)
    _check_names(source, rows, config)
    return source


def _model(tree: dict[str, Any], tensors: TensorFolder, path: Path, length: int | None) -> ModelConfig:
    kind, heads, width = tree["model_type"], tree.get("num_attention_heads"), tree.get("hidden_size")
    head_size = tree.get("head_dim")
    if head_size is not None and isinstance(heads, int) and head_size * heads == width:
        head_size = None
    rope = tree.get("rope_parameters") or {}
    try:
        return ModelConfig(
            num_layers=tree["num_hidden_layers"],
            hidden_size=tree["hidden_size"],
            num_heads=tree["num_attention_heads"],
            num_kv_heads=tree.get("num_key_value_heads"),
            head_size=head_size,
            ffn_hidden_size=tree["intermediate_size"],
            vocab_size=tree["vocab_size"] + 1,
            seq_length=length or tree["max_position_embeddings"],
            norm="rmsnorm",
            norm_eps=tree.get("rms_norm_eps", 1e-6),
            activation="swiglu",
            mlp_bias=bool(tree.get("mlp_bias", False)),
            qkv_bias=kind == "qwen2",
            output_bias=False,
            tied_embeddings=tree.get("tie_word_embeddings", "lm_head.weight" not in tensors.shapes),
            qk_norm=kind == "qwen3",
            rope_base=rope.get("rope_theta", tree.get("rope_theta", 10000.0)),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ForeignModel(f"{path}: does not describe a network that can be imported: {error}") from error


def _names(source: _Source, rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The source's tensors and their shapes."""
    m = source.model
    h, f, d = m.hidden_size, m.ffn_size, m.head_dim
    yield "model.embed_tokens.weight", (rows, h)
    yield "model.norm.weight", (h,)
    if not m.tied_embeddings:
        yield "lm_head.weight", (rows, h)
    for layer in range(m.num_layers):
        block = f"model.layers.{layer}."
        yield from ((f"{block}{name}.weight", (h,)) for name in ("input_layernorm", "post_attention_layernorm"))
        for name, heads in (("q", m.num_heads), ("k", m.kv_heads), ("v", m.kv_heads)):
            yield f"{block}self_attn.{name}_proj.weight", (heads * d, h)
            if m.qkv_bias:
                yield f"{block}self_attn.{name}_proj.bias", (heads * d,)
            if m.qk_norm and name != "v":
                yield f"{block}self_attn.{name}_norm.weight", (d,)
        yield f"{block}self_attn.o_proj.weight", (h, m.num_heads * d)
        for name, out, into in (("gate", f, h), ("up", f, h), ("down", h, f)):
            yield f"{block}mlp.{name}_proj.weight", (out, into)
            if m.mlp_bias:
                yield f"{block}mlp.{name}_proj.bias", (out,)


def _check_names(source: _Source, rows: int, config: Path) -> None:
    wanted, found = dict(_names(source, rows)), source.tensors.shapes
    bare = "embed_tokens.weight" in found
    if bare or ("lm_head.weight" in wanted and "lm_head.weight" not in found):
        who = (
            "a model without a head wrote it (names do not begin with `model.`)"
            if bare
            else "lm_head.weight is missing"
        )
        raise ForeignModel(
            f"{source.tensors.folder}: {who}, and what predicts tokens is the head; save the ...ForCausalLM, or, if its head is "
            f"the embedding, load the weights into one with tie_word_embeddings = true in {config} and save that"
        )
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise ForeignModel(
                f"{source.tensors.folder}: {name} is {found.get(name, 'missing')}, {config} needs {shape}"
            )
    for name in found:
        spare = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and source.model.tied_embeddings)
        if name not in wanted and not spare:
            raise ForeignModel(f"{source.tensors.folder}: tensor {name} has no place in this network")


def _converter(source: _Source) -> Callable[[str], Tensor]:
    """A function of our tensor's name."""
    m, kept = source.model, source.kept

    def get(name: str) -> Tensor:
        return source.tensors.read(name)

    def vocabulary(name: str, last: Callable[[Tensor], Tensor]) -> Tensor:
        rows = get(name)[:kept]
        return torch.cat([rows, last(rows)[None].to(rows.dtype)])

    def qkv(block: str, end: str) -> Tensor:
        q, k, v = (get(f"{block}self_attn.{name}_proj.{end}") for name in "qkv")
        groups = [x.view(m.kv_heads, -1, m.head_dim, *x.shape[1:]) for x in (q, k, v)]
        return torch.cat(groups, dim=1).reshape(-1, *q.shape[1:])  # by key-value head: its queries, its key, its value

    def read(name: str) -> Tensor:
        if name == "embedding.weight":
            return vocabulary("model.embed_tokens.weight", lambda rows: rows.mean(0, dtype=torch.float64))
        if name == "head.weight":
            return vocabulary("lm_head.weight", lambda rows: rows.new_zeros(rows.shape[1]))
        if name == "final_norm.weight":
            return get("model.norm.weight")
        layer, _, rest = name.removeprefix("layers.").partition(".")
        block, (part, _, end) = f"model.layers.{layer}.", rest.rpartition(".")
        if part == "attention.qkv":
            return qkv(block, end)
        if part == "mlp.fc1":
            return torch.cat([get(f"{block}mlp.{half}_proj.{end}") for half in ("gate", "up")])
        theirs = {
            "norm1": "input_layernorm",
            "norm2": "post_attention_layernorm",
            "attention.out": "self_attn.o_proj",
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
            "mlp.fc2": "mlp.down_proj",
        }
        return get(f"{block}{theirs[part]}.{end}")

    return read


@torch.no_grad()
def source_logits(
    tree: dict[str, Any], read: Callable[[str], Tensor], head: str, tokens: Tensor, positions: Tensor
) -> Tensor:
    """Logits (L, V) of the autoregressive network as its own definition has them: the other side of the probe.

    Written out on separate matrices, with a dense mask, so that it shares no code and no layout with our network.
    """
    wide = torch.float64 if read("model.norm.weight").dtype == torch.float64 else torch.float32
    heads, eps = tree["num_attention_heads"], tree.get("rms_norm_eps", 1e-6)
    base = (tree.get("rope_parameters") or {}).get("rope_theta", tree.get("rope_theta", 10000.0))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * read(f"{name}.weight").to(wide)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = read(f"{name}.bias").to(wide) if has_bias(name) else None
        return F.linear(x, read(f"{name}.weight").to(wide), bias)

    def has_bias(name: str) -> bool:
        if "mlp." in name:
            return bool(tree.get("mlp_bias", False))
        return tree["model_type"] == "qwen2" and not name.endswith("o_proj")

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        rates = (1.0 / base ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))).to(wide)
        turn = torch.polar(torch.ones((), dtype=wide), positions.to(wide)[:, None] * rates)[:, None]
        z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    x = read("model.embed_tokens.weight")[tokens].to(wide)
    unseen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(tree["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        y = norm(x, f"{block}input_layernorm")
        q = linear(y, f"{block}self_attn.q_proj").unflatten(1, (heads, -1))
        k, v = (linear(y, f"{block}self_attn.{name}_proj").unflatten(1, (-1, q.shape[-1])) for name in "kv")
        if tree["model_type"] == "qwen3":
            q, k = norm(q, f"{block}self_attn.q_norm"), norm(k, f"{block}self_attn.k_norm")
        times = heads // k.shape[1]
        k, v = turned(k).repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = torch.einsum("qnd,knd->nqk", turned(q), k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("nqk,knd->qnd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)
        x = x + linear(mixed.flatten(1), f"{block}self_attn.o_proj")
        y = norm(x, f"{block}post_attention_layernorm")
        gate, up = linear(y, f"{block}mlp.gate_proj"), linear(y, f"{block}mlp.up_proj")
        x = x + linear(F.silu(gate) * up, f"{block}mlp.down_proj")
    return norm(x, "model.norm") @ read(head).to(wide).t()


def next_token_log_likelihood(model: EsoLM, tokens: Tensor) -> Tensor:
    """log p(x_1 ... x_(L-1) | x_0) of each row, read as an autoregressive network: token i from the state of token i - 1.

    tokens: (B, L) int64. Returns (B,), fp32 or better, with gradients. One causal pass in order from left to right: on
    clean tokens, an imported network is its source.
    """
    batch, length = tokens.shape
    positions = torch.arange(length, device=tokens.device).repeat(batch)
    places = torch.arange(batch * length, device=tokens.device).view(batch, length)[:, :-1].flatten()
    attend, targets = PackedAttention(PackedLayout(length, batch)), tokens[:, 1:].flatten()
    losses = model(tokens.flatten(), positions, attend, places=places, targets=targets)
    return -losses.view(batch, length - 1).sum(1)
