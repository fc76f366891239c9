"""The reference implementation's own numbers: logits, token losses, loss and every gradient."""

import numpy as np
import pytest
import torch
from parity import MASK, Reference, fixture_path, load_case, metadata, rows_of

from esolm_megatron.objective.esolm import DIFFUSION, SEQUENTIAL, mean_loss, pack, part_sums

CASES = ["diff_elbo_a1", "diff_lowvar_a1", "seq_a0", "mix_a0.125", "mix_a0.25_pad"]


def needs(name):
    if fixture_path(name) is None:
        pytest.skip(f"{name} is only in ../shared/fixtures")


def packed_case(name):
    """The reference's draw of a case, packed as ours; capacity of a whole row, since its padding may be masked."""
    case, facts = load_case(name), metadata(name)
    valid = case["valid_tokens"].bool().numpy()
    size = len(case["diff.x0"]) if "diff.x0" in case else 0
    plain, groups = None, []
    if size:
        plain = rows_of(case, "diff", valid[:size])
        if "lowvar" not in name:
            weight = -float(facts["diff.dalpha_t"]) / (1 - case["diff.alpha_t"])
            plain.weights[:] *= weight.double().numpy()
    if "seq.x0" in case:
        groups.append((rows_of(case, "seq", valid[size:]), 32, SEQUENTIAL))
    counts = torch.tensor([valid[:size].sum(), valid[size:].sum()], dtype=torch.float64)
    return case, pack(plain, groups, MASK, 0), counts


def run(reference, batch):
    return reference(batch.tokens, batch.positions, batch.attend, places=batch.places, targets=batch.targets)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, dtype, tolerance):
    needs(name)
    case, batch, counts = packed_case(name)
    reference = Reference(dtype)
    losses = run(reference, batch)
    for part, label in ((DIFFUSION, "diff"), (SEQUENTIAL, "seq")):
        if f"{label}.per_token_loss_sorted" in case:
            mine = (losses * batch.weights.to(dtype))[batch.parts == part]
            theirs = case[f"{label}.per_token_loss_sorted"]
            valid = case["valid_tokens"].bool()
            valid = valid[: len(theirs)] if label == "diff" else valid[-len(theirs) :]
            seen = valid.gather(
                1, case[f"{label}.sort_idx"].long()
            )  # the reference masks padding too, and drops it later
            close(mine, theirs[(theirs != 0) & seen], tolerance, f"{label} token losses")
    loss = mean_loss(part_sums(losses, batch), counts)
    close(loss, case["loss_full_precision"], tolerance, "loss")
    for key, gradient in reference.gradients(loss).items():
        theirs = case.get(f"grads.{key}")
        if theirs is None:
            assert not gradient.any(), key
        else:  # stored in fp32, hence no closer than its rounding
            close(gradient, theirs, max(tolerance, 1.2e-7), key)


@pytest.mark.parametrize("name", CASES)
def test_logits(name):
    needs(name)
    case, batch, _ = packed_case(name)
    reference = Reference()
    logits = reference(batch.tokens, batch.positions, batch.attend)
    if "diff.logits" in case:
        theirs = case["diff.logits"]
        mine = logits[: theirs.shape[0] * 32].view(theirs.shape)
        close(mine[..., :MASK], theirs[..., :MASK], 1e-10, "diffusion logits")
    if "seq.logits" in case:
        theirs = case["seq.logits"]
        mine = logits[-theirs.shape[0] * 32 :].view(theirs.shape)
        masked = torch.from_numpy(
            np.take_along_axis(case["seq.z0"].numpy(), case["seq.sort_idx"].long().numpy(), 1) == MASK
        )
        close(mine[masked][:, :MASK], theirs[masked][:, :MASK], 1e-10, "sequential logits")


def close(mine, theirs, tolerance, what):
    error = (mine.detach().double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)
    assert error < tolerance, f"{what}: relative error {error:.1e}"
