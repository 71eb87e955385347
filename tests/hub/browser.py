"""A headless Chromium, driven over its DevTools protocol: no packages but aiohttp, which datasets brings."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--window-size=1280,1400", "--remote-debugging-port=0",
    # Anything but this machine is not found, so that a page that needs the network shows it.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip


class Page:
    """One tab. `requests` holds the address of everything that it asked for, `complaints` its console errors."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count = socket, 0
        self.answers: dict[int, asyncio.Future] = {}
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            event = json.loads(message.data)
            if "id" in event:
                self.answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(event["params"]["exceptionDetails"]["text"])

    async def send(self, method: str, **parameters) -> dict:
        self.count += 1
        self.answers[self.count] = future = asyncio.get_running_loop().create_future()
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        answer = await asyncio.wait_for(future, 60)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    async def evaluate(self, code: str):
        """The value of an expression of JavaScript."""
        result = await self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{code}: {result['exceptionDetails']}"
        return result["result"].get("value")

    async def until(self, code: str, seconds: float = 90):
        """Waits until the expression is true; returns its value."""
        for _ in range(int(seconds / 0.1)):
            if value := await self.evaluate(code):
                return value
            await asyncio.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {code}")

    async def choose_file(self, selector: str, file: Path) -> None:
        root = await self.send("DOM.getDocument")
        node = await self.send("DOM.querySelector", nodeId=root["root"]["nodeId"], selector=selector)
        await self.send("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(file)])

    async def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the left button at one point of the window and releases it at another."""
        for kind, (x, y), button in (
            ("mousePressed", start, "left"),
            ("mouseMoved", end, "left"),
            ("mouseReleased", end, "left"),
        ):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=1, clickCount=1)

    async def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode((await self.send("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def open_page(url: str, profile: Path):
    """A `Page` at `url` in a browser of its own, whose profile is the new folder `profile`."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = await _port(profile / "DevToolsActivePort", browser)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                tab = next(tab for tab in await response.json() if tab["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Network", "Runtime", "DOM"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=url)
                yield page
                page.reader.cancel()
    finally:
        browser.terminate()
        browser.wait(30)


async def _port(file: Path, browser: subprocess.Popen) -> int:
    for _ in range(600):
        if file.is_file() and len(lines := file.read_text().splitlines()) == 2:
            return int(lines[0])
        assert browser.poll() is None, "the browser ended at once"
        await asyncio.sleep(0.1)
    raise AssertionError("the browser did not come up")
