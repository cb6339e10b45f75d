"""The pages' addresses: who is let in, which view answers, what a browser may do with it.

    /console/VIEW        a whole page                    /console/live     what has changed, as events
    /console/part/VIEW   its parts alone                 /console/say      an answer in the playground, as events
    /console/asset/NAME  the style sheet and the script  /console/login    a key; /console/logout

Invariants: nothing but the log-in page and the assets is answered without a valid session; every page's policy allows
this server's own script, style sheet and connections, and nothing else; queries and bodies are bounded.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing
from hashlib import sha256
from importlib.resources import files
from urllib.parse import parse_qs

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from shoal.coordinator.reporting.markup import Markup
from shoal.errors import ShoalError
from shoal.serving.console.answers import Ask
from shoal.serving.console.door import COOKIE, Door, Visitor, give, now
from shoal.serving.console.frame import login_page, page
from shoal.serving.console.house import VIEWS, House
from shoal.serving.console.html import PREFIX
from shoal.serving.console.views import agents, episodes, memory, overview, playground, run, swarm
from shoal.serving.events import EventStream, frame
from shoal.serving.origin import same_origin

logger = logging.getLogger("shoal.console")

RENDERS: dict[str, Callable[[House, Mapping[str, str]], Markup]] = {
    "overview": overview.render,
    "run": run.render,
    "swarm": swarm.render,
    "agents": agents.render,
    "memory": memory.render,
    "episodes": episodes.render,
    "playground": playground.render,
}
assert tuple(RENDERS) == VIEWS

ASSETS = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}

MAX_QUERY_CHARS = 300
"""Of one value."""

MAX_BODY_BYTES = 256 * 1024
WATCH_S = 12 * 3600.0
"""A page's connection is ended after this long, and made again by the page."""

SAY_S = 600.0

Answer = Callable[[Request, Visitor], Awaitable[Response]]


