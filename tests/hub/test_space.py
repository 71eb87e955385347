"""The page of a model: by its interface for programs, and as a visitor sees it in a browser."""

import asyncio
import json
import socket
import time
import urllib.request
from pathlib import Path

import numpy as np
import processes
import pytest
from huggingface_hub import RepoCard
from PIL import Image

pytest.importorskip("gradio")
import browser

from uplvp_hf.commands import demo
from uplvp_hf.data import open_image
from uplvp_hf.evaluation import load_segmenter
from uplvp_hf.hub import prepare_folder
from uplvp_hf.hub.space_app import load_app, prepare_space


@pytest.fixture(scope="module")
def app():
    return load_app()


@pytest.fixture(scope="module")
def image_path(scenes_dir):
    return sorted((scenes_dir / "images").iterdir())[0]


@pytest.fixture(scope="module")
def page(app, tiny_model_dir):
    """The page of the tiny model on loopback: (address, segmenter's function)."""
    model, processor = load_segmenter(str(tiny_model_dir))
    blocks = app.build(model, processor, "tiny")
    blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=app.THEME, ssr_mode=False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def truth(tiny_model_dir, image_path):
    """Scores of what the model finds in the image, best first."""
    import torch

    model, processor = load_segmenter(str(tiny_model_dir))
    image = Image.open(image_path).convert("RGB")
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    size = [(image.height, image.width)]
    return processor.post_process_instance_segmentation(outputs, threshold=0.05, target_sizes=size)[0]


@pytest.mark.slow
def test_interface_for_programs(page, image_path, truth):
    from gradio_client import Client, handle_file

    client = Client(page, verbose=False)
    middle = float(truth["scores"][len(truth["scores"]) // 2])
    for threshold in (0.05, middle):
        overlay, table, file = client.predict(handle_file(image_path), threshold, api_name="/segment")
        kept = truth["scores"] >= threshold
        content = json.loads(Path(file).read_text())
        assert (content["width"], content["height"]) == Image.open(image_path).size and content["model"] == "tiny"
        found = content["instances"]
        assert [entry["score"] for entry in found] == pytest.approx(truth["scores"][kept].tolist())
        assert [entry["area"] for entry in found] == truth["masks"][kept].sum((1, 2)).tolist()
        assert np.allclose([entry["box"] for entry in found], truth["boxes"][kept], atol=0.051)
        assert len(table["data"]) == len(found) == int(kept.sum()) > 0
        assert [row[1] for row in table["data"]] == [entry["label"] for entry in found]
        assert Image.open(overlay).width >= Image.open(image_path).width


def test_bad_images_are_refused(app, tmp_path):
    import gradio as gr

    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(gr.Error, match="not an image"):
        app.open_image(str(tmp_path / "a.png"))
    Image.new("1", (9000, 9000)).save(tmp_path / "b.png")
    with pytest.raises(gr.Error, match="9000 x 9000 pixels; at most 50,000,000"):
        app.open_image(str(tmp_path / "b.png"))
    Image.new("1", (20_000, 10_000)).save(tmp_path / "c.png")
    with pytest.raises(gr.Error, match="too large; at most 50,000,000"):
        app.open_image(str(tmp_path / "c.png"))


def deep_gray(path):
    """A 16-bit image over the whole range: taken for 8 bits it would be white."""
    Image.fromarray(np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)).save(path)


def transparent(path):
    Image.new("RGBA", (96, 64), (255, 0, 0, 0)).save(path)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path, exif=exif)


@pytest.mark.parametrize("write", [deep_gray, transparent, turned])
def test_images_are_those_that_training_sees(app, write, tmp_path):
    write(tmp_path / "image.png")
    seen, wanted = app.open_image(str(tmp_path / "image.png")), open_image(tmp_path / "image.png")
    assert seen.mode == "RGB" and seen.size == wanted.size
    assert np.array_equal(np.asarray(seen), np.asarray(wanted))


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
@pytest.mark.slow
def test_in_a_browser(page, image_path, truth, tmp_path):
    asyncio.run(visit(page, image_path, truth, tmp_path))


