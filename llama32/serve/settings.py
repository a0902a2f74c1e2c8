"""Settings of the server: address, access, limits."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from typer import Option

server_option = partial(Option, rich_help_panel="Server")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Address, access and limits of a server. Also the options of `llama32 serve`."""

    host: Annotated[
        str, server_option(help="Address to listen on; 0.0.0.0 accepts other machines.")
    ] = "127.0.0.1"
    port: Annotated[
        int, server_option(min=0, max=65535, help="Port; 0 takes a free port and prints it.")
    ] = 8000
    api_key: Annotated[
        str | None,
        server_option(
            envvar="LLAMA32_API_KEY", help="Key that clients must send.", show_envvar=True
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        server_option(help="Model name for clients; repeat for several. Default: --model."),
    ] = None
    queue: Annotated[
        int, server_option(min=0, help="Maximum number of waiting requests; more get status 429.")
    ] = 1000
    timeout: Annotated[
        float, server_option(min=0.1, help="Seconds for a whole request, waiting included.")
    ] = 600.0
    drain: Annotated[
        float, server_option(min=0, help="Seconds for running requests to finish on shutdown.")
    ] = 30.0
    max_body: Annotated[int, server_option(min=1, help="Maximum bytes of a request body.")] = (
        8 * 2**20
    )
    cors_origin: Annotated[
        list[str] | None,
        server_option(help="Web site whose pages may send requests; repeat for several."),
    ] = None
    log_prompts: Annotated[
        bool, server_option("--log-prompts", help="Log prompts and answers, too.")
    ] = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError(
                "ServeSettings: api_key is blank or has characters outside ASCII; "
                "give an ASCII key or none"
            )
