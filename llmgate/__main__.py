"""`python -m llmgate` is `llmgate`."""

from llmgate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
