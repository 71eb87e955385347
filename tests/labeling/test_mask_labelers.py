"""Masks from files, mask generators and trained segmenters as labels."""

import json

import numpy as np
import pytest
import torch
from labeling_helpers import image_folder

from uplvp_hf.data import DataError, decode_segmentation, encode_masks, load_dataset_rows, read_store
from uplvp_hf.data.dataset import InstanceDataset
from uplvp_hf.labeling.cutting.proposals import filter_proposals, mask_nms, top_k
from uplvp_hf.labeling.labelers.mask_file import MaskFileLabeler
from uplvp_hf.labeling.labelers.mask_generator import MaskGeneratorLabeler
from uplvp_hf.labeling.labelers.segmenter import SegmenterLabeler
from uplvp_hf.labeling.pipeline import label_images

QUIET = {"progress": False, "batch_size": 3}


def masks_of(dataset, index):
    objects = dataset[index]["objects"]
    return [dataset.mask(index, k) for k in range(len(objects["score"]))]


def call(source, dataset, indices=None):
    indices = range(len(dataset)) if indices is None else indices
    return source([dataset.load_image(k) for k in indices], [dataset[k] for k in indices])


def test_a_coco_file_becomes_a_store(scenes_dir, tmp_path):
    truth = load_dataset_rows(scenes_dir)
    plain = load_dataset_rows(scenes_dir / "images")  # other ids, the same files
    assert {row["image_id"] for row in plain.rows}.isdisjoint(row["image_id"] for row in truth.rows)
    source = MaskFileLabeler(scenes_dir)
    summary = label_images(plain, source, None, tmp_path / "labels", **QUIET)
    assert source.notes == [] and summary.done == len(truth)
    stored = read_store(tmp_path / "labels")
    assert list(stored.id2label.values()) == list(truth.id2label.values())
    by_file = {row["file_name"].split("/")[-1]: k for k, row in enumerate(truth.rows)}
    for index, row in enumerate(stored.rows):
        other = by_file[row["file_name"].split("/")[-1]]
        want = masks_of(truth, other)
        assert len(want) == len(row["objects"]["score"]) > 0
        for k, mask in enumerate(masks_of(stored, index)):
            (same,) = [j for j, candidate in enumerate(want) if (candidate == mask).all()]
            names = [d.id2label[d.category_ids.index(d[i]["objects"]["category_id"][j])]
                     for d, i, j in ((stored, index, k), (truth, other, same))]  # fmt: skip
            assert names[0] == names[1]
    # A store is a source as well, and gives itself.
    again = MaskFileLabeler(tmp_path / "labels")
    label_images(plain, again, None, tmp_path / "again", **QUIET)
    assert list(read_store(tmp_path / "again").rows) == list(stored.rows)


def test_other_masks_are_not_mixed_into_a_store(scenes_dir, tmp_path):
    truth = load_dataset_rows(scenes_dir)
    first = MaskFileLabeler(truth)
    changed = InstanceDataset([dict(row) for row in truth.rows], truth.categories)
    changed.rows[0]["objects"] = {key: value[:1] for key, value in changed.rows[0]["objects"].items()}
    assert first.settings == MaskFileLabeler(truth).settings != MaskFileLabeler(changed).settings
    label_images(truth.unlabeled(), first, None, tmp_path / "labels", **QUIET)
    with pytest.raises(ValueError, match=r"settings\.content"):
        label_images(truth.unlabeled(), MaskFileLabeler(changed), None, tmp_path / "labels", **QUIET)


@pytest.fixture
def images(tmp_path):
    return image_folder(tmp_path / "images", 4)


def results_file(path, rows, **changes):
    """A COCO results list: for each row, masks of a few sizes with rising scores."""
    entries = []
    for row in rows:
        masks = np.zeros((3, row["height"], row["width"]), dtype=bool)
        for k, mask in enumerate(masks):
            mask[: 2 + 4 * k, : 3 + 4 * k] = True
        entries += [
            {"image_id": row["image_id"], "category_id": 5 + k % 2, "segmentation": rle, "score": 0.2 + 0.3 * k}
            for k, rle in enumerate(encode_masks(masks))
        ]
    entries[0] |= changes
    path.write_text(json.dumps(entries))
    return path


