"""Run the command line inside the test process."""

import json

from typer.testing import CliRunner, Result

from llama32.cli.main import app


def run(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def error_of(result: Result) -> str:
    """Return the error of a refused command, which must print a single line."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def json_of(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]
