"""Answers requests to an Inference Endpoint of this repository by the image-segmentation contract.

Request: `{"inputs": IMAGE, "parameters": {...}}`, or the image's bytes as the body. IMAGE is a base64 text, a
data URL, an http(s) address, bytes, or a PIL image. Answer: `[{"label", "score", "mask"}]`, best first, masks as
base64 PNG of the image's size with 255 inside. A semantic segmenter answers with one mask a class that is there, and
null as its score.

Environment: MAX_PIXELS (default 50,000,000) is the largest image, MAX_BYTES (default 50,000,000) the largest
download. ALLOW_LOCAL_URLS=1 lets requests name addresses of the endpoint's own network, which is refused otherwise.
Downloads take no proxy and no passwords from the environment.
"""

import base64
import binascii
import contextlib
import io
import ipaddress
import json
import os
import socket
import time
from urllib.parse import urljoin, urlsplit

import httpx
import torch
from PIL import Image
from transformers import pipeline

SEMANTIC = ("icpc",)  # model types
PARAMETERS = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
MAX_REDIRECTS = 5
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
TIMEOUT = 20  # seconds, for every answer and for a download as a whole
# What Pillow decodes itself; for others, such as EPS, it starts programs.
Image.init()
_WANTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
FORMATS = [name for name in _WANTED if name in Image.OPEN]


class EndpointHandler:
    """Loads the model once; `path` is the folder of the repository."""

    def __init__(self, path: str = "") -> None:
        path = path or os.path.dirname(os.path.abspath(__file__))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with open(os.path.join(path, "config.json"), encoding="utf-8") as stream:
            self.semantic = json.load(stream)["model_type"] in SEMANTIC
        task = "image-segmentation" if self.semantic else "instance-segmentation"
        self.segmenter = pipeline(task, model=path, device=device, trust_remote_code=True)

    def __call__(self, data: dict | bytes) -> list[dict]:
        """The instances of one image, or its classes.

        Parameters of a request, which only instances have: `threshold` (0..1) is the least score; `mask_threshold`
        (0..1) the least probability of a pixel, both as the pipeline has them where they are missing; with
        `overlap_mask_area_threshold` (0..1) every pixel goes to the best instance, and instances of which less than
        this share is left are dropped, as the pipeline of transformers does; without it masks may overlap. `subtask` is
        "instance", or "semantic".

        Raises ValueError, with what to send instead, for anything else.
        """
        if isinstance(data, (bytes, bytearray)):
            data = {"inputs": data}
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError('The request has no "inputs". Send {"inputs": IMAGE} or the bytes of an image.')
        options = read_parameters(data.get("parameters"), self.semantic)
        image = read_image(data["inputs"])
        if self.semantic:
            found = self.segmenter(image, subtask="semantic")
        else:
            found = self.segmenter(image, masks="pil", **options)
        return [{"label": item["label"], "score": item["score"], "mask": to_png(item["mask"])} for item in found]


def read_parameters(given: dict | None, semantic: bool = False) -> dict:
    """The parameters of a request as numbers. Raises ValueError, naming the parameter."""
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f'"parameters" is a {type(given).__name__}; an object such as {{"threshold": 0.5}} is needed.')
    given = {name: value for name, value in (given or {}).items() if value is not None}
    wanted, known = ("semantic", ()) if semantic else ("instance", PARAMETERS)
    subtask = given.pop("subtask", wanted)
    if subtask != wanted:
        raise ValueError(f"subtask {subtask!r} is not what this model does; leave it out.")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"Unknown parameters {unknown}; there are {sorted((*known, 'subtask'))}.")
    options = {}
    for name, value in given.items():
        number = value
        if isinstance(value, str):  # of a query such as ?threshold=0.2
            with contextlib.suppress(ValueError):  # refused below, as it was sent
                number = float(value)
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 <= number <= 1:
            raise ValueError(f"{name} is {value!r}; a number from 0 to 1 is needed.")
        options[name] = number
    return options


