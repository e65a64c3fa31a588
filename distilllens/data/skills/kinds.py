"""The kinds of tasks of the skills data set: each draws one question and works out its answer.

Each kind asks in several ways and often for opposite things (ascending, descending), so that a
model has to read the instruction; `tests/unit/test_skill_answers.py` reads the questions with
solvers of its own and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from distilllens.data.skills.words import (
    CATEGORIES,
    CATEGORY_OF,
    CITIES,
    COLOURS,
    JOBS,
    MONTHS,
    NAMES,
    NOUNS,
    OPPOSITES,
    PAST_TENSES,
    UNITS,
    WEEKDAYS,
    enumerate_words,
    number_word,
    plural,
    with_article,
)


@dataclass(frozen=True)
class Task:
    """One question and its answer, as a record has them."""

    instruction: str
    input: str
    output: str


def _on_list(rng: Random, order: str, items: Sequence[object], output: str) -> Task:
    """Puts the list behind the order, or half of the time into the record's input."""
    listed = ", ".join(map(str, items))
    ends = order.endswith("?")
    if rng.random() < 0.5:
        return Task(order if ends else f"{order}.", listed, output)
    return Task(f"{order} {listed}" if ends else f"{order}: {listed}", "", output)


def sort_words(rng: Random) -> Task:
    backwards = rng.random() < 0.5
    orders = (
        ("Sort these words from Z to A", "Put the words in reverse alphabetical order")
        if backwards
        else ("Sort these words from A to Z", "Put the words in alphabetical order")
    )
    words = rng.sample(NOUNS, 3)
    answer = ", ".join(sorted(words, reverse=backwards))
    return _on_list(rng, rng.choice(orders), words, answer)


def sort_numbers(rng: Random) -> Task:
    falling = rng.random() < 0.5
    orders = (
        ("Sort these numbers from large to small", "Put the numbers in descending order")
        if falling
        else ("Sort these numbers from small to large", "Put the numbers in ascending order")
    )
    numbers = rng.sample(range(1, 100), rng.randint(3, 4))
    answer = ", ".join(map(str, sorted(numbers, reverse=falling)))
    return _on_list(rng, rng.choice(orders), numbers, answer)


def count_members(rng: Random) -> Task:
    category, other = rng.sample(tuple(CATEGORIES), 2)
    count = rng.randint(0, 3)
    members = rng.sample(CATEGORIES[category], count)
    words = members + rng.sample(CATEGORIES[other], 4 - count)
    rng.shuffle(words)
    found = [word for word in words if word in members]
    question = rng.choice(
        (
            f"How many {plural(category)} are in this list?",
            f"Count the {plural(category)} and name them",
        )
    )
    if not found:
        return _on_list(rng, question, words, f"There are no {plural(category)} in it.")
    verb, noun = ("is", category) if count == 1 else ("are", plural(category))
    answer = f"There {verb} {number_word(count)} {noun}: {enumerate_words(found)}."
    return _on_list(rng, question, words, answer)


def compare_amounts(rng: Random) -> Task:
    first, second = rng.sample(NAMES, 2)
    things = plural(rng.choice(NOUNS))
    amount, difference = rng.randint(1, 10), rng.randint(1, 5)
    amounts = [amount, amount + difference]
    rng.shuffle(amounts)
    word = rng.choice(("more", "fewer"))
    passage = f"{first} has {amounts[0]} {things} and {second} has {amounts[1]}."
    question = rng.choice((f"Who has {word} {things}?", f"Who has {word}, and by how many?"))
    order = (first, second) if (amounts[0] > amounts[1]) == (word == "more") else (second, first)
    answer = f"{order[0]} has {difference} {word} than {order[1]}."
    if rng.random() < 0.5:
        return Task(question, passage, answer)
    return Task(f"{passage} {question}", "", answer)


def arithmetic_in_words(rng: Random) -> Task:
    terms, results = [], []
    for _ in range(2):
        first, second = rng.randint(1, 6), rng.randint(1, 6)
        plus = rng.random() < 0.5
        if not plus:
            first, second = max(first, second), min(first, second)
        terms.append(f"{number_word(first)} {'plus' if plus else 'minus'} {number_word(second)}")
        results.append(number_word(first + second if plus else first - second))
    question = " and ".join(terms)
    order = rng.choice(
        (f"How much are {question}?", f"What is {question}?", f"Work out {question}.")
    )
    return Task(order, "", " and ".join(results))


