#!/usr/bin/env python3
"""Whether the gate on this host answers, for keepalived: exit code 0 when it does, 1 when not. Usage: answers.py URL

Owns the one question. Refuses to know about nodes: gates see the same ones, and a fleet whose nodes are all gone must
not lose its address over it.
"""

from __future__ import annotations

import ssl
import subprocess
import sys
import urllib.request

PATIENCE_S = 3.0
"""Less than keepalived's own timeout, so that there is a line in its log."""


def leaving() -> bool:
    """The gate was told to stop, and lets running answers go on: moving the address now would cut them."""
    said = subprocess.run(["systemctl", "is-active", "llmgate.service"], text=True, capture_output=True, check=False)
    return said.stdout.strip() == "deactivating"


def answers(url: str) -> bool:
    # The door's certificate is for the name that clients use; what is asked here does not leave the host.
    unchecked = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S, context=unchecked) as said:
            return bool(said.status == 200)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if answers(sys.argv[1]) or leaving() else 1)
