"""Base model and bounded types of the request schemas.

Pydantic needs a thousand times the memory of a mistake to report the mistake. Lists therefore stop
at their first error, and the sizes of all other collections are bounded.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_ITEMS = 4096  # messages, parts of a message, choices
MAX_DICT_ENTRIES = 1024


def check_dict_size(value: Any) -> Any:
    """Reject a dict with too many entries to validate each."""
    if isinstance(value, dict) and len(value) > MAX_DICT_ENTRIES:
        limit = {"n": MAX_DICT_ENTRIES}
        raise PydanticCustomError("too_many", "at most {n} entries are allowed", limit)
    return value


T = TypeVar("T")
FailFastList = Annotated[list[T], Field(fail_fast=True)]
NonEmptyList = Annotated[list[T], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS)]
BoundedDict = Annotated[dict[str, T], BeforeValidator(check_dict_size)]
NonEmptyText = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[FailFastList[TokenId], Field(min_length=1)]
Schema = dict[str, Any]


class StrictModel(BaseModel):
    """A model that converts no types and rejects unknown fields.

    A number in quotes, for example, is not a number.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _keep_first_unknown(cls, values: Any) -> Any:
        """Drop all unknown names but the first, which is enough for the error."""
        if not isinstance(values, dict) or len(values) <= len(cls.model_fields):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in values if name not in known)
        return {name: values[name] for name in (*known, unknown) if name in values}
