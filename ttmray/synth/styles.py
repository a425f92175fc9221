"""The styles that pieces are drawn from: tempo, harmony, grooves and who plays. Tables only."""

from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Style:
    """What may be drawn. A drum kit of "" means that there are no drums.

    Attributes:
        swing: share of a beat that the first of two swung notes takes (0.5 straight, 0.67 triplets).
        swung: the notes that swing, in parts of a beat: 2 eighths, 4 sixteenths.
        raised: dominants in minor have a leading tone.
        sevenths: chance that the chords have four notes.
    """

    words: tuple[str, ...]
    tempo: Range
    modes: tuple[str, ...]
    harmony: tuple[str, ...]
    kits: tuple[str, ...]
    grooves: tuple[str, ...]
    bass: tuple[str, ...]
    basslines: tuple[str, ...]
    comp: tuple[str, ...]
    comping: tuple[str, ...]
    lead: tuple[str, ...]
    pads: tuple[str, ...]
    rooms: tuple[str, ...] = ("dry", "room", "hall")
    swing: Range = (0.5, 0.5)
    swung: int = 2
    beats: int = 4
    raised: bool = False
    sevenths: float = 0.1
    loose: float = 2.0
    """Standard deviation of the players' onsets in ms: a human touch, far below the fault of bad timing."""


