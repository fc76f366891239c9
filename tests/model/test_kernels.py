"""The branches that a GPU takes, on a CPU: calls of CUDA's operators against their signatures and against their rules."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from cuda_rules import OPERATORS, FlashAttn, cuda_operators
from ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import MODERN, REFERENCE, make_config, share_of_step

from esolm_megatron.model import flash, kernels, layers
from esolm_megatron.model.attention import DocumentRuns, PackedAttention, PackedLayout
from esolm_megatron.model.kernels import Call, Chosen, Cudnn, FlashPackage, Mode, Runs, TorchFlash
from esolm_megatron.model.layers import PlainLinears
from esolm_megatron.model.size import run_capacity
from esolm_megatron.model.transformer import EsoLM, initialise
from esolm_megatron.objective.esolm import micro_batch_layout

CPU = torch.device("cpu")
KERNELS = [TorchFlash(), TorchFlash(shared_heads=False), Cudnn()]
BAD_CALL = (ValueError, TypeError, RuntimeError, AssertionError, IndexError)
GPU_MODEL = {"hidden_size": 96, "num_heads": 6, "num_kv_heads": None, "seq_length": 40}
"""Heads of 16: CUDA's kernels want multiples of 8."""


@pytest.fixture
def on_gpu():
    """CUDA's operators on CPU tensors; what is chosen inside is forgotten."""
    before = kernels.CHOSEN
    with cuda_operators() as calls:
        yield calls
    kernels.CHOSEN = before


def use(kernel):
    kernels.CHOSEN = Chosen(kernel)


def call_arguments(shared, causal, runs, device):
    """q, k, v and a gradient as they lie in a packed row, and the runs."""
    heads, groups = 4, 2 if shared else 4
    rows, queries, keys = (1, 24, 24 if causal else 36) if runs else (3, 16, 16 if causal else 40)
    sizes = np.array([5, 1, 18]), np.array([5, 1, 18] if causal else [9, 7, 20])

    def tokens(n, count):
        shape, dtype = (rows, count, n, 16), torch.bfloat16
        x = torch.randn(shape).to(dtype) if device == "cpu" else torch.empty(shape, dtype=dtype, device=device)
        return x.transpose(1, 2)

    made = None
    if runs:
        made = Runs.of(*sizes)
        ends = [torch.empty_like(x, device=device) if device != "cpu" else x for x in (made.query_ends, made.key_ends)]
        made = replace(made, query_ends=ends[0], key_ends=ends[1])
    return tokens(heads, queries), tokens(groups, keys), tokens(groups, keys), tokens(heads, queries), made


def both_passes(q, k, v, grad, causal, runs):
    out, lse = kernels.flash_forward(q, k, v, causal, 0.25, runs)
    grad = torch.empty_like(out) if out.is_cuda else kernels.laid_out_as(grad, out)  # fake ones are not copied
    return out, lse, *kernels.flash_backward(grad, q, k, v, out, lse, causal, 0.25, runs)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("shared", "causal", "runs"), list(product([False, True], repeat=3)))
