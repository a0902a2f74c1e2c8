"""An engine without a model, to test the scheduler, the delivery and the streams."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, chain, islice
from random import Random
from weakref import WeakKeyDictionary
from zlib import crc32

from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.scheduler import Chunk, ScheduledStep
from llama32.engine.settings import EngineSettings
from llama32.engine.speculation import accept
from llama32.engine.token_sampling import SampledToken
from tests.checkpoints import tiny_config

VOCABULARY = 256  # tokens are bytes
ANSWERS = 251  # tokens from here on are never generated
CONTEXT = 1024
PAGE = 64


class FakeRunner:
    """A runner whose next token is a checksum of all tokens so far.

    A slot of a page contains the checksum of all tokens up to the slot. In every step, the slots
    that a request reads are compared with the checksums of its own tokens, so a lost or wrongly
    shared page is detected at once.
    """

    def __init__(self, num_pages: int = 32, page_size: int = PAGE) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.deterministic = True
        self.config = tiny_config(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
        self.weights: Hashable = 0  # changes stand for changes of the model
        self.before_step: Callable[[ScheduledStep], object] = lambda step: None
        self.errors: list[Exception] = []  # raised by the next steps, in order
        # By request and the number of output tokens before the row:
        self.is_finite: Callable[[Request, int], bool] = lambda request, num_output: True
        self.num_steps = 0
        self.num_resets = 0
        self._slots = [[0] * page_size for _ in range(num_pages)]
        self._sums: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def run(self, step: ScheduledStep) -> list[SampledToken]:
        chunks = (*step.prefill, *step.decode)
        for chunk in chunks:
            self._write(chunk, [-1] * chunk.stop)  # invalid contents, if the step fails
        self.before_step(step)
        if self.errors:
            raise self.errors.pop(0)
        self.num_steps += 1
        for chunk in chunks:
            self._write(chunk, self._sums_of(chunk.request))
        for chunk in chunks:
            self._check(chunk)
        requests = [request for request, _, stop in step.decode if stop >= request.length]
        return [
            sampled
            for request in requests
            for sampled in accept(request.drafts, self._sample(request))
        ]

    def warm_up(self, on_progress: Callable[[int, int], object]) -> None:
        on_progress(0, 0)

    def fingerprint(self) -> Hashable:
        return self.weights

    def reset_compiled(self) -> None:
        self.num_resets += 1

    def _sums_of(self, request: Request) -> list[int]:
        """Return the checksums at all known tokens and drafts."""
        sums = self._sums.setdefault(request, [])
        length = len(request.prompt) + len(request.output)
        if len(sums) < length:
            for token in request.ids(len(sums), length):
                sums.append(crc32(bytes([token]), sums[-1] if sums else 0))
        if not request.drafts:
            return sums
        drafts = (bytes([token]) for token in request.drafts)
        drafted = accumulate(drafts, lambda sum, token: crc32(token, sum), initial=sums[-1])
        return [*sums[:-1], *drafted]

    def _write(self, chunk: Chunk, sums: list[int]) -> None:
        for position in range(chunk.start, chunk.stop):
            page = chunk.request.pages[position // self.page_size]
            self._slots[page][position % self.page_size] = sums[position]

    def _check(self, chunk: Chunk) -> None:
        slots = chain.from_iterable(self._slots[page] for page in chunk.request.pages)
        own = self._sums_of(chunk.request)[: chunk.stop]
        assert list(islice(slots, chunk.stop)) == own, f"{chunk} reads slots of other tokens"

    def _sample(self, request: Request) -> list[SampledToken]:
        """Sample after the last known token and after each draft."""
        tokens: list[SampledToken] = []
        for sum in self._sums_of(request)[request.length - 1 :]:
            if self.is_finite(request, len(request.output) + len(tokens)):
                tokens.append(SampledToken(request, sum % ANSWERS, None))
            else:
                error = FloatingPointError("a row is not finite")
                tokens.append(SampledToken(request, -1, None, error))
        return tokens


def answer(prompt: list[int], length: int) -> list[int]:
    """Return the fake's output for a prompt."""
    tokens = bytearray(prompt)
    for _ in range(length):
        tokens.append(crc32(tokens) % ANSWERS)
    return [*tokens[len(prompt) :]]


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Return random tokens; different seeds have no common page."""
    return Random(seed).choices(range(ANSWERS), k=length)


class FakeDrafts:
    """Speculation that knows the answers, with each draft correct at a given probability."""

    bytes_per_token = 0

    def __init__(self, quality: float = 1.0, num_tokens: int = 4) -> None:
        self.num_tokens = num_tokens
        self.quality = quality
        self.tracked: set[Request] = set()  # got drafts, and not released
        self.requested: list[int] = []  # the limits of all calls
        self._random = Random(0)

    def drafter(self, config, settings: EngineSettings) -> "FakeDrafts":
        self.settings = settings
        return self

    def propose(self, limits: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        self.tracked |= limits.keys()
        self.requested += limits.values()
        return {request: self._guess(request, n) for request, n in limits.items()}

    def release(self, request: Request) -> None:
        self.tracked.discard(request)

    def _guess(self, request: Request, n: int) -> list[int]:
        return [
            token if self._random.random() < self.quality else (token + 1) % ANSWERS
            for token in answer([*request.prompt, *request.output], n)
        ]


def make_engine(
    num_pages: int = 32, page_size: int = PAGE, **settings
) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(num_pages, page_size)
    return Engine(runner, EngineSettings(**settings)), runner


def run_to_the_end(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.is_busy:
            break
        engine.step()
    assert not engine.is_busy
    assert engine.stats.pages_held == 0