def extraction(rng: Random) -> Task:
    people, cities = rng.sample(NAMES, 2), rng.sample(CITIES, 2)
    colours = rng.sample(COLOURS, 2)
    category = rng.choice(("garment", "tool", "vehicle", "instrument"))
    things = rng.sample(CATEGORIES[category], 2)
    facts = list(zip(people, colours, things, cities, strict=True))
    passage = " ".join(
        f"{person} bought a {colour} {thing} in {city}." for person, colour, thing, city in facts
    )
    person, colour, thing, city = rng.choice(facts)
    question, answer = rng.choice(
        (
            (f"Where did {person} buy the {thing}?", f"{person} bought the {thing} in {city}."),
            (f"Who bought something in {city}?", f"{person} bought a {thing} there."),
            (f"Who has the {thing}?", f"{person} has the {colour} {thing}."),
            (f"What did {person} buy?", f"{person} bought a {colour} {thing}."),
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        )
    )
    return Task(question, passage, answer)


def plurals(rng: Random) -> Task:
    nouns = rng.sample(NOUNS, rng.randint(2, 4))
    order = rng.choice(
        ("Write these words in the plural", "Give the plural of each word", "Turn one into many")
    )
    return _on_list(rng, order, nouns, ", ".join(map(plural, nouns)))


def past_tense(rng: Random) -> Task:
    people, cities = rng.sample(NAMES, 2), rng.sample(CITIES, 2)
    verbs = rng.sample(tuple(PAST_TENSES), 2)
    given, answer = (
        " and ".join(f"{who} {verb} in {city}" for who, verb, city in clauses) + "."
        for clauses in (
            list(zip(people, verbs, cities, strict=True)),
            list(zip(people, [PAST_TENSES[verb] for verb in verbs], cities, strict=True)),
        )
    )
    order = rng.choice(
        ("Rewrite in the past tense", "Say that it happened yesterday", "Use the past tense")
    )
    if rng.random() < 0.5:
        return Task(f"{order}.", given, answer)
    return Task(f"{order}: {given}", "", answer)


def capital_letters(rng: Random) -> Task:
    upper = rng.random() < 0.7
    orders = (
        ("Write in capital letters", "Change to upper case")
        if upper
        else ("Write in small letters", "Change to lower case")
    )
    words = f"{rng.choice(COLOURS)} {rng.choice(NOUNS)}"
    words += f" and {rng.choice(COLOURS)} {rng.choice(NOUNS)}"
    given, answer = (words, words.upper()) if upper else (words.upper(), words)
    return _on_list(rng, rng.choice(orders), [given], answer)


