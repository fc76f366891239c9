"""What `transformers` wants beside the weights: code, auto_map, generation and tokenizer configuration, a model card.

The code is this package's own: its plain network is copied at export, with imports made relative. There is no second one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import esolm_megatron
from esolm_megatron import __version__
from esolm_megatron.config import ModelConfig
from esolm_megatron.data.tokenizer import MASK_TEXT, Tokenizer, load_tokenizer

PACKAGE = "esolm_megatron"
MODELING, CONFIGURATION = f"{PACKAGE}.huggingface.modeling_esolm", f"{PACKAGE}.huggingface.configuration_esolm"
MODEL_CLASS, CONFIG_CLASS = "modeling_esolm.EsoLMForMaskedLM", "configuration_esolm.EsoLMConfig"

_IMPORT = re.compile(rf"^( *)from ({PACKAGE}[\w.]*) import (.+)$", re.MULTILINE)


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What config.json says for `transformers`, and what follows from the shape: the copied code need not know how."""
    return {
        "architectures": [MODEL_CLASS.partition(".")[2]],
        "auto_map": {
            "AutoConfig": CONFIG_CLASS,
            **dict.fromkeys(("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"), MODEL_CLASS),
        },
        "tie_word_embeddings": False,
        "vocab": config.vocab,
        "mask_id": config.mask_id,
        "head_dim": config.head_dim,
        "kv_heads": config.kv_heads,
        "ffn_size": config.ffn_size,
    }


def files(
    config: ModelConfig, alpha_0: float, facts: Mapping[str, Any], tokenizer_folder: str | Path | None
) -> dict[str, str]:
    """File name -> text of everything but weights, config.json and the tokenizer's own files."""
    out = code()
    generation: dict[str, Any] = {"mask_token_id": config.mask_id, "max_length": config.seq_length, "alpha_0": alpha_0}
    if tokenizer_folder is not None and (Path(tokenizer_folder) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(tokenizer_folder)
        # what transformers encodes is what training encoded: no begin token, which a template would add
        out["tokenizer.json"] = json.dumps(tokenizer.bare_definition(), ensure_ascii=False) + "\n"
        out["tokenizer_config.json"] = _json(_tokenizer_config(config, tokenizer, Path(tokenizer_folder)))
        generation |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    out["generation_config.json"] = _json(generation)
    out["README.md"] = card(config, alpha_0, facts)
    return out


def _tokenizer_config(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """The folder's own fields (a chat template, say), and in any case those that `transformers` needs, as training has them."""
    path = folder / "tokenizer_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = {name: value for name, value in own.items() if name not in ("auto_map", "add_bos_token", "add_eos_token")}
    names: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.seq_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.end_of_text,
        "pad_token": own.get("pad_token") or tokenizer.end_of_text,
    }
    if tokenizer.vocab_size == config.mask_id:  # only then does a new token get the mask's id
        names["mask_token"] = MASK_TEXT
    return own | names


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def code() -> dict[str, str]:
    """File name -> source of the model's classes and of every module of this package that they need."""
    out, waiting = dict[str, str](), [CONFIGURATION, MODELING]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in out:
            continue
        text = _source(module).read_text(encoding="utf-8")  # not imported: the model's class needs transformers
        waiting += [found for _, found, _ in _IMPORT.findall(text) if found != f"{PACKAGE}.config"]
        text = _IMPORT.sub(_relative, text)
        out[name] = f"# Written by esolm convert, from {PACKAGE} {__version__}: change it there.\n{text}"
    return out


def _source(module: str) -> Path:
    """The file of a module of this package, installed or not."""
    return Path(esolm_megatron.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _flat(module: str) -> str:
    if module in (MODELING, CONFIGURATION):
        return module.rpartition(".")[2]
    return "esolm_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _relative(match: re.Match[str]) -> str:
    indent, module, what = match.groups()
    if module != f"{PACKAGE}.config":
        return f"{indent}from .{_flat(module)} import {what}"
    names = [name.strip() for name in what.split(",")]
    for name in names:  # types in annotations, but for ModelConfig: of that, the stand-in has what the network reads
        if not name.endswith("Config"):
            raise AssertionError(
                f"the network imports {name} from {module}: only configurations have a stand-in in exports"
            )
    return "from .configuration_esolm import " + ", ".join(f"EsoLMConfig as {name}" for name in names)


_CARD = """\
---
library_name: transformers
tags: [esolm, masked-language-model]
---

# {name}

An Eso-LM ([Esoteric Language Models](https://arxiv.org/abs/2506.01928)): one causal transformer that writes text in any order.
Written by `esolm convert` of esolm-megatron {version}.

| | |
|---|---|
{rows}

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
ids = tokenizer("Some text", return_tensors="pt").input_ids
ids[0, -1] = model.config.mask_id
model(ids).logits[0, -1]  # what the last token could be
```

With esolm-megatron installed, `model.generate(ids, max_new_tokens=64, do_sample=True, steps=16)` is its sampler, which has a cache,
`import esolm_megatron.huggingface` makes remote code unnecessary, and `esolm_megatron.load_pretrained` computes exact likelihoods.
"""

_LABELS = {
    "step": "steps of training",
    "tokens": "tokens seen in training",
    "weights": "weights",
    "loss": "training loss",
    "validation_nelbo": "validation bound, nats per token",
    "data_fingerprint": "fingerprint of the data",
    "layout": "layout of training",
    "imported_from": "imported from",
    "read_out": "read-out",
}


def card(config: ModelConfig, alpha_0: float, facts: Mapping[str, Any]) -> str:
    """The model card: what it is, and what is known of its training."""
    shape = f"{config.num_layers} layers, {config.hidden_size} wide, {config.num_heads} heads, {config.vocab} ids"
    rows = {"network": f"{shape}, the mask {config.mask_id}", "sequence length": config.seq_length, "alpha_0": alpha_0}
    rows |= {label: facts[name] for name, label in _LABELS.items() if facts.get(name) is not None}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(name=facts.get("run", "Eso-LM"), version=__version__, rows=table)
