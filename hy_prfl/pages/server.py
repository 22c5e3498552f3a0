"""The web application of a study: a page, a few requests, and the videos of the study. Nothing else can be fetched."""

import hmac
import ipaddress
import json
import logging
import mimetypes
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..data.container import open_video
from ..data.pixels import VideoError
from .items import ConflictError, Item, StudyError, is_text
from .rendering import TEMPLATES, render
from .study import Study


logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_BODY, MAX_NAME = 1 << 16, 64
# Seconds between two writes of the result while people work. Labels are in the journal long before.
SAVE_SECONDS = 10.0
FILES = {"page.css": "text/css", "annotate.css": "text/css", "annotate.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self' blob:; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Handler = Callable[[dict[str, Any], str, str], dict[str, Any]]
Save = Callable[[Study], None]


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """
    What the page says and who may see it.

    Args:
        title, instructions (`str`): Shown as they are.
        questions (`Mapping[str, str]`): What is asked, by the name of the question.
        annotators (`Sequence[str]`): People who may take part; empty for everybody.
        token (`str`, *optional*): Secret without which nothing is served.
        hosts (`Sequence[str]`): Names and addresses, without a port, that the page may be called by.
    """

    title: str
    instructions: str
    questions: Mapping[str, str]
    annotators: Sequence[str] = ()
    token: str | None = None
    hosts: Sequence[str] = field(default=LOOPBACK)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """
    A socket to serve on; port 0 is any that is free.

    Raises:
        ValueError: If the server cannot listen on this address and port.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"`host` {host!r}, `port` {port}: cannot be listened on: {error.strerror}.") from error


def serve(app: Starlette, listener: socket.socket, announce: Callable[[], None]) -> None:
    """
    Serve until the process is interrupted (Ctrl-C) or terminated. Call it in the main thread.

    Args:
        announce (`Callable`):
            Tells the user that the page is there. From then on Ctrl-C ends the server, also while it starts, and also in a
            process that a shell started in the background, where SIGINT is ignored until somebody handles it.
    """
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
    config.load()
    server = uvicorn.Server(config)
    before = signal.signal(signal.SIGINT, server.handle_exit)
    try:
        announce()
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGINT, before)


def build_app(study: Study, settings: PageSettings, save: Save) -> Starlette:
    """
    The application.

    Args:
        save (`Callable`):
            Writes the result from a snapshot of the study, one call at a time. It is called in another thread now and
            then, and at the end. If it fails while people work, the page says so; their labels are in the journal.
    """
    return _App(study, settings, save).build()


class _App:
    def __init__(self, study: Study, settings: PageSettings, save: Save) -> None:
        self.study = study
        self.settings = settings
        self.save = save
        # Cookies do not tell ports apart, so each study has one of its own.
        self.cookie = f"hy_prfl_{study.public_id('cookie')}"
        self.saving = threading.Lock()
        self.saved_at = time.monotonic()
        self.save_error: str | None = None
        self.rates: dict[Path, float | None] = {}

    def build(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(app: Starlette) -> Any:
            yield
            self.write(self.study.snapshot())

        routes = [
            Route("/", self.page),
            *(Route(f"/{name}", self.file) for name in FILES),
            Route("/media/{media_id}", self.media),
            Route("/api/next", self.handle(self.next), methods=["POST"]),
            Route("/api/label", self.handle(self.label), methods=["POST"]),
            Route("/api/skip", self.handle(self.skip), methods=["POST"]),
            Route("/api/undo", self.handle(self.undo), methods=["POST"]),
        ]
        app = Starlette(routes=routes, lifespan=lifespan)
        app.router.redirect_slashes = False
        app.add_middleware(_Guard, settings=self.settings, cookie=self.cookie)
        return app

    async def page(self, request: Request) -> Response:
        if "token" in request.query_params:
            # The guard has checked it; out of the address bar and the history with it.
            response = RedirectResponse("/", status_code=303)
            token = request.query_params["token"]
            response.set_cookie(self.cookie, token, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
            return response
        settings = {
            "kind": self.study.kind,
            "choices": self.study.choices,
            "questions": [{"name": name, "text": self.settings.questions[name]} for name in self.study.questions],
            "annotators": list(self.settings.annotators),
            "study": self.study.public_id("study"),
        }
        page = render("annotate.html.j2", page=self.settings, settings=settings, study=self.study)
        return Response(page, media_type="text/html", headers={"Cache-Control": "no-store"})

    async def file(self, request: Request) -> Response:
        name = request.url.path.removeprefix("/")
        return FileResponse(TEMPLATES / name, media_type=FILES[name], headers={"Cache-Control": "no-cache"})

    async def media(self, request: Request) -> Response:
        try:
            path = self.study.video(request.path_params["media_id"])
        except StudyError as error:
            return _error(404, str(error))
        if not path.is_file():
            return _error(410, "the file of this clip is gone.")
        # Without the file's name, which may reveal the model.
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    def handle(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
                return _error(415, "expected JSON.")
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    return _error(413, "the request is too long.")
            try:
                values = json.loads(body)
            except (ValueError, RecursionError) as error:
                return _error(400, f"not valid JSON: {error}")
            try:
                annotator, window = self.names(values)
                result = handler(values, annotator, window)
            except ConflictError as error:
                # The page continues from the current state.
                return JSONResponse({"error": str(error), **self.state(annotator, window)}, status_code=409)
            except StudyError as error:
                return _error(400, str(error))
            except OSError as error:
                logger.error("%s: not written: %s", self.study.journal.path, error)
                return _error(507, f"nothing was saved: {error.strerror}. Make room and try again.")
            await self.save_now_and_then()
            return JSONResponse(result | {"save_error": self.save_error})

        return endpoint

    def names(self, values: Any) -> tuple[str, str]:
        """Annotator and window of a request, checked."""
        if not isinstance(values, dict):
            raise StudyError(f"expected an object, got {type(values).__name__}.")
        annotator, window = _text(values, "annotator").strip(), _text(values, "window")
        if not annotator or not annotator.isprintable():
            raise StudyError(f"`annotator` must be a name, got {annotator!r}.")
        if self.settings.annotators and annotator not in self.settings.annotators:
            raise StudyError(f"{annotator!r} is none of the annotators of this study.")
        return annotator, window

    def next(self, values: dict[str, Any], annotator: str, window: str) -> dict[str, Any]:
        return self.state(annotator, window)

    def label(self, values: dict[str, Any], annotator: str, window: str) -> dict[str, Any]:
        answers, seconds = values.get("answers"), values.get("seconds")
        if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
            raise StudyError("`answers` must be an object with a text for each question.")
        is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (is_number and 0 <= seconds < 1e6):
            raise StudyError("`seconds` must be a number from 0 to 10^6.")
        self.study.label(annotator, _text(values, "item"), answers, key=_text(values, "key"), seconds=seconds)
        return self.state(annotator, window)

    def skip(self, values: dict[str, Any], annotator: str, window: str) -> dict[str, Any]:
        self.study.skip(annotator, _text(values, "item"), key=_text(values, "key"))
        return self.state(annotator, window)

    def undo(self, values: dict[str, Any], annotator: str, window: str) -> dict[str, Any]:
        self.study.undo(annotator, window, _text(values, "item"), key=_text(values, "key"))
        return self.state(annotator, window)

    def state(self, annotator: str, window: str) -> dict[str, Any]:
        """The next items of a window, of which it shows the first now, and the progress."""
        items = self.study.next_items(annotator, window)
        return {
            "items": [self.describe(annotator, item) for item in items],
            "last": self.study.last_item(annotator),
            "progress": self.study.progress(annotator),
        }

    def describe(self, annotator: str, item: Item) -> dict[str, Any]:
        clips = self.study.shown_clips(annotator, item)
        return {
            "item": self.study.public_id(item.id),
            "caption": item.clips[0].caption,
            "clips": [{"url": f"/media/{self.study.media_id(clip)}", "fps": self.rate(clip.video)} for clip in clips],
        }

    def rate(self, path: Path) -> float | None:
        """Frames per second of a video, None if it cannot be read: the page says so where it shows it."""
        if path not in self.rates:
            try:
                with open_video(path) as container:
                    rate = container.streams.video[0].average_rate
                self.rates[path] = None if rate is None else float(rate)
            except (VideoError, av.error.FFmpegError, IndexError) as error:
                logger.warning("%s: cannot be read: %s", path, error)
                self.rates[path] = None
        return self.rates[path]

    async def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved_at < SAVE_SECONDS or self.saving.locked():
            return
        self.saved_at = time.monotonic()
        try:
            # The snapshot is taken in the only thread that changes the study.
            await run_in_threadpool(self.write, self.study.snapshot())
            self.save_error = None
        except OSError as error:
            logger.error("the result was not written: %s", error)
            self.save_error = f"the result was not written ({error.strerror}); labels are safe in the journal."

    def write(self, snapshot: Study) -> None:
        with self.saving:
            self.save(snapshot)


class _Guard:
    """Refuses requests with an unknown host name, from pages of other sites, or without the token."""

    def __init__(self, app: ASGIApp, settings: PageSettings, cookie: str) -> None:
        self.app = app
        self.settings = settings
        self.cookie = cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        refusal = self.refusal(Request(scope))
        await (self.app if refusal is None else refusal)(scope, receive, send_with_headers)

    def refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        # DNS rebinding: another site can let its own name point to this server; its requests then have that host name.
        if _host_name(f"//{host}") not in self.settings.hosts:
            return _error(421, "this server is not called by that name; see `allowed_hosts`.")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return _error(403, "requests of other sites are refused.")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _error(403, "requests of other sites are refused.")
        if self.settings.token is not None and not self._has_token(request):
            return _error(401, "open the address with `?token=...` that `hy-prfl` has printed.")
        return None

    def _has_token(self, request: Request) -> bool:
        given = [request.cookies.get(self.cookie), request.headers.get("authorization", "").removeprefix("Bearer ")]
        if request.url.path == "/":
            given.append(request.query_params.get("token"))
        expected = str(self.settings.token).encode()
        return any(hmac.compare_digest((text or "").encode(), expected) for text in given)


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not is_text(value):
        raise StudyError(f"`{name}` must be a text of 1 to {MAX_NAME} characters.")
    return value


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