def test_calls_fit_the_signatures_of_cuda(kernel, shared, causal, runs, monkeypatch):
    """Under fake tensors on a GPU; and the stand-in of the other tests gives the same shapes, types and strides."""
    if runs and not kernel.ragged:
        kernel = TorchFlash()
    monkeypatch.setattr(kernels, "CHOSEN", Chosen(kernel))
    with FakeTensorMode():
        *tensors, grad, cuts = call_arguments(shared, causal, runs, "cuda")
        made = both_passes(*tensors, grad, causal, cuts)
        assert all(x.is_cuda for x in made)
        fake = [(x.shape, x.dtype) for x in made]
        strides = made[0].stride()
    with cuda_operators():
        *tensors, grad, cuts = call_arguments(shared, causal, runs, "cpu")
        real = both_passes(*tensors, grad, causal, cuts)
    assert [(x.shape, x.dtype) for x in real] == fake
    if not runs:  # the fake ones lay the output of runs out afresh, which a GPU does not
        assert real[0].stride() == strides
    assert [x.shape for x in (real[0], *real[2:])] == [x.shape for x in (tensors[0], *tensors)]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_packed_row_is_that_of_the_cpu(on_gpu, kernel, documents, groups):
    """Plain rows, two kinds of mask streams, documents, shared keys; merged sums in backward."""
    layout = PackedLayout(seq_length=20, num_plain=2, groups=((2, 7), (1, 20)))
    cut = None
    if documents:
        plain, clean = np.array([[20, 0, 0], [1, 9, 10]]), [np.array([[1, 8, 11], [9, 0, 11]]), np.array([[4, 16, 0]])]
        cut = DocumentRuns.of([plain, *clean], [np.array([[1, 0, 6], [2, 0, 5]]), np.array([[4, 16, 0]])])
    generator = torch.Generator().manual_seed(3)
    shapes = [(layout.num_tokens, n, 16) for n in (4, groups, groups, 4)]
    *inputs, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)

    def results(dtype):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        out = PackedAttention(layout, cut)(0, *given)
        return [x.float() for x in (out, *torch.autograd.grad(out, given, grad.to(dtype)))]

    use(kernel)
    ours = results(torch.bfloat16)
    ran = {name for name, count in on_gpu.items() if count}
    wanted = {"_flash_attention_forward", "_flash_attention_backward"}
    if not documents:
        name = "cudnn" if isinstance(kernel, Cudnn) else "flash"
        wanted = {f"_scaled_dot_product_{name}_attention", f"_scaled_dot_product_{name}_attention_backward"}
    if documents and isinstance(kernel, Cudnn):
        wanted = {f"_scaled_dot_product_cudnn_attention{x}" for x in ("", "_backward")}  # run by run
    assert ran == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "GPU_DEVICES", set())
        truth = results(torch.float32)
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() < 6e-3 * b.norm()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_calls_of_the_package_flash_attn(on_gpu, documents, shared):
    """Against its documented signature: what torch's own operators give, in the same layouts."""
    for causal in (True, False):
        *tensors, grad, runs = call_arguments(shared, causal, documents, "cpu")
        use(TorchFlash())
        wanted = both_passes(*tensors, grad, causal, runs)
        use(FlashPackage(FlashAttn))
        for ours, theirs in zip(both_passes(*tensors, grad, causal, runs), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_the_package_is_used_where_it_is_installed(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(flash.KernelError, match="attention = fa2: No module named 'flash_attn'"):
        flash.choose(CPU, "fa2")
    assert [kernel.name for kernel in flash.others()] == ["cuDNN attention"]
    package = types.ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, flash.PACKAGE, FlashAttn)
    assert flash.choose(CPU, "fa2") == kernels.CHOSEN.default.name == "flash-attn 2"
    use(TorchFlash())
    call = Call(2, 4, 2, 16, 16, 16, True)
    (times,) = flash.time_calls([call], torch.bfloat16, CPU).values()
    assert set(times) == {"torch's flash attention", "cuDNN attention", "flash-attn 2"}
    (path,) = tmp_path.rglob("*.json")
    assert "flash-attn_2.8.3" in path.name
    flash.use({"call": times | {"flash-attn 2": 0.0}}, [call])
    assert kernels.CHOSEN.by_call[call].name == "flash-attn 2"
    monkeypatch.setattr(FlashAttn, "_flash_attn_backward", staticmethod(lambda *args, **options: args[6].zero_()))
    with pytest.raises(flash.KernelError, match="attention = fa2: relative error"):
        flash.choose(CPU, "fa2")


def test_what_no_kernel_takes_is_computed_densely(on_gpu):
    """Heads of 12 in bf16, and fp32."""
    for dtype, size in ((torch.bfloat16, 12), (torch.float32, 16)):
        q, k, v, grad = (torch.randn(2, 4, 10, size).to(dtype) for _ in range(4))
        assert [x.dtype for x in both_passes(q, k, v, grad, True, None)] == [dtype, torch.float32] + [dtype] * 3
    assert not on_gpu


@pytest.mark.parametrize("fault", ["lengths", "strides", "sums", "state", "head size"])
def test_the_rules_are_insisted_on(on_gpu, fault):
    """What a GPU refused, or answered wrongly in silence, is refused here."""
    q, k, v, grad, _ = call_arguments(False, True, False, "cpu")
    out, lse = kernels.flash_forward(q, k, v, True, 0.25)
    grad = kernels.laid_out_as(grad, out)
    assert kernels.flash_backward(grad, q, k, v, out, lse, True, 0.25)[0].shape == q.shape
    state, unused = torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64)
    arguments = [grad, q, k, v, out, lse, None, None, 16, 16, 0.0, True, state, unused]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_backward
    operator(*arguments, scale=0.25)
    if fault == "lengths":  # as it was until 2026-11-26
        arguments[6:8] = [torch.empty(0, dtype=torch.int32)] * 2
    elif fault == "strides":
        with pytest.raises(AssertionError, match="strides"):
            kernels.flash_backward(grad.contiguous(), q, k, v, out, lse, True, 0.25)
        use(Cudnn())
        kernels.flash_forward(q, k, v, True, 0.25)
        with pytest.raises(RuntimeError, match="strides"):
            Cudnn().backward(grad.contiguous(), q, k, v, out, lse, Mode(True, 0.25))
        return
    elif fault == "sums":
        arguments[5] = lse.double()
    elif fault == "state":
        arguments[12] = torch.empty(2, dtype=torch.int64)
    else:
        arguments[:5] = [x[..., :12].contiguous() for x in arguments[:5]]
    with pytest.raises(BAD_CALL):
        operator(*arguments, scale=0.25)


