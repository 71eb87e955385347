"""transformers' `Trainer` with default arguments: docs/training.md shows this code."""

import json

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from uplvp_hf.data import TrainingSet, TrainTransform, collate, load_dataset_rows
from uplvp_hf.models.configuration_uplvp import UplvpConfig
from uplvp_hf.models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining

KINDS = pytest.mark.parametrize("kind", ["mask2former", "knet", "queryinst"])


@pytest.fixture
def parts(scenes_dir, segmenters):
    """A model of a class, and the scenes as it trains on them."""
    dataset = load_dataset_rows(scenes_dir)
    label_map = {category: index for index, category in enumerate(dataset.category_ids)}
    transform = TrainTransform(64, scale_range=(1.0, 1.0))
    rows = TrainingSet(dataset, transform, label_map, [0.5] * 3, [0.25] * 3, seed=0)

    def make(kind, cls, **settings):
        torch.manual_seed(0)
        return cls(UplvpConfig(segmenter_config=segmenters[kind], id2label=dataset.id2label, **settings)), rows

    return make


def trainer_of(model, rows, folder, **changes):
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=2, learning_rate=1e-3,
        report_to="none", disable_tqdm=True, use_cpu=True, **changes,
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)


@KINDS
@pytest.mark.parametrize("cls", [UplvpForInstanceSegmentation, UplvpForPreTraining])
def test_trains_saves_and_loads(kind, cls, parts, tmp_path):
    model, rows = parts(kind, cls, prompt_drop=0.0)
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given.get("prompt_scores")), with_kwargs=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model, rows, tmp_path)
    result = trainer.train()
    assert np.isfinite(result.training_loss)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any("backbone" in name or "encoder" in name for name in changed) and len(changed) > 20
    # Removing columns leaves what prompts are chosen by, where there are prompts.
    assert [scores is not None and len(scores) for scores in seen] == [2 * (cls is UplvpForPreTraining)] * 2
    trainer.save_model(str(tmp_path / "final"))
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert not [key for key in saved if not UplvpConfig._is_known(key) and key != "transformers_version"]
    loaded = cls.from_pretrained(tmp_path / "final")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@KINDS
def test_predictions_begin_with_the_class_logits(kind, parts, tmp_path):
    model, rows = parts(kind, UplvpForInstanceSegmentation)
    classes = model.config.num_labels + (kind == "mask2former")
    found = {}

    def metrics(prediction):
        (batches,) = [[batch[0] for batch in prediction.predictions]]
        found["logits"], found["labels"] = np.concatenate(batches), prediction.label_ids
        return {"largest": float(found["logits"].max())}

    trainer = trainer_of(model, rows, tmp_path, eval_do_concat_batches=False)
    trainer.compute_metrics = metrics
    result = trainer.evaluate()
    assert np.isfinite(result["eval_loss"]) and "eval_largest" in result
    queries = model.config.segmenter_config.num_queries
    assert found["logits"].shape == (len(rows), queries, classes)
    batch = collate([rows[index] for index in range(3)])
    with torch.no_grad():
        expected = model.eval()(batch["pixel_values"], batch["pixel_mask"]).class_queries_logits
    np.testing.assert_allclose(found["logits"][:3], expected.numpy(), rtol=1e-3, atol=1e-3)
    masks, labels = found["labels"][0]
    assert [len(one) for one in masks] == [len(one) for one in labels] == [len(one) for one in batch["class_labels"]]
