"""`ttmray serve`: the page over HTTP, by the standard library: a dozen requests need no framework.

Nothing is fetched from anywhere else. On a loopback address whoever uses this machine may ask; requests that other
pages make a browser send are refused by their `Host` and `Origin`. On any other address every request needs the token.
"""

import base64
import hashlib
import ipaddress
import json
import re
import secrets
import sys
from dataclasses import asdict
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6, gethostname
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from ttmray import pages
from ttmray.console import console
from ttmray.errors import EXIT_OK, UserError
from ttmray.json_text import read_json
from ttmray.serve.tryout import LONGEST, SEEDS, HeardClip, ServeConfig, TryOut

COOKIE = "ttmray_token"
MOST_BYTES = 16_384
"""Of a request."""
_AUDIO = re.compile(r"/clips/([0-9a-f]{32})\.flac")
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def serve(config: ServeConfig) -> int:
    """Listen until Ctrl-C; returns the exit code.

    Raises:
        UserError: models that are not there, or an address that cannot be had.
    """
    with open_server(config) as server:
        console.print(f"open {server.address()}   (Ctrl-C ends)", markup=False)
        console.print(f"clips and votes: {server.tryout.out}, {len(server.tryout.votes)} votes so far", markup=False)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.print(f"{len(server.tryout.votes)} votes in {server.tryout.out}", markup=False)
    return EXIT_OK


