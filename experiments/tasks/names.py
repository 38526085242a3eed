"""Names that stand for nothing: keys, values, variables and words of the long-context tasks, new within a prompt.

    kind       looks like                              how many
    word       brave-lantern                           adjective times noun, see ADJECTIVES and NOUNS
    number     4071253                                 seven digits, 9 * 10^6
    uuid       3f0c6a1e-98b4-4d7f-a2c1-5e6b7d8f9a01    version 4, 2^122
    variable   QWXLT                                   five capital letters, 26^5
    worth      40712                                   five digits, 9 * 10^4
    listed     tomiku                                  three syllables of a consonant and a vowel, 70^3
    coded      xqjvwa                                  six small letters, 26^6

Which split a name belongs to is decided by the name alone:

    split(name) = "train" if SHA-256(name) is even, else "test"

so no name of one split is ever one of the other, whatever the seeds. No adjective ends with another and no noun
begins with another: a key of words never hides within another key.
"""

from __future__ import annotations

import hashlib
import random
import string
import uuid
from functools import cache
from typing import Literal

from gka.training.errors import UserError

Split = Literal["train", "test"]
Kind = Literal["word", "number", "uuid", "variable", "worth", "listed", "coded"]

_PATIENCE = 10_000  # draws without a new name before giving up: about one in a thousand is left then

ADJECTIVES = tuple(
    """
    amber ample ancient angry arctic ashen autumn awake azure bitter black blank bleak blind blond blue
    blunt bold brave brief bright brisk broad bronze brown busy calm careful cheap cheerful chief civil
    clean clear clever close cloudy clumsy coarse cold common copper coral cosy crimson crisp crooked
    cruel curious curly daily damp daring dark dear deep dense dim distant dizzy double dreamy dry dull
    dusty eager early eastern easy elder electric elegant empty endless equal even exact faint fair
    faithful famous fancy fast feeble fertile festive fierce final fine firm flat fluffy foggy foreign
    formal fragile frank free frequent fresh friendly frosty frozen full funny gentle giant glad global
    golden good grand grateful grave gray great greedy green grim gross happy hard harsh hasty heavy
    hidden hollow honest hot huge humble hungry idle inner ivory jade jolly joyful keen kind large late
    lazy light lively local lonely long loose lost loud lovely loyal lucky lunar mad magic major marble
    mean mellow mental merry mighty mild minor modern modest moist mortal muddy narrow nasty native neat
    neutral new nimble noble noisy normal northern odd olive open orange outer pale patient perfect pink
    plain playful polite poor proud public pure purple quick quiet rapid rare raw ready recent regal rich
    rigid ripe robust rosy rough round royal rude rural rustic sacred sad safe salty sandy scarlet secure
    senior serene severe shallow sharp shiny short shy silent silky silver simple single sleepy slim slow
    small smart smooth snowy sober soft solar solemn solid sour southern spare spicy square stable steady
    steep sticky stiff still strange strict strong sturdy subtle sudden sunny super sweet swift tall tame
    tender tense thick thin thirsty tidy tight tiny tired tough tranquil true upper urban urgent useful
    vague vain valid vast velvet violet vivid warm wary weak wealthy weary western wet white whole wide
    wild windy wise witty wooden woolly worthy yellow young zealous
    """.split()
)
NOUNS = tuple(
    """
    acorn airport alley anchor angle ankle antler apple apron arch armchair arrow atlas attic badge
    bagpipe bakery balcony balloon bamboo banana banjo banner barrel basin basket bathtub beacon beard
    beaver bell bench bicycle blanket blossom boat bonfire book bottle boulder bowl branch bread bridge
    broom brush bubble bucket buckle bugle butter button cabin cactus camel camera canal candle canoe
    canyon carpet carrot castle cavern cellar chair chalk chapel cherry chest chimney circus clarinet
    cliff cloak clock clover coat cobweb coffee comet compass cottage cradle crane crater cricket crown
    crystal cupboard curtain cushion cymbal daisy desert desk diamond dolphin donkey dragon drawer drum
    eagle easel elbow elephant engine envelope falcon farmer feather fence ferry fiddle finger flag flute
    forest fork fossil fountain fox garden garlic gate geyser giraffe glacier glove goblet goose grape
    guitar gutter hammer hammock harbor harp hazel hedge helmet hermit heron hill honey hook horizon
    hotel igloo inkwell island jacket jaguar jasmine jelly jewel jungle kayak kettle kitchen kitten knife
    knot ladder lagoon lantern laurel lemon leopard letter library lighthouse lily lizard lobster locket
    lumber magnet mailbox mango mantle maple market marsh mask meadow melon mirror mitten monkey moth
    mountain mushroom napkin necklace needlework nest notebook oak oasis ocean onion orchard organ
    ostrich otter oven owl oyster paddle palace panther parcel parrot pasture peach pearl pebble pelican
    pencil pepper piano pigeon pillow pine pirate planet plum pocket pony potato prairie prism pumpkin
    puppet puzzle quarry quilt rabbit radish raft raven ribbon river robin rocket roof rope saddle salmon
    sandal satchel saucer scarf school scooter shadow shelf shovel sign sketch sled slipper snail sofa
    spade sparrow spider spoon spruce statue stove stream swan table tailor tapestry teapot temple
    thimble thunder ticket tiger toast tomato torch tower tractor trumpet tulip tunnel turtle umbrella
    valley vase vessel village violin volcano waffle wagon walnut walrus weasel whale wheel whistle
    willow window winter wizard yacht zebra zipper
    """.split()
)


def split_of(name: str) -> Split:
    """The split that a name belongs to, by the last bit of its SHA-256."""
    return "test" if hashlib.sha256(name.encode()).digest()[-1] & 1 else "train"


@cache
def words_of(split: Split) -> tuple[str, ...]:
    """All names of the kind "word" of a split, in alphabetical order."""
    names = (f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)
    return tuple(name for name in names if split_of(name) == split)


class Names:
    """Draws names of one split that were not drawn before and do not stand in a text.

    Args:
        numbers: what names are drawn with.
        split: that the names belong to.
        text: lower case; no name drawn is found in it, not even as part of a word.
    """

    def __init__(self, numbers: random.Random, split: Split, text: str) -> None:
        self._numbers, self._split, self._text = numbers, split, text
        self._taken: set[str] = set()

    def draw(self, kind: Kind) -> str:
        """A new name.

        Raises:
            UserError: there are hardly any left that are new and not in the text.
        """
        for _ in range(_PATIENCE):
            name = self._any(kind)
            if name not in self._taken and split_of(name) == self._split and name.lower() not in self._text:
                self._taken.add(name)
                return name
        raise UserError(f"there are too few names of the kind {kind!r} that do not stand in the text: use another")

    def _any(self, kind: Kind) -> str:
        numbers = self._numbers
        if kind == "word":
            return numbers.choice(words_of(self._split))
        if kind == "number":
            return str(numbers.randrange(10**6, 10**7))
        if kind == "uuid":
            return str(uuid.UUID(int=numbers.getrandbits(128), version=4))
        if kind == "variable":
            return "".join(numbers.choices(string.ascii_uppercase, k=5))
        if kind == "worth":
            return str(numbers.randrange(10**4, 10**5))
        if kind == "listed":
            return "".join(numbers.choice("bdfgklmnprstvz") + numbers.choice("aeiou") for _ in range(3))
        return "".join(numbers.choices(string.ascii_lowercase, k=6))
