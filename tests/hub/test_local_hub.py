"""Pushed with the real client to a Hub on loopback, and loaded from it by name in a fresh process."""

import json
from pathlib import Path

import pytest
import torch
from local_hub_routes import PART_SIZE

from uplvp_hf.commands import push
from uplvp_hf.hub import prepare_folder, push_folder
from uplvp_hf.hub.errors import HubError

NAME = "uplvp/mask2former-coco"

LOAD = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForInstanceSegmentation, pipeline
from uplvp_hf import UplvpForInstanceSegmentation

pixels = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    one = UplvpForInstanceSegmentation.from_pretrained("uplvp/mask2former-coco").eval()(**pixels)
    two = AutoModelForInstanceSegmentation.from_pretrained("uplvp/mask2former-coco").eval()(**pixels)
segmenter = pipeline("image-segmentation", model="uplvp/mask2former-coco")
found = segmenter(Image.open(sys.argv[2]), threshold=0.0, overlap_mask_area_threshold=0.0)
assert type(segmenter.model).__module__ == "uplvp_hf.models.modeling_uplvp"  # and no remote code
entries = [(entry["label"], entry["score"], entry["mask"].tobytes()) for entry in found]
torch.save([one.masks_queries_logits, two.masks_queries_logits, entries], sys.argv[3])
"""


@pytest.mark.slow
def test_pushed_and_loaded_by_name(hub, fresh_process, tiny_model_dir, scenes_dir, tmp_path):
    from PIL import Image
    from transformers import pipeline

    from uplvp_hf import UplvpForInstanceSegmentation, UplvpImageProcessor

    command = "import sys; from uplvp_hf.cli import main; sys.exit(main(['push', *sys.argv[1:]]))"
    pushed = fresh_process(command, tiny_model_dir, "--repo-id", NAME)
    assert pushed.returncode == 0 and pushed.stdout.strip().startswith(f"{hub.url}/{NAME}/commit/"), pushed.stderr
    weights = (tiny_model_dir / "model.safetensors").read_bytes()
    assert hub.files(NAME)["model.safetensors"] == weights and len(weights) > PART_SIZE  # uploaded in parts

    image = sorted((scenes_dir / "images").iterdir())[0]
    model = UplvpForInstanceSegmentation.from_pretrained(tiny_model_dir).eval()
    processor = UplvpImageProcessor.from_pretrained(tiny_model_dir)
    pixels = dict(processor(Image.open(image), return_tensors="pt"))
    torch.save(pixels, tmp_path / "pixels.pt")
    loaded = fresh_process(LOAD, tmp_path / "pixels.pt", image, tmp_path / "out.pt")
    assert loaded.returncode == 0, loaded.stderr
    one, two, entries = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        here = model(**pixels).masks_queries_logits
    assert torch.equal(one, here) and torch.equal(two, here)
    local = pipeline("image-segmentation", model=str(tiny_model_dir))
    expected = local(Image.open(image), threshold=0.0, overlap_mask_area_threshold=0.0)
    assert entries == [(entry["label"], entry["score"], entry["mask"].tobytes()) for entry in expected]
    assert len(entries) > 0 and not hub.leaks  # the token did not reach the host of the large files


REMOTE = """
from PIL import Image
from transformers import AutoImageProcessor, pipeline

name = "uplvp/mask2former-coco"
try:
    pipeline("image-segmentation", model=name)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("the repository's code ran without being asked for")
assert not any("uplvp" in module for module in sys.modules), sorted(sys.modules)
segmenter = pipeline("image-segmentation", model=name, trust_remote_code=True)
found = segmenter(Image.new("RGB", (90, 50), (90, 120, 30)), threshold=0.0, overlap_mask_area_threshold=0.0)
assert found and all(entry["mask"].size == (90, 50) for entry in found), found
assert type(segmenter.model).__module__.startswith("transformers_modules."), type(segmenter.model)
segmenter = pipeline("instance-segmentation", model=name, trust_remote_code=True)
found = segmenter(Image.new("RGB", (90, 50)), threshold=0.0)
assert {"label", "score", "box", "rle"} <= set(found[0]), found[0].keys()
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True, backend="pil")
assert type(processor).__name__ == "UplvpImageProcessorPil", type(processor)
"""


@pytest.mark.slow
def test_remote_code_runs_only_when_asked(without_library, hub_client, fresh_process, tiny_model_dir, tmp_path):
    folder = prepare_folder(tiny_model_dir, tmp_path / "repository", NAME)
    push_folder(folder, NAME)
    result = fresh_process(without_library + REMOTE)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def small(tmp_path):
    """A folder to push, with one large file of two parts."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    return folder


def test_private_branch_and_second_push(hub_client, small):
    push_folder(small, "uplvp/x", private=True, revision="v1", message="first")
    repository = hub_client.repositories["model", "uplvp/x"]
    assert repository.private and set(repository.branches) == {"main", "v1"}
    assert set(hub_client.files("uplvp/x", "v1")) == {".gitattributes", "config.json", "model.safetensors"}
    assert set(hub_client.files("uplvp/x")) == {".gitattributes"}
    (small / "model.safetensors").rename(small / "model-00001-of-00001.safetensors")
    sent = len(hub_client.requests)
    push_folder(small, "uplvp/x", private=True, revision="v1", message="second")
    # from_pretrained would prefer the old name.
    assert set(hub_client.files("uplvp/x", "v1")) == {
        ".gitattributes",
        "config.json",
        "model-00001-of-00001.safetensors",
    }
    assert not any(request.startswith("PUT") for request in hub_client.requests[sent:])  # the content is there