def step_on_a_gpu(config, kernel):
    """One rank: loss and gradient norm of two steps through CUDA's operators, which ran, and what was chosen."""
    from esolm_megatron.parallel.engine import Engine

    with cuda_operators() as calls:
        engine = Engine(config)
        tried = dict(calls)
        if kernel is not None:
            kernels.CHOSEN = replace(kernels.CHOSEN, by_call=dict.fromkeys(kernels.CHOSEN.by_call, kernel))
        found = []
        for step in range(2):
            top = engine.topology
            result = engine.train_step(share_of_step(config, step, top.data_rank, top.data_size), 1e-3)
            found.append((result.loss, result.grad_norm))
    more = {name: calls[name] - tried.get(name, 0) for name in calls}
    return found, {name for name, count in more.items() if count}, engine.providers["attention"]


def step_on_a_cpu(config):
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top = engine.topology
    steps = [engine.train_step(share_of_step(config, i, top.data_rank, top.data_size), 1e-3) for i in range(2)]
    return [(step.loss, step.grad_norm) for step in steps]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("shape", "alpha_0", "parallel", "cross_document"),
    [
        (REFERENCE, 1.0, {}, True),
        (MODERN, 0.5, {}, True),
        (MODERN, 0.5, {}, False),
        (REFERENCE, 0.0, {"tensor_size": 2}, True),
        (MODERN, 0.5, {"context_size": 2}, True),
    ],
    ids=["causal", "mixed", "documents", "tp2", "cp2"],
)
def test_a_whole_step_through_cudas_operators(tmp_path, monkeypatch, shape, alpha_0, parallel, cross_document):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = shape | GPU_MODEL | ({"num_kv_heads": 2} if shape is MODERN else {})
    config = make_config(
        model,
        objective={"alpha_0": alpha_0},
        parallel=parallel,
        data={"cross_document": cross_document},
        train={"precision": "bf16"},
    )
    world = config.parallel.tensor_size * config.parallel.context_size
    (ours, ran, chosen), *_ = run_ranks(step_on_a_gpu, world, config, Cudnn())
    truth, *_ = run_ranks(step_on_a_cpu, world, config)
    np.testing.assert_allclose(ours, truth, rtol=2e-2)
    assert {"_flash_attention_forward", "_flash_attention_backward", "mm.dtype"} <= ran, "the last block has runs"
    assert ("_scaled_dot_product_cudnn_attention" in ran) == cross_document
    assert ran <= OPERATORS.keys()
    assert ("ms" in chosen) == cross_document
    assert chosen.startswith("torch's flash attention")


