"""What differs on a GPU: flash kernels, bf16 matrices with fp32 logits, the sampler, one training step over NCCL."""

import pytest
import torch
import torch.nn.functional as F
from truth import MODERN, make_config, plain_loss, plain_model, share_of_step

from esolm_megatron.inference import PretrainedEsoLM, SampleRequest, sample
from esolm_megatron.inference.decoding.cuda_graphs import RECORD_AT
from esolm_megatron.inference.decoding.decoder import Decoder
from esolm_megatron.inference.decoding.scheduler import plan_rows
from esolm_megatron.inference.sampler import Sampler, schedule_log_probs
from esolm_megatron.model import flash, kernels
from esolm_megatron.model.attention import PackedAttention, PackedLayout, mask_stream_attention
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.loss import predicted_losses
from esolm_megatron.model.transformer import EsoLM
from esolm_megatron.objective.esolm import part_sums

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WIDE = MODERN | {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "seq_length": 128, "vocab_size": 1001}


@pytest.mark.parametrize(("capacity", "length"), [(192, 512), (512, 512), (1, 64)])
def test_mask_stream_in_bf16_is_the_fp32_one(capacity, length):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, capacity, 64)] + [(2, 2, n, 64) for n in (capacity, capacity, length, length)]
    exact = [torch.randn(s, generator=generator).bfloat16().float().requires_grad_() for s in shapes]
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    truth, ours = mask_stream_attention(*exact), mask_stream_attention(*rounded)
    assert (ours.float().cpu() - truth).abs().max() < 0.02
    grad = torch.randn(truth.shape, generator=generator).bfloat16()
    theirs = torch.autograd.grad(truth, exact, grad.float())
    for a, b in zip(torch.autograd.grad(ours, rounded, grad.cuda()), theirs, strict=True):
        assert (a.float().cpu() - b).norm() / b.norm() < 0.01


def test_some_flash_library_is_right_here():
    device = torch.device("cuda")
    assert "flash" in flash.choose(device)
    assert flash.error_of(kernels.CHOSEN.default, device) < 0.02


