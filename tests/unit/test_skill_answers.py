"""Every answer of the skills data, worked out again from the question alone.

The solvers here share nothing with the generator: they read the text of a question, and know
words (plurals, past tenses, categories …) from tables of their own.
"""

from __future__ import annotations

import calendar
import datetime
import re
from collections.abc import Callable

import pytest

from distilllens.data.skills.records import generate_skills

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
    "hot cold big small fast slow wet dry hard soft full empty rich poor high low long short "
    "clean dirty strong weak loud quiet happy sad young old"
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
PEOPLE = (
    "Anna Ben Clara David Emma Frank Greta Hugo Ida Jack Karl Lena Maria Nina Oscar Paul".split()
)


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
    return " and ".join(
        NUMBERS[NUMBERS.index(x) + NUMBERS.index(y) * (1 if sign == "plus" else -1)]
        for x, sign, y in re.findall(r"([\w-]+) (plus|minus) ([\w-]+)", text)
    )


def extraction(text: str) -> str:
    facts = re.findall(r"(\w+) bought a (\w+) (\w+) in (\w+)\.", text)
    assert len(facts) == 2
    question = text.split("?")[0]
    # What no fact shares with the other tells which of them is asked for.
    chosen = [fact for fact in facts if any(re.search(rf"\b{part}\b", question) for part in fact)]
    assert len(chosen) == 1, text
    person, colour, thing, city = chosen[0]
    return {
        "Where did": f"{person} bought the {thing} in {city}.",
        "Who bought": f"{person} bought a {thing} there.",
        "Who has": f"{person} has the {colour} {thing}.",
        "What did": f"{person} bought a {colour} {thing}.",
        "What colour": f"The {thing} is {colour}.",
    }[" ".join(question.split()[:2])]


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
    (day,) = find(rf"\b({'|'.join(calendar.day_name)})\b", text)
    (number,) = find(r"\b(two|three|four) days", text)
    date = datetime.date(2024, 7, 1) + datetime.timedelta(list(calendar.day_name).index(day))
    assert date.strftime("%A") == day  # 1 July 2024 was a Monday
    sign = -1 if asks(text, "before", "backwards") else 1
    days = [date + datetime.timedelta(sign * (i + 1)) for i in range(NUMBERS.index(number))]
    return ", ".join(calendar.day_name[day.weekday()] for day in days)


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
    places = re.findall(r"\b(first|second|last)\b", text)
    return " and ".join(items(text)[{"first": 0, "second": 1, "last": -1}[p]] for p in places)


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


def filter_words(text: str) -> str:
    if asks(text, "Leave out", "Remove"):
        (kind,) = find(r"(?:the|every) (\w+)", text)
        return ", ".join(w for w in items(text) if not kind.startswith(KIND_OF[w]))
    (kind,) = find(r"(?:the|each) (\w+)", text)
    return ", ".join(w for w in items(text) if kind.startswith(KIND_OF[w]))


def describe(text: str) -> str:
    given = items(text)
    (age,) = [item for item in given if item.isdigit()]
    (job,) = [item for item in given if item.islower()]
    (name,) = [item for item in given if item in PEOPLE]
    (city,) = set(given) - {age, job, name}
    return f"{name} is {age} years old, lives in {city} and works as a {job}."


SOLVERS: dict[str, Callable[[str], str]] = {
    solver.__name__: solver
    for solver in (
        *(sort_words, sort_numbers, count_members, compare_amounts, arithmetic_in_words),
        *(extraction, plurals, past_tense, capital_letters, reverse_order, weekdays, dates),
        *(units, list_position, word_length, yes_no_category, yes_no_number, opposites),
        *(odd_one_out, filter_words, describe),
    )
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_answer_is_right(seed: int) -> None:
    skills = generate_skills(seed=seed, train=20000, dev=200, test=240)
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