def test_results_lists_and_limits(images, tmp_path):
    file = results_file(tmp_path / "results.json", images.rows[:3])
    source = MaskFileLabeler(file, min_area=7, min_score=0.3, top=1)
    assert source.vocabulary == ["5", "6"]
    found = call(source, images)
    assert [len(p) for p in found] == [1, 1, 1, 0]
    for p in found[:3]:
        assert p.masks[0].sum() == 10 * 11 and p.scores[0] == pytest.approx(0.8) and p.labels[0] == 0
    assert source.notes == [f"1 images are not in {file}: they got no masks"]
    summary = label_images(images, MaskFileLabeler(file, missing="fail"), None, tmp_path / "labels", **QUIET)
    assert (summary.done, summary.failed) == (3, 1)
    (failure,) = read_store(tmp_path / "labels").failures
    assert failure["file"] == images[3]["image"] and f"003.png: is not in {file}" in failure["reason"]
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"categories": [{"id": 5, "name": "bear"}, {"id": 6, "name": "deer"}]}))
    source = MaskFileLabeler(file, categories=str(names))
    assert source.vocabulary == ["bear", "deer"]
    assert call(source, images, [0])[0].scores.tolist() == pytest.approx([0.8, 0.5, 0.2])
    names.write_text(json.dumps({"categories": [{"id": 5, "name": "bear"}]}))
    with pytest.raises(DataError, match="names no category 6"):
        MaskFileLabeler(file, categories=str(names))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_results_in_the_encodings_of_windows(images, tmp_path, encoding):
    """With a mark of the byte order in front, as Notepad and PowerShell write JSON."""
    file = results_file(tmp_path / "results.json", images.rows)
    plain = call(MaskFileLabeler(file), images)
    file.write_text(file.read_text(), encoding=encoding)
    again = call(MaskFileLabeler(file), images)
    assert [len(p) for p in again] == [len(p) for p in plain] and sum(len(p) for p in plain) > 0


def test_damaged_results(images, tmp_path):
    file = tmp_path / "results.json"
    source = MaskFileLabeler(results_file(file, images.rows, segmentation={"size": [64, 96], "counts": "0"}))
    assert [len(p) for p in call(source, images)] == [2, 3, 3, 3]
    assert source.notes == [f"1 masks of {file} are malformed and were left out"]
    with pytest.raises(DataError, match=r"entry 0.*finite"):
        MaskFileLabeler(results_file(file, images.rows, score=float("nan")))
    file.write_text('[{"image_id": 1}]')
    with pytest.raises(DataError, match=r"entry 0: has no 'category_id'"):
        MaskFileLabeler(file)
    with pytest.raises(DataError, match="no such file"):
        MaskFileLabeler(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="`missing` must be one of fail, empty, got `skip`"):
        MaskFileLabeler(file, missing="skip")
    with pytest.raises(ValueError, match="`match` must be one of auto, file_name, image_id, got `name`"):
        MaskFileLabeler(file, match="name")


