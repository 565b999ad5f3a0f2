"""The `pingjia` command: its verbs, and the one place where an exception becomes an exit code.

0 done, 2 the user can put it right (one clear line), 1 our fault, 130 interrupted. `--debug` shows the traceback.
Only light modules are imported here; a verb imports its rooms when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from typing import Any, cast

import typer
from typer.exceptions import TyperException

from pingjia.cli import (
    chat,
    cluster,
    cost,
    data,
    doctor,
    env,
    eval,
    exam,
    export,
    gateway,
    keys,
    quality,
    quantize,
    run,
    serve,
    train,
    worker,
)
from pingjia.cli.console import errors
from pingjia.cli.environment import with_environment
from pingjia.errors import UserError

app = typer.Typer(
    name="pingjia",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error (anywhere in the line)."),
) -> None:
    """pingjia (平价): from a JSONL file to a tuned, served model on the hardware you own, and the bill for it."""


app.command("run")(run.run)
app.add_typer(data.app, name="data")
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("quality")(quality.quality)
app.command("exam")(exam.exam)
app.command("serve")(with_environment(serve.serve))
app.command("gateway")(with_environment(gateway.gateway))
app.command("worker")(with_environment(worker.worker))
app.add_typer(keys.app, name="keys")
app.add_typer(cluster.app, name="cluster")
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.command("quantize")(quantize.quantize)
app.add_typer(cost.app, name="cost")
app.command("doctor")(doctor.doctor)
app.command("env")(env.env)
app.command("version")(env.version)


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments or bool(os.environ.get("PINGJIA_DEBUG"))
    sys.exit(invoke([a for a in arguments if a != "--debug"], debug=debug))


def invoke(arguments: list[str], *, debug: bool = False) -> int:
    """Run one command line and return its exit code; every error has been printed by then."""
    if not debug:
        # Notices of transformers and peft to their own developers; they would stand between our lines.
        warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate)(\.|$)")
    try:
        result = app(args=arguments, prog_name="pingjia", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as e:
        return e.exit_code
    except TyperException as e:
        # A line that cannot be parsed. Typer carries its own click: catching click's exceptions would miss these.
        cast(Any, e).show()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left; there is nobody to complain to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        return _explain(e, debug)


def _explain(error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, UserError):
        errors.print(f"error: {error}", markup=False)
        return 2
    if isinstance(error, OSError) and error.errno in _USER_ERRNO:
        errors.print(f"error: {error.filename or 'file'}: {error.strerror}", markup=False)
        return 2
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _EXTRAS:
        extra = _EXTRAS[(error.name or "").partition(".")[0]]
        errors.print(f"error: {error.name} is not installed; run: pip install 'pingjia[{extra}]'", markup=False)
        return 2
    errors.print(f"internal error: {type(error).__name__}: {error}", markup=False)
    if not debug:
        errors.print("this is a fault in pingjia; run again with --debug and report what it prints", markup=False)
    return 1


_USER_ERRNO = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}
_EXTRAS = {name: "model" for name in ("torch", "transformers", "peft", "accelerate", "safetensors", "matplotlib")} | {
    "openai": "demo",
    "redis": "redis",
    "opentelemetry": "otel",
}


if __name__ == "__main__":
    main()