def open_server(config: ServeConfig) -> "TryOutServer":
    """A server that has its address; `serve_forever` answers.

    Raises:
        UserError: as `serve`.
    """
    tryout = TryOut(config)
    try:
        return TryOutServer(config.host, config.port, tryout)
    except OSError as error:
        raise UserError(
            f"{config.host}, port {config.port}: {error.strerror or error}.", "Choose another --port (0: any free one)."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TryOutServer(ThreadingHTTPServer):
    """Listens from its making on.

    Attributes:
        token: that every request needs; empty on a loopback address.
        page: the page, which is the same for all.
        policy: what the page may load.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int, tryout: TryOut) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.tryout, self.host = tryout, host
        self.token = "" if is_loopback(host) else secrets.token_urlsafe(24)
        text = page(tryout)
        style = " ".join(_sha256(part) for part in _STYLE.findall(text))
        self.page = text.encode()
        self.policy = (
            f"default-src 'none'; style-src {style}; script-src 'self'; connect-src 'self'; media-src 'self' blob:; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        super().__init__((host, port), TryOutHandler)

    def address(self) -> str:
        """For people, with the token."""
        host = gethostname() if self.host in ("0.0.0.0", "::") else self.host
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{self.server_port}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            return  # a browser that did not wait
        super().handle_error(request, client_address)


def page(tryout: TryOut) -> str:
    """The page for what the weights can do."""
    return pages.render(
        "serve.html.j2",
        title="Try out " + " and ".join(one.name for one in tryout.weights),
        note=tryout.note,
        systems=[one.name for one in tryout.weights],
        scores=tryout.scores,
        guidance=tryout.guidance,
        clip_s=tryout.clip_s,
        longest=LONGEST,
        last_seed=SEEDS - 1,
        table=tryout.out.path("votes.csv"),
        votes=len(tryout.votes),
    )


def _sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class TryOutHandler(BaseHTTPRequestHandler):
    """One connection. Answers are JSON but for the page, its script and the clips."""

    server: TryOutServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "ttmray", ""
    timeout = 60
    _types: ClassVar[dict[str, str]] = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8"}

    def do_GET(self) -> None:
        """The page, its script, and clips."""
        address = urlsplit(self.path)
        if self.server.token and address.path == "/" and "token" in (asked := parse_qs(address.query)):
            self._take_token(asked["token"][0])
            return
        if not self._may():
            return
        if address.path == "/":
            self._answer(HTTPStatus.OK, self.server.page, self._types["html"])
        elif address.path == "/serve.js":
            self._answer(HTTPStatus.OK, pages.source("serve.js").encode(), self._types["js"])
        elif (match := _AUDIO.fullmatch(address.path)) and (data := self.server.tryout.audio(match[1])) is not None:
            self._answer(HTTPStatus.OK, data, "audio/flac")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def do_POST(self) -> None:
        """`/clips` makes one or two, `/votes` keeps what somebody prefers."""
        body = self._body()
        if body is None or not self._may(changes=True):
            return
        acts = {"/clips": self._clips, "/votes": self._votes}
        act = acts.get(urlsplit(self.path).path)
        if act is None:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing here.")
            return
        try:
            asked = read_json(body)
            answer = act(asked)
        except UserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, f"{error.message} {error.hint}".strip())
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, f"The request is none of this page: {error!r}.")
        except Exception:
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "Something broke; the terminal has the details.")
            raise
        else:
            self._answer(HTTPStatus.OK, json.dumps(answer, ensure_ascii=False).encode())

    def _clips(self, asked: dict[str, Any]) -> dict[str, Any]:
        tryout = self.server.tryout
        prompt, seed, guidance = asked["prompt"], asked["seed"], float(asked["guidance"])
        if not isinstance(prompt, str):
            raise UserError("A prompt is a text.", "Say what is to be heard.")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"A seed is a whole number from 0 to {SEEDS - 1}.")
        scores = [None if score is None else float(score) for score in asked["scores"]]
        if len(scores) == 1:
            clip = tryout.clip(prompt, scores[0], guidance, seed)
            return {"clips": [_told(clip)]}
        first, second = scores
        heard = tryout.pair(prompt, (first, second), guidance, seed)
        return {"pair": heard.id, "clips": [{"audio": f"/{clip.file}"} for clip in heard.clips]}

    def _votes(self, asked: dict[str, Any]) -> dict[str, Any]:
        heard, count = self.server.tryout.vote(str(asked["pair"]), asked["choice"])
        return {"votes": count, "clips": [_told(clip) for clip in heard.clips]}

    def _body(self) -> bytes | None:
        """Of a request; None where it was refused. It is read even where the request may be refused: the connection
        goes on with the next one."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A request has a length, of at most {MOST_BYTES} bytes.")
            return None
        return self.rfile.read(int(length))

    def _may(self, changes: bool = False) -> bool:
        """Whether the request may have an answer; else it has got one.

        Args:
            changes: it makes something, and must come from this page or a program.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.token:
            if not secrets.compare_digest(self._token().encode(), self.server.token.encode()):
                self._refuse(HTTPStatus.UNAUTHORIZED, "Open the address with the token that ttmray serve has printed.")
                return False
        elif not is_loopback(urlsplit(f"//{host}").hostname or ""):
            self._refuse(HTTPStatus.FORBIDDEN, "This page is for the machine that it runs on.")
            return False
        if changes:
            of_ours = origin is None or urlsplit(origin).netloc == host
            if not of_ours or self.headers.get_content_type() != "application/json":
                self._refuse(HTTPStatus.FORBIDDEN, "Requests come from this page, as JSON.")
                return False
        return True

    def _token(self) -> str:
        """That a request brings; empty where it brings none."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return token.strip()
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return ""
        return morsel.value if morsel else ""

    def _take_token(self, token: str) -> None:
        """The address that was printed: from here on the browser brings the token, and the address has none."""
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.UNAUTHORIZED, "This is not the token of this start of ttmray serve.")
            return
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._answer(status, json.dumps({"error": message}, ensure_ascii=False).encode())

    def _answer(self, status: HTTPStatus, data: bytes, kind: str = "application/json; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is made shows itself, and errors have their own lines."""


def _told(clip: HeardClip) -> dict[str, Any]:
    """A clip with all that is known of it."""
    facts = asdict(clip)
    return {"audio": f"/{facts.pop('file')}", **facts}
