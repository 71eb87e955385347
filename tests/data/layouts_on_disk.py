"""Small trees of published layouts for the tests, and the files in them."""

import numpy as np
from PIL import Image

SIZE = (40, 30)
OUTLINE = [5, 5, 10, 4, 15, 4, 20, 5, 25, 6, 30, 8, 34, 10, 33, 20, 29, 18, 24, 16, 19, 15, 14, 14, 9, 14, 4, 15]


def image(path, size=SIZE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def id_map(path, ids, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    if palette:
        image = Image.fromarray(ids.astype(np.uint8), "P")
        image.putpalette(list(range(256)) * 3)
    else:
        image = Image.fromarray(ids.astype(np.uint16))
    image.save(path)
    return path


def ctw_xml(boxes, name="0001.jpg"):
    entries = "".join(
        f'<box height="9" left="1" top="2" width="9"><label>{text}</label>'
        f"<segs>{','.join(map(str, points))}</segs><pts>1,2</pts></box>"
        for points, text in boxes
    )
    return f'<Annotations><image file="{name}">{entries}</image></Annotations>'


def write_ctw(root):
    """CTW1500 in both forms, one image each: (root, outline of the first text, outline of the second)."""
    image(root / "train_images" / "0001.jpg")
    image(root / "test_images" / "1001.jpg")
    for name in ("ctw1500_train_labels", "gt_ctw1500"):
        (root / name).mkdir()
    shifted = [value + 3 * (k % 2) for k, value in enumerate(OUTLINE)]
    (root / "ctw1500_train_labels/0001.xml").write_text(ctw_xml([(OUTLINE, "caf&#233;"), (shifted, "###")]))
    lines = [f"{','.join(map(str, points))},####{text}" for points, text in ((OUTLINE, "a, b"), (shifted, "###"))]
    (root / "gt_ctw1500/0001001.txt").write_text("\n".join(lines) + "\n")
    return root, OUTLINE, shifted
