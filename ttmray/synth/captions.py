"""Captions in words: many wordings of the same attributes, some of them held out to test unseen wordings.

A caption is an opening (style, tempo, mood) and a few clauses (melody, chords, bass, drums, voice, ...),
joined in one of
several ways. Held-out wordings have sentence frames and phrases of their own. Each content word of theirs also
occurs in
a training wording of the same fact, so that a text encoder which knows only training captions can understand them:
what is new is how they say it.
"""

import re
from collections.abc import Mapping

import numpy as np

from ttmray.synth.piece import Attributes

Wordings = tuple[tuple[str, ...], tuple[str, ...]]
"""Training and held-out."""

TEMPO: Mapping[str, tuple[str, ...]] = {
    "slow": ("slow", "unhurried", "slow-moving", "leisurely"),
    "medium": ("mid-tempo", "medium", "moderate", "steady"),
    "fast": ("fast", "quick", "up-tempo", "rapid"),
}
MOOD: Mapping[bool, tuple[str, ...]] = {
    True: ("happy", "cheerful", "sunny", "bright"),
    False: ("sad", "dark", "moody", "melancholic"),
}
SOUND: Mapping[str, tuple[str, ...]] = {
    "finger bass": ("electric bass", "finger bass", "bass guitar"),
    "picked bass": ("picked bass", "picked bass guitar"),
    "upright bass": ("upright bass", "double bass", "acoustic bass"),
    "synth bass": ("synth bass", "analog synth bass"),
    "sub bass": ("sub bass", "deep sub bass"),
    "acid bass": ("acid bass", "squelchy acid bass"),
    "chip bass": ("chip bass", "8-bit bass"),
    "chip lead": ("chip lead", "8-bit lead", "8-bit synth"),
    "chip pulse": ("chip pulses", "8-bit pulses"),
    "nylon guitar": ("nylon guitar", "nylon-string guitar"),
    "steel guitar": ("acoustic guitar", "steel-string guitar", "steel-string acoustic guitar"),
    "electric guitar": ("electric guitar", "clean electric guitar"),
    "distorted guitar": ("distorted guitar", "distorted electric guitar", "overdriven guitar"),
    "electric piano": ("electric piano", "rhodes", "rhodes electric piano"),
    "piano": ("piano", "acoustic piano", "grand piano"),
    "saxophone": ("saxophone", "sax"),
    "strings": ("strings", "string section", "orchestral strings"),
    "pizzicato strings": ("pizzicato strings", "plucked strings"),
    "glockenspiel": ("glockenspiel", "bells", "glockenspiel bells"),
    "vibraphone": ("vibraphone", "vibes"),
    "saw lead": ("saw lead", "sawtooth synth lead", "sawtooth synth"),
    "saw stab": ("synth stabs", "sawtooth stabs"),
    "square lead": ("square lead", "square wave synth", "square synth lead"),
    "synth pluck": ("synth pluck", "plucked synth"),
    "synth brass": ("synth brass", "brassy synth"),
    "warm pad": ("warm pad", "warm synth pad"),
    "glass pad": ("glass pad", "glassy synth pad"),
}
"""Instruments that go by other names; the rest by their own."""
KITS: Mapping[str, tuple[str, ...]] = {
    "acoustic": ("acoustic drums", "live drums", "a drum kit", "drums"),
    "electronic": ("electronic drums", "a drum machine", "electronic beats", "drums"),
    "machine": ("drum machine", "808 drums", "an 808 drum machine", "drums"),
    "chip": ("8-bit drums", "chip drums", "drums"),
    "brushes": ("brushed drums", "drums with brushes", "drums"),
    "ride": ("drums with a ride cymbal", "ride cymbal and drums", "drums"),
    "hand": ("hand percussion", "hand drums", "congas and shaker", "drums"),
}
VOICE: Mapping[str, tuple[str, ...]] = {
    "low": ("low", "male"),
    "high": ("high", "female"),
}
ROOM: Mapping[str, Wordings] = {
    "dry": (("dry sound", "close and dry", "no reverb"), ("the sound is dry and close",)),
    "room": (("in a small room", "some room sound"), ("the room is small",)),
    "hall": (("in a large hall", "lots of reverb", "spacious hall reverb"), ("the hall is large with reverb",)),
}

