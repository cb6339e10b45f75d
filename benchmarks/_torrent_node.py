"""One BitTorrent node of the broadcast benchmark, by libtorrent, in an environment of its own.

python _torrent_node.py JSON: seeds or fetches one file, knows all others by address, says when it is whole.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import libtorrent as lt

PORT = 6881


def main() -> None:
    task = json.loads(sys.argv[1])
    settings: dict[str, Any] = {
        "listen_interfaces": f"{task['host']}:{PORT}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        # What somebody who moves one file between a few known machines sets.
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        "unchoke_slots_limit": -1,
        "in_enc_policy": 2,
        "out_enc_policy": 2,
        "send_buffer_watermark": 3 * 2**20,
    }
    session = lt.session(settings)
    with tempfile.TemporaryDirectory(dir=task["scratch"]) as scratch:
        is_source = task["role"] == "source"
        if is_source:
            (Path(scratch) / "w").write_bytes(random.Random(0).randbytes(task["num_bytes"]))
            files = lt.file_storage()
            lt.add_files(files, str(Path(scratch) / "w"))
            torrent = lt.create_torrent(files, 256 * 2**10)
            lt.set_piece_hashes(torrent, scratch)
            Path(task["torrent"]).write_bytes(lt.bencode(torrent.generate()))
        params = lt.add_torrent_params()
        params.ti = lt.torrent_info(task["torrent"])
        params.save_path = scratch
        handle = session.add_torrent(params)
        while is_source and not handle.status().is_seeding:
            time.sleep(0.05)
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        for host in task["others"]:
            handle.connect_peer((host, PORT))
        while not handle.status().is_seeding:
            time.sleep(0.02)
        print(json.dumps({"whole_at": time.time()}), flush=True)
        sys.stdin.readline()


main()
