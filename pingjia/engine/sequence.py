"""One request while it is being computed, and the piece of it that one step computes. Plain data; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pingjia.engine.pages import page_key


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one request: the prompt, then what was sampled. Sampled tokens survive preemption.

    root: what a KV page depends on besides the tokens up to its end (adapter; for two-way prompts the whole prompt).
    prefix_len: leading tokens that see each other both ways.
    followers: younger sequences with an equal prompt, which wait for this one to compute it and go on from its end.
    leader: the sequence that this one follows, until then.
    drafts: guesses at the next tokens. While a step runs, those that it tries stand at the end of `tokens`.
    """

    id: str
    arrival: int
    tokens: list[int]
    root: bytes = b""
    prefix_len: int = 0
    adapter: str | None = None
    num_prompt: int = field(init=False)
    num_computed: int = 0  # leading tokens whose keys and values lie in `pages`
    num_cached: int | None = None  # prompt tokens found in the cache when the request was first admitted
    pages: list[int] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)
    leader: Sequence | None = None
    drafts: list[int] = field(default_factory=list)
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; at least 1."""
        return len(self.tokens) - self.num_computed

    @property
    def prompt_key(self) -> bytes:
        """Equal for sequences whose prompts give equal keys, values and logits."""
        return page_key(self.root, self.tokens[: self.num_prompt])

    def keys(self, num_pages: int, page_size: int) -> list[bytes]:
        """Content keys of the first `num_pages` pages, all of which must be full."""
        assert num_pages * page_size <= len(self.tokens), "only a full page has a key"
        while len(self._keys) < num_pages:
            start = len(self._keys) * page_size
            parent = self._keys[-1] if self._keys else self.root
            self._keys.append(page_key(parent, self.tokens[start : start + page_size]))
        return self._keys[:num_pages]

    def tail(self, page_size: int) -> tuple[int, int]:
        """(page, tokens in it) of the prompt without its last token, which is computed anew for its logits."""
        return divmod(self.num_prompt - 1, page_size)

    def tail_key(self, page_size: int) -> bytes:
        """Content key of those tokens; never that of a full page, which has more."""
        index, count = self.tail(page_size)
        parent = self.keys(index, page_size)[-1] if index else self.root
        return page_key(parent, self.tokens[index * page_size :][:count])


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens start..stop-1 of a sequence, computed in one step. `samples`: the last of them yields the next token.

    num_drafts: the last so many are guesses; each of them, and the token before the first, yields logits.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    num_drafts: int = 0

    @property
    def num_outputs(self) -> int:
        """Rows of logits, after its last tokens."""
        return 1 + self.num_drafts

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def ends_prompt(self) -> bool:
        """Whether the token after it is the first of the answer, and so of every follower's answer."""
        return self.samples and self.stop == self.sequence.num_prompt
