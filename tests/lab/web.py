#!/usr/bin/env python3
"""A web server for the lab: serves a folder with ranges, and breaks off when the folder says so.

    web.py ADDRESS PORT FOLDER RECORD

Writes the bytes of each answer to RECORD, one number a line. While FOLDER/breaks holds a number above 0, an answer
counts it down and carries 100,000 bytes the first time a file is asked for, none when it is gone on with.
"""

from __future__ import annotations

import http.server
import re
import sys
from pathlib import Path


class Web(http.server.BaseHTTPRequestHandler):
    folder: Path
    record: Path

    def do_GET(self) -> None:
        content = (self.folder / Path(self.path).name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if self._breaks():
            rest = b"" if asked else rest[:100_000]
        self.wfile.write(rest)
        with self.record.open("a") as record:
            record.write(f"{len(rest)}\n")

    def _breaks(self) -> bool:
        left = self.folder / "breaks"
        count = int(left.read_text()) if left.exists() else 0
        if count:
            left.write_text(str(count - 1))
        return count > 0

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    address, port, folder, record = sys.argv[1:]
    Web.folder, Web.record = Path(folder), Path(record)
    with http.server.HTTPServer((address, int(port)), Web) as server:
        Web.record.touch()
        server.serve_forever()


if __name__ == "__main__":
    main()
