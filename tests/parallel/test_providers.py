"""Who does each job: what a run says, what `train.kernels` forces, and what it refuses."""

import json
import subprocess
import sys
import types

import pytest
import torch
from ranks import run_ranks
from truth import MODERN, make_config, share_of_step

from esolm_megatron.config import dump
from esolm_megatron.errors import UserError

pytestmark = pytest.mark.gloo


def said(config):
    """One rank: the table, and what a refused one says; with a loss, to see that it runs."""
    from esolm_megatron.parallel.engine import Engine

    try:
        engine = Engine(config)
    except UserError as error:
        return str(error)
    return engine.providers, engine.train_step(share_of_step(config, 0), 1e-3).loss


def bf16(**kernels):
    return make_config(train={"precision": "bf16", "kernels": kernels})


def test_every_job_has_somebody_and_a_reason():
    ((table, _),) = run_ranks(said, 1, bf16())
    assert json.loads(json.dumps(table)) == {
        "attention": "torch's flash attention for CPUs",
        "linears": "megatron-core",
        "norms": "torch",
        "gradients": "added up in fp32 by torch's products (NVIDIA Apex is not installed)",
        "loss": "torch",
        "optimizer": "torch's fused AdamW, DeepSpeed ZeRO 1",
    }


def test_doctor_tries_the_kernels_of_a_run_of_any_size(tmp_path):
    """One process, with what a cluster's ranks would find."""
    config = make_config(
        parallel={"tensor_size": 2, "pipeline_size": 2}, optim={"name": "muon"}, train={"precision": "bf16"}
    )
    (tmp_path / "run.yaml").write_text(dump(config))

    def asked(*words):
        command = [sys.executable, "-m", "esolm_megatron", "doctor", f"--providers={tmp_path / 'run.yaml'}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    found = json.loads(asked("--json").stdout)
    assert found["optimizer"] == "Muon for the matrices of blocks; torch's fused AdamW, DeepSpeed ZeRO 1, for the rest"
    assert found["gradients"] == "added up in fp32 by torch's products (NVIDIA Apex is not installed)"
    assert "Muon for the matrices" in asked().stdout
    (tmp_path / "run.yaml").write_text(dump(bf16(attention="fa2")))
    refused = asked()
    assert refused.returncode == 1
    assert "train.kernels.attention = fa2: on a CPU attention is torch's own" in refused.stderr


def test_gradients_may_be_left_to_deepspeed():
    ((table, loss),) = run_ranks(said, 1, bf16(gradients="deepspeed"))
    assert table["gradients"] == "DeepSpeed"
    assert loss == run_ranks(said, 1, bf16())[0][1]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"precision": "bf16", "kernels": {"attention": "fa3"}}, "train.kernels.attention = fa3: on a CPU"),
        ({"precision": "bf16", "kernels": {"attention": "cudnn"}}, "train.kernels.attention = cudnn: on a CPU"),
        ({"precision": "bf16", "kernels": {"gradients": "apex"}}, "finds no fused_weight_gradient_mlp_cuda; build NVIDIA Apex"),
        ({"precision": "fp32", "kernels": {"gradients": "torch"}}, "in bf16 runs of ZeRO 0 and 1 without offload; set auto"),
        ({"precision": "bf16", "kernels": {"loss": "triton"}}, "needs a GPU and the package triton, found device cpu"),
    ],
)  # fmt: skip
def test_what_is_named_and_is_not_there_ends_the_run(train, words):
    (message,) = run_ranks(said, 1, make_config(MODERN, train=train))
    assert words in message


class DocumentedApex(types.ModuleType):
    """A stand-in for NVIDIA Apex's extension, with the one call that megatron-core makes of it, as Apex declares it:
    wgrad_gemm_accum_fp32(input, d_output, d_weight), which adds d_output^T input to d_weight.
    """

    factor, calls = 1.0, 0

    def wgrad_gemm_accum_fp32(self, input, d_output, d_weight):
        self.calls += 1
        assert input.dtype == d_output.dtype == torch.bfloat16
        assert d_weight.dtype == torch.float32
        assert d_weight.is_contiguous()
        d_weight.add_(d_output.float().t() @ input.float(), alpha=self.factor)


def with_apex(config, factor):
    from esolm_megatron.parallel import main_grad

    apex = sys.modules["fused_weight_gradient_mlp_cuda"] = DocumentedApex("fused_weight_gradient_mlp_cuda")
    apex.factor, main_grad._APEX = factor, apex
    choose, tried = main_grad.choose, []

    def counted(*args):
        found = choose(*args)
        tried.append(apex.calls)
        return found

    main_grad.choose = counted
    found = said(config)
    return found if isinstance(found, str) else (*found, apex.calls - tried[0])


def test_apex_is_tried_timed_and_used_where_it_is_right():
    ((table, loss, calls),) = run_ranks(with_apex, 1, bf16(gradients="apex"), 1.0)
    assert calls == 4 * 4 * MODERN["num_layers"], "micro-batches, matrices of a block, blocks"
    assert table["gradients"].startswith("added up in fp32 by NVIDIA Apex's products (relative error ")
    assert loss == run_ranks(said, 1, bf16())[0][1]
    ((table, _, calls),) = run_ranks(with_apex, 1, bf16(), 0.9)
    assert calls == 0
    assert "by torch's products (relative error 0.1" in table["gradients"]
    (message,) = run_ranks(with_apex, 1, bf16(gradients="apex"), 0.9)
    assert message.startswith("train.kernels.gradients = apex: relative error 0.1")
