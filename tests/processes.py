"""Python processes that start in a fraction of a second: children of a server that has imported the heavy libraries.

A process of its own takes five seconds to import torch and transformers. The server, one for each worker of pytest,
takes them once, and knows nothing of our library: a child that hides it, or that is to import it first, is as good as
a fresh interpreter. What depends on when the heavy libraries are imported, and environment variables that they read
then (HF_HOME, HF_ENDPOINT), need `anew`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# How `torch.multiprocessing.start_processes(..., start_method="forkserver")` starts its processes, too.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torchvision", "timm", "accelerate", "evaluate", "scipy.optimize", "scipy.ndimage", "pycocotools.mask",
     "PIL.Image", "transformers.modeling_utils", "transformers.pipelines", "transformers.models.auto.modeling_auto",
     "transformers.models.auto.image_processing_auto", "transformers.models.mask2former.modeling_mask2former",
     "transformers.models.clip.modeling_clip", "transformers.models.timm_backbone.modeling_timm_backbone"]
)  # fmt: skip
COMMAND = "import sys\nfrom uplvp_hf.cli import main\nsys.exit(main())"
# Its worker processes are forked, too.
FORKING_COMMAND = f"""
import multiprocessing
given = multiprocessing.get_context
multiprocessing.get_context = lambda kind=None: given("fork")
{COMMAND}"""


class Child:
    """A process that runs `program`, Python code or the path of a script, with `arguments` in `sys.argv`.

    `environment` is added to that of this process. What it prints is kept in files, and its stdin is closed.
    """

    def __init__(self, program: str | Path, *arguments, environment=None, cwd=None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        self.arguments = [str(argument) for argument in arguments]
        words = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        call = (program, self.arguments, words, str(cwd or os.getcwd()), self.files)
        self.process = CONTEXT.Process(target=_run, args=call)
        self.process.start()

    def printed(self) -> str:
        """Its stdout so far."""
        return self.files[0].read_text() if self.files[0].exists() else ""

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Exit code and outputs; fails after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        texts = [file.read_text() if file.exists() else "" for file in self.files]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Kills the process as soon as `condition()` holds; fails if it has ended before."""
        end = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, self.files[1].read_text()
            time.sleep(0.001)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


def run(program: str | Path, *arguments, **options) -> subprocess.CompletedProcess:
    """A `Child` that is waited for."""
    return Child(program, *arguments, **options).wait()


def instead_of_subprocess(command: list[str], **unused) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, SCRIPT, ...])` gives, by `run`."""
    return run(Path(command[1]), *command[2:])


def anew(code: str, *arguments, environment=None, cwd=None) -> subprocess.CompletedProcess:
    """The same in a new interpreter, which imports everything itself."""
    words = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def run_together(program: str | Path, *arguments, count: int = 2, environment=None, cwd=None):
    """The program in `count` processes with what torchrun tells them; fails with the first error.

    Returns what each printed, stdout before stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    words = [{name: str(value) for name, value in {**shared, **rank}.items()} for rank in ranks]
    children = [Child(program, *arguments, environment=one, cwd=cwd) for one in words]
    ends = [child.wait() for child in children]
    for end in ends:
        assert end.returncode == 0, end.stderr[-3000:]
    return [end.stdout + end.stderr for end in ends]


def _run(program: str | Path, arguments: list[str], environment: dict, cwd: str, files: list[Path]) -> None:
    for number, file in enumerate(files, start=1):
        with open(file, "wb") as stream:
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # as in any interpreter; it was the server's
    os.chdir(cwd)
    import torch
    from transformers import dynamic_module_utils

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    dynamic_module_utils.HF_MODULES_CACHE = str(files[0].with_name("modules"))  # no copies of code from other tests
    script = isinstance(program, Path)
    sys.argv = [str(program) if script else "-c", *arguments]
    sys.path.insert(0, str(program.resolve().parent) if script else "")
    try:
        if script:
            runpy.run_path(str(program), run_name="__main__")
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
        sys.stdout.flush()
