"""`bokeh farm` over two real servers, one of which is killed while it works."""

import json
import threading

from bokeh_core.cli import main
from bokeh_core.media import read_picture

from .comfy import WORKFLOWS, Host, to_api


def test_two_servers_share_the_shots_and_one_is_lost(host, object_info, tmp_path, capsys):
    prompt = to_api(json.loads((WORKFLOWS / "photo_physical.json").read_text()), object_info)
    shots = []
    for number in range(4):
        for node in prompt.values():
            if node["class_type"] == "SaveImage":
                node["inputs"]["filename_prefix"] = f"shot{number}"
            if "strength" in node["inputs"] and not isinstance(node["inputs"]["strength"], list):
                node["inputs"]["strength"] = 8.0 + number
        shots.append(tmp_path / f"shot{number}.json")
        shots[-1].write_text(json.dumps(prompt))
    other = Host(tmp_path / "other")
    killed = threading.Event()

    def kill_when_busy():
        while not killed.wait(0.2):
            if other.get("/queue")["queue_running"]:
                other.process.kill()
                killed.set()

    watch = threading.Thread(target=kill_when_busy)
    watch.start()
    try:
        code = main(["farm", *map(str, shots), "-o", str(tmp_path / "out"), "--server", host.url, "--server", other.url])
    finally:
        killed.set()
        watch.join()
        other.stop()
    assert other.process.returncode not in (0, None)
    assert code == 0 and "4 done, 0 skipped, 0 failed" in capsys.readouterr().out
    for shot in shots:
        (saved,) = (tmp_path / "out" / shot.stem).iterdir()
        assert read_picture(saved).pixels.std() > 0.05