def test_what_is_fastest_for_a_call_is_found_and_right(tmp_path, monkeypatch):
    """cuDNN among the candidates, with merged sums and few heads of keys; what is chosen gives the mask stream's numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, layout = torch.device("cuda"), PackedLayout(512, 1, ((2, 192),))
    flash.choose(device)
    calls = flash.padded_calls(layout, 4, 2, 64)
    times = flash.time_calls(calls, torch.bfloat16, device)
    assert all(len(found) == 2 for found in times.values()), times
    flash.use(times, calls)
    generator = torch.Generator().manual_seed(0)
    *exact, grad = (torch.randn(layout.num_tokens, n, 64, generator=generator).bfloat16() for n in (4, 2, 2, 4))

    def results(device, dtype):
        given = [x.to(device, dtype).requires_grad_() for x in exact]
        out = PackedAttention(layout)(0, *given)
        return [x.float().cpu() for x in (out, *torch.autograd.grad(out, given, grad.to(device, dtype)))]

    for a, b in zip(results("cuda", torch.bfloat16), results("cpu", torch.float32), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_of_several_chunks_is_that_of_the_cpu(bias):
    """Triton's kernels, and a weight gradient that the product itself adds up; counts known beforehand."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(300, 64), (1024, 64), *([(1024,)] if bias else [])]
    exact = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [x.detach().cuda().bfloat16().requires_grad_() for x in exact]
    targets, counts = torch.randint(0, 1001, (300,), generator=generator), torch.rand(300, generator=generator)
    options = {"first_id": 0, "num_ids": 1001, "over_ranks": lambda x, how: x, "chunk": 64 * 1024}
    none = [] if bias else [None]
    truth = predicted_losses(*exact, *none, targets, counts, **options)
    ours = predicted_losses(*rounded, *none, targets.cuda(), counts.cuda(), **options)
    torch.testing.assert_close(ours.cpu(), truth, rtol=1e-4, atol=1e-4)
    theirs = torch.autograd.grad(truth, exact, counts)
    for a, b in zip(torch.autograd.grad(ours, rounded, counts.cuda()), theirs, strict=True):
        assert (a.float().cpu() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("alpha_0", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("cross_document", [True, False])
def test_loss_and_gradients_are_those_of_the_cpu(alpha_0, dtype, tolerance, cross_document):
    config = make_config(WIDE, objective={"alpha_0": alpha_0}, data={"cross_document": cross_document})
    noised = share_of_step(config, 0, num_micro_batches=1)
    model = plain_model(config)
    loss = plain_loss(model, noised)
    loss.backward()
    there = EsoLM(config.model, PlainLinears(dtype, "cuda"))
    there.load_state_dict(model.state_dict())
    batch = noised.micro_batches[0].to(torch.device("cuda"))
    losses = there(batch.tokens, batch.positions, batch.attend, targets=batch.targets, last=batch.last)
    assert losses.dtype == torch.float32
    own = (part_sums(losses, batch) / noised.num_valid.clamp(min=1).to(losses)).sum()
    own.backward()
    assert own.item() == pytest.approx(loss.item(), rel=tolerance)
    for (name, a), b in zip(there.named_parameters(), model.parameters(), strict=True):
        assert (a.grad.float().cpu() - b.grad).norm() <= 2 * tolerance * b.grad.norm() + 1e-6, name


def test_sampler_gives_its_own_log_probabilities():
    config = make_config(WIDE)
    model = EsoLM(config.model, PlainLinears(torch.float32, "cuda"))
    model.load_state_dict(plain_model(config).state_dict())
    made = sample(model, 3, 64, alpha_0=0.5, steps=8, top_p=0.9, seed=1)
    again = schedule_log_probs(model, made[0], made.order, made.ks)
    torch.testing.assert_close(made[1], again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_recorded_passes_give_what_launched_ones_give(dtype, tolerance):
    """Few rows, so that each pass is small enough; and both kinds of a pass do take place."""
    config = make_config(WIDE)
    model = EsoLM(config.model, PlainLinears(dtype, "cuda"))
    model.load_state_dict(plain_model(config).state_dict())
    plans = plan_rows(SampleRequest(3, 96, alpha_0=0.5, steps=8, own_schedules=True), model.shape.mask_id)
    order = F.pad(torch.stack([torch.from_numpy(plan.order) for plan in plans]).cuda(), (0, 1, 0, 1))
    found = []
    with torch.inference_mode():
        for fixed_shapes in (False, True):
            fed = torch.full_like(order, model.shape.mask_id)
            seen = torch.zeros(*order.shape, model.shape.mask_id, device="cuda")
            decoder = Decoder(model, fed, order, fixed_shapes=fixed_shapes, record=True)

            def choose(logits, rows, places, seen=seen):
                seen[rows, places] = logits[:, : model.shape.mask_id]
                return (7 * rows + 5 * places) % model.shape.mask_id

            for row, plan in enumerate(plans):
                decoder.add(row, plan.ks, 0)
            while len(decoder.rows):
                decoder.step(choose)
            found.append(seen[:-1, :-1])
    assert any(count > RECORD_AT for count in decoder.recorded.counts.values()), "none was replayed"
    assert decoder.recording[0] > 1
    assert found[0].any(-1).all()
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_a_gpus_samples_are_those_of_a_cpu():
    """In fp32, from the same words; a near tie may fall the other way, and changes the rest of its row."""
    config = make_config(WIDE)
    there = EsoLM(config.model, PlainLinears(torch.float32, "cuda"))
    here = plain_model(config).float()
    there.load_state_dict(here.state_dict())
    hitting = {"schedule": "first_hitting", "propose": 4}
    for batch, options in (
        (16, {}),
        (1, {}),
        (16, {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2, "own_schedules": True}),
        (16, hitting),
        (1, hitting | {"passes": 2, "top_p": 0.9}),
        (8, hitting | {"propose": "auto", "prompt": torch.arange(40) % 7}),
    ):
        ours, theirs = (
            PretrainedEsoLM(x, 0.7).sample(16, 64, 8, seed=2, batch_size=batch, **options) for x in (there, here)
        )
        same = (ours[0].cpu() == theirs[0]).all(1)
        assert same.float().mean() > 0.8, (batch, options)
        torch.testing.assert_close(ours[1].cpu()[same], theirs[1][same], rtol=1e-3, atol=1e-3)
        assert ours.recorded[0] > 0, (batch, options)


def test_rows_share_memory_in_pages():
    """Texts of several pages, more than there is memory for at once."""
    config = make_config(WIDE)
    model = EsoLM(config.model, PlainLinears(torch.float32, "cuda"))
    model.load_state_dict(plain_model(config).state_dict())
    fields = {"alpha_0": 0.9, "steps": 12, "seed": 6, "prompt": torch.arange(50) % 9}
    plans = plan_rows(SampleRequest(6, 300, **fields), model.shape.mask_id)
    whole, made, waiting = sample(model, 6, 300, **fields), {}, list(range(6))
    sampler, at = Sampler(model, 4, 300, places=3 * 384), {}
    with torch.inference_mode():
        while waiting or sampler.busy:
            while waiting and sampler.takes(plans[waiting[0]]):
                number = waiting.pop(0)
                at[sampler.add(plans[number])] = number
            assert len(sampler.plans) <= 3
            filled = sampler.step()
            for row in filled.done if filled else ():
                made[at[row]] = sampler.result(row)[0]
                sampler.release(row)
    same = torch.stack([(made[i] == whole[0][i]).all() for i in range(6)])
    assert same.float().mean() > 0.8


def test_what_was_recorded_is_kept_for_the_next_call():
    config = make_config(WIDE)
    network = EsoLM(config.model, PlainLinears(torch.float32, "cuda"))
    network.load_state_dict(plain_model(config).state_dict())
    model = PretrainedEsoLM(network, 0.5)
    first, again = (model.sample(4, 64, 8, seed=3, batch_size=2) for _ in range(2))
    assert first.recorded[0] > 0
    assert again.recorded[0] == 0
    assert torch.equal(first[0], again[0])


def test_rows_are_stopped_some_passes_late():
    config = make_config(WIDE)
    model = EsoLM(config.model, PlainLinears(torch.float32, "cuda"))
    model.load_state_dict(plain_model(config).state_dict())
    options = {"alpha_0": 0.0, "steps": 1, "seed": 5, "stop_id": 3, "temperature": 2.0}
    whole = sample(model, 8, 96, **{**options, "stop_id": None})
    ours = sample(model, 8, 96, **options)
    for row, saved, full in zip(ours[0].tolist(), ours.saved.tolist(), whole[0].tolist(), strict=True):
        assert row == full[: 96 - saved] + [3] * saved
        assert 3 not in full[: 95 - saved]


def test_inputs_of_blocks_wait_in_host_memory():
    config = make_config(WIDE | {"dropout": 0.1})
    batch, found = share_of_step(config, 0, num_micro_batches=1).micro_batches[0].to(torch.device("cuda")), []
    for offload in (False, True):
        model = EsoLM(config.model, PlainLinears(torch.float32, "cuda"), recompute="full", offload=offload)
        model.load_state_dict(plain_model(config).state_dict())
        losses = model(
            batch.tokens, batch.positions, batch.attend, targets=batch.targets, places=batch.places,
            dropout_ids=batch.dropout_ids,
        )  # fmt: skip
        losses.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_muon_on_a_gpu_is_that_of_a_cpu():
    """Newton-Schulz in fp32: the matrices that a step adds."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((96, 64), (64, 96)):
        matrix = torch.randn(shape, generator=generator)
        orthogonal = pytest.importorskip("esolm_megatron.parallel.muon").orthogonal
        torch.testing.assert_close(orthogonal(matrix.cuda()).cpu(), orthogonal(matrix), rtol=2e-2, atol=2e-3)
        rounded = orthogonal(matrix.cuda().bfloat16()).float().cpu()
        assert (rounded - orthogonal(matrix)).norm() < 0.05 * rounded.norm()


def test_steps_of_muon_lower_the_loss():
    pytest.importorskip("megatron.core")
    from esolm_megatron.parallel.engine import Engine

    config = make_config(WIDE, train={"device": "cuda", "precision": "bf16"}, optim={"name": "muon", "lr": 1e-3})
    engine, noised = Engine(config), share_of_step(config, 0)
    losses = [engine.train_step(noised, 1e-3).loss for _ in range(8)]
    engine.close()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("precision", "cuda_graphs"), [("fp32", None), ("bf16", False), ("bf16", True)])
def test_training_steps_lower_the_loss(precision, cuda_graphs):
    """None: blocks that are not compiled."""
    pytest.importorskip("megatron.core")
    from esolm_megatron.parallel.engine import Engine

    train = {
        "device": "cuda",
        "precision": precision,
        "compile": cuda_graphs is not None,
        "cuda_graphs": bool(cuda_graphs),
    }
    config = make_config(WIDE, train=train, optim={"lr": 1e-3, "clip_grad": 1.0})
    engine = Engine(config)
    truth = plain_loss(plain_model(config), share_of_step(config, 0, num_micro_batches=1)).item()
    noised = share_of_step(config, 0)
    losses = [engine.train_step(noised, 1e-3).loss for _ in range(8)]
    engine.close()
    assert losses[0] == pytest.approx(truth, rel=1e-3 if precision == "fp32" else 2e-2)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("job", ["linears", "norms"])
def test_transformer_engine_is_right_where_it_is(job):
    pytest.importorskip("transformer_engine.pytorch")
    from esolm_megatron.parallel import nvidia_te

    train = {"precision": "bf16", "fp8": "tensorwise", "kernels": {job: "te"}}
    config = make_config(WIDE | {"num_layers": 4, "hidden_size": 256, "num_heads": 4}, train=train)
    assert "Transformer Engine's" in nvidia_te.tried(config, job, torch.device("cuda"))
