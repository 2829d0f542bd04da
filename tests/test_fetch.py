"""Files from a server of our own: whole with the right digest, or absent."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import names, refuses

from patchdiffusion.system import fetch as module
from patchdiffusion.system.fetch import fetch

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cut` and `wrong` say how many answers are short or changed."""

    daemon_threads = False  # so that closing waits for them
    asked = 0
    cut = 0
    wrong = 0
    absent = 0


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.absent >= self.server.asked:
            self.send_error(503)
            return
        content = CONTENT
        if self.server.wrong >= self.server.asked:
            content = b"?" + content[1:]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:100] if self.server.cut >= self.server.asked else content)

    def log_message(self, format: str, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(module, "WAIT", 0.0)
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path))
    with Server(("127.0.0.1", 0), Handler) as own:
        thread = threading.Thread(target=own.serve_forever, args=(0.01,))
        thread.start()
        yield own
        own.shutdown()
        thread.join()


def ask(server: Server) -> Path:
    url = f"http://127.0.0.1:{server.server_port}/folder/net.pth"
    return fetch(url, digest=DIGEST, hint="give the file with --weights")


def nothing_left(folder: Path) -> bool:
    return not [f for f in folder.rglob("*") if f.is_file()]


def test_fetched_once(server: Server, tmp_path: Path) -> None:
    path = ask(server)
    assert path.read_bytes() == CONTENT
    assert path == tmp_path / "downloads" / f"{DIGEST[:8]}-net.pth"
    assert ask(server) == path
    assert server.asked == 1


def test_the_whole_digest_counts(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/folder/net.pth"
    with refuses("SHA-256", error=OSError):
        fetch(url, digest=DIGEST[:-1] + ("0" if DIGEST[-1] != "0" else "1"), hint="")


@pytest.mark.parametrize("fault", ["cut", "wrong", "absent"])
def test_s3_second_and_third_try(fault: str, server: Server) -> None:
    setattr(server, fault, 2)
    assert ask(server).read_bytes() == CONTENT
    assert server.asked == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [("cut", "100 of 7,000 bytes"), ("wrong", "SHA-256 is"), ("absent", "503")],
)
def test_s3_nothing_is_left(fault: str, said: str, server: Server, tmp_path: Path) -> None:
    setattr(server, fault, 99)
    with pytest.raises(OSError, match=said) as caught:
        ask(server)
    assert names(str(caught.value), "--weights")
    assert server.asked == 3
    assert nothing_left(tmp_path)


def test_a_file_that_was_damaged_later_is_named(server: Server) -> None:
    path = ask(server)
    path.write_bytes(b"?" + CONTENT[1:])
    with refuses(path.name, "SHA-256"):
        ask(server)


def test_no_network(server: Server) -> None:
    server.shutdown()
    server.server_close()
    with refuses("--weights", error=OSError):
        ask(server)
