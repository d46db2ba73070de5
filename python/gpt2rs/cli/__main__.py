"""`python -m gpt2rs.cli`, where the script `gpt2rs` is not on the path."""

from . import main

main()
