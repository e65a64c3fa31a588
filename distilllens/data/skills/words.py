"""The few hundred words of the skills data set: few, so that a model of some million weights
can know them all, and chosen so that each question about them has one answer."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "horse", "cow", "sheep", "mouse", "wolf", "lion"),
    "fruit": ("apple", "pear", "cherry", "lemon", "banana", "grape"),
    "vegetable": ("carrot", "onion", "potato", "bean", "cabbage", "radish"),
    "tool": ("hammer", "axe", "drill", "rake", "spade", "wrench"),
    "garment": ("coat", "hat", "shirt", "shoe", "scarf", "dress"),
    "vehicle": ("car", "bus", "train", "boat", "truck", "tram"),
    "instrument": ("piano", "violin", "flute", "drum", "guitar", "trumpet"),
    "tree": ("oak", "birch", "pine", "maple", "willow", "cedar"),
}
"""Category and its members; no word stands in two of them."""

CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
NOUNS = tuple(CATEGORY_OF)

PLURALS = {
    "mouse": "mice",
    "wolf": "wolves",
    "sheep": "sheep",
    "cherry": "cherries",
    "potato": "potatoes",
    "radish": "radishes",
    "wrench": "wrenches",
    "dress": "dresses",
    "bus": "buses",
    "birch": "birches",
    "scarf": "scarves",
}
"""Plurals that are not the word with an s."""

NAMES = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Greta", "Hugo"),
    *("Ida", "Jack", "Karl", "Lena", "Maria", "Nina", "Oscar", "Paul"),
)
CITIES = ("Rome", "Paris", "Berlin", "Madrid", "Oslo", "Vienna", "Prague", "Dublin", "Athens")
JOBS = ("baker", "teacher", "doctor", "farmer", "pilot", "painter", "nurse", "lawyer")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")

PAST_TENSES = {
    "sings": "sang",
    "walks": "walked",
    "eats": "ate",
    "drinks": "drank",
    "writes": "wrote",
    "swims": "swam",
    "runs": "ran",
    "sleeps": "slept",
    "plays": "played",
    "works": "worked",
    "waits": "waited",
    "dances": "danced",
    "sits": "sat",
    "stands": "stood",
    "speaks": "spoke",
    "laughs": "laughed",
    "cooks": "cooked",
    "paints": "painted",
}
"""Third person, present and past."""

ANTONYM_PAIRS = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("wet", "dry"), ("hard", "soft")),
    *(("full", "empty"), ("rich", "poor"), ("high", "low"), ("long", "short"), ("clean", "dirty")),
    *(("strong", "weak"), ("loud", "quiet"), ("happy", "sad"), ("young", "old")),
)
OPPOSITES = dict(ANTONYM_PAIRS) | {second: first for first, second in ANTONYM_PAIRS}

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)

UNITS = (
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("euros", "cents", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("years", "months", 12),
)
"""Large unit, small unit, how many of the small one make a large one."""

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_word(number: int) -> str:
    """Spells a number from 0 to 99: 34 is "thirty-four"."""
    assert 0 <= number <= 99, number
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def plural(noun: str) -> str:
    """Returns the plural of a word of `NOUNS` or of a category."""
    return PLURALS.get(noun, f"{noun}s")


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun of this file."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def enumerate_words(words: list[str]) -> str:
    """Joins words as a sentence does: "cat, dog and cow"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
