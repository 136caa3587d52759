"""Names of tensors: what wrappers add, older spellings, prefixes that differ between two models, and patterns of what to leave out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from lata_lightning.errors import LataError, LayoutMismatchError, first_three
from lata_lightning.layers import unwrapped

# Spellings of older releases: TensorFlow's words for layer norms, and weight norm before parametrizations. Transformers renames them when it loads.
_OLD_ENDINGS = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
    (".weight_g", ".parametrizations.weight.original0"),
    (".weight_v", ".parametrizations.weight.original1"),
)


def current_spelling(name: str) -> str:
    """Return a name in the spelling of the installed transformers, where only its ending has changed over the releases."""
    for old, new in _OLD_ENDINGS:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


class LeaveOut:
    """Which tensors to leave out, by regular expressions to search in their names.

    Args:
        patterns: The regular expressions.
        names: Further names that are left out, each in full.

    Raises:
        LataError: A pattern is no regular expression, or is empty.
    """

    def __init__(self, patterns: Iterable[str] = (), names: Collection[str] = ()) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self.names = frozenset(names)
        self._compiled = []
        for pattern in self.patterns:
            try:
                self._compiled.append(re.compile(pattern))
            except re.error as error:
                raise LataError(f"a pattern of what to leave out must be a regular expression; {pattern!r} is none: {error}") from error
            if not pattern:
                raise LataError("a pattern of what to leave out must not be empty: it would leave out every tensor")

    def __call__(self, name: str) -> bool:
        """Return whether a tensor of this name is left out."""
        return name in self.names or any(pattern.search(name) for pattern in self._compiled)

    def used(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the patterns that match at least one of the given names."""
        listed = list(names)
        return tuple(text for text, pattern in zip(self.patterns, self._compiled, strict=True) if any(map(pattern.search, listed)))

    def check_used(self, names: Iterable[str], label: str) -> None:
        """Refuse patterns that match none of the given names, as they are misspelled.

        Raises:
            LataError: At least one pattern matches nothing.
        """
        listed = list(names)
        unused = set(self.patterns) - set(self.used(listed))
        if unused:
            raise LataError(
                f"each pattern of what to leave out must match a tensor name of {label}; without a match are {first_three(unused)}. "
                f"The names are {first_three(listed)}"
            )


NOTHING = LeaveOut()


def differing_prefixes(one: Collection[str], other: Collection[str], label: str) -> tuple[str, str]:
    """Return the prefixes to remove from the names of two models so that as many names as possible agree.

    Args:
        one: Names of the tensors of the first model.
        other: Names of the tensors of the second model.
        label: Name of the first model, for messages.

    Returns:
        The prefix to remove from the names of ``one``, and that of ``other``, each with its dot; empty to remove none.

    Raises:
        LayoutMismatchError: Several prefixes of ``one`` match equally well: it has the model more than once.
    """
    first, second = set(one), set(other)
    smaller = min(len(first), len(second))
    same = len(first & second)
    if same == smaller:
        return "", ""
    counts: Counter[tuple[str, str]] = Counter()
    for name in first:
        counts.update((prefix, "") for prefix, rest in _cuts(name) if rest in second)
    for name in second:
        counts.update(("", prefix) for prefix, rest in _cuts(name) if rest in first)
    if same == 0 and max(counts.values(), default=0) < smaller:
        counts.update(_two_sided(first, second))
    best = max(counts.values(), default=0)
    # Names that agree already need no prefix, and a few common endings say nothing.
    if best <= same or 2 * best < smaller:
        return "", ""
    pairs = [pair for pair, count in counts.items() if count == best]
    pairs = [pair for pair in pairs if not any(_extends(pair, shorter) for shorter in pairs)]
    if len(pairs) > 1:
        listed = [prefix or other_prefix for prefix, other_prefix in pairs]
        raise LayoutMismatchError(
            f"{label} must hold the model once; equally many of its tensors are under each of {first_three(listed)}. "
            "Say which to take: --model NAME, or model=NAME in Python."
        )
    return pairs[0]


def _two_sided(first: set[str], second: set[str]) -> dict[tuple[str, str], int]:
    """Return how many names agree by pair of prefixes, for prefixes that at least half of the names of their side have."""
    trunks = []
    for names in (first, second):
        covered = Counter(prefix for name in names for prefix, _ in _cuts(name))
        trunks.append([prefix for prefix, count in covered.items() if 2 * count >= len(names)])
    counts = {}
    for one in trunks[0]:
        rests = {name[len(one) :] for name in first if name.startswith(one)}
        for other in trunks[1]:
            if one.split(".")[-2] != other.split(".")[-2]:
                counts[one, other] = sum(name.startswith(other) and name[len(other) :] in rests for name in second)
    return counts


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """Yield every way to cut a name at a dot: prefix with its dot, and rest."""
    dot = name.find(".")
    while dot >= 0:
        yield name[: dot + 1], name[dot + 1 :]
        dot = name.find(".", dot + 1)


def _extends(pair: tuple[str, str], shorter: tuple[str, str]) -> bool:
    """Return whether a pair of prefixes is another pair with the same components added to both."""
    added = [long.removeprefix(short) if long.startswith(short) else None for long, short in zip(pair, shorter, strict=True)]
    return pair != shorter and added[0] is not None and added[0] == added[1]


def leave_out_pattern(lone: Iterable[str], common: Sequence[str]) -> str | None:
    """Return the pattern that leaves out some tensors and nothing else; None unless they are a few modules outside the numbered layers.

    Args:
        lone: Names to leave out.
        common: Names to keep.
    """
    common_prefixes = {prefix for name in common for prefix, _ in _cuts(name)}
    names, modules = list(lone), set()
    for name in names:
        prefix = next((prefix for prefix, _ in _cuts(name) if prefix not in common_prefixes), None)
        module = name if prefix is None else prefix
        if any(part.isdigit() for part in module.split(".")):
            return None
        modules.add(re.escape(name) + "$" if prefix is None else re.escape(prefix))
    # A head may be a numbered list itself; where as many tensors differ as agree, they are no head.
    numbered = any(part.isdigit() for name in names for part in name.split("."))
    if not modules or not common or len(modules) > 4 or (numbered and 2 * len(names) > len(common)):
        return None
    return "^" + next(iter(modules)) if len(modules) == 1 else f"^({'|'.join(sorted(modules))})"


def keyed(names: Iterable[str], label: str) -> dict[str, str]:
    """Return stored names by the key under which two models are compared: without wrappers, in today's spelling.

    Raises:
        LayoutMismatchError: Two names have one key.
    """
    by_key: dict[str, str] = {}
    twice = []
    for name in names:
        key = current_spelling(unwrapped(name))
        if key in by_key:
            twice.append(name)
        by_key[key] = name
    if twice:
        raise LayoutMismatchError(f"{label} must hold each tensor once; under a second name are {first_three(twice)}")
    return by_key


def restored(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the names whose key begins with a prefix, by the rest of their key."""
    return {key[len(prefix) :]: name for key, name in names.items() if key.startswith(prefix)}
