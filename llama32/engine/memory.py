"""How large the KV cache is to be."""

import torch

from llama32.cache import PAGE_SIZE, bytes_per_token
from llama32.engine.settings import EngineSettings
from llama32.int8_cache import int8_bytes_per_token
from llama32.model import Llama
from llama32.paged import QUERY_BLOCK

CPU_BYTES = 4 << 30  # at most, unless asked for more: a context of Llama 3.2 1B


def page_size(model: Llama, settings: EngineSettings) -> int:
    """Slots of a page. Small pages share more of a prompt; on a GPU larger ones cost less."""
    on_gpu = model.norm.weight.device.type == "cuda"
    return settings.page_size or (PAGE_SIZE if on_gpu else QUERY_BLOCK)


def num_pages(model: Llama, settings: EngineSettings) -> int:
    """Pages of the cache, by the settings or by the memory that is there.

    Never more than `max_running` requests of the whole context can fill. A draft model has the same
    pages, in memory of its own, which is counted here. ValueError if there is not room for one.
    """
    size = page_size(model, settings)
    weight = model.norm.weight
    per_token = bytes_per_token(model.config, weight.dtype)
    if settings.cache_dtype is not None:
        per_token = int8_bytes_per_token(model.config)
    per_page = size * per_token
    if settings.speculation is not None:
        per_page += size * settings.speculation.bytes_per_token
    context = -(-model.config.max_position_embeddings // size)
    if settings.cache_tokens is not None:
        return -(-settings.cache_tokens // size)
    if settings.cache_bytes is not None:
        room = settings.cache_bytes
    elif weight.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(weight.device)
        room = int(free * settings.memory_fraction)
    else:
        room = CPU_BYTES
    pages = room // per_page
    if not pages:
        raise ValueError(
            f"the KV cache gets {room:,} bytes, and a page of {size} tokens takes {per_page:,}"
        )
    return min(pages, settings.max_running * context)
