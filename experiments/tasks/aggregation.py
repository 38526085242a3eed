"""RULER's tasks beyond the needles (arXiv 2404.06654, section 3): tracing variables, and counting words.

Variable tracking (vt). Chains of assignments, each in order, at random places of noise:

    VAR A = 12345.  ..  VAR B = VAR A.  ..  VAR C = VAR B.  ..        wanted: all variables of one value

Common words extraction (cwe). A numbered list in random order, in which C words stand a times and u words b times,
a > b; the C words are wanted. The length sets u.

Frequent words extraction (fwe). A text of coded words in random order. The word of rank k stands

    n(k) = floor(N k^-2 / zeta(2)),   zeta(2) = pi^2 / 6

times, the expected count of N draws from the zeta distribution of exponent 2, so that ranks are never tied by
chance; rank 1 is written as dots and means nothing, ranks 2, 3 and 4 are wanted. The length sets N.

Other than in RULER: the wording; no worked example stands before cwe and vt; vt has three chains, not one, since
with one every variable in the text is an answer; the words of cwe are made of syllables (the splits need more
different words than a list of English ones holds).
"""

from __future__ import annotations

import math

from .haystack import NOISE, Draft, Setting, Text, noise, scatter
from .names import Names

CHAINS, HOPS = 3, 4  # vt; a chain has one variable more than hops
COMMON = 10  # C of cwe
REPEATS = (30, 3)  # a and b of cwe
FEW_REPEATS = (6, 1)  # instead, where the common words would else fill more than half of the text
MOST_LISTED = 100_000  # different words of cwe, of about 170,000 that a split has
FREQUENT = 3  # wanted of fwe
LEAST_DRAWN = 100  # N of fwe: the counts of ranks 2 to 5 differ from here on

_VT = "Variables are given values in the text below. Keep track of the value of each.\n\n"
_CWE = "Below is a numbered list of words. Some of them stand in it more often than the others.\n\n"
_CWE_QUESTION = f"\n\nWhich {COMMON} words stand in the list most often?"
_CWE_START = f"The {COMMON} most common words of the list are"
_FWE = "The text below is in code. Count how often each of its words occurs; the dots mean nothing.\n\n"
_FWE_QUESTION = f"\n\nWhich {FREQUENT} words occur most often in the coded text?"
_FWE_START = f"The {FREQUENT} words that occur most often are"


def variable_tracking(setting: Setting) -> Draft:
    """vt; the unit is a sentence of noise."""
    numbers = setting.stream("chains")
    names = Names(numbers, setting.split, "")
    worth = [names.draw("worth") for _ in range(CHAINS)]
    chains = [[names.draw("variable") for _ in range(HOPS + 1)] for _ in range(CHAINS)]
    depths = [sorted(numbers.random() for _ in chain) for chain in chains]
    asked = numbers.randrange(CHAINS)
    assignments = []  # (depth, text), chain after chain
    for value, chain, where in zip(worth, chains, depths, strict=True):
        sources = [value, *(f"VAR {variable}" for variable in chain)]
        assignments += [
            (depth, f"VAR {variable} = {source}.")
            for depth, variable, source in zip(where, chain, sources, strict=False)
        ]
    first = asked * (HOPS + 1)

    def build(count: int) -> Text:
        text, positions = scatter(noise(count), assignments, " ")
        question = f"\n\nWhich {HOPS + 1} variables have the value {worth[asked]}?"
        start = f"The {HOPS + 1} variables that have the value {worth[asked]} are"
        wanted = tuple(len(_VT) + position for position in positions[first : first + HOPS + 1])
        return Text(_VT + text + question, start, tuple(chains[asked]), wanted)

    return Draft(build, least=len(NOISE))


def common_words(setting: Setting) -> Draft:
    """cwe; the unit is a word that stands there seldom."""
    often, seldom = REPEATS
    shortest = " ".join(f"{i}. {word}" for i, word in enumerate(["tomiku"] * (often * COMMON), 1))
    if 2 * setting.num_tokens(shortest) > setting.length:
        often, seldom = FEW_REPEATS
    names = Names(setting.stream("words"), setting.split, (_CWE + _CWE_QUESTION + _CWE_START).lower())
    common = [names.draw("listed") for _ in range(COMMON)]
    uncommon: list[str] = []  # drawn when they are needed, always the same

    def build(count: int) -> Text:
        while len(uncommon) < count:
            uncommon.append(names.draw("listed"))
        words = common * often + uncommon[:count] * seldom
        setting.stream("order").shuffle(words)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        return Text(_CWE + text + _CWE_QUESTION, _CWE_START, tuple(common))

    return Draft(build, least=COMMON, most=MOST_LISTED)


def zeta_counts(drawn: int) -> list[int]:
    """n(1), n(2), .. of the frequent words, as long as they are not 0, for N = `drawn`."""
    counts: list[int] = []
    while count := int(drawn * 6 / (math.pi * (len(counts) + 1)) ** 2):
        counts.append(count)
    return counts


def frequent_words(setting: Setting) -> Draft:
    """fwe; the unit is a draw."""
    names = Names(setting.stream("words"), setting.split, (_FWE + _FWE_QUESTION + _FWE_START).lower())
    ranked = ["...."]

    def build(drawn: int) -> Text:
        counts = zeta_counts(drawn)
        while len(ranked) < len(counts):
            ranked.append(names.draw("coded"))
        words = [word for word, count in zip(ranked, counts, strict=False) for _ in range(count)]
        setting.stream("order").shuffle(words)
        return Text(_FWE + " ".join(words) + _FWE_QUESTION, _FWE_START, tuple(ranked[1 : FREQUENT + 1]))

    return Draft(build, least=LEAST_DRAWN)
