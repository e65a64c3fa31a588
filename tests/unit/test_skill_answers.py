"""Every answer of the skills data, worked out again from the question alone.

The solvers here share nothing with the generator: they read the text of a question, and know
words (plurals, past tenses, categories …) from tables of their own.
"""

from __future__ import annotations

import calendar
import datetime
import itertools
import re
from collections.abc import Callable

import pytest

from distilllens.data.skills import generate_skills

MEMBERS = {
    "animal": "cat dog horse cow sheep goat mouse wolf lion frog",
    "fruit": "apple pear cherry lemon melon peach banana grape",
    "vegetable": "carrot onion potato bean leek cabbage radish turnip",
    "tool": "hammer axe drill rake spade wrench shovel chisel",
    "garment": "coat hat shirt shoe scarf glove sock dress boot",
    "vehicle": "car bus train boat truck bicycle tram van ship",
    "instrument": "piano violin flute drum guitar harp trumpet cello",
    "tree": "oak birch pine maple willow elm cedar spruce",
}
KIND_OF = {word: kind for kind, words in MEMBERS.items() for word in words.split()}
ODD_PLURALS = {"mice": "mouse", "wolves": "wolf", "scarves": "scarf", "sheep": "sheep"}
PAST = dict(
    pair.split("/")
    for pair in (
        "sings/sang walks/walked eats/ate drinks/drank writes/wrote swims/swam runs/ran "
        "sleeps/slept plays/played works/worked waits/waited dances/danced sits/sat stands/stood "
        "speaks/spoke laughs/laughed cooks/cooked paints/painted"
    ).split()
)
_PAIRS = (
    "hot cold big small fast slow dark bright wet dry hard soft open closed full empty rich poor "
    "high low long short wide narrow clean dirty strong weak loud quiet happy sad thick thin "
    "sweet sour cheap expensive young old"
).split()
OPPOSITE = dict(zip(_PAIRS, [_PAIRS[i ^ 1] for i in range(len(_PAIRS))], strict=True))
SECONDS_EACH = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
MILLIMETRES_EACH = {"centimetres": 10, "metres": 1000, "kilometres": 1_000_000}
SCALES: list[dict[str, int]] = [
    SECONDS_EACH,
    MILLIMETRES_EACH,
    {"grams": 1, "kilograms": 1000},
    {"cents": 1, "euros": 100},
    {"months": 1, "years": 12},
]
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
for _tens in "twenty thirty forty fifty sixty seventy eighty ninety".split():
    NUMBERS += [_tens, *(f"{_tens}-{ones}" for ones in NUMBERS[1:10])]
PLACES = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "last": -1}


def singular(word: str) -> str:
    """Finds the word whose plural this is, by the rules of English spelling."""
    if word in ODD_PLURALS:
        return ODD_PLURALS[word]
    for ending, stem in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss")):
        if word.endswith(ending):
            return word.removesuffix(ending) + stem
    if word in ("buses", "potatoes"):
        return word.removesuffix("es")
    assert word.endswith("s")
    return word.removesuffix("s")


def pluralise(word: str) -> str:
    irregular = {one: many for many, one in ODD_PLURALS.items()}
    if word in irregular:
        return irregular[word]
    if re.search(r"(s|ch|sh)$|^potato$", word):
        return word + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", word) + "s"


def a(noun: str) -> str:
    return ("an " if re.match("[aeiou]", noun) else "a ") + noun


def items(text: str) -> list[str]:
    """The list of a question: after the colon, after the question mark, or the input."""
    tail = re.split(r"[:?.\n]", text.strip().removesuffix("?").removesuffix("."))[-1]
    return [item.strip() for item in tail.split(",")]


def asks(text: str, *hints: str) -> bool:
    return any(hint in text for hint in hints)


