"""Names of the HTTP headers that clients, gate and nodes exchange."""

REQUEST_ID = "x-request-id"
"""Accepted from the client if it is 1-128 characters of [A-Za-z0-9._-], else made; echoed, logged, sent to nodes."""

IGNORED = "x-llmrack-ignored"
"""Response: comma-separated names of request fields that were accepted as advice and had no effect."""

REPORT_USAGE = "x-llmrack-report-usage"
"""Request, gate to node, value "1": end a stream with a usage comment (`wire.sse.usage_comment`) before `[DONE]`."""

USAGE = "x-llmrack-usage"
"""Response, node to gate, of an answer in one body where `REPORT_USAGE` was asked for: `PROMPT CACHED COMPLETION`, in
tokens. A body of a million numbers need not be read for them."""

NODE = "x-llmrack-node"
"""Response, gate to client: the node that answered."""

TELL = "x-llmrack-tell"
"""Request, client to gate, value "node": when a stream goes on at another node than the one that `NODE` names, say so
in a comment, `: node NAME`."""

SHOULD_RETRY = "x-should-retry"
"""Response: "false" once the gate has spent its own retries, so that SDKs do not multiply them."""

RESUMABLE = "x-llmrack-resumable"
"""Request, gate to node: `wire.resume.Fixed`. The node answers as an event stream with commit markers.
Response, node to gate: the version of the resume format, where the answer has markers."""

ORIGIN = "x-llmrack-origin"
"""Response, node to gate, where the answer has markers: `wire.resume.Origin`, the model that it comes from."""

LOAD = "x-llmrack-load"
"""Response, node to gate, where the answer has markers: `wire.node.Load` as the answer begins, so that a gate hears of
what others have sent there before the next poll."""

PRIORITY = "x-llmrack-priority"
"""Request, client to gate: "high", "normal" or "low", how soon it wants its turn; not above its key's own."""

DEADLINE_MS = "x-llmrack-deadline-ms"
"""Request, gate to node: milliseconds that are left for the answer; the node takes the shorter of this and its own."""
