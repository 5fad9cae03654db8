"""`python -m llmnode`."""

import sys

from llmnode.cli import main

sys.exit(main())