def find(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    assert match, (pattern, text)
    return match.groups()


def sort_words(text: str) -> str:
    return ", ".join(sorted(items(text), reverse=asks(text, "Z to A", "reverse")))


def sort_numbers(text: str) -> str:
    falling = asks(text, "large to small", "descending")
    return ", ".join(sorted(items(text), key=int, reverse=falling))


def count_members(text: str) -> str:
    (many,) = find(r"(?:How many|Count the) (\w+)", text)
    found = [word for word in items(text) if KIND_OF[word] == singular(many)]
    if not found:
        return f"There are no {many} in it."
    names = " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
    head = f"is one {singular(many)}" if len(found) == 1 else f"are {NUMBERS[len(found)]} {many}"
    return f"There {head}: {names}."


def compare_amounts(text: str) -> str:
    first, x, second, y = find(r"(\w+) has (\d+) \w+ and (\w+) has (\d+)\.", text)
    (word,) = find(r"Who has (more|fewer)", text)
    gap = int(x) - int(y) if word == "more" else int(y) - int(x)
    winner, loser = (first, second) if gap > 0 else (second, first)
    return f"{winner} has {abs(gap)} {word} than {loser}."


def arithmetic_in_words(text: str) -> str:
    x, sign, y = find(r"([\w-]+) (plus|minus) ([\w-]+)", text)
    return NUMBERS[NUMBERS.index(x) + NUMBERS.index(y) * (1 if sign == "plus" else -1)]


def story_arithmetic(text: str) -> str:
    owner, had, things, giver, given = find(
        r"(\w+) had (\d+) (\w+)\. (\w+) (?:gave|handed) \w+ (\d+)", text
    )
    assert asks(text, f"does {owner} have")
    now = int(had) - int(given) if giver == owner else int(had) + int(given)
    assert now >= 2
    return f"{owner} now has {now} {things}."


def extraction(text: str) -> str:
    facts = re.findall(r"On (\w+) (\w+) bought a (\w+) (\w+) in (\w+)\.", text)
    assert len(facts) == 2
    question = re.sub(r"On \w+ \w+ bought .*", "", text)
    # What no fact shares with the other tells which of them is asked for.
    chosen = [fact for fact in facts if any(re.search(rf"\b{part}\b", question) for part in fact)]
    assert len(chosen) == 1, text
    day, person, colour, thing, city = chosen[0]
    return {
        "Where": f"{person} bought the {thing} in {city}.",
        "When ": f"The {thing} was bought on {day}.",
        "Who b": f"{person} bought a {thing} there.",
        "What d": f"{person} bought a {colour} {thing}.",
        "What c": f"The {thing} is {colour}.",
    }[next(start for start in ("Where", "When ", "Who b", "What d", "What c") if start in question)]


def plurals(text: str) -> str:
    return ", ".join(pluralise(word) for word in items(text))


def past_tense(text: str) -> str:
    (sentence,) = find(r"((?:\w+ \w+ in \w+ and )+\w+ \w+ in \w+\.)", text)
    return re.sub(r"\w+", lambda word: PAST.get(word.group(), word.group()), sentence)


def capital_letters(text: str) -> str:
    return items(text)[0].swapcase()


def reverse_order(text: str) -> str:
    return ", ".join(items(text)[::-1])


def weekdays(text: str) -> str:
    (number,) = find(rf"\b({'|'.join(NUMBERS[14:0:-1])}) days?\b", text)
    (day,) = find(rf"\b({'|'.join(calendar.day_name)})\b", text)
    date = datetime.date(2024, 7, 1) + datetime.timedelta(list(calendar.day_name).index(day))
    assert date.strftime("%A") == day  # 1 July 2024 was a Monday
    days = NUMBERS.index(number) * (-1 if asks(text, "before", "ago") else 1)
    return calendar.day_name[(date + datetime.timedelta(days)).weekday()]


def dates(text: str) -> str:
    date = datetime.date.fromisoformat("-".join(find(r"(\d{4})-(\d\d)-(\d\d)", text)))
    return f"{date.day} {calendar.month_name[date.month]} {date.year}"


def units(text: str) -> str:
    number, large = find(r"(\d+) (\w+)", text)
    (small,) = (
        find(r"How many (\w+)|$", text) if "How" in text else find(r"(?:to|in) (\w+)\.", text)
    )
    scale = next(scale for scale in SCALES if {large, small} <= set(scale))
    factor, rest = divmod(scale[large], scale[small])
    assert rest == 0
    return f"{number} {large} are {int(number) * factor} {small}."


def list_position(text: str) -> str:
    question = text.replace(", ".join(items(text)), "")
    names = re.findall(rf"\b({'|'.join(PLACES)})\b", question)
    return " and ".join(items(text)[PLACES[name]] for name in names)


def word_length(text: str) -> str:
    (name,) = find(r"(longest|shortest)", text)
    by_length = sorted(items(text), key=len, reverse=name == "longest")
    assert len(by_length[0]) != len(by_length[1])
    return f"The {name} word is {by_length[0]} with {NUMBERS[len(by_length[0])]} letters."


def yes_no_category(text: str) -> str:
    if text.startswith("Do "):
        noun, kind = map(singular, find(r"Do (\w+) belong to the (\w+)\?", text))
    else:
        noun, kind = find(r"(?:Is|:) an? (\w+) (?:is )?an? (\w+)[?.]", text)
    answer = "Yes" if KIND_OF[noun] == kind else "No"
    return f"{answer}, {a(noun)} is {a(KIND_OF[noun])}."


def yes_no_number(text: str) -> str:
    x, word, y = find(r"(\d+) (?:is )?(larger|smaller) than (\d+)", text)
    true = "larger" if int(x) > int(y) else "smaller"
    return f"{'Yes' if word == true else 'No'}, {x} is {true} than {y}."


def sequences(text: str) -> str:
    numbers = [int(item) for item in items(text)]
    (step,) = {after - before for before, after in itertools.pairwise(numbers)}
    return ", ".join(str(numbers[-1] + step * i) for i in (1, 2))


def opposites(text: str) -> str:
    given = text.rstrip(".").split("." if "." in text.rstrip(".") else ":")[-1].strip()
    turned, count = re.subn(r"\w+", lambda w: OPPOSITE.get(w.group(), w.group()), given)
    assert count >= 2
    return turned


def odd_one_out(text: str) -> str:
    kinds = [KIND_OF[word] for word in items(text)]
    (odd,) = [word for word in items(text) if kinds.count(KIND_OF[word]) == 1]
    (others,) = {kind for kind in kinds if kind != KIND_OF[odd]}
    return f"The {odd} is {a(KIND_OF[odd])}, the others are {others}s."


def word_letters(text: str) -> str:
    place = 0 if asks(text, "first") else -1
    return ", ".join(word[place] for word in items(text))


def filter_words(text: str) -> str:
    if asks(text, "Leave out", "Remove"):
        (kind,) = find(r"(?:the|every) (\w+)", text)
        return ", ".join(w for w in items(text) if not kind.startswith(KIND_OF[w]))
    (kind,) = find(r"(?:the|each) (\w+)", text)
    return ", ".join(w for w in items(text) if kind.startswith(KIND_OF[w]))


def filter_numbers(text: str) -> str:
    word, limit = find(r"(above|over|than|below|under) (\d+)", text)
    above = word not in ("below", "under")
    kept = [n for n in items(text) if (int(n) > int(limit) if above else int(n) < int(limit))]
    return ", ".join(kept) or "none"


def describe(text: str) -> str:
    data = dict(re.findall(r"(\w+): (\w+)", text))
    return (
        f"{data['name']} is {data['age']} years old, lives in {data['city']} "
        f"and works as a {data['job']}."
    )


SOLVERS: dict[str, Callable[[str], str]] = {
    solver.__name__: solver
    for solver in (
        *(sort_words, sort_numbers, count_members, compare_amounts, arithmetic_in_words),
        *(story_arithmetic, extraction, plurals, past_tense, capital_letters, reverse_order),
        *(weekdays, dates, units, list_position, word_length, yes_no_category, yes_no_number),
        *(sequences, opposites, odd_one_out, word_letters, filter_words, filter_numbers),
        describe,
    )
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_answer_is_right(seed: int) -> None:
    skills = generate_skills(seed=seed, train=8000, dev=200, test=240)
    wrong = [
        (row, solved)
        for row in [*skills.train, *skills.dev, *skills.test]
        if (solved := SOLVERS[row["topic"]](f"{row['instruction']}\n{row['input']}"))
        != row["output"]
    ]
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("topic", sorted(SOLVERS))
def test_solvers_answer_by_the_question(topic: str) -> None:
    """A solver that gave one answer to all would agree with a generator that does."""
    rows = [
        r for r in generate_skills(seed=3, train=500, dev=0, test=0).train if r["topic"] == topic
    ]
    answers = {SOLVERS[topic](f"{row['instruction']}\n{row['input']}") for row in rows}
    assert len(answers) > len(rows) / 4, answers
