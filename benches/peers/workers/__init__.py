"""One process a peer, one module each, run in that peer's environment; protocol.py is what they share."""
