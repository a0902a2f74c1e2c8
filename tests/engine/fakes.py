"""An engine without a model, for tests of all that is around it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, chain, islice
from random import Random
from weakref import WeakKeyDictionary
from zlib import crc32

from llama32.engine.drawing import Drawn
from llama32.engine.engine import Engine
from llama32.engine.request import Request
from llama32.engine.scheduler import Step, Work
from llama32.engine.settings import EngineSettings
from llama32.engine.speculation import verified
from tests.checkpoints import tiny_config

VOCABULARY = 256  # tokens are bytes
ANSWERS = 251  # those from here on are never said
CONTEXT = 1024
PAGE = 64


class FakeRunner:
    """Its next token is a function of all tokens so far, and nobody reads what is not his own.

    A slot of a page holds the checksum of all tokens up to the one that was computed into it. In
    every step all that a request reads is compared with the checksums of its own tokens, so that a
    page lost or wrongly shared is noticed at once.
    """

    def __init__(self, num_pages: int = 32, page_size: int = PAGE) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.deterministic = True
        self.config = tiny_config(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
        self.weights: Hashable = 0  # a change of the model
        self.before_step: Callable[[Step], object] = lambda step: None
        self.errors: list[Exception] = []  # each is raised by one step, the first by the next
        # Of a request's row, after which its output has so many tokens:
        self.is_finite: Callable[[Request, int], bool] = lambda request, said: True
        self.num_steps = 0
        self.num_forgets = 0
        self._slots = [[0] * page_size for _ in range(num_pages)]
        self._sums: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def run(self, step: Step) -> list[Drawn]:
        works = (*step.prefill, *step.decode)
        for work in works:
            self._write(work, [-1] * work.stop)  # all that is left of a step that breaks off
        self.before_step(step)
        if self.errors:
            raise self.errors.pop(0)
        self.num_steps += 1
        for work in works:
            self._write(work, self._sums_of(work.request))
        for work in works:
            self._check(work)
        asking = [request for request, _, stop in step.decode if stop >= request.length]
        return [one for request in asking for one in verified(request.drafts, self._draw(request))]

    def warm_up(self, on_progress: Callable[[int, int], object]) -> None:
        on_progress(0, 0)

    def fingerprint(self) -> Hashable:
        return self.weights

    def forget(self) -> None:
        self.num_forgets += 1

    def _sums_of(self, request: Request) -> list[int]:
        """Of all its known tokens, and then of its drafts."""
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

    def _write(self, work: Work, sums: list[int]) -> None:
        for position in range(work.start, work.stop):
            page = work.request.pages[position // self.page_size]
            self._slots[page][position % self.page_size] = sums[position]

    def _check(self, work: Work) -> None:
        slots = chain.from_iterable(self._slots[page] for page in work.request.pages)
        own = self._sums_of(work.request)[: work.stop]
        assert list(islice(slots, work.stop)) == own, f"{work} reads what is not its own"

    def _draw(self, request: Request) -> list[Drawn]:
        """After its last known token, and after each draft."""
        drawn: list[Drawn] = []
        for sum in self._sums_of(request)[request.length - 1 :]:
            if self.is_finite(request, len(request.output) + len(drawn)):
                drawn.append(Drawn(request, sum % ANSWERS, None))
            else:
                error = FloatingPointError("a row is not finite")
                drawn.append(Drawn(request, -1, None, error))
        return drawn


def answer(prompt: list[int], length: int) -> list[int]:
    """What the fake says to a prompt."""
    tokens = bytearray(prompt)
    for _ in range(length):
        tokens.append(crc32(tokens) % ANSWERS)
    return [*tokens[len(prompt) :]]


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Any tokens; of two seeds not even the first page is alike."""
    return Random(seed).choices(range(ANSWERS), k=length)


class FakeDrafts:
    """Speculation that knows the answers, and gets each token right with this probability."""

    bytes_per_token = 0

    def __init__(self, quality: float = 1.0, num_tokens: int = 4) -> None:
        self.num_tokens = num_tokens
        self.quality = quality
        self.known: set[Request] = set()  # asked for, and not released
        self.asked: list[int] = []  # how many each time
        self._random = Random(0)

    def drafter(self, config, settings: EngineSettings) -> "FakeDrafts":
        self.settings = settings
        return self

    def propose(self, asked: Mapping[Request, int]) -> Mapping[Request, Sequence[int]]:
        self.known |= asked.keys()
        self.asked += asked.values()
        return {request: self._guess(request, n) for request, n in asked.items()}

    def release(self, request: Request) -> None:
        self.known.discard(request)

    def _guess(self, request: Request, n: int) -> list[int]:
        right = answer([*request.prompt, *request.output], n)
        is_right = (self._random.random() < self.quality for _ in right)
        return [
            token if good else (token + 1) % ANSWERS
            for token, good in zip(right, is_right, strict=True)
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