def read_image(source) -> Image.Image:
    """The opened, not yet decoded image of anything that a request may hold. Raises ValueError."""
    if isinstance(source, str):
        source = read_text(source.strip())
    if isinstance(source, (bytes, bytearray)):
        try:
            source = Image.open(io.BytesIO(source), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"The image is too large ({error}). Scale it down.") from error
        except Exception as error:
            known = ", ".join(FORMATS)
            raise ValueError(f"The {len(source):,} bytes sent are not an image; {known} are read.") from error
    if not isinstance(source, Image.Image):
        raise ValueError(f'"inputs" is a {type(source).__name__}; one image as text or bytes is needed.')
    limit = int(os.environ.get("MAX_PIXELS", "50000000"))
    if source.width * source.height > limit:  # known before a pixel is decoded
        raise ValueError(
            f"The image has {source.width} x {source.height} pixels, more than the {limit:,} that are taken here. "
            "Scale it down, or set MAX_PIXELS of the endpoint."
        )
    return source  # the pipeline decodes it as training does


def read_text(text: str) -> bytes:
    """The bytes behind an http(s) address, a data URL or base64. Raises ValueError."""
    if text[:8].lower().startswith(("http://", "https://")):
        return download(text)
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise ValueError("A data URL must have the form data:image/...;base64,DATA.")
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f'"inputs" is neither an http(s) address nor correct base64 ({error}). Send the image\'s bytes in base64.'
        ) from error
    if not content:
        raise ValueError('"inputs" is empty. Send an image.')
    return content


def download(url: str) -> bytes:
    """What an address gives, at most MAX_BYTES. Every hop must lead to a public address. Raises ValueError."""
    shown, end = url, time.monotonic() + TIMEOUT
    try:
        with httpx.Client(timeout=TIMEOUT, trust_env=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                response = client.send(request_to(client, url), stream=True)
                try:
                    if not response.has_redirect_location:
                        return read_answer(response, shown, end)
                    url = urljoin(url, response.headers["Location"])
                finally:
                    response.close()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise ValueError(f"{shown} cannot be fetched ({error}). Check the address, or send the bytes.") from error
    raise ValueError(f"{shown} redirects more than {MAX_REDIRECTS} times. Send the address of the image itself.")


def request_to(client: httpx.Client, url: str) -> httpx.Request:
    """A request to the address that was checked: a name that is looked up again may lead elsewhere."""
    host, address = public_address(url)
    request = client.build_request("GET", url, headers={"Accept-Encoding": "identity"})
    request.url = request.url.copy_with(host=f"[{address}]" if ":" in address else address)
    request.extensions["sni_hostname"] = host  # certificates are held against the name
    return request


def read_answer(response: httpx.Response, shown: str, end: float) -> bytes:
    """The body as it is sent, so that nothing small unpacks to something large."""
    limit = int(os.environ.get("MAX_BYTES", "50000000"))
    if response.status_code != 200:
        raise ValueError(f"{shown} answered {response.status_code}, not with an image.")
    content = bytearray()
    for chunk in response.iter_raw():
        content += chunk
        if len(content) > limit:
            raise ValueError(f"{shown} gives more than {limit:,} bytes. Send a smaller image.")
        if time.monotonic() > end:
            raise ValueError(f"{shown} takes more than {TIMEOUT} seconds. Send the bytes instead.")
    return bytes(content)


def public_address(url: str) -> tuple[str, str]:
    """(host, an address of it). Raises ValueError if any of its addresses is inside the endpoint's own network, where
    requests have no business."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{url} is not a correct address ({error}).") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"{url} is not an http(s) address.")
    found = [entry[4][0].split("%")[0] for entry in socket.getaddrinfo(host, port or 80, proto=socket.IPPROTO_TCP)]
    for address in found:
        if not is_public(ipaddress.ip_address(address)) and os.environ.get("ALLOW_LOCAL_URLS") != "1":
            raise ValueError(f"{url} leads to {address}, which is not a public address. Send the bytes instead.")
    return host, min(found, key=lambda address: ":" in address)  # not every container has IPv6


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is one machine of the open internet, and no IPv6 form of some IPv4 address (6to4, Teredo, NAT64)."""
    if address.version == 6 and (address not in _GLOBAL_IPV6 or address.sixtofour or address.teredo):
        return False
    return address.is_global and not address.is_multicast


def to_png(mask: Image.Image) -> str:
    """A mask as base64 PNG, 255 inside."""
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