def reverse_order(rng: Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    order = rng.choice(
        ("Reverse the order of the words", "Write the list backwards", "Read from last to first")
    )
    return _on_list(rng, order, words, ", ".join(reversed(words)))


def weekdays(rng: Random) -> Task:
    start, count = rng.randrange(7), rng.randint(2, 4)
    day, name, number = WEEKDAYS[start], rng.choice(NAMES), number_word(count)
    step = rng.choice((-1, 1))
    questions = (
        (
            f"Name the {number} days after {day}.",
            f"After {day} {name} was away for {number} days. Which days?",
        )
        if step == 1
        else (
            f"Name the {number} days before {day}, the nearest first.",
            f"{name} came on {day} after {number} days of travel. Which days, backwards?",
        )
    )
    answer = ", ".join(WEEKDAYS[(start + step * place) % 7] for place in range(1, count + 1))
    return Task(questions[rng.random() < 0.8], "", answer)


def dates(rng: Random) -> Task:
    year, month, day = rng.randint(1990, 2029), rng.randint(1, 12), rng.randint(1, 28)
    question = rng.choice(
        ("Write this date with the name of the month", "Which date is this in words")
    )
    return _on_list(
        rng, question, [f"{year}-{month:02d}-{day:02d}"], f"{day} {MONTHS[month - 1]} {year}"
    )


def units(rng: Random) -> Task:
    large, small, factor = rng.choice(UNITS)
    number = rng.randint(2, 20)
    question = rng.choice(
        (
            f"How many {small} are {number} {large}?",
            f"Convert {number} {large} to {small}.",
            f"Express {number} {large} in {small}.",
        )
    )
    return Task(question, "", f"{number} {large} are {number * factor} {small}.")


def list_position(rng: Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    places = rng.sample(("first", "second", "last"), 2)
    named = {"first": words[0], "second": words[1], "last": words[-1]}
    question = rng.choice(
        (
            f"Name the {places[0]} and the {places[1]} word",
            f"Which words are {places[0]} and {places[1]}?",
        )
    )
    return _on_list(rng, question, words, " and ".join(named[place] for place in places))


def word_length(rng: Random) -> Task:
    words = rng.sample(NOUNS, 4)
    longest = rng.random() < 0.5
    word = (max if longest else min)(words, key=len)
    if sum(len(other) == len(word) for other in words) > 1:
        return word_length(rng)  # two words of that length: no single answer
    name = "longest" if longest else "shortest"
    question = rng.choice((f"Which word is the {name}?", f"Find the {name} word"))
    answer = f"The {name} word is {word} with {number_word(len(word))} letters."
    return _on_list(rng, question, words, answer)


def yes_no_category(rng: Random) -> Task:
    noun = rng.choice(NOUNS)
    true = CATEGORY_OF[noun]
    asked = true if rng.random() < 0.4 else rng.choice(tuple(CATEGORIES))
    question = rng.choice(
        (
            f"Is {with_article(noun)} {with_article(asked)}?",
            f"True or not: {with_article(noun)} is {with_article(asked)}.",
            f"Do {plural(noun)} belong to the {plural(asked)}?",
        )
    )
    answer = f"{'Yes' if asked == true else 'No'}, {with_article(noun)} is {with_article(true)}."
    return Task(question, "", answer)


def yes_no_number(rng: Random) -> Task:
    first, second = rng.sample(range(1, 100), 2)
    word = rng.choice(("larger", "smaller"))
    true = "larger" if first > second else "smaller"
    question = rng.choice(
        (f"Is {first} {word} than {second}?", f"Is it true that {first} is {word} than {second}?")
    )
    answer = f"{'Yes' if word == true else 'No'}, {first} is {true} than {second}."
    return Task(question, "", answer)


def opposites(rng: Random) -> Task:
    adjectives = rng.sample(tuple(OPPOSITES), rng.randint(2, 3))
    turned = [OPPOSITES[adjective] for adjective in adjectives]
    if rng.random() < 0.4:
        order = rng.choice(("Give the opposites", "Write the opposite of each word"))
        return _on_list(rng, order, adjectives, ", ".join(turned))
    nouns = rng.sample(NOUNS, len(adjectives))
    given, answer = (
        enumerate_words([f"the {a} {n}" for a, n in zip(words, nouns, strict=True)])
        for words in (adjectives, turned)
    )
    order = rng.choice(("Replace each adjective by its opposite", "Say the opposite of this"))
    return _on_list(rng, order, [given], answer)


def odd_one_out(rng: Random) -> Task:
    category, other = rng.sample(tuple(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[other])
    words = [*rng.sample(CATEGORIES[category], rng.randint(3, 4)), odd]
    rng.shuffle(words)
    question = rng.choice(
        ("Which word does not belong?", "Find the odd one out", "One word is of another kind")
    )
    answer = f"The {odd} is {with_article(other)}, the others are {plural(category)}."
    return _on_list(rng, question, words, answer)


def filter_words(rng: Random) -> Task:
    keep, other = rng.sample(tuple(CATEGORIES), 2)
    kept = rng.sample(CATEGORIES[keep], rng.randint(1, 3))
    words = kept + rng.sample(CATEGORIES[other], 4 - len(kept))
    rng.shuffle(words)
    drop = rng.random() < 0.4
    orders = (
        (f"Leave out the {plural(other)}", f"Remove every {other} from the list")
        if drop
        else (f"Keep only the {plural(keep)}", f"Name each {keep} in the list")
    )
    answer = ", ".join(word for word in words if word in kept)
    return _on_list(rng, rng.choice(orders), words, answer)


def describe(rng: Random) -> Task:
    name, age = rng.choice(NAMES), rng.randint(20, 69)
    city, job = rng.choice(CITIES), rng.choice(JOBS)
    data = [name, age, city, job]
    rng.shuffle(data)
    order = rng.choice(
        ("Describe the person in a sentence", "Turn the data into a sentence", "Who is this?")
    )
    answer = f"{name} is {age} years old, lives in {city} and works as a {job}."
    return _on_list(rng, order, data, answer)


KINDS: dict[str, Callable[[Random], Task]] = {
    kind.__name__: kind
    for kind in (
        *(sort_words, sort_numbers, count_members, compare_amounts, arithmetic_in_words),
        *(extraction, plurals, past_tense, capital_letters, reverse_order, weekdays, dates),
        *(units, list_position, word_length, yes_no_category, yes_no_number, opposites),
        *(odd_one_out, filter_words, describe),
    )
}
"""Name of a kind, which becomes the record's topic, and what draws one of its tasks."""
