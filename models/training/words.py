"""Word lists for the keys of retrieval tasks.

The training lists and the held-out lists share no word, so that an evaluation with held-out keys
shows copying from the document, not recall of keys seen in training.
"""

from __future__ import annotations


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN_ADJECTIVES: tuple[str, ...] = _listed("""
    able absurd active agile airy alert ample ancient angry ardent arid autumn awkward bald bare
    basic bitter blank bleak blond blunt bold brave brief bright brisk brittle broad broken bronze
    brown bumpy busy calm candid careful casual central cheap cheerful chief chilly civil clean
    clear clever close cloudy clumsy coarse cold comic common coral cosmic costly cozy crimson
    crisp crooked cruel cunning curious curly damp daring dark deaf dear deep delicate dense dim
    distant dizzy double drowsy dull dusty eager early earnest easy elegant empty endless even
    exact faint fair faithful false familiar famous fancy fatal fertile fierce final firm flat
    foggy foolish formal fragile free frequent fresh frosty frugal gaunt generous gentle giant
    glad gloomy golden graceful grand grave greedy green grim handy happy harsh hasty heavy hidden
    hollow honest huge humble hungry icy ideal idle inner jolly keen kind large late lavish lazy
    lean level light lively local lofty lonely loose loud loyal lucky mellow merry mild misty
    modest muddy narrow neat nervous nimble noble noisy novel odd olive orange pale patient plain
    plump polite poor proud pure purple quick quiet rapid rare ready red rich rigid ripe rough
    round royal rude rusty sad scarlet secret sharp shiny short shy silent silver simple slim slow
    small smooth sober soft solid sour spare steady steep stern stiff still strange strict strong
    subtle sudden sunny sweet swift tall tame tart tender thick thin tidy timid tiny tired tough
    tranquil true urban urgent vague vain vast violet vivid warm wary weak weary wet white whole
    wide wild wise witty wooden yellow young
    """)

TRAIN_NOUNS: tuple[str, ...] = _listed("""
    acorn alley anchor animal apple apron arch arrow attic badge bakery ball bandage banner barrel
    basin basket bay beach beacon bead beam bean beard bed bee bell bench berry bicycle bird biscuit
    blanket blossom board boat bolt bone book boot bottle bowl box branch brass bread brick bridge
    brook broom brush bucket bug butter button cabbage cabin cable cake camel camp canal candle
    cannon cap captain card carpet cart castle cat cave ceiling cellar chain chair chalk cheese
    cherry chest chimney church cigar circle city clay cliff clock cloth cloud clover coach coal
    coast coat coffee coin collar comb compass copper cord corn corner cotton cottage cow cradle
    crane cream crown crystal cup curtain dairy daisy deer desk diamond dinner dish doctor dog doll
    donkey door dove dragon drawer dream dress drum duck eagle ear elbow engine face factory fan
    farm feather fence fern field finger fire fish flag flame flask fleet flour flute fog forest
    fork fountain fox frame frog fruit garden gate ghost glass glove goat grain grape grass guitar
    hammer hand harbor hat hawk hedge hill hinge honey horn horse hotel house island ivory jacket
    jar jewel judge kettle key kitchen kite knee knife knot ladder lake lamp lawn leaf lemon letter
    lily lion lock log loom lumber magnet maple marble market meadow melon milk mill mirror monkey
    moon mountain mouse nail needle nest net oak oar ocean office onion orchard organ oven owl ox
    paint palace pan paper parcel park parrot path peach pear pebble pencil pepper piano picture pie
    pig pillow pine pipe plate plough plum pocket pond porch prince pump queen quill rabbit rail
    ribbon rice ring river road robe roof root rope rose rug saddle sail salt sand scarf school
    seed shelf shell ship shoe shore sister skirt slope smoke snail snow soap sock spade spoon
    spring stable star stone stove street sugar table teacher temple thread throne thumb ticket
    tiger tower town tray tree trunk tulip tunnel valley vase village wagon wall watch wave wheel
    whistle window wing winter wolf wood yard
    """)

HELD_OUT_ADJECTIVES: tuple[str, ...] = _listed("""
    abundant amber aquatic brazen bashful breezy buoyant cerulean chubby compact cordial dapper
    dainty decent earthy elated fluffy fluent frantic gifted glossy grumpy hardy hectic humid
    jagged jaunty joyful lanky limber lucid lunar magenta marvelous mighty nifty obscure ornate
    peculiar placid plush polished prickly pristine quaint quirky radiant robust rugged rustic
    sable scenic serene shaggy slender sleek snug sturdy sullen supple teal thorny thrifty turquoise
    upbeat velvet verdant wobbly zany zealous
    """)

HELD_OUT_NOUNS: tuple[str, ...] = _listed("""
    abacus accordion albatross almond antler aquarium asteroid avocado badger bamboo banjo beaver
    beetle blender boulder bouquet bracelet buffalo bumper burrow cactus canyon caravan cashew
    cello cheetah cobra comet coyote cucumber dolphin easel falcon ferret flamingo galaxy garlic
    gazelle gecko geyser giraffe glacier gondola hamster harp heron iguana jaguar jigsaw kayak
    koala lagoon lantern lizard lobster mango meteor mosaic nebula octopus orchid otter panda
    papaya pelican penguin pretzel pyramid quartz raccoon raven saxophone seahorse sparrow squid
    tambourine toucan trumpet turnip tuxedo volcano walnut walrus xylophone yacht zebra zeppelin
    """)

_ONSETS = _listed(
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm sn "
    "sp st str t th tr v w y z"
)
_VOWELS = _listed("a e i o u ai ea ee ie oa oo ou")
_CODAS = ("", "", "", *_listed("b ck d ff g l ll lm m n nd ng nt p r rd rk rn s sh ss st t th x"))


def pseudo_word(numbers: tuple[int, ...]) -> str:
    """Spells an invented word from one to four syllables.

    `numbers` holds three non-negative integers a syllable (onset, vowel, coda), reduced modulo the
    number of choices, so that any random source gives words.
    """
    parts = []
    for start in range(0, len(numbers) - 2, 3):
        onset, vowel, coda = numbers[start : start + 3]
        parts.append(
            _ONSETS[onset % len(_ONSETS)]
            + _VOWELS[vowel % len(_VOWELS)]
            + _CODAS[coda % len(_CODAS)]
        )
    return "".join(parts)
