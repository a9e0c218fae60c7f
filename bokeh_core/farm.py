"""Shots over several ComfyUI servers, through their HTTP queues.

A job is a workflow in ComfyUI's API format (*Export (API)*). Every server has one job at a time; a server that stops answering gives its
job back, and is asked again later. Nothing but the Python standard library.
"""

import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from .errors import BokehError

EVERY = 1.0  # s between two questions to a server
PATIENCE = 5  # questions in a row without an answer, until a server counts as lost
COMES_BACK = 30.0  # s until a lost server is tried again
LOSSES = 3  # servers lost over one job until it is left out
# No answer (urllib's errors are OSErrors), half of one, or no sense in it: a lost server.
LOST = (OSError, http.client.HTTPException, ValueError, KeyError)


def run(
    jobs: dict[str, dict],
    servers: list[str],
    output: Path,
    finished: Callable[[str, str, str], None],
    *,
    every: float = EVERY,
    comes_back: float = COMES_BACK,
) -> None:
    """Queue all jobs and fetch what they save.

    jobs      prompts in API format by name
    servers   addresses such as http://render1:8188
    output    the files that a job saves come to output / its name /
    finished  called as finished(name, server, sentence) when a job ends, with an empty sentence where it went well
    every, comes_back  seconds, see EVERY and COMES_BACK

    Returns when every job has ended. Raises BokehError when no server answers any more.
    """
    waiting: queue.Queue = queue.Queue()
    for name in jobs:
        waiting.put(name)
    lost, left, gone = dict.fromkeys(jobs, 0), set(jobs), set()
    lock, stop = threading.Lock(), threading.Event()

    def end(name: str, server: str, sentence: str) -> None:
        with lock:
            left.discard(name)
            finished(name, server, sentence)

    def serve(server: str) -> None:
        while left and not stop.is_set():
            if server in gone and answering(server) is None:
                stop.wait(comes_back)
                continue
            gone.discard(server)
            try:
                name = waiting.get(timeout=every)
            except queue.Empty:
                continue
            try:
                end(name, server, _do(server, jobs[name], output / name, every, stop))
            except LOST:
                gone.add(server)
                lost[name] += 1
                if lost[name] >= LOSSES:
                    end(name, server, f"{LOSSES} servers were lost that worked on it")
                else:
                    waiting.put(name)

    threads = [threading.Thread(target=serve, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        while left and any(thread.is_alive() for thread in threads):
            time.sleep(every / 2)
            if gone == set(servers):
                raise BokehError(f"No server answers any more ({', '.join(servers)}); {len(left)} jobs are left.")
    finally:
        stop.set()


def answering(server: str) -> str | None:
    """ComfyUI's version, or None when the server does not answer."""
    try:
        return _ask(f"{server}/system_stats")["system"].get("comfyui_version", "")
    except LOST:
        return None


def _do(server: str, prompt: dict, folder: Path, every: float, stop: threading.Event) -> str:
    """Run one prompt on a server and fetch its files. Returns what went wrong, or an empty text. Raises one of LOST for a lost server."""
    try:
        number = _ask(f"{server}/prompt", {"prompt": prompt, "client_id": "bokeh-farm"})["prompt_id"]
    except urllib.error.HTTPError as error:  # it is there, and does not want the job
        return f"{server} refuses it: {_reason(error.read())}"
    silent = 0
    while not stop.wait(every):
        try:
            entry = _ask(f"{server}/history/{number}").get(number)
            if entry is None and not _queued(server, number):
                raise ConnectionResetError(f"{server} was started anew and has forgotten the job")
            silent = 0
        except (TimeoutError, ValueError, urllib.error.URLError):
            silent += 1
            if silent >= PATIENCE:
                raise
            continue
        if entry is not None:
            break
    else:
        return "stopped"
    status = entry.get("status", {})
    if status.get("status_str") == "error":
        said = [message[1].get("exception_message", "") for message in status.get("messages", []) if message[0] == "execution_error"]
        return (said[0] if said else "the workflow failed").strip()
    for made in entry.get("outputs", {}).values():
        for file in (one for kind in made.values() if isinstance(kind, list) for one in kind):
            if isinstance(file, dict) and "filename" in file and file.get("type", "output") == "output":
                _fetch(server, file, folder)
    return ""


def _queued(server: str, number: str) -> bool:
    """Whether the job waits or runs, or has just ended."""
    found = _ask(f"{server}/queue")
    if any(number in entry[:2] for entries in found.values() for entry in entries):
        return True
    return number in _ask(f"{server}/history/{number}")


def _fetch(server: str, file: dict, folder: Path) -> None:
    from .media import atomic

    names = {"filename": file["filename"], "subfolder": file.get("subfolder", ""), "type": "output"}
    with urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(names)}", timeout=60) as answer:
        data = answer.read()
    with atomic(folder / Path(file["filename"]).name) as temporary:  # a server has no say in where files go
        temporary.write_bytes(data)


def _ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.loads(answer.read())


def _reason(body: bytes) -> str:
    try:
        said = json.loads(body)
        errors = [one for node in said.get("node_errors", {}).values() for one in node["errors"]]
        return "; ".join(f"{one['message']}: {one.get('details', '')}" for one in errors) or said["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return body.decode(errors="replace")[:200]