@pytest.mark.parametrize(
    "objective", [{"alpha_0": 0.5}, {"alpha_0": 1.0, "diffusion_loss": "any_order"}, {"alpha_0": 0.0}], ids=str
)
def test_the_calls_of_a_run_are_known_before_it(on_gpu, monkeypatch, objective):
    """Those that `padded_calls` lists are those that a step makes, last block aside."""
    config = make_config(MODERN | GPU_MODEL, objective=objective)
    layout = micro_batch_layout(config, run_capacity(config))
    for batch in share_of_step(config, 0).micro_batches:
        assert batch.layout == layout
    made, forward = [], TorchFlash.forward

    def seen(self, q, k, v, mode):
        made.append(Call(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], mode.causal))
        return forward(self, q, k, v, mode)

    monkeypatch.setattr(TorchFlash, "forward", seen)
    use(TorchFlash())
    tokens = torch.randn(layout.num_tokens, 6, 16).bfloat16()
    PackedAttention(layout)(0, tokens, tokens, tokens)
    assert made == flash.padded_calls(layout, 6, 6, 16)


right_backward = TorchFlash.backward


class Wrong(TorchFlash):
    """A library whose gradients are wrong where sums are merged."""

    def backward(self, grad, q, k, v, out, lse, mode):
        return right_backward(self, grad, q, k, v, out, lse - 0.1, mode)


class Refusing(TorchFlash):
    def forward(self, q, k, v, mode):
        raise RuntimeError("no engine for this shape")


def test_the_fastest_right_kernel_of_each_call_is_used_and_remembered(on_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use(TorchFlash())
    wide, narrow = Call(2, 4, 2, 16, 16, 16, True), Call(2, 4, 4, 8, 24, 16, False)
    others = [Cudnn(), Wrong(name="wrong"), Refusing(name="refusing")]
    took = iter([3.0, 2.0, 1.0, 4.0])  # torch and cuDNN for one call, then for the other
    monkeypatch.setattr(flash, "milliseconds", lambda work, device: next(took))
    times = flash.time_calls([wide, narrow], torch.bfloat16, CPU, others)
    assert [list(found) for found in times.values()] == [["torch's flash attention", "cuDNN attention"]] * 2
    lines = flash.use(times, [wide, narrow], others)
    assert kernels.CHOSEN.by_call[wide].name == "cuDNN attention"
    assert kernels.CHOSEN.by_call[narrow].name == "torch's flash attention"
    assert (
        lines[0]
        == "2 x 4/2 x 16 x 16 causal bfloat16: cuDNN attention (cuDNN attention 2 ms, torch's flash attention 3 ms)"
    )
    on_gpu.clear()
    assert flash.time_calls([narrow, wide], torch.bfloat16, CPU, others) == times, "from the file"
    assert not on_gpu
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text()) == times
    path.write_text('{"cut": ')
    took = iter([1.0] * 4)
    flash.time_calls([wide], torch.bfloat16, CPU, others)
    assert on_gpu, "a damaged file is measured anew"


