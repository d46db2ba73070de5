"""The command line: `gpt2rs generate | info | score | compare | convert | train | tokenizer | bench`.

Exit codes: 0; 1 for a mistake or failure, with one line on stderr (GPT2RS_DEBUG=1 shows the traceback); 2 for
wrong usage; 130 after Ctrl-C; 141, as a shell counts SIGPIPE, when nobody reads the output any more.

Nothing but typer and `import gpt2rs` is loaded before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, compare, convert, generate, info, score, tokenizer, train

_MISTAKES = (ValueError, OSError, RuntimeError, ImportError, MemoryError)


class Commands(TyperGroup):
    """The commands, with one way of ending for all of them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for; turn what goes wrong into an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:
            code = 141
        except _MISTAKES as error:
            if os.environ.get("GPT2RS_DEBUG"):
                raise
            print(f"gpt2rs: error: {_in_one_line(error)}", file=sys.stderr)
            code = 1
        _let_go_of_stdout()
        raise typer.Exit(code)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _let_go_of_stdout() -> None:
    """Write what is left; where that fails, point stdout nowhere: Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(wanted: bool) -> None:
    if wanted:
        from gpt2rs import __version__

        print(f"gpt2rs {__version__}")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(generate.generate)
app.command()(info.info)
app.command()(score.score)
app.command()(compare.compare)
app.command()(convert.convert)
app.command()(train.train)
app.add_typer(tokenizer.tokenizer, name="tokenizer")
app.command()(bench.bench)


@app.callback()
def gpt2rs(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    """Run GPT-2 (generate, info, score), compare and convert its weights, train it, measure."""


def main() -> None:
    """Run the command that `sys.argv` asks for, and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without Unicode shows what it can.
        sys.stdout.reconfigure(errors="replace")
    app(prog_name="gpt2rs")
