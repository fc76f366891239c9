"""What `transformers` wants beside the weights: code, auto_map, generation and tokenizer configuration, a model card.

The code is this package's own: its plain network is copied at export, with imports made relative. There is no second one.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esolm_megatron import __version__
from esolm_megatron.config import ModelConfig
from esolm_megatron.data.tokenizer import EOS, MASK_TEXT

PACKAGE = "esolm_megatron"
MODELING, CONFIGURATION = f"{PACKAGE}.huggingface.modeling_esolm", f"{PACKAGE}.huggingface.configuration_esolm"
MODEL_CLASS, CONFIG_CLASS = "modeling_esolm.EsoLMForMaskedLM", "configuration_esolm.EsoLMConfig"

_IMPORT = re.compile(rf"^( *)from ({PACKAGE}[\w.]*) import (.+)$", re.MULTILINE)


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What config.json says for `transformers`, and what follows from the shape: the copied code need not know how."""
    return {
        "architectures": [MODEL_CLASS.partition(".")[2]],
        "auto_map": {"AutoConfig": CONFIG_CLASS, "AutoModel": MODEL_CLASS, "AutoModelForMaskedLM": MODEL_CLASS},
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
    out, eos = code(), None
    definition = None if tokenizer_folder is None else Path(tokenizer_folder) / "tokenizer.json"
    if definition is not None and definition.is_file():
        tokens = _tokens(definition)
        names: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_length}
        names["clean_up_tokenization_spaces"] = False
        if EOS in tokens:
            names["eos_token"], eos = EOS, tokens[EOS]
        if tokens and max(tokens.values()) + 1 == config.mask_id:  # only then does a new token get the mask's id
            names["mask_token"] = MASK_TEXT
        out["tokenizer_config.json"] = _json(names)
    generation = {
        "mask_token_id": config.mask_id,
        "eos_token_id": eos,
        "max_length": config.seq_length,
        "alpha_0": alpha_0,
    }
    out["generation_config.json"] = _json({name: value for name, value in generation.items() if value is not None})
    out["README.md"] = card(config, alpha_0, facts)
    return out


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def _tokens(definition: Path) -> dict[str, int]:
    """Ids of a tokenizer.json's tokens; empty where its vocabulary is no table."""
    try:
        tree = json.loads(definition.read_bytes())
        return dict(tree["model"]["vocab"]) | {t["content"]: t["id"] for t in tree.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError):
        return {}


def code() -> dict[str, str]:
    """File name -> source of the model's classes and of every module of this package that they need."""
    out, waiting = dict[str, str](), [CONFIGURATION, MODELING]
    while waiting:
        module = waiting.pop()
        name = f"{_flat(module)}.py"
        if name in out:
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        text = Path(spec.origin).read_text(encoding="utf-8")
        waiting += [found for _, found, _ in _IMPORT.findall(text) if found != f"{PACKAGE}.config"]
        text = _IMPORT.sub(_relative, text)
        out[name] = f"# Written by esolm convert, from {PACKAGE} {__version__}: change it there.\n{text}"
    return out


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

With esolm-megatron installed, `import esolm_megatron.huggingface` makes remote code unnecessary, and
`esolm_megatron.load_pretrained` samples with a cache and computes exact likelihoods.
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
