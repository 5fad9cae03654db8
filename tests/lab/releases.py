"""Releases for the lab's hosts without collecting them: copies of one that is there, some of them bad on purpose."""

from __future__ import annotations

import subprocess
import sys

from tests.lab import lab

FOLDER = "/opt/llmrack/releases"

# What makes a release a bad one, put behind its fake backend.
ANSWERS_WRONGLY = "_logits = FakeBackend.logits\nFakeBackend.logits = lambda self: np.roll(_logits(self), 1, axis=1)\n"
IS_NEVER_READY = "FakeBackend.__init__ = lambda self, *_, **__: time.sleep(1e6)\n"
CRASHES_AT_ONCE = "import os\nFakeBackend.__init__ = lambda self, *_, **__: os.abort()\n"
CRASHES_UNDER_LOAD = """
import os
_decode, _count = FakeBackend.decode, iter(range(60))
FakeBackend.decode = lambda self, chunks: os.abort() if next(_count, None) is None else _decode(self, chunks)
"""


def make_release(name: str, of: str, code: str = "") -> None:
    """Another release on every host, cheaply: the files of `of` under another name. `code`: what makes it a bad one."""
    new, old = f"{FOLDER}/{name}", f"{FOLDER}/{of}"
    # The mark is a file of its own, by whose age a host tells which of its releases are the newest.
    work = f"rm -rf {new} && cp -al {old} {new} && rm {new}/.complete && touch {new}/.complete"
    work += f" && sed -i 's#{old}/#{new}/#' {new}/bin/llmnode {new}/bin/llmgate"
    if code:
        fake = f"{new}/lib/python3*/site-packages/llmnode/engine/fake.py"
        work += f" && cp $(echo {fake}) /tmp/fake.py && cat >> /tmp/fake.py && mv /tmp/fake.py $(echo {fake})"
    for host in lab.ADDRESSES:
        done = subprocess.run(
            [sys.executable, lab.__file__, "ssh", host, work], input=code, text=True, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