OPENINGS: Wordings = (
    (
        "a {tempo} {style} piece",
        "a {mood} {style} song at a {tempo} pace",
        "{tempo} {style} music",
        "this is a {tempo} {style} track",
        "{style}, {tempo}, {mood}",
        "a {mood}, {tempo} {style} tune",
        "a {style} track with a {tempo} tempo and a {mood} mood",
        "{mood} {style} at {bpm} bpm, {tempo}",
        "a {tempo} {style} song in {key}",
        "{tempo} and {mood} {style}",
        "the song is {mood} {style} with a {tempo} beat",
        "a piece of {style} in {key}, {tempo}",
    ),
    (
        "the tempo of this {style} piece is {tempo}",
        "{style} song, the mood is {mood}, the pace is {tempo}",
        "this {tempo} track is {style} music",
        "a tune with a {tempo} pace, {mood}, {style}",
        "music at a {tempo} tempo: {mood} {style} in {key}",
    ),
)
CLAUSES: Mapping[str, Wordings] = {
    "lead": (
        ("{lead} melody", "the melody is on {lead}", "led by {lead}", "{lead} plays the lead", "featuring {lead}"),
        ("the lead is on {lead}", "{lead} plays the melody", "melody played by {lead}"),
    ),
    "comp": (
        ("{comp} chords", "backed by {comp}", "over {comp}", "{comp} accompaniment", "the chords are played on {comp}"),
        ("chords on {comp}", "{comp} plays chords", "the accompaniment is played by {comp}"),
    ),
    "bass": (("{bass}", "over {bass}", "{bass} line", "with {bass} below"), ("a line on {bass}", "{bass} is below")),
    "pad": (("{pad} behind", "backed by {pad}", "held {pad}"), ("{pad} is held behind", "{pad} is behind")),
    "drums": (
        ("{kit}", "with {kit}", "{kit} play", "a beat on {kit}", "there are {kit}"),
        ("the beat is on {kit}", "{kit} play the beat"),
    ),
    "no drums": (
        ("no drums", "without drums", "drumless", "there are no drums", "no percussion"),
        ("without percussion", "the music is drumless", "there is no percussion"),
    ),
    "voice": (
        (
            "a {voice} voice sings",
            "{voice} vocals",
            "sung by a {voice} voice",
            "with {voice} singing",
            "a {voice} singer",
            "there is a {voice} voice",
        ),
        ("there is {voice} singing", "a {voice} singer is singing", "the vocals are sung by a {voice} singer"),
    ),
    "no voice": (
        ("instrumental", "no vocals", "without a voice", "no singing", "there are no vocals", "instrumental music"),
        ("there is no voice", "without vocals", "there is no singing", "the music is instrumental"),
    ),
}
CHANCE = {"lead": 0.75, "comp": 0.7, "bass": 0.45, "pad": 0.4, "drums": 0.85, "voice": 0.85, "room": 0.3}
JOINS: Wordings = ((", ", "; ", ". ", " with ", " / "), (" and ", " - "))


def caption(attributes: Attributes, rng: np.random.Generator, heldout: bool = False) -> str:
    """One caption that is true of the attributes; clips take those of `Piece.heard`.

    Style and tempo are always told, the other facts often.
    """
    side = int(heldout)
    fill = {
        "style": _pick(rng, (attributes.word, attributes.style))
        if attributes.word != attributes.style
        else attributes.style,
        "tempo": _pick(rng, TEMPO[attributes.tempo_word]),
        "mood": _pick(rng, MOOD[attributes.key.bright]),
        "key": attributes.key.name,
        "bpm": f"{round(attributes.tempo / 5) * 5:d}",
    }
    for part in ("lead", "comp", "bass", "pad"):
        name = getattr(attributes, part)
        fill[part] = _pick(rng, SOUND.get(name, (name,)))
    fill["kit"] = _pick(rng, KITS[attributes.kit]) if attributes.kit else ""
    fill["voice"] = _pick(rng, VOICE[attributes.voice]) if attributes.voice else ""
    clauses = [_pick(rng, wordings[side]).format(**fill) for wordings in _facts(attributes, rng)]
    order = rng.permutation(len(clauses))
    text = [_pick(rng, OPENINGS[side]).format(**fill), *(clauses[i] for i in order)]
    return _sentence(text, side, rng)


def _facts(attributes: Attributes, rng: np.random.Generator) -> list[Wordings]:
    """The facts that a caption tells beside style and tempo."""
    told = {fact: bool(rng.random() < chance) for fact, chance in CHANCE.items()}
    facts = [CLAUSES[part] for part in ("lead", "comp", "bass", "pad") if told[part] and getattr(attributes, part)]
    if told["drums"]:
        facts.append(CLAUSES["drums" if attributes.kit else "no drums"])
    if told["voice"]:
        facts.append(CLAUSES["voice" if attributes.voice else "no voice"])
    if told["room"]:
        facts.append(ROOM[attributes.room])
    return facts


def _sentence(text: list[str], side: int, rng: np.random.Generator) -> str:
    join = _pick(rng, JOINS[side])
    if join == " with ":
        joined = text[0] + ("" if len(text) == 1 else ", " + ", ".join(text[1:]))
    elif join == ". ":
        joined = ". ".join(part[:1].upper() + part[1:] for part in text)
    else:
        joined = join.join(text)
    styled: str = joined[:1].upper() + joined[1:] + "." if rng.random() < 0.7 else joined
    return styled


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def wordings(side: int) -> set[str]:
    """Every word of the frames (not of the values in braces): 0 training, 1 held out. For tests."""
    texts = [*OPENINGS[side], *(text for pair in (*CLAUSES.values(), *ROOM.values()) for text in pair[side])]
    return {word.strip(",:.") for text in texts for word in text.split() if "{" not in word and word.strip(",:.")}


_NO_VOICE = re.compile(r"\b(?:no|without(?: an?)?)\s+(?:vocals?|voice|sing\w*)", re.IGNORECASE)
_VOICE = re.compile(r"\b(?:sing|sings|singer|singing|sung|vocals?|voice)\b", re.IGNORECASE)


def asks_for_a_voice(text: str) -> bool:
    """Whether a caption of this module speaks of somebody who sings, and not of nobody."""
    return _VOICE.search(_NO_VOICE.sub("", text)) is not None
