"""A run on several processes, put together again, and its comparison with one process."""

import functools
import json

import pytest
import torch
from truth import make_config, plain_run, share_of_step

NUM_STEPS = 5


def train(config, num_steps):
    """One rank: losses, norms, what it would save after the first step (whose momentum is the gradient) and at the end."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    out = {"losses": [], "norms": []}
    for step in range(num_steps):
        noised = share_of_step(config, step, top.data_rank, top.data_size)
        result = engine.train_step(noised, config.optim.lr)
        out["losses"].append(result.loss)
        out["norms"].append(result.grad_norm)
        if step == 0:
            out["first"] = saved_pieces(engine)
    return out | {"pieces": saved_pieces(engine)}


def saved_pieces(engine):
    """(kind|name, whole shape, offset, values) of what this rank would write."""
    return [(f"{p.kind}|{p.name}", p.whole_shape, p.offset, p.tensor.clone().numpy()) for p in engine.pieces()]


def assemble(pieces):
    """Whole tensors from boxes, which must cover every element exactly once."""
    whole = {}
    for name, shape, offset, values in pieces:
        tensor = whole.setdefault(name, torch.full(shape, float("nan")))
        where = tuple(slice(a, a + n) for a, n in zip(offset, values.shape, strict=True))
        assert tensor[where].isnan().all(), f"{name}: saved twice"
        tensor[where] = torch.from_numpy(values)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: parts are missing"
    return whole


def saved(results, when="pieces"):
    """{kind: {name: whole tensor}} of what all ranks would write."""
    out = {}
    for key, tensor in assemble([p for r in results for p in r[when]]).items():
        kind, name = key.split("|")
        out.setdefault(kind, {})[name] = tensor
    return out


def truth_of(config):
    """What one process without any parallelism does for `config`; remembered, for many layouts share it."""
    tree = config.model_dump(mode="json")
    for part in ("parallel", "train", "checkpoint", "log", "evaluate"):
        tree.pop(part)
    return _truth(json.dumps(tree), config.train.global_batch_size)


@functools.cache
def _truth(text, global_batch_size):
    tree = json.loads(text)
    return plain_run(make_config(train={"global_batch_size": global_batch_size}, **tree), NUM_STEPS)


def compare(results, truth, tolerance=1e-5):
    """Losses and norms on every rank, gradients, weights and their average after clipped steps."""
    for result in results:
        assert result["losses"] == pytest.approx(truth["losses"], rel=tolerance)
        assert result["norms"] == pytest.approx(truth["norms"], rel=10 * tolerance)
    assert min(truth["norms"]) > 0.5, "clipping must be active"
    close(saved(results, "first")["exp_avg"], first_momentum(truth), 10 * tolerance)
    mine = saved(results)
    close(mine["weight"], truth["weights"], 100 * tolerance)
    close(mine["ema"], truth["ema"], 100 * tolerance)


def first_momentum(truth):
    """Adam's first moment after one step: the clipped gradient times 1 - beta."""
    optim = make_config().optim
    factor = (1 - optim.betas[0]) * min(1.0, optim.clip_grad / truth["norms"][0])
    return {name: grad * factor for name, grad in truth["grads"].items()}


def close(mine, theirs, tolerance):
    """Both have the same tensors, and the largest differences are small beside the largest values."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        error = (mine[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"
