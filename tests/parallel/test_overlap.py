"""ZeRO 1 beside the arithmetic: what is reduced and gathered, in which order, and that nothing else changes."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from truth import MODERN, make_config, share_of_step

STEPS, MICRO_BATCHES = 3, 2


def course(config):
    """One rank: losses and norms, weights, and what was called in the last step and the validation after it, in order."""
    from esolm_megatron.model.transformer import Block
    from esolm_megatron.parallel.engine import Engine

    engine, events = Engine(config), []
    scatter, gather, reduce = dist.reduce_scatter_tensor, dist.all_gather_into_tensor, dist.all_reduce
    top = engine.topology

    class Work:
        def __init__(self, name, work):
            self.name, self.work = name, work

        def wait(self):
            events.append(f"{self.name} is there")
            self.work.wait()

    def seen(name, call):
        def called(out, of, **options):
            events.append(f"{name} {max(out.numel(), of.numel())}")
            work = call(out, of, **options)
            return Work(events[-1], work) if options.get("async_op") else work

        return called

    def all_reduce(tensor, *args, **options):
        if tensor.dtype == torch.float32:
            events.append(f"all_reduce {tensor.numel()}")
        return reduce(tensor, *args, **options)

    dist.reduce_scatter_tensor, dist.all_gather_into_tensor = seen("scatter", scatter), seen("gather", gather)
    dist.all_reduce = all_reduce
    for chunk in engine.chunks:
        for block in chunk.modules():
            if isinstance(block, Block):
                block.register_forward_hook(lambda b, i, o: events.append(f"forward {b.layer}"))
                block.register_full_backward_hook(lambda b, i, o: events.append(f"backward {b.layer}"))
    numbers = []
    for step in range(STEPS):
        events.clear()
        noised = share_of_step(config, step, top.data_rank, top.data_size)
        result, problem = engine.try_step(noised, 1e-2, lambda loss, norm, bad=step == 1: "no" if bad else None)
        assert (problem is not None) == (step == 1)
        numbers.append((result.loss, result.grad_norm))
    with engine.state.averaged_weights():
        numbers.append(tuple(engine.evaluate(noised)[0].tolist()))
    assert engine.disagreements() == []
    weights = {o.name: o.parameter.detach().float().clone() for o in engine.owned}
    last = list(events)
    engine.settle()
    return numbers, weights, last


def config_of(overlap, **parallel):
    return make_config(
        MODERN, parallel={"overlap": overlap, "reduce_bucket_elements": 1, **parallel},
        train={"precision": "bf16"}, optim={"clip_grad": 1e9, "ema_decay": 0.9},
    )  # fmt: skip


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        (2, {"reduce_bucket_elements": 50_000_000}),
        (2, {"context_size": 2}),
        (4, {"tensor_size": 2, "sequence_parallel": True}),
        (4, {"pipeline_size": 2}),
        (4, {"pipeline_size": 2, "virtual_pipeline_size": 2}),
        (2, {"recompute": "full"}),
    ],
    ids=str,
)
def test_weights_are_the_same_to_the_last_bit(world, parallel):
    """Two replicas' sums have one order only; norms are added up in another order, so clipping stays away."""
    beside, after = (run_ranks(course, world, config_of(overlap, **parallel)) for overlap in (True, False))
    for (numbers, weights, _), (others, other_weights, _) in zip(beside, after, strict=True):
        for mine, other in zip(numbers, others, strict=True):
            assert mine == pytest.approx(other, rel=1e-6, nan_ok=True)
        for name, weight in weights.items():
            assert torch.equal(weight, other_weights[name]), name


@pytest.mark.gloo
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_go_while_backward_runs_and_weights_come_while_forward_runs(recompute):
    """Two buckets of two blocks of 12,480 elements: each is reduced once, right after its own backward, and waited for late."""
    config = config_of(True, recompute=recompute, reduce_bucket_elements=20_000)
    for _, _, events in run_ranks(course, 2, config):
        assert config.train.global_batch_size // config.train.micro_batch_size // 2 == MICRO_BATCHES
        up, down = (
            [f"{way} {layer}" for layer in layers] for way, layers in (("forward", range(4)), ("backward", "3210"))
        )
        backward = [*down[:2], "scatter 24960", *down[2:], "scatter 24960"]
        step = [*(up + down) * (MICRO_BATCHES - 1), *up, *backward, *["scatter 24960 is there"] * 2]
        seen = [x for x in events if "24960" in x or x in up + down]
        assert seen[: len(step)] == step
        rest = seen[len(step) :]
        assert rest[:2] == ["gather 24960"] * 2
        evaluated = rest.index(up[0])
        assert rest[evaluated - 3 :][:6] == [
            *["gather 24960"] * 2,
            "gather 24960 is there",
            *up[:2],
            "gather 24960 is there",
        ]
        assert sum(x.startswith("all_reduce") for x in events) == 3, (
            "what is no block's, the norm of buckets, the whole norm"
        )