# Number of rows below the head; rows that do not fit into the window are not in the document.
ROWS = "document.querySelector('#table [role=grid]')?.getAttribute('aria-rowcount') - 1"
OVERLAY = "document.querySelector('#overlay img')"
SLIDER = "document.querySelector('#threshold input[type=range]')"
THUMB = f"""(slider => {{
    const box = slider.getBoundingClientRect();
    const share = (slider.value - slider.min) / (slider.max - slider.min);
    return [box.left + 8 + share * (box.width - 16), box.top + box.height / 2, box.left + 1];
}})({SLIDER})"""


async def visit(url, image_path, truth, folder):
    async with browser.open_page(url, folder / "profile") as page:
        await page.until(f"Boolean(document.querySelector('input[type=file]') && {SLIDER})")
        await page.choose_file("input[type=file]", image_path)
        size = await page.until(f"{OVERLAY}?.naturalWidth && [{OVERLAY}.naturalWidth, {OVERLAY}.naturalHeight]")
        width, height = Image.open(image_path).size
        assert size[0] / size[1] == pytest.approx(width / height, rel=0.01)
        before = await page.evaluate(f"{OVERLAY}.src")
        x, y, left = await page.evaluate(THUMB)
        await page.drag((x, y), (left, y))  # to the smallest value
        count = len(truth["scores"])
        await page.until(f"{ROWS} == {count}")
        await page.until(f"{OVERLAY}.src != {json.dumps(before)} && {OVERLAY}.complete")
        text = await page.evaluate("document.querySelector('#table').innerText")
        assert f"{truth['scores'][0]:.3f}".rstrip("0") in text
        await page.screenshot(folder / "page.png")
        assert Image.open(folder / "page.png").size[0] == 1280
        await page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder / "downloads"))
        await page.evaluate("document.querySelector('#download').click()")
        file = folder / "downloads" / "instances_0.05.json"
        for _ in range(300):
            if file.is_file():
                break
            await asyncio.sleep(0.1)
        assert len(json.loads(file.read_text())["instances"]) == count
        local = (url, "data:", "blob:", "about:", "chrome:")
        assert [request for request in page.requests if not request.startswith(local)] == []
        assert page.complaints == []


@pytest.mark.slow
def test_command_serves_the_page(tiny_model_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = processes.Child(processes.COMMAND, "demo", "--app", tiny_model_dir, "--port", port)
    end = time.monotonic() + 120
    try:
        while f"http://127.0.0.1:{port}" not in child.printed():
            assert child.process.is_alive() and time.monotonic() < end
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as answer:
            config = json.loads(answer.read())
        assert config["title"] == tiny_model_dir.name and not config["analytics_enabled"]
    finally:
        child.process.terminate()
        child.process.join(60)


def test_wrong_input_is_one_line(tmp_path, capsys):
    assert demo.main(["--app", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such folder" in error


def test_folder_of_a_space(tmp_path):
    folder = prepare_space(tmp_path / "space", "somebody/model")
    names = {file.name for file in folder.iterdir()}
    beside = {"visualize.py", "images.py", "errors.py", "thresholds.py"}
    assert names == {"app.py", "README.md", "requirements.txt", *beside}
    card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False).data.to_dict()
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and len(card["short_description"]) <= 60
    assert '"MODEL", "somebody/model"' in (folder / "app.py").read_text()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        prepare_space(folder, "somebody/model")
    with pytest.raises(ValueError, match="USER/NAME"):
        prepare_space(tmp_path / "other", "model")


ALONE = """
import json
sys.path.insert(0, sys.argv[1])
import app

model, processor = app.load(sys.argv[2], trust_remote_code=True)
app.build(model, processor, "alone")
overlay, rows, file = app.Segmenter(model, processor, "alone")(sys.argv[3], 0.05)
print(json.dumps([overlay.size, len(rows), len(json.loads(open(file).read())["instances"])]))
"""


@pytest.mark.slow
def test_a_space_works_without_the_library(without_library, tiny_model_dir, image_path, truth, tmp_path):
    space = prepare_space(tmp_path / "space", "somebody/model")
    repository = prepare_folder(tiny_model_dir, tmp_path / "repository", "somebody/model")
    result = processes.run(without_library + ALONE, space, repository, image_path)
    assert result.returncode == 0, result.stderr
    size, rows, instances = json.loads(result.stdout.splitlines()[-1])
    assert rows == instances == len(truth["scores"]) and min(size) >= 96
