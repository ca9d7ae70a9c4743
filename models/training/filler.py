"""Original prose-like text from templates, for use where no books are at hand.

The text is meant to be looked through, not read: plausible sentences in paragraphs, varied enough
that no long stretch repeats. `held_out=True` uses people, places and things that the training text
never uses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True, slots=True)
class _Lexicon:
    people: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    materials: tuple[str, ...]


_TRAIN = _Lexicon(
    people=_listed("""
        Alice Arthur Beatrice Bernard Clara Conrad Dora Edmund Edith Felix Flora George Grace
        Harold Helen Hugh Irene Isaac Jane Joseph Kate Lewis Lydia Martin Mary Nathan Nora Oliver
        Peter Rachel Robert Ruth Samuel Sarah Simon Thomas Ursula Victor Walter William"""),
    places=(
        "the harbour", "the market square", "the old mill", "the railway station", "the orchard",
        "the school house", "the north road", "the upper valley", "the post office", "the bakery",
        "the river bank", "the church yard", "the village hall", "the east gate", "the ferry",
        "the quarry", "the stables", "the town library", "the garden wall", "the lower field",
        "the stone bridge", "the inn", "the watch tower", "the fishing pier", "the chapel",
        "the carpenter's yard", "the top of the hill", "the edge of the wood",
    ),
    things=(
        "letter", "clock", "ladder", "basket", "map", "lamp", "wagon", "coat", "painting", "kettle",
        "notebook", "fence", "boat", "roof", "bell", "chair", "saddle", "window", "barrel", "rope",
        "table", "door", "net", "coin", "blanket", "chest", "hammer", "spade", "loom", "mirror",
    ),
    materials=(
        "oak", "iron", "wool", "clay", "linen", "brass", "leather", "straw", "pine", "glass",
        "copper", "canvas", "tin", "paper",
    ),
)  # fmt: skip
_HELD_OUT = _Lexicon(
    people=_listed("""
        Agatha Ambrose Bridget Cedric Delia Desmond Eleanor Everett Frances Gideon Harriet
        Horace Imogen Jasper Leonora Lionel Mabel Maurice Naomi Percy Priscilla Rupert Sylvia
        Theodore Winifred"""),
    places=(
        "the lighthouse", "the observatory", "the vineyard", "the customs house", "the glass works",
        "the botanical garden", "the theatre", "the canal lock", "the print shop",
        "the south shore", "the assembly room", "the saw mill", "the reservoir",
        "the signal box", "the museum",
    ),
    things=(
        "violin", "telescope", "suitcase", "teapot", "sculpture", "bicycle", "cabinet", "umbrella",
        "ledger", "curtain", "canoe", "fountain", "stove", "portrait", "parcel", "scaffold",
    ),
    materials=("marble", "silk", "walnut wood", "bronze", "porcelain", "velvet", "slate", "cork"),
)  # fmt: skip

_TRAITS = _listed("""
    patient careful stubborn cheerful quiet generous curious practical restless honest tired
    thoughtful proud hopeful uneasy kind punctual forgetful""")
_LOOKS = _listed("""
    worn heavy small plain handsome narrow faded crooked polished dusty broad pale dark
    battered slender curious ordinary unfinished""")
_WEATHER = (
    "rain", "a thin mist", "bright sun", "a cold wind", "the first snow", "heavy cloud",
    "a warm breeze", "thunder far off", "a hard frost", "low fog",
)  # fmt: skip
_TIMES = (
    "early in the morning", "before noon", "late in the afternoon", "after supper", "at dusk",
    "on the following day", "some weeks later", "that same evening", "near the end of the month",
    "during the long winter", "at the start of spring", "when the harvest was in",
    "before anyone else was awake", "on the way home", "after a long silence",
)  # fmt: skip
_DEEDS = (
    "mended", "sold", "carried", "painted", "borrowed", "cleaned", "measured", "described",
    "returned", "bought", "hid", "examined", "lost", "found", "repaired", "wrapped", "dropped",
    "weighed", "drew", "praised",
)  # fmt: skip
_REASONS = (
    "because nobody else would", "for the sake of an old promise", "without asking the price",
    "as the custom was", "although the work was slow", "since the road was closed",
    "while the others talked", "in spite of the weather", "to save the cost of a new one",
    "before the light was gone", "with more haste than skill", "and thought no more about it",
    "and was glad to have it done", "to the surprise of the neighbours", "as if it mattered to all",
)  # fmt: skip
_REMARKS = (
    "it would not last another season", "there was no hurry", "the price had been fair",
    "nothing of the kind had been seen before", "the matter was settled",
    "one could not judge by the first look", "every household ought to keep one",
    "the children would remember it", "the road was longer than it seemed",
    "the best time to begin was now", "it had belonged to a cousin", "the river would rise again",
    "a careful person would have waited", "the news could not be true",
)  # fmt: skip
_COUNTS = _listed("two three four five six seven eight nine ten twelve twenty forty")
_TEMPLATES = (
    "{Time}, {a} {deed} the {look} {thing} {reason}.",
    "{a} was a {trait} person, and {b} was a {trait2} one.",
    "The {thing} near {place} was made of {material} and looked {look}.",
    "There was {weather} over {place}, and the people stayed indoors.",
    "{a} told {b} that {remark}.",
    "{a} walked from {place} to {place2} {time}.",
    "Nobody at {place} could say who had {deed} the {thing}.",
    "{b} kept {count} pieces of {material} in a {look} {thing}.",
    '"I believe that {remark}," said {a}.',
    '"Have you seen the {look} {thing}?" asked {b}, {reason}.',
    "It took {count} days to bring the {material} to {place}.",
    "If {a} had been less {trait}, the {thing} would have been {deed} sooner.",
    "{Time}, with {weather} in the air, {a} and {b} met at {place}.",
    "They spoke of the {thing}, of the {material}, and of {place2}.",
    "The {look} {thing} stood by itself at {place} for {count} years.",
    "What {a} wanted was a {thing} of {material}, neither too {look} nor too {look2}.",
    "{b} answered that {remark}, and went on with the work.",
    "From {place} one could see {place2} when there was no mist.",
    "Of all the things that {a} owned, the {thing} was the most {look}.",
    "{a} and {b} agreed on little, but both were {trait}.",
    "{Time}, the {thing} was {deed} again, this time by {b}.",
    "The road past {place} was {look} {time}, and {a} took the other way.",
    "Some held that {remark}; others, that {remark2}.",
    "{count2} people came to {place} to look at the {thing}.",
    "{a} wrote a long account of it, {reason}.",
    "A {trait} neighbour had {deed} the {material} and would not explain why.",
)


def sentence(rng: random.Random, *, held_out: bool = False) -> str:
    """One sentence, with its capital and its full stop and no surrounding space."""
    words = _HELD_OUT if held_out else _TRAIN
    pick = rng.choice
    a, b = rng.sample(words.people, 2)
    place, place2 = rng.sample(words.places, 2)
    look, look2 = rng.sample(_LOOKS, 2)
    trait, trait2 = rng.sample(_TRAITS, 2)
    remark, remark2 = rng.sample(_REMARKS, 2)
    time, count = pick(_TIMES), pick(_COUNTS)
    return pick(_TEMPLATES).format(
        a=a, b=b, place=place, place2=place2, look=look, look2=look2, trait=trait, trait2=trait2,
        remark=remark, remark2=remark2, time=time, Time=time.capitalize(), thing=pick(words.things),
        material=pick(words.materials), weather=pick(_WEATHER), deed=pick(_DEEDS),
        reason=pick(_REASONS), count=count, count2=count.capitalize(),
    )  # fmt: skip


def prose(seed: int, characters: int, *, held_out: bool = False) -> str:
    """Paragraphs of three to eight sentences, at least `characters` long, the same for each seed.

    Paragraphs are separated by one empty line; the text ends with a full stop or a quotation mark.
    """
    rng = random.Random(seed)
    paragraphs: list[str] = []
    size = 0
    while size < characters:
        lines = [sentence(rng, held_out=held_out) for _ in range(rng.randint(3, 8))]
        paragraphs.append(" ".join(lines))
        size += len(paragraphs[-1]) + 2
    return "\n\n".join(paragraphs)
