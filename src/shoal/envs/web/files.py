"""A folder of files as a site: read once, kept, and never anything outside the folder."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from urllib.parse import unquote

from shoal.envs.web.gate import Request, Response

CACHED = (("Cache-Control", "max-age=86400"),)


class Files:
    """Answers GET requests for files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._kept: dict[str, Response] = {}

    def __call__(self, request: Request) -> Response:
        if request.path not in self._kept:
            path = (self._root / unquote(request.path).lstrip("/")).resolve()
            if not path.is_relative_to(self._root) or not path.is_file():
                return Response(b"There is no such file.", 404, "text/plain; charset=utf-8")
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            charset = "; charset=utf-8" if kind.startswith("text/") else ""
            self._kept[request.path] = Response(path.read_bytes(), content_type=kind + charset, headers=CACHED)
        return self._kept[request.path]
