"""A run on one process with nothing but torch: what every parallel layout is compared with."""

import numpy as np
import torch

from esolm_megatron.config import check
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import mask_capacity
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import document_numbers, draw_step, mean_loss, part_sums

MODERN = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_heads": 6,
    "num_kv_heads": 2,
    "ffn_hidden_size": 44,
    "vocab_size": 53,
    "seq_length": 16,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "mlp_bias": False,
    "output_bias": False,
    "qk_norm": True,
    "init_std": 0.2,
}
REFERENCE = MODERN | {
    "num_kv_heads": None,
    "norm": "layernorm",
    "activation": "gelu",
    "mlp_bias": True,
    "output_bias": True,
    "qk_norm": False,
}


def make_config(model=MODERN, **sections):
    """A small run; keyword arguments replace fields of sections."""
    tree = {
        "name": "test",
        "seed": 5,
        "model": model,
        "objective": {"alpha_0": 0.5},
        "train": {
            "num_steps": 5,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
        },
        "optim": {"lr": 3e-3, "clip_grad": 0.5, "weight_decay": 0.1, "ema_decay": 0.9, "warmup_steps": 0},
        "data": {"path": "nowhere"},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return check(tree)


def random_documents(seed, rows, length):
    """Numbers of random documents, (rows, L): row 0 is one document, in row 1 each token is one."""
    starts = np.random.default_rng([seed, 7]).random((rows, length)) < 4 / length
    starts[:2] = [[False], [True]]
    return document_numbers([np.flatnonzero(row) for row in starts], np.ones((rows, length), bool))


def share_of_step(config, step, data_rank=0, data_size=1, num_micro_batches=None, skewed=False):
    """A data rank's noised share of a global batch of random tokens; skewed ones have something to learn."""
    m, t = config.model, config.train
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, m.mask_id, (t.global_batch_size, m.seq_length))
    tokens = tokens**3 // m.mask_id**2 if skewed else tokens
    rows = np.arange(data_rank, t.global_batch_size, data_size)
    documents = random_documents(step, t.global_batch_size, m.seq_length)[rows]
    count = num_micro_batches or t.global_batch_size // (t.micro_batch_size * data_size)
    return draw_step(
        tokens[rows],
        np.ones((len(rows), m.seq_length), bool),
        rows,
        config.objective,
        mask_id=m.mask_id,
        global_batch_size=t.global_batch_size,
        num_micro_batches=count,
        capacity=mask_capacity(m.seq_length, config.objective.alpha_0),
        key=(config.seed, step),
        documents=None if config.data.cross_document else documents,
    )


def plain_model(config, dtype=torch.float32):
    model = EsoLM(config.model, PlainLinears(dtype))
    initialise(model, config.seed)
    return model


def plain_loss(model, noised):
    """The global loss of a whole batch in one micro-batch."""
    (batch,) = noised.micro_batches
    losses = model(
        batch.tokens,
        batch.positions,
        batch.attend,
        places=batch.places,
        targets=batch.targets,
        dropout_ids=batch.dropout_ids,
    )
    return mean_loss(part_sums(losses, batch), noised.num_valid)


def plain_run(config, num_steps):
    """Losses, gradient norms, the first step's gradients, and the weights and their average after `num_steps`."""
    model, o = plain_model(config), config.optim
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in named.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    out = {"losses": [], "norms": []}
    history = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = plain_loss(model, share_of_step(config, step, num_micro_batches=1))
        loss.backward()
        if step == 0:
            out["grads"] = {n: p.grad.clone() for n, p in named.items()}
        norm = torch.nn.utils.clip_grad_norm_(named.values(), o.clip_grad) if o.clip_grad else 0.0
        optimizer.step()
        out["losses"].append(loss.item())
        out["norms"].append(float(norm))
        history.append({n: p.detach().clone() for n, p in named.items()})
    out["weights"] = history[-1]
    share = [o.ema_decay ** (num_steps - 1 - i) for i in range(num_steps)]
    out["ema"] = {n: sum(s * h[n] for s, h in zip(share, history, strict=True)) / sum(share) for n in named}
    return out
