"""What sharded training saves: another layout continues from it with difference 0, and it exports with its own probe."""

import pytest
import torch
from ranks import run_ranks
from truth import MODERN, REFERENCE, make_config, share_of_step

from checkpoints_conversion.export import export_run
from esolm_megatron.checkpoint import folder as checkpoint

pytestmark = pytest.mark.gloo


def train_and_save(config, run, restore_step, num_steps):
    """One rank: load `restore_step` if there is one, train, save at the step reached."""
    from esolm_megatron.parallel.engine import Engine

    engine = Engine(config)
    top, start = engine.topology, restore_step or 0
    if restore_step is not None:
        found = checkpoint.Checkpoint.open(checkpoint.step_folder(run, restore_step))
        engine.restore(found)
    for step in range(num_steps):
        engine.forward_backward(share_of_step(config, step, top.data_rank, top.data_size))
        engine.state.step(config.optim.lr)
    step = start + max(num_steps, 1)
    staging, probe = checkpoint.staging_folder(run, step), engine.probe()
    checkpoint.write_rank(staging, top.rank, engine.pieces())
    torch.distributed.barrier()
    if engine.is_first_rank:
        manifest = {"step": step, "config": config.model_dump(mode="json")}
        checkpoint.commit(staging, checkpoint.step_folder(run, step), manifest, top.world_size, probe)


@pytest.mark.parametrize(
    ("model", "first", "second"),
    [
        (REFERENCE, {"tensor_size": 2}, {"pipeline_size": 2, "virtual_pipeline_size": 2}),
        (MODERN | {"tied_embeddings": True}, {"pipeline_size": 2}, {"tensor_size": 2, "sequence_parallel": True}),
        (MODERN, {"zero_stage": 3}, {"zero_stage": 2}),
    ],
    ids=["reference_tp_to_pp", "tied_pp_to_tp", "zero_3_to_2"],
)
def test_saved_on_one_layout_loaded_on_another_exported_from_both(tmp_path, model, first, second):
    run_ranks(train_and_save, 2, make_config(model, parallel=first), tmp_path, None, 2)
    run_ranks(train_and_save, 2, make_config(model, parallel=second), tmp_path, 2, 0)
    before, after = (checkpoint.Checkpoint.open(checkpoint.step_folder(tmp_path, step), verify=True) for step in (2, 3))
    assert before.kinds() == after.kinds() == ["weight", "exp_avg", "exp_avg_sq", "ema"]
    for kind in before.kinds():
        assert sorted(before.names(kind)) == sorted(after.names(kind))
        for name in before.names(kind):
            assert torch.equal(before.read(kind, name), after.read(kind, name)), f"{kind} {name}"
    assert not torch.equal(before.read("weight", "embedding.weight"), before.read("ema", "embedding.weight"))
    for step in (2, 3):
        for weights in ("ema", "last"):
            report = export_run(tmp_path, tmp_path / f"{weights}{step}", weights=weights, step=step)
            assert report.max_difference < report.tolerance
