import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from uplvp_hf.data import ImageError, InstanceDataset, Row, empty_objects, image_size, load_dataset_rows, open_image
from uplvp_hf.data.check import check_dataset
from uplvp_hf.models.images import open_bytes


@pytest.fixture
def pixels():
    """40 x 30 px; smooth, so that JPEG keeps it, and different in its four corners."""
    y, x = np.mgrid[0:30, 0:40]
    return np.stack([x * 6, y * 8, (x + y) * 3], axis=-1).astype(np.uint8)


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def test_16_bit_grey_is_scaled_to_8_bits(tmp_path):
    values = np.array([[0, 128, 129, 257], [32768, 32896, 65407, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(values).save(tmp_path / name)
        opened = np.asarray(open_image(tmp_path / name))
        assert opened.shape == (2, 4, 3) and opened.dtype == np.uint8
        for channel in range(3):
            np.testing.assert_array_equal(opened[..., channel], np.rint(values / 65535 * 255))


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_a_16_bit_file_are_guessed_with_a_warning(tmp_path, bits):
    white = 2**bits - 1
    values = np.array([[0, white // 2, white]], dtype=np.uint16)
    for name in ("few.png", "few.tif"):
        Image.fromarray(values).save(tmp_path / name)
        with pytest.warns(UserWarning, match=rf"few\..*end at {white}.*{bits} bits"):
            opened = np.asarray(open_image(tmp_path / name))
        assert opened[0, :, 0].tolist() == [0, round(white // 2 / white * 255), 255]


def test_a_file_that_states_its_range_needs_no_guess(tmp_path):
    values = np.array([[0, 100, 1000]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "stated.tif", tiffinfo={281: 4095})
    assert np.asarray(open_image(tmp_path / "stated.tif"))[0, :, 0].tolist() == [0, 6, 62]
    Image.fromarray(values * 0).save(tmp_path / "black.png")
    assert not np.asarray(open_image(tmp_path / "black.png")).any()


def test_float_pixels(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "unit.tif")
    assert np.asarray(open_image(tmp_path / "unit.tif"))[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0.0, 99.6, 255.0]], dtype=np.float32)).save(tmp_path / "eight.tif")
    with pytest.warns(UserWarning, match=r"eight\.tif.*end at 255.*0\.\.255"):
        assert np.asarray(open_image(tmp_path / "eight.tif"))[0, :, 0].tolist() == [0, 100, 255]
    for value in (300.0, -1.0, np.nan):
        Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "wide.tif")
        with pytest.raises(ImageError, match=rf"wide\.tif.*{value:g}"):
            open_image(tmp_path / "wide.tif")


def test_cmyk_jpeg(tmp_path, pixels):
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    assert Image.open(tmp_path / "c.jpg").mode == "CMYK"
    assert np.abs(np.asarray(open_image(tmp_path / "c.jpg")).astype(int) - pixels).max() < 12


def test_palette_with_transparency_shows_white(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0, 1, 2, 0, 1])
    image.save(tmp_path / "p.png", transparency=1)
    opened = np.asarray(open_image(tmp_path / "p.png"))
    colors = np.array([[255, 0, 0], [255, 255, 255], [0, 0, 255]])
    np.testing.assert_array_equal(opened, colors[[[0, 1, 2, 0], [1, 2, 0, 1]]])


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_on_white(tmp_path, mode):
    gray, alpha = np.array([[0, 100, 200, 50]], dtype=np.uint8), np.array([[255, 0, 255, 51]], dtype=np.uint8)
    channels = [gray] * (len(mode) - 1) + [alpha]
    Image.fromarray(np.stack(channels, axis=-1), mode=mode).save(tmp_path / "alpha.png")
    opened = np.asarray(open_image(tmp_path / "alpha.png"))[0, :, 0].astype(int)
    assert opened[:3].tolist() == [0, 255, 200]
    assert abs(opened[3] - (50 * 0.2 + 255 * 0.8)) <= 1


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_and_two_level(tmp_path, pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "gray.png")
    opened = np.asarray(open_image(tmp_path / "gray.png"))
    expected = np.asarray(image).astype(np.uint8) * (255 if mode == "1" else 1)
    np.testing.assert_array_equal(opened, np.repeat(expected[..., None], 3, axis=2))


TURNS = {  # what has to be done to the stored pixels, written down from the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_rotation(tmp_path, pixels, orientation):
    file = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(file, quality=100, exif=exif(orientation))
    stored = np.asarray(Image.open(file))
    upright = open_image(file)
    np.testing.assert_array_equal(np.asarray(upright), TURNS[orientation](stored))
    assert upright.size == image_size(file) == ((30, 40) if orientation >= 5 else (40, 30))
    assert upright.getexif().get(0x0112, 1) == 1, "a second reader would turn it again"


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_rotation_of_a_tiff(tmp_path, pixels, orientation):
    """Pillow turns TIFF files itself when it decodes them, and says their size as turned before that."""
    file = tmp_path / "turned.tif"
    Image.fromarray(pixels).save(file, exif=exif(orientation))
    turned = (30, 40) if orientation >= 5 else (40, 30)
    upright, stored = open_image(file), open_image(file, exif=False)
    np.testing.assert_array_equal(np.asarray(upright), TURNS[orientation](pixels))
    np.testing.assert_array_equal(np.asarray(stored), pixels)
    assert upright.size == image_size(file) == turned and image_size(file, exif=False) == (40, 30)
    np.testing.assert_array_equal(np.asarray(open_bytes(file.read_bytes())), np.asarray(upright))
    if orientation >= 5:
        assert open_image(file, size=(40, 30)).size == (40, 30)


def deep_png(file, values):
    """A PNG with 16 bits a color, which Pillow does not write: gray and alpha, RGB or RGBA by the last axis."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("bits", [12, 16])
def test_colors_of_16_bits(tmp_path, pixels, channels, bits):
    deep = (pixels[..., [0, 1, 2, 2]] / 255 * (2**bits - 1)).round().astype(np.uint16)
    shown = pixels[..., [0, 0, 0]] if channels == 2 else pixels
    deep = deep[..., [0, 3]] if channels == 2 else deep[..., :channels]
    deep[..., -1] = 65535 if channels != 3 else deep[..., -1]  # opaque
    deep_png(tmp_path / "deep.png", deep)
    if bits == 16:
        opened, levels = open_image(tmp_path / "deep.png"), 256
    else:
        with pytest.warns(UserWarning, match=r"deep\.png.*12 bits and brightened"):
            opened, levels = open_image(tmp_path / "deep.png"), 16
    assert np.abs(np.asarray(opened).astype(int) - shown).max() <= 256 / levels


def test_annotations_decide_the_frame_of_a_rotated_image(tmp_path, pixels):
    file = tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(file, quality=100, exif=exif(6))
    stored = np.asarray(Image.open(file))

    def row(width, height):
        return Row(
            image=str(file), image_id=1, file_name="turned.jpg", width=width, height=height, objects=empty_objects()
        )

    dataset = InstanceDataset([row(30, 40), row(40, 30), row(20, 15)], [])
    np.testing.assert_array_equal(np.asarray(dataset.load_image(0)), np.rot90(stored, -1))
    kept = dataset.load_image(1)
    np.testing.assert_array_equal(np.asarray(kept), stored)
    assert kept.getexif().get(0x0112, 1) == 1
    with pytest.raises(ImageError, match=r"turned\.jpg.*30x40.*20x15"):
        dataset.load_image(2)
    in_memory = InstanceDataset([{**row(40, 30), "image": Image.open(file)}], [])
    np.testing.assert_array_equal(np.asarray(in_memory.load_image(0)), stored)


def test_unreadable_exif_is_warned_of(tmp_path, pixels, monkeypatch):
    """Pillow 12 and later read around most damage; earlier ones raise such errors."""

    def fail(self):
        raise SyntaxError("not a TIFF file")

    Image.fromarray(pixels).save(tmp_path / "e.jpg")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.warns(UserWarning, match=r"e\.jpg.*not a TIFF file"):
        assert open_image(tmp_path / "e.jpg").size == (40, 30)


def broken_images(pixels):
    jpeg, png = io.BytesIO(), io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8))
    noise.save(jpeg, "JPEG", quality=95)
    noise.save(png, "PNG")
    return {
        "cut.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) * 2 // 3],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is not an image",
        "flipped.png": png.getvalue()[:20] + b"\xff\xff" + png.getvalue()[22:],
    }


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "empty.jpg", "text.jpg", "flipped.png"])
def test_broken_images_raise_and_name_the_file(tmp_path, pixels, name):
    (tmp_path / name).write_bytes(broken_images(pixels)[name])
    with pytest.raises(ImageError, match=name) as caught:
        open_image(tmp_path / name)
    assert caught.value.file == str(tmp_path / name)


def test_missing_image_and_folder_in_place_of_one(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(ImageError, match="no such image"):
            open_image(path)


def test_folder_of_images(tmp_path, pixels):
    """Good ones become rows, those without a readable head failures; cut off ones are found by `check_dataset`."""
    for name in ("b.png", "deep/er/a.JPG", ".hidden/x.png", "._ghost.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name, exif=exif(6))
    for name, content in broken_images(pixels).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "loop").symlink_to(tmp_path)
    dataset = load_dataset_rows(tmp_path)
    assert [row["file_name"] for row in dataset.rows] == ["b.png", "cut.jpg", "cut.png", "deep/er/a.JPG"]
    assert [row["image_id"] for row in dataset.rows] == [row["file_name"] for row in dataset.rows]
    assert (dataset[0]["width"], dataset[0]["height"]) == (30, 40) == dataset.load_image(0).size
    assert {failure["file"].split("/")[-1] for failure in dataset.failures} == {"empty.jpg", "text.jpg", "flipped.png"}
    report = check_dataset(lambda: load_dataset_rows(tmp_path), images=True)
    assert report["images"] == 4 and len(report["broken"]) == 5
    assert {fault["file"].split("/")[-1] for fault in report["broken"][3:]} == {"cut.jpg", "cut.png"}


def test_errors_survive_pickling(tmp_path):
    import pickle

    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "none.jpg")
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ImageError and str(again) == str(caught.value) and again.file == caught.value.file
