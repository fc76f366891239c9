"""data.cross_document=false from a run's first step to the evaluation of its exported model."""

import json
import random

import pytest
import torch
import yaml
from test_trainer import finish, start, tree
from truth import plain_model

from checkpoints_conversion.export import export_run
from esolm_megatron import load_pretrained
from esolm_megatron.cli import main
from esolm_megatron.config import ConfigError, check, load
from esolm_megatron.data.prepare import PrepareConfig, prepare
from esolm_megatron.data.stream import TokenStream, ValidationSet
from esolm_megatron.evaluation import evaluate
from esolm_megatron.model.size import mask_capacity
from esolm_megatron.objective.esolm import document_numbers, draw_step, draw_validation, mean_loss, part_sums
from esolm_megatron.train import preflight

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory):
    """Shards of documents of 1 to 20 bytes, several in each row."""
    folder, rng = tmp_path_factory.mktemp("short"), random.Random(1)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(1, 20))) for _ in range(600)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in texts))
    options = {"validation_fraction": 0.2, "block_tokens": 1024, "num_processes": 1}
    prepare(
        PrepareConfig(inputs=(str(folder / "texts.jsonl"),), output=str(folder / "tokens"), **options), progress=False
    )
    return folder / "tokens"


def loss_of(model, noised):
    (batch,) = noised.micro_batches
    with torch.no_grad():
        losses = model(batch.tokens, batch.positions, batch.attend, places=batch.places, targets=batch.targets)
    return mean_loss(part_sums(losses, batch), noised.num_valid).item()


def test_training_validation_and_evaluation_stay_inside_documents(short_texts, tmp_path, capsys):
    data, schedule = {"path": str(short_texts), "cross_document": False}, {"num_steps": 2, "micro_batch_size": 8}
    code, text = finish(start(tree(short_texts, tmp_path, data=data, train=schedule), tmp_path))
    assert code == 0, text
    run, config = tmp_path / "run", load(tmp_path / "run" / "config.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shape, objective = config.model, config.objective

    batch = TokenStream(short_texts, seq_length=32, global_batch_size=8, seed=config.seed).batch(0)
    assert min(map(len, batch.documents)) > 0

    def first_step(documents):
        capacity = mask_capacity(32, 0.5)
        noised = draw_step(
            batch.tokens, batch.valid, batch.rows, objective, mask_id=shape.mask_id, global_batch_size=8,
            num_micro_batches=1, capacity=capacity, key=(config.seed, 1), documents=documents,
        )  # fmt: skip
        return loss_of(plain_model(config), noised)

    inside = first_step(document_numbers(batch.documents, batch.valid))
    assert lines[0]["loss"] == pytest.approx(inside, rel=1e-6)
    assert first_step(None) != pytest.approx(inside, rel=1e-6)

    export_run(run, tmp_path / "model")
    model = load_pretrained(tmp_path / "model")
    assert model.cross_document is False
    rows = ValidationSet(short_texts, seq_length=32).rows(range(5))
    documents = document_numbers(rows.documents, rows.valid)
    noised = draw_validation(
        rows.tokens, rows.valid, rows.rows, 5, objective, mask_id=shape.mask_id, key=(config.seed, "validation"),
        documents=documents,
    )  # fmt: skip
    (found,) = [line["validation_nelbo"] for line in lines if "validation_nelbo" in line]
    assert found == pytest.approx(loss_of(model.model, noised), rel=1e-6)

    assert main(["eval", str(tmp_path / "model"), f"data={short_texts}", "num_sequences=5", "orders=1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["nelbo"]["nats_per_token"]
    text = [(rows.tokens, rows.valid)]
    assert printed == pytest.approx(evaluate(model.model, text, objective, documents=documents).nelbo.nats_per_token)
    assert printed != pytest.approx(evaluate(model.model, text, objective).nelbo.nats_per_token, rel=1e-6)

    crossing = check(tree(short_texts, tmp_path, train=schedule))
    with pytest.raises(ConfigError, match="data.cross_document: was False, now True"):
        preflight.check_run(crossing, 1)
    written = yaml.safe_load((run / "config.yaml").read_text())
    del written["data"]["cross_document"]  # as a run of before there was such a field
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    preflight.check_run(crossing, 1)