def test_private_never_lands_in_public(hub_client, small):
    push_folder(small, "uplvp/x")
    (small / "config.json").write_text('{"secret": 1}')
    with pytest.raises(ValueError, match="is public"):
        push_folder(small, "uplvp/x", private=True)
    assert hub_client.files("uplvp/x")["config.json"] == b"{}"


def test_a_dropped_connection_is_tried_again(hub_client, small):
    hub_client.fail("PUT", "/lfs/", 0, times=2)
    push_folder(small, "uplvp/x")
    assert hub_client.files("uplvp/x")["model.safetensors"] == (small / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method, path, times", [("PUT", "/lfs/.*/2", 99), ("POST", "/commit/", 1)])
def test_a_dead_line_is_one_sentence_and_a_second_push_completes(
    hub_client, tiny_model_dir, capsys, method, path, times
):
    hub_client.fail(method, path, 0, times)
    arguments = [str(tiny_model_dir), "--repo-id", NAME]
    assert push.main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("uplvp push: error: the connection to http://127.0.0.1")
    assert "Run the same command again" in lines[-1]
    assert set(hub_client.files(NAME)) == {".gitattributes"}  # all or nothing
    hub_client.faults.clear()
    assert push.main(arguments) == 0
    assert hub_client.files(NAME)["model.safetensors"] == (tiny_model_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method, path, status, headers, said",
    [
        ("POST", "/api/repos/create", 401, {}, ["401", "hf auth login", "HF_TOKEN"]),
        ("POST", "/preupload/", 404, {}, ["404", "uplvp/x", "Check the name"]),
        ("POST", "/objects/batch", 429, {"Retry-After": "7"}, ["429", "too many requests", "Wait 7 seconds"]),
        ("POST", "/commit/", 503, {}, ["503", "a fault on its side"]),
        ("POST", "/commit/", 403, {}, ["403", "may not write to uplvp/x"]),
    ],
)
def test_refusals_say_what_to_do(hub_client, small, method, path, status, headers, said):
    hub_client.fail(method, path, status, times=99, **headers)
    with pytest.raises(HubError) as caught:
        push_folder(small, "uplvp/x")
    assert all(part in str(caught.value) for part in [*said, "a fault of this test"]), str(caught.value)
    hub_client.faults.clear()
    push_folder(small, "uplvp/x")
    assert set(hub_client.files("uplvp/x")) == {".gitattributes", "config.json", "model.safetensors"}


def test_who_may_not_write_is_told_so(hub_client, small, monkeypatch):
    with pytest.raises(HubError, match="may not write to somebody/x"):
        push_folder(small, "somebody/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not accept the token"):
        push_folder(small, "uplvp/x")


def test_offline_mode_is_named(small):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(small, "uplvp/x")


def test_errors_of_another_kind_stay_what_they_are(hub_client, small):
    (small / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_folder(small, "uplvp/x")


def test_links_out_of_the_folder_are_refused(small, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (small / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes\.txt leads out of"):
        push_folder(small, "uplvp/x")


@pytest.mark.slow
def test_a_dropped_download_goes_on_where_it_stopped(hub_client, small, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    push_folder(small, "uplvp/x")
    hub_client.fail("GET", "/cdn/", 0)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is written at once; a lost piece is asked again
    content = (small / "model.safetensors").read_bytes()
    assert Path(hf_hub_download("uplvp/x", "model.safetensors")).read_bytes() == content
    assert hub_client.ranges == [None, f"bytes={len(content) // 2}-"]


@pytest.mark.slow
def test_push_to_hub_of_transformers(hub_client, tiny_model_dir):
    from transformers import pipeline

    from uplvp_hf import UplvpForInstanceSegmentation, UplvpImageProcessor

    UplvpForInstanceSegmentation.from_pretrained(tiny_model_dir).push_to_hub("uplvp/plain")
    UplvpImageProcessor.from_pretrained(tiny_model_dir).push_to_hub("uplvp/plain")
    files = hub_client.files("uplvp/plain")
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert json.loads(files["config.json"])["auto_map"] and "modeling_uplvp.py" in files  # it needs no library
    segmenter = pipeline("image-segmentation", model="uplvp/plain")
    assert type(segmenter.model) is UplvpForInstanceSegmentation
    weights = UplvpForInstanceSegmentation.from_pretrained(tiny_model_dir).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in segmenter.model.state_dict().items())


def test_a_space_beside_the_model(hub_client, tiny_model_dir, tmp_path, capsys):
    arguments = [str(tiny_model_dir), "--repo-id", NAME, "--space", "uplvp/page"]
    assert push.main(arguments) == 0
    assert hub_client.repositories["space", "uplvp/page"].sdk == "gradio"
    pushed = hub_client.files("uplvp/page", kind="space")
    assert {"app.py", "README.md", "requirements.txt", "visualize.py"} <= set(pushed)
    assert "TRUST_REMOTE_CODE" in capsys.readouterr().out
    assert push.main([*arguments, "--dry-run", "--output", str(tmp_path / "dry")]) == 0
    written = {file.name: file.read_bytes() for file in (tmp_path / "dry-space").iterdir()}
    assert written == {name: content for name, content in pushed.items() if name != ".gitattributes"}
    assert push.main([str(tiny_model_dir), "--repo-id", NAME, "--space", "page"]) == 2
