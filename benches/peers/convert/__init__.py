"""Checkpoint to a peer's own format, one module a peer, run in that peer's environment."""
