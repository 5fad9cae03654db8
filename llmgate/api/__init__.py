"""What the gate answers over HTTP: one blueprint a module. Decisions are the core's, upstream work is the relay's."""