STYLES: dict[str, Style] = {
    "pop": Style(
        words=("pop",), tempo=(72, 150), modes=("major", "minor"), harmony=("song",),
        kits=("acoustic", "electronic", ""), grooves=("backbeat", "half"), bass=("finger bass", "synth bass"),
        basslines=("eighths", "roots", "syncopated"), comp=("piano", "steel guitar", "electric piano"),
        comping=("block", "strum", "pulse"), lead=("saw lead", "electric guitar", "piano", "glockenspiel"),
        pads=("strings", "warm pad", ""),
    ),
    "rock": Style(
        words=("rock",), tempo=(84, 172), modes=("major", "minor", "mixolydian"), harmony=("rock", "song"),
        kits=("acoustic",), grooves=("backbeat", "driving"), bass=("picked bass",), basslines=("eighths", "roots"),
        comp=("distorted guitar", "electric guitar"), comping=("pulse", "strum"),
        lead=("electric guitar", "distorted guitar", "organ"), pads=("organ", ""), rooms=("dry", "room"),
    ),
    "folk": Style(
        words=("folk",), tempo=(66, 152), modes=("major", "dorian", "minor"), harmony=("song",),
        kits=("", "", "hand"), grooves=("hands", "backbeat"), bass=("upright bass",), basslines=("rootfifth", "roots"),
        comp=("steel guitar", "nylon guitar", "banjo"), comping=("strum", "arpeggio"),
        lead=("violin", "flute", "accordion", "harmonica"), pads=("", "accordion"), rooms=("dry", "room"), loose=4.0,
    ),
    "jazz": Style(
        words=("jazz",), tempo=(68, 196), modes=("major", "dorian", "minor"), harmony=("jazz",),
        kits=("brushes", "ride", ""), grooves=("swing",), bass=("upright bass",), basslines=("walking",),
        comp=("piano", "electric guitar"), comping=("charleston", "block"),
        lead=("saxophone", "trumpet", "clarinet", "vibraphone", "piano"), pads=("",), rooms=("room",),
        swing=(0.6, 0.67), raised=True, sevenths=1.0, loose=4.0,
    ),
    "blues": Style(
        words=("blues",), tempo=(62, 140), modes=("mixolydian", "dorian"), harmony=("blues",),
        kits=("acoustic", "brushes"), grooves=("shuffle",), bass=("finger bass", "upright bass"),
        basslines=("rootfifth", "walking"), comp=("electric guitar", "organ", "piano"),
        comping=("pulse", "charleston"), lead=("harmonica", "electric guitar", "saxophone"), pads=("",),
        rooms=("room", "dry"), swing=(0.62, 0.67), sevenths=0.6, loose=4.0,
    ),
    "house": Style(
        words=("house", "dance"), tempo=(116, 138), modes=("minor", "dorian", "major"), harmony=("loop", "song"),
        kits=("electronic",), grooves=("four",), bass=("synth bass", "sub bass"), basslines=("offbeat", "octaves"),
        comp=("piano", "saw stab", "organ"), comping=("stabs", "offbeat"), lead=("saw lead", "synth pluck",
        "square lead"),
        pads=("warm pad", "strings", ""), sevenths=0.5, loose=0.0,
    ),
    "techno": Style(
        words=("techno",), tempo=(124, 150), modes=("minor", "dorian"), harmony=("loop", "drift"),
        kits=("electronic", "machine"), grooves=("four",), bass=("acid bass", "sub bass"),
        basslines=("sixteenths", "offbeat"), comp=("saw stab", "synth pluck"), comping=("stabs", "sixteenths"),
        lead=("square lead", "synth pluck", "glass pad"), pads=("glass pad", "warm pad", ""), loose=0.0,
    ),
    "hip hop": Style(
        words=("hip hop", "lo-fi hip hop"), tempo=(66, 102), modes=("minor", "dorian"), harmony=("loop", "jazz"),
        kits=("machine", "acoustic"), grooves=("boombap",), bass=("sub bass", "finger bass"),
        basslines=("syncopated", "roots"), comp=("electric piano", "vibraphone", "nylon guitar"),
        comping=("block", "charleston"), lead=("flute", "glockenspiel", "synth pluck", "trumpet"),
        pads=("warm pad", ""), rooms=("dry", "room"), swing=(0.54, 0.6), swung=4, sevenths=0.8, loose=3.0,
    ),
    "ambient": Style(
        words=("ambient",), tempo=(54, 88), modes=("major", "dorian", "minor"), harmony=("drift",),
        kits=("", "", "", "hand"), grooves=("sparse",), bass=("sub bass", "cello"), basslines=("long",),
        comp=("harp", "electric piano", "glockenspiel"), comping=("arpeggio", "slow"),
        lead=("flute", "violin", "glass pad", "clarinet"), pads=("warm pad", "glass pad", "strings"), rooms=("hall",),
        sevenths=0.4, loose=4.0,
    ),
    "classical": Style(
        words=("classical",), tempo=(60, 168), modes=("major", "minor"), harmony=("classical",),
        kits=("",), grooves=("sparse",), bass=("cello",), basslines=("roots", "rootfifth"),
        comp=("piano", "harp", "pizzicato strings"), comping=("arpeggio", "block", "alberti"),
        lead=("violin", "flute", "clarinet", "trumpet", "piano"), pads=("strings", ""), rooms=("hall", "room"),
        raised=True, loose=4.0,
    ),
    "waltz": Style(
        words=("waltz",), tempo=(80, 184), modes=("major", "minor"), harmony=("classical", "song"),
        kits=("", "brushes"), grooves=("waltz",), bass=("upright bass", "cello"), basslines=("ones",),
        comp=("accordion", "piano", "nylon guitar"), comping=("oompah",), lead=("violin", "accordion", "clarinet"),
        pads=("", "strings"), rooms=("room", "hall"), beats=3, raised=True, loose=3.0,
    ),
    "funk": Style(
        words=("funk",), tempo=(90, 122), modes=("dorian", "mixolydian"), harmony=("loop",),
        kits=("acoustic", "electronic"), grooves=("funk",), bass=("finger bass", "synth bass"),
        basslines=("syncopated", "octaves"), comp=("electric guitar", "electric piano", "organ"),
        comping=("sixteenths", "stabs"), lead=("trumpet", "saxophone", "synth brass"), pads=("",),
        rooms=("dry", "room"), swing=(0.5, 0.56), swung=4, sevenths=0.9,
    ),
    "bossa nova": Style(
        words=("bossa nova", "latin"), tempo=(104, 156), modes=("major", "minor", "dorian"), harmony=("jazz",),
        kits=("hand", "brushes"), grooves=("bossa",), bass=("upright bass",), basslines=("rootfifth",),
        comp=("nylon guitar",), comping=("bossa",), lead=("flute", "saxophone", "vibraphone"), pads=("", "strings"),
        rooms=("room", "dry"), raised=True, sevenths=1.0, loose=3.0,
    ),
    "reggae": Style(
        words=("reggae",), tempo=(66, 100), modes=("major", "minor", "dorian"), harmony=("loop", "song"),
        kits=("acoustic",), grooves=("onedrop",), bass=("sub bass", "finger bass"), basslines=("syncopated",),
        comp=("electric guitar", "organ"), comping=("offbeat",), lead=("trumpet", "organ", "harmonica"),
        pads=("organ", ""),
        rooms=("room", "dry"), swing=(0.5, 0.58),
    ),
    "synthwave": Style(
        words=("synthwave", "electronic"), tempo=(76, 140), modes=("minor", "dorian"), harmony=("song", "loop"),
        kits=("electronic", "machine"), grooves=("backbeat", "four"), bass=("synth bass", "acid bass"),
        basslines=("eighths", "sixteenths", "octaves"), comp=("synth pluck", "saw stab"),
        comping=("arpeggio", "sixteenths"), lead=("saw lead", "synth brass", "square lead"),
        pads=("warm pad", "strings"), rooms=("hall", "room"), loose=0.0,
    ),
    "chiptune": Style(
        words=("chiptune", "video game"), tempo=(108, 184), modes=("major", "minor"), harmony=("song", "rock"),
        kits=("chip", "chip", ""), grooves=("driving", "four"), bass=("chip bass",), basslines=("octaves", "eighths"),
        comp=("chip pulse",), comping=("arpeggio", "sixteenths"), lead=("chip lead", "square lead"), pads=("",),
        rooms=("dry",), loose=0.0,
    ),
    "drum and bass": Style(
        words=("drum and bass",), tempo=(158, 178), modes=("minor", "dorian"), harmony=("loop", "drift"),
        kits=("acoustic", "machine"), grooves=("breaks",), bass=("sub bass", "acid bass"),
        basslines=("syncopated", "long"), comp=("electric piano", "saw stab"), comping=("slow", "stabs"),
        lead=("saw lead", "flute", "glass pad"), pads=("warm pad", "strings"), loose=0.0,
    ),
    "punk": Style(
        words=("punk",), tempo=(152, 196), modes=("major", "minor"), harmony=("rock", "song"), kits=("acoustic",),
        grooves=("driving",), bass=("picked bass",), basslines=("eighths",), comp=("distorted guitar",),
        comping=("pulse",), lead=("distorted guitar", "electric guitar"), pads=("",), rooms=("dry", "room"),
    ),
    "ballad": Style(
        words=("ballad",), tempo=(56, 82), modes=("major", "minor"), harmony=("song", "classical"),
        kits=("", "brushes", "acoustic"), grooves=("half",), bass=("finger bass", "upright bass"),
        basslines=("roots", "long"), comp=("piano", "nylon guitar", "electric piano"), comping=("arpeggio", "block"),
        lead=("cello", "violin", "saxophone", "electric guitar"), pads=("strings", "warm pad"), rooms=("hall", "room"),
        raised=True, sevenths=0.3, loose=4.0,
    ),
    "country": Style(
        words=("country",), tempo=(84, 168), modes=("major", "mixolydian"), harmony=("song", "rock"),
        kits=("acoustic", "brushes", ""), grooves=("train", "backbeat"), bass=("upright bass", "finger bass"),
        basslines=("rootfifth",), comp=("steel guitar", "banjo"), comping=("strum", "boomchick"),
        lead=("violin", "harmonica", "banjo", "steel guitar"), pads=("",), rooms=("dry", "room"), loose=3.0,
    ),
}  # fmt: skip