def test_images_are_matched_by_name_before_id(images):
    rows = [dict(row) for row in images.rows]
    for index, row in enumerate(rows):  # ids of another numbering, names in another folder
        row |= {"image_id": images[(index + 1) % 4]["image_id"], "file_name": f"elsewhere/{row['file_name']}"}
    other = InstanceDataset(rows, [])
    assert [MaskFileLabeler(other).find(row) for row in images.rows] == [0, 1, 2, 3]
    assert [MaskFileLabeler(other, match="image_id").find(row) for row in images.rows] == [3, 0, 1, 2]
    twice = InstanceDataset([{**rows[0], "file_name": f"{k}/000.png", "image_id": k} for k in "ab"], [])
    assert MaskFileLabeler(twice).find(images[0]) is None  # which of the two is not said
    rows[0] |= {"width": 50}
    with pytest.raises(DataError, match=r"000.png: has 96x64 pixels, but 50x64 in"):
        call(MaskFileLabeler(InstanceDataset(rows, [], "masks.json")), images, [0])


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    from transformers import SamConfig, SamImageProcessor, SamModel

    folder = tmp_path_factory.mktemp("sam")
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 16, "iou_head_depth": 2}
    torch.manual_seed(0)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for parameter in model.mask_decoder.parameters():  # masks that differ from point to point
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    sizes |= {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    SamImageProcessor(**sizes).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    return folder


def test_a_mask_generator(sam_folder, images, tmp_path):
    from transformers import pipeline

    options = {"points": 4, "min_iou": -100.0, "min_stability": 0.0, "nms": 1.0, "max_area": 1.0}
    source = MaskGeneratorLabeler(str(sam_folder), points_batch=5, mask_nms=0.8, top=3, **options)
    assert source.license == "apache-2.0" and source.vocabulary == ()
    generator = pipeline("mask-generation", model=str(sam_folder), device="cpu")
    for image, got in zip([images.load_image(k) for k in range(3)], call(source, images, range(3))):
        raw = generator(image, points_per_crop=4, pred_iou_thresh=-100, stability_score_thresh=0, crops_nms_thresh=1.0)
        masks = np.stack([np.asarray(mask) for mask in raw["masks"]])
        order = np.argsort(-raw["scores"].numpy().clip(0, 1), kind="stable")
        kept = []
        for k in order:  # greedy suppression, by hand
            share = masks[k].mean()
            ious = [(masks[k] & masks[j]).sum() / (masks[k] | masks[j]).sum() for j in kept]
            if share >= 0.001 and max(ious, default=0) <= 0.8:
                kept.append(k)
        assert len(masks) > len(kept[:3]) >= 1
        assert (got.masks == masks[kept[:3]]).all() and got.labels is None
        assert got.scores.tolist() == pytest.approx(raw["scores"].numpy().clip(0, 1)[kept[:3]].tolist(), abs=1e-6)
    nothing = MaskGeneratorLabeler(str(sam_folder), points=2, min_iou=2.0)
    assert [len(p) for p in call(nothing, images)] == [0, 0, 0, 0]
    summary = label_images(images, source, None, tmp_path / "labels", **QUIET)
    header = json.loads((tmp_path / "labels" / "header.json").read_text())
    assert summary.done == 4 and header["settings"]["points"] == 4 and header["encoder"] == str(sam_folder)


def test_not_every_model_generates_masks(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit model, which generates no masks"):
        MaskGeneratorLabeler(str(tmp_path))


def test_self_training_keeps_what_is_sure_and_large(tiny_model_dir, scenes_dir, tmp_path):
    from uplvp_hf.evaluation.predictor import load_segmenter, predict_dataset

    dataset = load_dataset_rows(scenes_dir).unlabeled()
    model, processor = load_segmenter(str(tiny_model_dir), "cpu")
    raw = [result for _, result in predict_dataset(model, processor, dataset, progress=False)]
    every = np.sort(np.concatenate([result["scores"].numpy() for result in raw]))
    sizes = [decode_segmentation(rle, 96, 96).sum() for result in raw for rle in result["rle"]]
    floor, least = float(every[len(every) // 2]), int(np.median(sizes))
    source = SegmenterLabeler(tiny_model_dir, device="cpu", min_score=floor, min_area=least)
    got = [p for start in (0, 4) for p in call(source, dataset, range(start, min(start + 4, len(dataset))))]
    kept = 0
    for proposals, result in zip(got, raw, strict=True):
        masks = [decode_segmentation(rle, 96, 96) for rle in result["rle"]]
        want = [k for k, m in enumerate(masks) if m.sum() >= least and result["scores"][k] >= floor]
        kept += len(want)
        assert len(proposals) == len(want)
        for k, index in enumerate(want):
            assert (proposals.masks[k] == masks[index]).all() and proposals.labels[k] == int(result["labels"][index])
            assert proposals.scores[k] == pytest.approx(float(result["scores"][index]), abs=1e-6)
    assert 0 < kept < len(every)
    assert source.vocabulary == [model.config.id2label[k] for k in range(len(model.config.id2label))]
    plain = SegmenterLabeler(tiny_model_dir, device="cpu")
    assert (plain.settings["min_score"], plain.settings["min_area"]) == (0.5, 32)
    agnostic = SegmenterLabeler(tiny_model_dir, device="cpu", min_score=0.0, class_agnostic=True, nms=0.5, top=5)
    label_images(dataset, agnostic, None, tmp_path / "labels", **QUIET)
    stored = read_store(tmp_path / "labels")
    assert [category["name"] for category in stored.categories] == ["object"]
    for p in call(agnostic, dataset):
        assert p.labels is None and len(p) == len(mask_nms(p, 0.5)) <= len(top_k(filter_proposals(p), 5))
