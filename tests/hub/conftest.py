"""A Hub on loopback, and clients that talk to it."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from local_hub import TOKEN, LocalHub


@pytest.fixture
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def online(monkeypatch):
    """The client of this process may send requests, which tests otherwise forbid."""
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub_client(hub, online, monkeypatch, tmp_path):
    """The client of this process talks to the loopback Hub, as its user `uplvp`, and does not wait between tries."""
    import transformers.utils.hub
    from huggingface_hub.utils import _http

    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # another test may have made it, with its address
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    return hub


@pytest.fixture
def fresh_process(hub, tmp_path):
    """Runs Python code in a process of its own, with its own HF_HOME, against the loopback Hub."""

    def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        # No keyboard: a question about remote code would fail, as it should.
        return subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )

    return run
