"""The endpoint's handler, loaded from a pushed folder as the endpoint does, answers what `InferenceClient` parses."""

import base64
import gzip
import importlib.util
import io
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import processes
import pytest
from huggingface_hub import InferenceClient
from PIL import Image

from uplvp_hf.hub import prepare_folder


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    return prepare_folder(tiny_model_dir, tmp_path_factory.mktemp("push") / "repository", "uplvp/x")


@pytest.fixture(scope="module")
def module(folder):
    """`handler.py`, executed from its file."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def handler(module, folder):
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def image_path(scenes_dir):
    return sorted((scenes_dir / "images").iterdir())[0]


@pytest.fixture
def serve():
    """Starts loopback servers: path -> function(request body, headers) -> (status, headers, body)."""
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, content = answer(self.path, body, self.headers)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


LOW = {"threshold": 0.0}  # the model has random weights


def masks_of(answer):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["mask"])))) for entry in answer]


def test_all_forms_of_an_image_give_the_same(handler, image_path, serve, monkeypatch):
    content = image_path.read_bytes()
    text = base64.b64encode(content).decode()
    monkeypatch.setenv("ALLOW_LOCAL_URLS", "1")
    url = serve(lambda path, body, headers: (200, {}, content) if path == "/b" else (302, {"Location": "/b"}, b""))
    forms = [content, bytearray(content), text, "\n".join([text[:70], text[70:]]), f"data:image/png;base64,{text}"]
    forms += [f"{url}/a", Image.open(image_path)]
    answers = [handler({"inputs": form, "parameters": LOW}) for form in forms]
    assert answers[0] and all(answer == answers[0] for answer in answers[1:])
    assert handler(content) == handler({"inputs": content})


def test_answer_is_that_of_the_model(handler, image_path, tiny_model_dir):
    import torch

    from uplvp_hf import UplvpForInstanceSegmentation, UplvpImageProcessor

    image = Image.open(image_path).convert("RGB")
    processor = UplvpImageProcessor.from_pretrained(tiny_model_dir)
    model = UplvpForInstanceSegmentation.from_pretrained(tiny_model_dir).eval()
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    size = [(image.height, image.width)]
    expected = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=size)[0]
    answer = handler({"inputs": image, "parameters": LOW})
    assert [entry["label"] for entry in answer] == [model.config.id2label[k] for k in expected["labels"].tolist()]
    assert [entry["score"] for entry in answer] == pytest.approx(expected["scores"].tolist())
    for mask, truth in zip(masks_of(answer), expected["masks"].numpy(), strict=True):
        assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255} and np.array_equal(mask > 0, truth)


def test_parameters(handler, image_path):
    content = image_path.read_bytes()
    everything = handler({"inputs": content, "parameters": LOW})
    scores = [entry["score"] for entry in everything]
    assert scores == sorted(scores, reverse=True)
    middle = scores[len(scores) // 2]
    some = handler({"inputs": content, "parameters": {"threshold": middle, "subtask": "instance"}})
    assert 0 < len(some) < len(everything) and some == everything[: len(some)]
    assert handler({"inputs": content, "parameters": {"threshold": f"{middle!r}"}}) == some  # ?threshold=...
    wide = handler({"inputs": content, "parameters": {**LOW, "mask_threshold": "0.2"}})
    assert sum(mask.sum() for mask in masks_of(wide)) > sum(mask.sum() for mask in masks_of(everything))
    flat = masks_of(handler({"inputs": content, "parameters": {**LOW, "overlap_mask_area_threshold": 0.0}}))
    assert np.max(np.sum(np.stack(flat) > 0, axis=0)) == 1  # every pixel at most once
    assert np.max(np.sum(np.stack(masks_of(everything)) > 0, axis=0)) > 1


@pytest.mark.parametrize(
    "parameters, said",
    [
        ({"treshold": 0.5}, "treshold"),
        ({"threshold": 1.5}, "threshold is 1.5; a number from 0 to 1"),
        ({"mask_threshold": "half"}, "mask_threshold is 'half'; a number"),
        ({"threshold": "1.5"}, "threshold is '1.5'; a number"),
        ({"threshold": "nan"}, "threshold is 'nan'"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"subtask": "panoptic"}, "'panoptic' is not what this model does"),
        ([0.5], '"parameters" is a list'),
    ],
)
def test_wrong_parameters(handler, image_path, parameters, said):
    with pytest.raises(ValueError, match=said):
        handler({"inputs": image_path.read_bytes(), "parameters": parameters})


def test_bad_images_are_refused_with_a_sentence(handler, module, image_path, serve, monkeypatch):
    content = image_path.read_bytes()
    text = base64.b64encode(content).decode()
    huge = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(huge, "PNG")
    url = serve(lambda path, body, headers: {
        "/page": (200, {"Content-Type": "text/html"}, b"<html>no image</html>"),
        "/loop": (302, {"Location": "/loop"}, b""),
        "/long": (200, {}, content * 10),
    }.get(path, (404, {}, b"")))  # fmt: skip
    monkeypatch.setenv("ALLOW_LOCAL_URLS", "1")
    monkeypatch.setenv("MAX_BYTES", str(len(content) * 5))
    cases = [
        (text[:-3], "base64"), ("?" + text, "base64"), ("", "is empty"), ("data:image/png,abc", "data URL"),
        (b"GIF89a", "not an image"), (base64.b64encode(b"hello there").decode(), "not an image"),
        (content[: len(content) // 2], "cannot be decoded|not an image"), ([text], "is a list"), (7, "is a int"),
        (huge.getvalue(), "too large|more than the 50,000,000"), (f"{url}/page", "not an image"),
        (f"{url}/loop", "redirects more than"), (f"{url}/none", "answered 404"), (f"{url}/long", "gives more than"),
        ("http://127.0.0.1:9/x.png", "cannot be fetched"),
    ]  # fmt: skip
    for source, said in cases:
        with pytest.raises(ValueError, match=said):
            handler({"inputs": source})
    monkeypatch.setenv("MAX_PIXELS", "100")
    with pytest.raises(ValueError, match="more than the 100"):
        module.read_image(content)


def test_addresses_of_the_own_network_are_refused(module, serve):
    asked = []
    url = serve(lambda path, body, headers: asked.append(path) or (200, {}, b""))
    hosts = ["169.254.169.254/latest/meta-data", "[::1]", "10.0.0.1", "2130706433", "[::ffff:10.0.0.1]", "224.0.0.1"]
    hosts += ["[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::1]"]  # forms of 127.0.0.1
    for address in (f"{url}/x", url.upper(), *(f"http://{host}/" for host in hosts)):
        with pytest.raises(ValueError, match="not a public address"):
            module.read_image(address)
    assert not asked
    with pytest.raises(ValueError, match='no "inputs"'):
        module.EndpointHandler.__call__(None, {"image": 1})


def test_a_name_that_changes_its_address_is_asked_once(module, serve, image_path, monkeypatch):
    """A second lookup might lead into the own network; the address that was checked is the one connected to."""
    looked_up, hosts = [], []
    url = serve(lambda path, body, headers: hosts.append(headers["Host"]) or (200, {}, image_path.read_bytes()))
    port = int(url.rsplit(":", 1)[1])

    def getaddrinfo(host, port, **how):
        looked_up.append(host)
        return [(0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(module, "is_public", lambda address: True)
    monkeypatch.setattr(module, "socket", SimpleNamespace(getaddrinfo=getaddrinfo, IPPROTO_TCP=socket.IPPROTO_TCP))
    assert module.read_image(f"http://images.invalid:{port}/x").size == Image.open(image_path).size
    assert looked_up == ["images.invalid"] and hosts == [f"images.invalid:{port}"]


def test_a_small_answer_does_not_unpack_to_a_large_one(module, serve, monkeypatch):
    monkeypatch.setenv("ALLOW_LOCAL_URLS", "1")
    asked = []
    bomb = gzip.compress(bytes(5_000_000))
    url = serve(lambda path, body, headers: asked.append(headers) or (200, {"Content-Encoding": "gzip"}, bomb))
    with pytest.raises(ValueError, match=f"The {len(bomb):,} bytes sent are not an image"):
        module.read_image(url)
    assert asked[0]["Accept-Encoding"] == "identity"


def test_a_slow_answer_ends(module, serve, monkeypatch):
    monkeypatch.setenv("ALLOW_LOCAL_URLS", "1")
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=iter((0, 21)).__next__))
    with pytest.raises(ValueError, match="takes more than 20 seconds"):
        module.read_image(serve(lambda path, body, headers: (200, {}, b"drop")))


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/", "http://a b/", f"http://{'a' * 70}.com/"])
def test_addresses_that_are_none_are_named(module, url):
    with pytest.raises(ValueError, match=re.escape(url)):
        module.read_image(url)


def test_images_become_rgb_as_in_the_library(handler, monkeypatch):
    from uplvp_hf.data import to_rgb

    seen = []
    processor = handler.segmenter.image_processor
    process = processor.preprocess
    monkeypatch.setattr(processor, "preprocess", lambda image, **how: seen.append(image) or process(image, **how))
    values = np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16)
    clear = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 4)).astype(np.uint8))
    for image in (Image.fromarray(values), clear, clear.convert("LA"), clear.convert("CMYK"), clear.convert("1")):
        stream = io.BytesIO()
        image.save(stream, "TIFF")
        handler(stream.getvalue())
        assert np.array_equal(seen.pop(), to_rgb(image)), image.mode


def test_no_program_is_started_for_an_image(module):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow would, and start Ghostscript
    with pytest.raises(ValueError, match="are not an image; JPEG, "):
        module.read_image(eps)


def test_inference_client_parses_the_answer(handler, image_path, serve, online):
    """The client of huggingface_hub against a server that does what the endpoint's container does."""

    def endpoint(path, body, headers):
        if (headers["Content-Type"] or "").startswith("application/json"):
            request = json.loads(body)
        else:
            request = {"inputs": Image.open(io.BytesIO(body))}
        return 200, {"Content-Type": "application/json"}, json.dumps(handler(request)).encode()

    client = InferenceClient(model=serve(endpoint))
    found = client.image_segmentation(str(image_path), threshold=0.0, mask_threshold=0.4)
    expected = handler({"inputs": image_path.read_bytes(), "parameters": {"threshold": 0.0, "mask_threshold": 0.4}})
    assert [(item.label, item.score) for item in found] == [(entry["label"], entry["score"]) for entry in expected]
    size = Image.open(image_path).size
    assert found and all(item.mask.size == size and item.mask.mode == "L" for item in found)
    assert client.image_segmentation(image_path.read_bytes()) == []  # raw bytes; no score above one half


ALONE = """
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler

answer = EndpointHandler(sys.argv[1])({"inputs": open(sys.argv[2], "rb").read(), "parameters": {"threshold": 0.0}})
import json
json.dump(answer, open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_works_without_the_library(without_library, handler, folder, image_path, tmp_path):
    output = tmp_path / "answer.json"
    done = processes.run(without_library + ALONE, folder, image_path, output)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text()) == handler({"inputs": image_path.read_bytes(), "parameters": LOW})
