"""Files, folders, patterns and addresses; what is refused, and that nothing leaves the folder of downloads."""

import os

import pytest
from PIL import Image

from uplvp_hf.data import DataError, ImageError
from uplvp_hf.inference.download import Limits, fetch_image
from uplvp_hf.inference.sources import check_pixels, find_images, pixels_unbounded, plain_stem

QUICK = Limits(max_bytes=1_000_000, pause=0.4, seconds=0.8, redirects=3)


def image(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)
    return path


def test_an_image_from_the_web(web, tmp_path):
    for page in ("good.png", "moved.png"):
        data = find_images([f"{web.address}/{page}"], tmp_path)
        (row,) = data.rows
        assert (row["width"], row["height"], row["image_id"]) == (80, 50, 1)
        assert row["file_name"] == f"{web.address}/{page}" and data.load_image(0).getpixel((0, 0)) == (200, 30, 30)
    assert len(list(tmp_path.iterdir())) == 2
    asked = len(web.asked)
    assert len(find_images([f"{web.address}/good.png"], tmp_path)) == 1 and len(web.asked) == asked


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("missing.png", "answers 404"),
        ("text.png", "is not an image: the server sent 21 bytes of text/html"),
        ("endless.png", "more than 1000000 bytes"),
        ("packed.png", "more than 1000000 bytes"),
        ("loop.png", "more than 3 redirects"),
        ("local.png", "not http or https"),
        ("silent.png", "silent for 0.4 s"),
        ("trickle.png", "not there after 0.8 s"),
        ("broken.png", "cannot be fetched"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(web, page, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        fetch_image(f"{web.address}/{page}", QUICK)
    assert str(caught.value).startswith(f"{web.address}/{page}: ")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a.png", "/etc/hostname"])
def test_only_http(url):
    with pytest.raises(ImageError, match="not an address of http"):
        fetch_image(url)


def test_nobody_listens(tmp_path):
    with pytest.raises(DataError, match="cannot be fetched: ConnectError"):
        find_images(["http://127.0.0.1:9/a.png"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_addresses_name_no_files(web, tmp_path):
    address = f"{web.address}/../../%2e%2e/good.png?x=/../../etc"
    assert len(find_images([address], tmp_path / "downloads")) == 1
    (file,) = (tmp_path / "downloads").iterdir()
    assert file.name.isalnum() and list(tmp_path.iterdir()) == [tmp_path / "downloads"]


def test_failures_beside_what_can_be_read(web, tmp_path):
    good = image(tmp_path / "a.png")
    text = tmp_path / "b.png"
    text.write_text("no image")
    data = find_images([str(good), str(text), f"{web.address}/text.png"], tmp_path / "downloads")
    assert [row["file_name"] for row in data.rows] == ["a.png"]
    assert [failure["file"] for failure in data.failures] == [str(text), f"{web.address}/text.png"]
    with pytest.raises(DataError, match="file://"):
        find_images([f"file://{good}"], tmp_path)


def test_patterns_folders_and_numbers(tmp_path):
    for name in ("b/2.png", "b/c/3.jpg", "1.png", "b/notes.txt", "[x].png"):
        (image if name[-3:] != "txt" else lambda path: path.write_text("-"))(tmp_path / name)
    data = find_images([f"{tmp_path}/**/*.[pj]*g", str(tmp_path / "b"), str(tmp_path / "[x].png")])
    names = [os.path.basename(row["image"]) for row in data.rows]
    assert names == ["1.png", "[x].png", "2.png", "3.jpg", "2.png", "3.jpg", "[x].png"]
    assert [row["image_id"] for row in data.rows] == list(range(1, 8))
    with pytest.raises(DataError, match="no file has such a name"):
        find_images([f"{tmp_path}/*.gif"])
    with pytest.raises(DataError, match="no such file or folder"):
        find_images([f"{tmp_path}/none"])
    assert [f["file"] for f in find_images([f"{tmp_path}/b/*"]).failures] == [f"{tmp_path}/b/notes.txt"]


def test_gigapixel_images_are_refused_by_their_head_and_let_through_on_request(tmp_path):
    """A PNG of 20000 x 20000 pixels takes 50 kB; Pillow alone refuses it whatever is asked for."""
    large, small = tmp_path / "large.png", image(tmp_path / "small.png")
    Image.new("1", (20000, 20000)).save(large)
    bound = Image.MAX_IMAGE_PIXELS
    data = find_images([str(tmp_path)])
    assert [row["image"] for row in data.rows] == [str(small)]
    assert "400 million pixels, more than the 100 million" in data.failures[0]["reason"]
    assert "--max-pixels" in data.failures[0]["reason"]
    data = find_images([str(large)], max_pixels=400_000_000)
    assert (data[0]["width"], data[0]["height"]) == (20000, 20000)
    with pytest.raises(ImageError, match=r"^.*large.png: 20000 x 20000 are 400 million"):
        find_images([str(large)], max_pixels=399_999_999)
    with pytest.raises(DataError, match=r"none of the 2 images can be read; the first: .*400 million"):
        find_images([str(large)] * 2)
    assert bound == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="26 x 4"):
        check_pixels((26, 4), 100, "x")


def test_blocks_without_a_bound_may_overlap():
    bound = Image.MAX_IMAGE_PIXELS
    first, second = pixels_unbounded(), pixels_unbounded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert bound == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("../../x.png", "x"),
        ("/etc/passwd", "passwd"),
        ("a\\..\\b c\n.png", "b_c"),
        ("http://host/a/%2e%2e%2fq%00r.jpg?k=/v.png", "q_r"),
        ("http://host/", "image"),
        ("..", "image"),
        ("\u00e4\u4e2d.png", "\u00e4\u4e2d"),
        ("n" * 300 + ".png", "n" * 80),
        (".hidden", "hidden"),
    ],
)
def test_stems_are_safe(name, stem):
    assert plain_stem(name) == stem