def test_a_home_that_cannot_be_written_is_no_obstacle(on_gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use(TorchFlash())
    (found,) = flash.time_calls([Call(1, 2, 2, 8, 8, 8, True)], torch.bfloat16, CPU).values()
    assert set(found) == {"torch's flash attention", "cuDNN attention"}


def test_a_gpu_without_a_right_kernel_is_refused(on_gpu, monkeypatch):
    monkeypatch.setattr(TorchFlash, "backward", Wrong.backward)
    with pytest.raises(flash.KernelError, match="flash attention of torch .* on cpu: relative error"):
        flash.choose(CPU)


# ------------------------------------------------------------------------------------- attention over the cache's rows


def seen_by(kind, width, length):
    """(slot, limit, first) of a row's queries, ended by padding: one after another, or groups of masks that are rivals."""
    queries = width - (length % 3 == 0)
    slot = torch.arange(length - queries, length)
    if kind == "causal":
        return torch.stack([slot, slot * 0, slot * 0], 1), queries
    group = torch.arange(queries) // 2 * 2
    first = length - queries + group
    return torch.stack([slot, first - group // 2, first], 1), queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 10**6], ids=["whole", "split over keys"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "kind"), [(3, 3, 1, "causal"), (6, 2, 5, "causal"), (6, 2, 7, "groups"), (4, 1, 9, "groups")]
)  # fmt: skip
@pytest.mark.parametrize("int8", [False, True], ids=["full", "int8"])
def test_rows_of_the_cache_attend_as_dense_arithmetic_says(
    monkeypatch, dtype, programs, heads, groups, width, kind, int8
):
    """Ragged rows, in another order than they are stored; the truth in fp64, of the same rounded numbers."""
    triton = pytest.importorskip("esolm_megatron.model.attention_triton")
    monkeypatch.setattr(triton, "PROGRAMS", programs)
    monkeypatch.setattr(triton, "BLOCK_K", 16)
    generator, lengths, head_dim = torch.Generator().manual_seed(4), (11, 66, 30), 12
    keys, values = torch.randn(2, 5, groups, 71, head_dim, generator=generator).to(dtype)
    scales = None
    if int8:
        keys, values = ((30 * x).round().to(torch.int8) for x in (keys, values))
        scales = torch.rand(2, 3, 5, groups, 71, generator=generator)[:, 1] / 20  # those of a layer, between others
    rows = torch.tensor([4, 0, 2])
    parts = [seen_by(kind, width, length) for length in lengths]
    seen = torch.full((3, width, 3), -1)
    for i, (numbers, queries) in enumerate(parts):
        seen[i, :queries] = numbers
    q = torch.randn(3 * width, heads, head_dim, generator=generator).to(dtype)
    for i, length in enumerate(lengths):  # nothing past a row's length is read
        for x in (keys, values) if scales is None else scales:
            x[rows[i], :, length:] = float("nan")
    out = triton.attend(q, keys, values, rows, seen.view(-1, 3).int(), scales)
    if scales is not None:
        keys, values = (x * scale[..., None] for x, scale in zip((keys, values), scales, strict=True))
    assert out.dtype == dtype
    key, slot, limit, first = torch.arange(71), *seen.view(-1, 3, 1).unbind(1)
    hidden = (key > slot) | ((key >= limit) & (key < first))
    k, v = (x[rows].nan_to_num().double().repeat_interleave(heads // groups, 1) for x in (keys, values))
    scores = torch.einsum("rwnd,rnkd->rwnk", q.view(3, width, heads, head_dim).double(), k) * head_dim**-0.5
    p = scores.masked_fill(hidden.view(3, width, 1, 71), float("-inf")).softmax(-1).nan_to_num()
    truth = torch.einsum("rwnk,rnkd->rwnd", p, v).reshape(out.shape)
    step = torch.finfo(dtype).eps
    bound = (
        4 * step * torch.einsum("rwnk,rnkd->rwnd", p, v.abs()).reshape(out.shape) + 20 * torch.finfo(torch.float32).eps
    )
    assert ((out.double() - truth).abs() <= bound).all()
    assert not out.view(3, width, -1)[[i for i, (_, n) in enumerate(parts) if n < width], -1].any(), (
        "padding sees nothing"
    )


@pytest.mark.parametrize("int8", [False, True])
def test_pages_hold_what_rows_hold(int8):
    """The same blocks of keys in the same order, wherever they lie: to the last bit."""
    attention_triton = pytest.importorskip("esolm_megatron.model.attention_triton")
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(3, 2, 256, 16, generator=generator) for _ in range(2))
    scales = None
    if int8:
        keys, values = ((x * 40).round().to(torch.int8) for x in (keys, values))
        scales = torch.rand(2, 3, 2, 256, generator=generator)
    q = torch.randn(3 * 5, 4, 16, generator=generator)
    seen = torch.tensor(
        [[200 + i, 150, 190] for i in range(5)] + [[i, 0, 0] for i in range(5)] + [[-1, 0, 0]] * 5
    ).int()
    table = torch.randperm(9, generator=generator)[:6].view(3, 2)

    def in_pages(x):
        pages = x.new_zeros(9, *x.shape[1:2], 128, *x.shape[3:])
        for row in range(3):
            for page in range(2):
                pages[table[row, page]] = x[row, :, 128 * page : 128 * (page + 1)]
        return pages

    whole = attention_triton.attend(q, keys, values, torch.arange(3), seen, scales)
    apart = None if scales is None else torch.stack([in_pages(x) for x in scales])
    found = attention_triton.attend(q, in_pages(keys), in_pages(values), table, seen, apart)
    assert whole[:10].any(-1).all()
    assert torch.equal(found, whole)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_multiplies_rows_that_a_gpu_likes(on_gpu, monkeypatch, tied):
    """In a pass: logits of a vocabulary of odd size by a product of a multiple of 128 columns; weights have no more rows."""
    shape = MODERN | {"vocab_size": 301, "tied_embeddings": tied}
    config, sizes, product = make_config(shape).model, [], layers.wide_product
    monkeypatch.setattr(
        layers, "wide_product", lambda x, matrix: (sizes.append(matrix.shape[1]), product(x, matrix))[1]
    )
    model = EsoLM(config, PlainLinears(torch.bfloat16))
    initialise(model, 3)
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    matrix = model.embedding.weight if tied else model.head.weight
    assert matrix.shape == (301, config.hidden_size)
    with torch.no_grad():
        logits = model.logits(hidden)
    narrow = model.logits(hidden)
    assert sizes == [384, 301], "what may have a gradient has no spare rows"
    assert logits.shape == narrow.shape == (5, 301)
    assert torch.equal(logits[:, :300], hidden.float() @ matrix[:300].float().T)
    assert logits[:, 300:].isneginf().all()
    torch.testing.assert_close(narrow, logits)
    flat = torch.zeros(640, config.hidden_size)  # as optimizers lay weights out
    assert len(layers.with_spare_rows(flat[:301])) == 301
    assert len(layers.with_spare_rows(matrix.detach().clone())) == 301


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esolm_megatron.inference.decoding import draw_triton
from esolm_megatron.model import attention_triton, sampling_triton

def compiled(kernel, pointers, numbers, constants):
    kinds = dict.fromkeys(kernel.arg_names, "i32") | pointers | numbers | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(kernel, kinds, values), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})

sizes = {"HEAD": 64, "WIDE": 64}
pointers = dict.fromkeys(["q", "keys", "values", "scales"], "*bf16")
pointers |= {"rows": "*i64", "seen": "*i32", "out": "*fp32", "lse": "*fp32"}
more = {"QUERIES": 2, "BLOCK_Q": 16, "BLOCK_K": 64, "EXACT": False, "INT8": False, "PAGE": 0}
numbers = {"row_stride": "i64", "scales_stride": "i64", "scale": "fp32"}
compiled(attention_triton._attend, pointers, numbers, sizes | more)
narrow = {"keys": "*i8", "values": "*i8", "scales": "*fp32"}
compiled(attention_triton._attend, pointers | narrow, numbers, sizes | more | {"INT8": True})
compiled(attention_triton._attend, pointers | narrow, numbers, sizes | more | {"INT8": True, "PAGE": 128})
compiled(attention_triton._merge, {"parts": "*fp32", "lse": "*fp32", "out": "*bf16"}, {}, sizes | {"SPLITS": 16})
pointers = dict.fromkeys(["raw", "rows", "tokens"], "*i64") | dict.fromkeys(["logits", "sums", "log_probs"], "*fp32")
compiled(draw_triton._draw, pointers | {"kinds": "*fp64"}, {}, {"BLOCKS": 256, "TILE": 16})
bf16 = lambda *names: dict.fromkeys(names, "*bf16")
heads = {"GROUPS": 4, "QUERIES": 2, "HALF": 32, "WIDE": 32, "HEADS": 16, "NORM": True}
pointers = bf16("y", "cos", "sin", "q_weight", "k_weight", "q", "k")
compiled(sampling_triton._rotate, pointers, {"eps": "fp32", "token_stride": "i64"}, heads)
compiled(sampling_triton._rotate, pointers, {"eps": "fp32", "token_stride": "i64"}, heads | {"NORM": False})
strides = dict.fromkeys(["row_stride", "scales_stride"], "i64")
places = {"rows": "*i64", "slots": "*i64"}
sizes = {"HEAD": 64, "WIDE": 64, "GROUPS": 12, "BLOCK": 16}
compiled(sampling_triton._store, bf16("k", "v", "keys", "values", "scales") | places, strides, sizes | {"INT8": False})
compiled(sampling_triton._store, bf16("k", "v") | narrow | places, strides, sizes | {"INT8": True})
for centred in (True, False):
    pointers = bf16("x", "delta", "weight", "bias", "total", "out")
    compiled(sampling_triton._add_normalise, pointers, {"eps": "fp32"}, {"BLOCK": 1024, "CENTRED": centred})
"""


def test_kernels_compile_for_an_h200(tmp_path):
    """Down to machine code; the interpreter takes more than the compiler does."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    found = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
