"""How a server behaves: whom it lets in, how much at once, for how long."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from typer import Option

about = partial(Option, rich_help_panel="Server")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where it listens, and its limits. Also the options of `llama32 serve`."""

    host: Annotated[str, about(help="Only this machine by default; 0.0.0.0 is everyone.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, about(min=0, max=65535, help="0 takes a free one, and tells.")] = 8000
    api_key: Annotated[
        str | None,
        about(envvar="LLAMA32_API_KEY", help="What clients have to send.", show_envvar=True),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        about(help="What clients call the model; repeat it for several. By default its --model."),
    ] = None
    queue: Annotated[
        int, about(min=0, help="Requests that may wait; more are told to come later (429).")
    ] = 1000
    timeout: Annotated[
        float, about(min=0.1, help="Seconds for a whole request, the wait for its turn included.")
    ] = 600.0
    drain: Annotated[
        float, about(min=0, help="Seconds that running requests have left at the end.")
    ] = 30.0
    max_body: Annotated[int, about(min=1, help="Bytes of a request, at most.")] = 8 * 2**20
    cors_origin: Annotated[
        list[str] | None, about(help="A web site whose pages may ask; repeat it for several.")
    ] = None
    log_prompts: Annotated[
        bool, about("--log-prompts", help="Log what was asked and answered, too.")
    ] = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("api_key: give ASCII characters, not only spaces; or none at all")
