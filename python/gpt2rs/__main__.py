"""`python -m gpt2rs`, where the script `gpt2rs` is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
