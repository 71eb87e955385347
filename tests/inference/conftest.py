"""A web server on loopback that serves images, and everything that can go wrong instead of one."""

import contextlib
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image


def png(size=(80, 50), color=(200, 30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format="PNG")
    return stream.getvalue()


class Pages(BaseHTTPRequestHandler):
    def log_message(self, *unused):
        pass

    def answer(self, code, content=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough
            getattr(self, f"page_{name.partition('.')[0]}", lambda: self.answer(404))()

    def page_good(self):
        self.answer(200, png(), Content_Type="image/png")

    def page_text(self):
        self.answer(200, b"<html>not here</html>", Content_Type="text/html")

    def page_endless(self):
        self.answer(200, Content_Type="image/png")
        while True:
            self.wfile.write(bytes(65536))

    def page_packed(self):
        import gzip

        self.answer(200, gzip.compress(bytes(3_000_000)), Content_Encoding="gzip")

    def page_loop(self):
        self.answer(302, Location="/loop.png")

    def page_moved(self):
        self.answer(302, Location="/good.png")

    def page_local(self):
        self.answer(302, Location="file:///etc/hostname")

    def page_silent(self):
        self.server.closing.wait(20)

    def page_trickle(self):
        self.answer(200, Content_Type="image/png")
        for byte in png():
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.closing.wait(0.1):
                return

    def page_broken(self):
        self.answer(200, png()[:40], Content_Length="4000")


@pytest.fixture(scope="module")
def web():
    """The server: `address` is http://127.0.0.1:port, `asked` the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    server.asked, server.closing = [], threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join(5)
