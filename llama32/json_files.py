"""Small JSON files of a checkpoint folder, read with errors that name the place."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises FileNotFoundError, or ValueError with the file and the line and column of the fault.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the checkpoint is incomplete")
    try:
        data = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not valid JSON at {place}: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid JSON: the text is not UTF-8") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a JSON {type(data).__name__}, expected an object")
    return data