class Console:
    """The pages of one house."""

    def __init__(self, house: House, door: Door) -> None:
        self.house, self._door = house, door
        root = files("shoal.serving.console").joinpath("assets")
        self._assets = {name: root.joinpath(name).read_bytes() for name in ASSETS}
        self._marks = {name: sha256(data).hexdigest()[:12] for name, data in self._assets.items()}

    def routes(self) -> list[BaseRoute]:
        """What an application mounts."""
        return [
            Route(PREFIX, self._home),
            Route(f"{PREFIX}/asset/{{name}}", self._asset),
            Route(f"{PREFIX}/login", self._login, methods=["GET", "POST"]),
            Route(f"{PREFIX}/logout", self._within(self._logout), methods=["POST"]),
            Route(f"{PREFIX}/live", self._within(self._live)),
            Route(f"{PREFIX}/say", self._within(self._say), methods=["POST"]),
            Route(f"{PREFIX}/part/{{view}}", self._within(self._part)),
            Route(f"{PREFIX}/{{view}}", self._within(self._page)),
        ]

    # Who is let in

    def _within(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for those with a session; others are sent to the log-in page."""

        async def checked(request: Request) -> Response:
            if not self._door.answers(request):
                return PlainTextResponse("This name is not answered here.", 421)
            visitor = self._door.visitor(request, now())
            is_new = visitor is None and not self._door.asks
            if is_new:
                visitor = self._door.nobody(now())
            if visitor is None:
                if request.path_params.get("view") in VIEWS and not request.url.path.startswith(f"{PREFIX}/part/"):
                    return RedirectResponse(f"{PREFIX}/login", 303)
                return PlainTextResponse("Log in first.", 401)
            if request.method == "POST":
                token = request.headers.get("x-csrf-token", "")
                if not self._door.may_change(request, visitor, token):
                    return PlainTextResponse("This was not asked by a page of yours.", 403)
            response = await answer(request, visitor)
            if is_new:
                give(response, visitor.cookie)
            return response

        return checked

    async def _home(self, request: Request) -> Response:
        return RedirectResponse(f"{PREFIX}/{VIEWS[0]}", 303)

    async def _login(self, request: Request) -> Response:
        if not self._door.answers(request):
            return PlainTextResponse("This name is not answered here.", 421)
        if not self._door.asks:
            return RedirectResponse(f"{PREFIX}/{VIEWS[0]}", 303)
        wrong = False
        if request.method == "POST":
            if not same_origin(request.headers):
                return PlainTextResponse("This was not asked by a page of ours.", 403)
            fields = parse_qs((await _body(request)).decode("utf-8", "replace"), max_num_fields=4)
            cookie = self._door.enter(fields.get("key", [""])[0], now())
            if cookie is not None:
                response = RedirectResponse(f"{PREFIX}/{VIEWS[0]}", 303)
                give(response, cookie)
                return response
            wrong = True
        return self._html(request, lambda nonce: login_page(self._marks, nonce, _theme(request), wrong=wrong), wrong)

    async def _logout(self, request: Request, visitor: Visitor) -> Response:
        response = PlainTextResponse("")
        response.delete_cookie(COOKIE, path=PREFIX)
        return response

    # Pages

    async def _page(self, request: Request, visitor: Visitor) -> Response:
        view, query = request.path_params["view"], _query(request)
        if view not in RENDERS:
            return PlainTextResponse("There is no such page.", 404)
        token, last = self._door.token(visitor), self.house.live.now  # what changes from here on is told
        parts = await self.house.on_reader(lambda: RENDERS[view](self.house, query))
        runs, keyed = list(self.house.runs), bool(visitor.name)
        return self._html(
            request,
            lambda nonce: page(
                view, parts, marks=self._marks, nonce=nonce, theme=_theme(request), token=token, last=last, query=query,
                runs=runs, keyed=keyed,
            ),
        )  # fmt: skip

    async def _part(self, request: Request, visitor: Visitor) -> Response:
        view, query = request.path_params["view"], _query(request)
        if view not in RENDERS:
            return PlainTextResponse("There is no such page.", 404)
        parts = await self.house.on_reader(lambda: RENDERS[view](self.house, query))
        return HTMLResponse(parts, headers=_headers(""))

    def _html(self, request: Request, made: Callable[[str], Markup], wrong: bool = False) -> Response:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(made(nonce), 401 if wrong else 200, headers=_headers(nonce))

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._assets:
            return PlainTextResponse("There is no such file.", 404)
        is_this = request.query_params.get("v") == self._marks[name]
        kept = "public, max-age=31536000, immutable" if is_this else "no-cache"
        headers = {**_headers(""), "Cache-Control": kept}
        return Response(self._assets[name], media_type=ASSETS[name], headers=headers)

    # Streams

    async def _live(self, request: Request, visitor: Visitor) -> Response:
        last = request.headers.get("last-event-id") or request.query_params.get("last", "")
        return EventStream(_told(self.house.live.frames(last[:64])), WATCH_S, ExitStack())

    async def _say(self, request: Request, visitor: Visitor) -> Response:
        try:
            ask = msgspec.json.decode(await _body(request), type=Ask)
        except msgspec.DecodeError as error:
            return PlainTextResponse(f"This cannot be asked: {error}.", 400)

        async def frames() -> AsyncGenerator[bytes]:
            async with aclosing(self.house.voices.say(ask)) as pieces:
                async for piece in pieces:
                    yield frame(piece)

        return EventStream(_told(frames()), SAY_S, ExitStack())


async def _told(frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The same frames; what goes wrong is told as one of them."""
    try:
        async with aclosing(frames):
            async for data in frames:
                yield data
    except ShoalError as error:
        yield frame({"error": str(error)})


def make_app(console: Console) -> Starlette:
    """An application of the console alone."""

    async def home(request: Request) -> Response:
        return RedirectResponse(f"{PREFIX}/{VIEWS[0]}", 303)

    return Starlette(routes=[Route("/", home), *console.routes()])


def _query(request: Request) -> dict[str, str]:
    return {key: value[:MAX_QUERY_CHARS] for key, value in list(request.query_params.items())[:16]}


def _theme(request: Request) -> str:
    chosen = request.cookies.get("shoal_theme", "")
    return chosen if chosen in ("dark", "light") else ""


def _headers(nonce: str) -> dict[str, str]:
    script = f"script-src 'nonce-{nonce}'; " if nonce else ""
    policy = (
        f"default-src 'none'; {script}style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",  # without one, a form would be sent with the origin "null"
        "Cache-Control": "no-store",
    }


async def _body(request: Request) -> bytes:
    """The request's body; what is longer than it may be is cut, and so is no request."""
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > MAX_BODY_BYTES:
            return b""
    return bytes(found)