GROOVES: dict[str, tuple[dict[str, str], ...]] = {
    # one bar in sixteenths for each drum: x always, g soft, ? in half of the pieces
    "backbeat": (
        {"kick": "x.......x.?.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.....x.x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x..x....x.x.....", "snare": "....x.......x..?", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.......x.......", "snare": "....x.......x...", "tambourine": "..x...x...x...x.",
         "hat": "x...x...x...x..."},
    ),
    "half": (
        {"kick": "x...............", "snare": "........x.......", "hat": "x...x...x...x..."},
        {"kick": "x.........x.....", "snare": "....x.......x...", "hat": "x...x...x...x..."},
        {"kick": "x.......x.......", "rim": "....x.......x...", "shaker": "x...x...x...x..."},
    ),
    "driving": (
        {"kick": "x...x...x...x...", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.x.....x.x.....", "snare": "....x.......x...", "ride": "x.x.x.x.x.x.x.x."},
        {"kick": "x.......x.......", "snare": "....x.......x...", "open": "x...x...x...x..."},
    ),
    "four": (
        {"kick": "x...x...x...x...", "clap": "....x.......x...", "open": "..x...x...x...x."},
        {"kick": "x...x...x...x...", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x...x...x...x...", "clap": "....x.......x...", "hat": "..x...x...x...x.",
         "shaker": "xgxgxgxgxgxgxgxg"},
        {"kick": "x...x...x...x...", "rim": "...x..x....x..?.", "open": "..x...x...x...x."},
    ),
    "boombap": (
        {"kick": "x......x..x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x..x......x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.......?.x.....", "clap": "....x.......x...", "hat": "x.x.x.x.x.x.x.xg"},
    ),
    "swing": (
        {"ride": "x...x.x.x...x.x.", "hat": "....x.......x...", "kick": "g...g...g...g...",
         "snare": "......g.......?."},
        {"snare": "x.g.x.g.x.g.x.g.", "hat": "....x.......x..."},
    ),
    "shuffle": (
        {"kick": "x.......x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.....x.x.......", "snare": "....x.......x...", "ride": "x.x.x.x.x.x.x.x."},
    ),
    "hands": (
        {"conga": "x..x..x.x..x..x.", "shaker": "x.x.x.x.x.x.x.x."},
        {"conga": "x...x.x.x...x.x.", "clap": "....x.......x..."},
    ),
    "bossa": (
        {"kick": "x.....x.x.....x.", "rim": "x..x..x...x..x..", "shaker": "x.x.x.x.x.x.x.x."},
        {"conga": "x.....xxx.....xx", "rim": "..x..x..x..x....", "shaker": "x.x.x.x.x.x.x.x."},
    ),
    "onedrop": (
        {"kick": "........x.......", "rim": "........x.......", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.......x.......", "snare": "....x.......x...", "hat": "..x...x...x...x."},
    ),
    "funk": (
        {"kick": "x..x..x...x..x..", "snare": "....x.g.g...x..g", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.x.......xx....", "snare": "....x..g.g..x...", "hat": "xgxgxgxgxgxgxgxg"},
    ),
    "breaks": (
        {"kick": "x.........x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
        {"kick": "x.x.......x.....", "snare": "....x..g.g..x...", "ride": "x.x.x.x.x.x.x.x."},
    ),
    "train": ({"kick": "x...x...x...x...", "snare": "g.x.g.x.g.x.g.x."}, {"kick": "x.......x.......",
    "snare": "x.xxx.xxx.xxx.xx"}),
    "waltz": (
        {"kick": "x...........", "snare": "....x...x..."},
        {"kick": "x...........", "rim": "....x...x...", "hat": "x...x...x..."},
    ),
    "sparse": ({"conga": "x.....?.x.......", "shaker": "....x.......x..."}, {"kick": "x...............",
    "shaker": "x...x...x...x..."}),
}  # fmt: skip
"""Patterns of each groove; a piece takes one and settles its question marks."""

ROLES = {"drums": "drums", "bass": "bass", "voice": "vocals", "lead": "other", "comp": "other", "pad": "other"}
"""Part -> stem."""
