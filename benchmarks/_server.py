"""Start `transformers serve` on this machine, and send requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTS_WITHIN = 180  # seconds
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        model: folder of the model that it serves.
        port: its port on this machine.
        process: its process.
    """

    model: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, **body: Any) -> Any:
        """Send a request for the model, and return the answer: JSON, or events if it streams."""
        data = json.dumps({"model": str(self.model), **body}).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            if body.get("stream"):
                lines = [line.decode().strip() for line in answer]
                found = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
                return [json.loads(one) for one in found if one != "[DONE]"]
            return json.loads(answer.read())

    def processor_seconds(self) -> float:
        """Return the processor time that the server has used."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat")
            .read_text(encoding="utf-8")
            .rpartition(")")[2]
            .split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serve(model: Path, *options: str) -> Iterator[Server]:
    """Serve a model on a free port of this machine, and end the server at the end of the block.

    The server generates on one thread.

    Raises:
        RuntimeError: if the server does not start. The message is the last line that it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        Path(home, "hub").mkdir()
        settings = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        log = Path(home, "log")
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
        command += ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--port", str(port), *options],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | settings | {"PYTHONPATH": path},
            )
        server = Server(model, port, process)
        try:
            _wait(server, log)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _wait(server: Server, log: Path) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until and server.process.poll() is None:
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(server.url + "/health", timeout=5)
            return
        time.sleep(0.2)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise RuntimeError(f"the server of {server.model} did not start: {(lines or [''])[-1]}")
