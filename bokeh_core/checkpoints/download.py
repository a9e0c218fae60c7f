"""The only code that downloads: one file, resumable, verified before it gets its name."""

import contextlib
import hashlib
import http.client
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ..errors import BokehError

BLOCK = 1 << 20
TRIES = 4  # a broken connection is taken up again so often before giving up


def download(
    url: str,
    target: str | Path,
    *,
    size: int | None = None,
    sha256: str = "",
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    schemes: tuple[str, ...] = ("https",),
) -> Path:
    """Download `url` to `target` and return the path. What arrives grows in TARGET.part, which a later call takes up again.

    size, sha256  what the file must be; where they are not known, what the server names is used (Hugging Face names both)
    check         called with the complete .part file; may raise BokehError to refuse it
    progress      called as progress(bytes, all bytes); may raise to interrupt, what has arrived stays
    schemes       of the address and of every address it leads to
    Raises BokehError when the target exists, the server cannot be reached or refuses, the disk is full, or the file is not the
    right one (which is then deleted).
    """
    target = Path(target)
    part = target.with_name(target.name + ".part")
    if target.exists():
        raise BokehError(f"{target} is already there; move or delete it first, nothing is overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        before = _bytes(part)
        try:
            size, sha256 = _fetch(url, part, size, sha256, schemes, progress)
            break
        except (OSError, http.client.HTTPException) as error:  # errors of the network; those of the disk are BokehErrors already
            if isinstance(error, urllib.error.HTTPError) or attempt == TRIES - 1 or (attempt and _bytes(part) == before):
                raise BokehError(_explain(error, url, target, _bytes(part))) from error
    found = _bytes(part)
    if size is not None and found != size:
        part.unlink()
        raise BokehError(f"{target.name} has {found} bytes and should have {size}; it was deleted, try again.")
    if sha256 and _sha256(part) != sha256:
        part.unlink()
        raise BokehError(
            f"{target.name} is not the file that was asked for (its SHA-256 differs), so it was deleted; try again, and if it happens "
            f"again the published file has changed: get it from {url} by hand and look at it with 'bokeh models check'."
        )
    if check:
        try:
            check(part)
        except BokehError:
            part.unlink()
            raise
    part.replace(target)
    return target


def _fetch(url, part, size, sha256, schemes, progress) -> tuple[int | None, str]:
    """One request; appends to `part`. Returns what the file must be: (bytes or None, SHA-256 or "")."""
    redirects = _Redirects(schemes)
    have = _bytes(part)
    if size is not None and have == size:
        return size, sha256
    request = urllib.request.Request(url, headers={"User-Agent": "bokeh", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    redirects.check(url)
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # 416: nothing follows what we have
            raise
        part.unlink()
        return _fetch(url, part, size, sha256, schemes, progress)
    with answer:
        named = {**{k.lower(): v for k, v in answer.headers.items()}, **redirects.named}
        if answer.status != 206:
            have = 0  # the server sends the file from its start
        length = answer.headers.get("Content-Length")
        total = int(length) + have if length else None
        stated = int(named["x-linked-size"]) if named.get("x-linked-size", "").isdecimal() else total
        digest = named.get("x-linked-etag", "").strip('"').lower()
        digest = digest if len(digest) == 64 else ""
        if (size is not None and stated not in (None, size)) or (sha256 and digest not in ("", sha256)):
            raise BokehError(
                f"The file at {url} is no longer the known one: its size or SHA-256 has changed. Get it by hand and look at it with "
                "'bokeh models check'."
            )
        size, sha256 = stated if size is None else size, sha256 or digest
        free = shutil.disk_usage(part.parent).free
        if size is not None and size - have > free:
            raise BokehError(f"{part.parent} has {_mega(free)} free, {_mega(size - have)} are needed; make room or choose another folder.")
        with _writing(part), part.open("ab" if have else "wb") as file:
            while block := _read(answer):
                file.write(block)
                have += len(block)
                if progress:
                    progress(have, size or have)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke at {have} of {total} bytes")
    return size, sha256


def _read(answer) -> bytes:
    try:
        return answer.read(BLOCK)
    except OSError as error:
        raise http.client.HTTPException(str(error)) from error


@contextlib.contextmanager
def _writing(part: Path):
    try:
        yield
    except OSError as error:
        raise BokehError(f"{part} cannot be written ({error.strerror or error}); the next try goes on where this one stopped.") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed schemes and keeps what their answers say of the file."""

    def __init__(self, schemes: tuple[str, ...]):
        self.schemes = schemes
        self.named: dict[str, str] = {}

    def check(self, url: str) -> None:
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme not in self.schemes:
            raise BokehError(f"{url} is not fetched: only {' and '.join(self.schemes)} addresses are.")

    def redirect_request(self, request, file, code, message, headers, new_url):
        self.check(new_url)
        self.named.update({key.lower(): value for key, value in headers.items() if key.lower().startswith("x-linked-")})
        return super().redirect_request(request, file, code, message, headers, new_url)


def _explain(error: Exception, url: str, target: Path, have: int) -> str:
    host = urllib.parse.urlsplit(url).hostname
    by_hand = f"get the file from {url} by hand and put it into {target.parent}"
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (401, 403):
            return f"{host} does not hand out {target.name} without a log-in ({error.code}); {by_hand}."
        if error.code in (404, 410):
            return f"{host} has no such file any more ({error.code}): {url}. Look for it on its page."
        return f"{host} answered with an error ({error.code} {error.reason}); try again later."
    if have:
        return f"The connection to {host} broke; {_mega(have)} are kept, and the same command goes on from there."
    reason = getattr(error, "reason", error)
    return f"{host} cannot be reached ({reason}); is this machine offline? Try again later, or {by_hand}."


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _mega(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
