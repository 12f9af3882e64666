"""More ways to put each type of question: patterns whose parts vary freely.

``(a|b)`` stands for either and ``(a|)`` for a or nothing; ``{...}`` are filled from the question's
facts. A pattern is one kind of sentence, so that questions are drawn evenly over patterns and not
over what they expand to. What a pattern shares with a held-out phrasing is left out, as
:func:`expand` has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from itertools import product

__all__ = ["PATTERNS", "VALIDATION", "essence", "expand", "others"]

PATTERNS: dict[str, tuple[str, ...]] = {
    "sound heard": (
        "(Which|What) (sound|noise|sound event)(s|) (do|did) you (hear|notice|recognise)?",
        "(Which|What) (sounds|noises|sound events) (are there|were there|are heard|were heard)?",
        "(Which|What) (sounds|noises) does (the recording|this recording) (hold|contain|have)?",
        "(Which|What) (sounds|noises) (are|appear) in (the|this) recording?",
        "(Which|What) (makes|made) a (sound|noise) (here|in the recording)?",
        "(Name|List|Give|Write down) (the|all|all the|every one of the) (sounds|noises).",
        "(Name|List|Give) (the|all) sound events (that you notice|in the recording|).",
        "(What kinds|What sorts|Which types) of (sounds|noises) (are there|do you notice)?",
        "(Can|Could) you (name|list) the (sounds|noises)?",
        "(Identify|Recognise|Enumerate) the (sounds|noises)(| in the recording).",
        "Apart from music and speech, what (sounds|noises) are (there|heard)?",
    ),
    "sound missing": (
        "Which of (these|the following|the) (sounds|choices) (is|was) (not there|not in it)?",
        "Which (sound|one|choice) (is|was) not (in|part of) the recording?",
        "Which (sound|one) (does|did) (not occur|not appear|not come up)?",
        "(What|Which) sound do you not hear?",
        "Find the sound that is (missing|not there|not in the recording).",
        "Which of (these|the sounds) (has|have) no place in the recording?",
    ),
    "background": (
        "(Which|What) (noise|sound) is (there|heard|) in the background?",
        "(Which|What) (kind|sort) of background (noise|) is (it|there|that)?",
        "(Which|What) background (noise|) does the recording have?",
        "What is (going on|audible) in the background?",
        "What is the background( noise|)?",
        "(Name|Identify|Say|Describe) (the background|what is in the background).",
        "What (goes on|is heard) (under|beneath|underneath) (everything|everything else|it all)?",
        "(Does|Did) the recording have a background noise, and (which|what)?",
        "Behind (it all|everything), what is there?",
        "What (lasts|goes on) through the whole recording?",
    ),
    "distance": (
        "(How far|How far off|How far away) (is|was) the {item}?",
        "Is the {item} (close|near|nearby) or (far|distant|far away|far off)?",
        "Was the {item} (close by|nearby) or (far off|in the distance)?",
        "(Say|Tell me|Judge|Decide) (if|whether) the {item} is (near|close) or far.",
        "Near or far: (where is|how is) the {item}?",
        "(How close|How near) (is|was) the {item}?",
        "Does the {item} (come from|seem) (near|nearby|close) or far(| away)?",
        "Is (it|that) a near or a (far|distant) {item}?",
        "(From|At) what distance (does|did) the {item} (come|sound)?",
        "(Where|How) is the {item}: (near|close) or (far|distant)?",
    ),
    "instrument": (
        "(Which|What) (instrument|musical instrument) (plays|is playing|played|is it|is that)?",
        "(Which|What) (instrument|musical instrument) (do|did) you (hear|recognise|notice)?",
        "(Which|What) (instrument|musical instrument) (is|was) (heard|there|present)?",
        (
            "(Which|What) (instrument|musical instrument) (makes|made|plays|played) "
            "the (music|melody)?"
        ),
        "(On|With) (which|what) (instrument|) (is|was) the (music|melody|scale) (played|made)?",
        "(What|Which instrument) is the (melody|tune|scale) played on?",
        "(Name|Identify|Recognise|Give) the (instrument|musical instrument).",
        "(Say|Tell me) (which|what) instrument (plays|it is|is playing|you hear).",
        "What (kind|sort|type) of instrument (plays|is playing|is it|is this)?",
        "(What|Which instrument) does the (musician|player|performer) play?",
        "Who or what plays the (melody|music): which instrument?",
        "The (melody|music) comes from (which|what) instrument?",
    ),
    "tempo": (
        "Is the (music|melody|tune|piece) (fast|quick|rapid) or slow?",
        "(Is|Was) the (music|melody) played (quickly|rapidly) or slowly?",
        "(What|Which) (tempo|speed|pace) does the (music|melody|tune) have?",
        "(What|How) is the (tempo|speed|pace) of the (music|melody|tune)?",
        "How (quick|rapid) is the (music|melody|tune)?",
        "(Say|Tell me|Decide) (if|whether) the (music|melody) is fast or slow.",
        "(Fast|Slow) or (slow|fast): how (is|goes) the (music|melody)?",
        "Do the notes come (fast|quickly) or slowly?",
        "(At|In) (which|what) (speed|tempo) (is|does) the music (played|go)?",
    ),
    "mode": (
        "Is the (music|melody|scale|harmony) (major|minor) or (minor|major)?",
        "Is the (music|melody|scale|tune) in a (major|minor) or a (minor|major) key?",
        "(Which|What) mode (does|has) the (music|melody)(| have)?",
        "(Say|Tell me|Decide) (if|whether) the (music|melody|scale) is in major or minor.",
        "Major or minor: (what|which) is the (music|mode|scale)?",
        "(Are|Were) the chords (in|of) (major|minor) or (minor|major)?",
        "(Does|Do) the (music|chords) sound (major|minor) or (minor|major)?",
    ),
    "pair": (
        "(Which|What) (pair|combination) is (true|correct|heard|there)?",
        "(Which|What) (pair|combination) (fits|matches|describes) (the recording|what you hear)?",
        "Which (two|two things) (belong|go) to the recording?",
        "Which of (these|the) (pairs|combinations) (fits|is true|is in the recording)?",
        "(Choose|Pick|Find) the pair that (fits|is true|is heard).",
        "Both (parts|halves) of which (pair|choice) are (true|right)?",
    ),
    "sound count": (
        "How (many times|often) (is|was) the {item} (heard|there|present)?",
        "How (many times|often) (does|did) the {item} (occur|sound|come|appear|happen)?",
        "How many {item} (sounds|events) (are|were) (there|heard)?",
        "How many {item} (sounds|events) (do|did) you (hear|notice|count)?",
        "(Count|Tally) the {item}( sounds|).",
        "(Say|Tell me|Write down) how (often|many times) the {item} (occurs|is there|sounds).",
        "What is the (number|count) of {item} (sounds|events)?",
        "The {item}: how (often|many times) (is it heard|does it occur|is it there)?",
        "How (many|often): the {item}?",
        "In the recording, how (often|many times) is (the|a) {item} heard?",
        "(The number|The count) of {item} sounds is what?",
    ),
    "meter": (
        "How many beats (are|are there|lie) in (a|each|every|one) (bar|measure)?",
        "How many beats (make|are in) a (bar|measure) of the music?",
        "Is the (music|melody) in (three|four) or( in|) (four|three)?",
        "(Say|Tell me|Decide) (if|whether) the (music|meter) is in three or four.",
        "(What|Which) (meter|metre) does the music have(|, three or four)?",
        "Three or four: how many beats are in (a|each) bar?",
        "After how many beats does the (strong beat|chord) come again?",
    ),
    "word count": (
        "How many words (are|were) (there|spoken|said|uttered|heard)?",
        "How many words (do|did) you (hear|count|notice)?",
        "How many words (does|did) the (speaker|voice|person) (say|speak|utter)?",
        "(Count|Tally) the (words|spoken words|words of the speech).",
        "(Say|Tell me|Write down) how many words are (said|spoken).",
        "What is the (number|count) of (words|words said)?",
        "How many words are in the (speech|utterance)?",
        "How (long is the speech|many is it), in words?",
    ),
    "first": (
        "What (is|was) (heard|there|audible) first?",
        "What (starts|begins|comes|came|started|began|sounds) first(| in the recording)?",
        "(Which|What) (thing|sound|one) (starts|begins|comes|is heard) first?",
        "(Name|Say|Tell me) (what|the thing that) (comes|starts|begins|is heard) first.",
        "What is the first (sound|thing)(| in the recording| you hear)?",
        "(With what|How) does (the|this) recording (start|open|begin)?",
        "What (opens|begins|starts) the recording?",
        "What do you (hear|notice) (first of all|at the beginning|at first)?",
        "What is heard (before everything else|before all else|earliest)?",
        "(What|Which) is the earliest (sound|thing)?",
    ),
    "last": (
        "What (is|was) (heard|there|audible) last?",
        "What (starts|begins|comes|came|started|began|sounds) last(| in the recording)?",
        "(Which|What) (thing|sound|one) (starts|begins|comes|is heard) last?",
        "(Name|Say|Tell me) (what|the thing that) (comes|starts|begins|is heard) last.",
        "What is the last (sound|thing)(| in the recording| you hear)?",
        "(With what|How) does (the|this) recording (end|close|finish)?",
        "What (closes|ends) the recording?",
        "What do you (hear|notice) (last of all|at the end|in the end)?",
        "What is heard (after everything else|after all else|latest)?",
        "(What|Which) is the (latest|final) (sound|thing)?",
    ),
    "after": (
        (
            "What (comes|is|is heard|starts|begins|sounds|came) "
            "(right|directly|immediately|) after the {item}?"
        ),
        (
            "(Which|What) (thing|sound|one) (comes|is heard|starts|begins) "
            "(right|directly|) after the {item}?"
        ),
        "(Right|Directly|Immediately|Just) after the {item}, what (comes|is heard|starts|begins)?",
        "What (follows|succeeds)( directly on|) the {item}?",
        "What (do|did) you (hear|notice) (right|directly|) after the {item}?",
        "(Name|Say|Tell me) what (comes|follows|starts) (right|directly|) after the {item}.",
        "The {item} is followed by what?",
        "(After|Following) the {item}, what is (next|heard next)?",
        "What is next, after the {item}?",
    ),
    "before": (
        (
            "What (comes|is|is heard|starts|begins|sounds|came) "
            "(right|directly|immediately|) before the {item}?"
        ),
        (
            "(Which|What) (thing|sound|one) (comes|is heard|starts|begins) "
            "(right|directly|) before the {item}?"
        ),
        "(Right|Directly|Immediately|Just) before the {item}, what (comes|is heard|starts|begins)?",
        "What (precedes|comes ahead of)( directly|) the {item}?",
        "What (do|did) you (hear|notice) (right|directly|) before the {item}?",
        "(Name|Say|Tell me) what (comes|starts|is heard) (right|directly|) before the {item}.",
        "The {item} is preceded by what?",
        "(Before|Preceding) the {item}, what is (there|heard)?",
        "What (leads up to|goes before) the {item}?",
    ),
    "relation": (
        "(Is|Was) the {item} (heard|) before or after the {other}?",
        (
            "(Does|Did) the {item} (start|come|sound|occur|appear) "
            "(before|after) or (after|before) the {other}?"
        ),
        "When (is|was|comes) the {item}: before or after the {other}?",
        "Before or after the {other}: (when|where) (does the {item} come|is the {item} heard)?",
        "(Say|Tell me|Decide) (if|whether) the {item} comes before or after the {other}.",
        "Is the {item} (earlier|later) or (later|earlier) than the {other}, before or after it?",
        "Compared with the {other}, is the {item} before or after?",
        "The {item}, is it before or after the {other}?",
    ),
    "word order": (
        "(What|Which) (is|was) the {where} word( said| spoken| of the speech| of the speaker|)?",
        "(What|Which) word (is|was|comes|came) {where}?",
        "(What|Which) word (is|was) (said|spoken|heard|uttered) {where}?",
        "(What|Which) word (does|did) the (speaker|voice|person) (say|speak|utter) {where}?",
        "(Name|Say|Tell me|Write down) the {where} (word|spoken word|word that is said).",
        "(Of|Among) the (words|spoken words), which (is|comes) {where}?",
        "The {where} word( of the speech|) is (what|which)?",
    ),
    "nearer": (
        "Which (is|sound is|one is|was) {word}(:|,) (the {item}|{item}) or (the {other}|{other})?",
        "What is {word}(:|,) (the {item}|{item}) or (the {other}|{other})?",
        "(Of|Between|Among) the {item} and the {other}, (which|what) (is|one is) {word}?",
        "Is the {item} {word}, or the {other}?",
        "Is it the {item} or the {other} that is {word}?",
        "(Say|Tell me|Decide) (which|what) is {word}, the {item} or the {other}.",
        "(Compare|Take) the {item} and the {other}: (which|what) is {word}?",
    ),
    "more often": (
        "(Which|What) (is|was) (heard|there) more often(:|,) the {item} or the {other}?",
        "(Which|What) (occurs|sounds|appears) more (often|times)(:|,) the {item} or the {other}?",
        "(Of|Between|Among) the {item} and the {other}, (which|what) (occurs|sounds) more often?",
        "Is it the {item} or the {other} that (occurs|is heard|sounds) more often?",
        "Are there more of the {item} or of the {other}?",
        "(Say|Tell me|Decide) which (occurs|is heard) more often, the {item} or the {other}.",
        "(Compare|Count) the {item} and the {other}: which is more (often|frequent)?",
        "(What|Which) is more frequent, the {item} or the {other}?",
    ),
    "direction": (
        "(Is|Was) the (melody|music|scale|tune|pitch) (rising|going up) or (falling|going down)?",
        "(Does|Did) the (melody|music|scale|tune) (rise|go up|climb) or (fall|go down|sink)?",
        "(In|To) (which|what) direction does the (music|scale|tune|pitch) (go|move)?",
        "(Which|What) (way|direction) does the (melody|music|tune|scale) (go|move|take|run)?",
        "(Say|Tell me|Decide) (if|whether) the (melody|scale|music) rises or falls.",
        "(Up|Upwards) or (down|downwards): (where|how) does the (melody|music) go?",
        "Where (do the notes|does the melody|does the scale|does the tune) go(|, up or down)?",
        "Do the (tones|pitches) get (higher|lower) or (lower|higher)?",
        "(Are|Were) the (tones|pitches) (rising|going up) or (falling|going down)?",
        "How does the (pitch|melody|tune|scale) (move|change|develop)?",
    ),
    "speaker": (
        "(Who|Which person) (speaks|is speaking|says it|is saying something|spoke|is heard)?",
        (
            "(Is|Was) the (speaker|voice|person speaking) (a man|a "
            "woman|male|female) or (a woman|a man|female|male)?"
        ),
        "(Is|Was) (it|that|this) a (man|woman) or a (woman|man)(| who speaks|'s voice)?",
        "(Whose voice|What voice|Which voice) (is it|is that|is heard|speaks|do you notice)?",
        "(What kind|What sort) of (person|voice|speaker) (speaks|is it|is speaking)?",
        "(Say|Tell me|Decide) (if|whether) a (man|woman) or a (woman|man) speaks.",
        "(Man or woman|Woman or man): who (speaks|is speaking|is the speaker)?",
        "(What|Which) is the (gender|sex) of the (speaker|voice|person)?",
        "(Does|Did) a (man|woman) or a (woman|man) (speak|say something|say the words)?",
        "(Name|Identify|Describe) the (speaker|person who speaks).",
        "By whom (are the words said|is something said), a man or a woman?",
    ),
    "word heard": (
        "(What|Which words) (does|did) the (speaker|voice|person|man or woman) (say|speak|utter)?",
        "(What|Which words) (is|are|was) (said|uttered)?",
        "(What|Which) (words|spoken words) (do|did) you (hear|notice|recognise|understand)?",
        "(What|Which) (words|spoken words) (are|were) (there|said|heard|uttered|in the recording)?",
        (
            "(Write down|Transcribe|Give|Note|List) (the speech|the "
            "words|the spoken words|what is said)."
        ),
        "(Say|Tell me) (what|which words) (is said|the voice says|were said|the speaker says).",
        "What (are|were) the (words|words of the speaker|words of the speech)?",
        "(What|Which words) do they say(| in the recording)?",
        "(A transcript|A transcription|The text) of the speech, please.",
        "(What|Which words) do you hear (somebody|someone|the speaker) say?",
    ),
    "word named": (
        "(Which|What) {category} (is|was) (named|said|spoken|heard|uttered|there)?",
        "(Which|What) {category} (do|did) you (hear|notice|recognise|understand)?",
        (
            "(Which|What) {category} (does|did) the (voice|person|speaker) "
            "(say|speak of|utter|mention)?"
        ),
        "(Name|Say|Tell me|Give|Write down) the {category}( that is said| of the speech|).",
        "(Which|What) {category} (do|did) they (name|say|mention)?",
        "(Which|What) {category} (is|occurs|comes up) (in the speech|among the words)?",
        "(Among|Of) the words, which is (a|the) {category}?",
        "There is a {category} in the speech: which (one|)?",
        "What is the {category} (that is said|in the speech|you hear)?",
    ),
    "presence": (
        "(Is|Was) there {thing}(| to hear| in it)?",
        "(Do|Did|Could) you (hear|notice|recognise|make out) {thing}(| in the recording)?",
        "(Is|Was) {thing} (heard|there|present|audible|part of the recording)?",
        "(Does|Did) {thing} (occur|appear|come up|sound)(| in the recording)?",
        "(Does|Did) the recording (contain|hold|have|include) {thing}?",
        "(Say|Tell me|Decide) (if|whether) (there is|you hear) {thing}.",
        "(Yes or no|True or false)(:|,) (is there|do you hear|is) {thing}?",
        "{thing}: is it (heard|there|in the recording)?",
        "(Is|Was) (it|that) {thing} (that you hear|in the recording)?",
        "Are you hearing {thing}?",
        "Check for {thing}: is it there?",
    ),
    "anybody": (
        "(Is|Was) (someone|somebody|anyone|a person) (speaking|talking|saying something)?",
        "(Does|Did) (someone|somebody|anyone|anybody|a person) (speak|say something|say a word)?",
        "(Is|Was) there (a voice|any voice|speech|somebody speaking|someone who speaks|a speaker)?",
        "(Do|Did|Could) you (hear|notice) (speech|someone speaking|somebody|a person|any words)?",
        "(Does|Did) the recording (contain|have|hold) (speech|a voice|words|any words)?",
        "(Are|Were) (words|any words) (spoken|said|heard)?",
        "(Say|Tell me|Decide) (if|whether) (anybody|someone) speaks.",
        "(Yes or no|True or false): (does anybody speak|is there speech)?",
    ),
    "any music": (
        "(Is|Was) there (any music|music|a melody|a tune|an instrument|any instrument)(| in it)?",
        "(Do|Did|Could) you (hear|notice) (music|a melody|a tune|an instrument)?",
        "(Does|Did) (someone|somebody|anybody) play (music|something|an instrument|a melody)?",
        "(Does|Did) the recording (contain|have|hold) (music|a melody|any music|an instrument)?",
        "(Is|Was) (music|a melody|a tune) (heard|there|played|being played|audible)?",
        "(Say|Tell me|Decide) (if|whether) there is music.",
        "(Yes or no|True or false): (is there music|do you hear music)?",
    ),
    "silent": (
        "(Is|Was) (it|everything|all) (silent|quiet|still)?",
        "(Is|Was) there (nothing|nothing at all|no sound at all)(| to hear| in it)?",
        "(Is|Was) the recording (silent|empty|without any sound|without a sound)?",
        "(Does|Did) the recording (contain|hold|have) (nothing|no sound at all)?",
        "Do you hear nothing(| at all)?",
        "(Say|Tell me|Decide) (if|whether) it is silent.",
    ),
    "description": (
        "What (is|was) (there|there to hear|audible|going on|happening|in it)?",
        "What (do|did|can|could) you (hear|notice|make out|recognise)(| in this recording| here)?",
        "(Describe|Summarise|Sum up) (it|what you hear|this recording|what is there|everything).",
        (
            "(Say|Tell me|Write down|Explain) (what you hear|what "
            "there is to hear|what happens|everything)."
        ),
        "What (happens|goes on|happened|occurs)(| in this recording| here)?",
        (
            "(Give|Write) (a description|a summary|a caption|a "
            "sentence) (of|about|for) (it|the recording)."
        ),
        "What does (this|the) recording (hold|contain|consist of|have in it|sound like)?",
        "(Which|What) (things|events) (are heard|happen|are there|do you hear)?",
        "(What is|What's) (on|in) (this|the) recording?",
        "(Caption|Describe) this.",
        "(What|Everything) you hear, in (one|a) sentence, please.",
        "What's (that|this|going on|to hear)?",
    ),
}

# Asked of validation only: sentences of other kinds than training's, to tell how well it asks for
# what it was not taught, without a look at the test's.
VALIDATION: dict[str, tuple[str, ...]] = {
    "sound heard": ("Which sounds come up?", "Give me the sounds you can tell apart."),
    "sound missing": ("Which of these is nowhere in the recording?",),
    "background": ("What noise lies under all of it?", "Which background can you make out?"),
    "distance": ("Would you say that the {item} is near or far?", "How distant is the {item}?"),
    "instrument": ("Which instrument is at work?", "What instrument would you say this is?"),
    "tempo": ("Would you call the music fast or slow?", "How swiftly does the melody go?"),
    "mode": ("Would you call it major or minor?", "Which one is it, major or minor?"),
    "pair": ("Which two things does the recording have?",),
    "sound count": ("How many of the {item} can you find?", "What does the {item} add up to?"),
    "meter": ("Counting the beats of a bar, do you get three or four?",),
    "word count": ("Counting all words, how many do you get?", "How many words come up?"),
    "first": ("What leads the way?", "Which of all things is earliest?"),
    "last": ("What is there at the very end?", "Which of all things is latest?"),
    "after": ("Once the {item} has come, what is next?", "What is behind the {item} in time?"),
    "before": ("Up to the {item}, what was the last thing?", "What is in front of the {item}?"),
    "relation": ("Which is it: {item} before {other}, or after?",),
    "word order": ("Would you give me the {where} word?", "The {where} of the words is what?"),
    "nearer": ("Would you say that the {item} or the {other} is {word}?",),
    "more often": ("Would you say that the {item} or the {other} comes more often?",),
    "direction": ("Would you say that the notes climb or sink?", "Which way is the tune going?"),
    "speaker": ("Would you say that it is a man or a woman?", "Whom do you hear speaking?"),
    "word heard": ("What are they saying?", "Which words come up?"),
    "word named": ("Which {category} comes up?", "What is it that they call a {category}?"),
    "presence": ("Would you say that there is {thing}?", "Any sign of {thing}?"),
    "anybody": ("Would you say that someone speaks?", "Any speech?"),
    "any music": ("Would you say that there is music?", "Any music?"),
    "silent": ("Would you call it silent?",),
    "description": ("What would you say you hear?", "Put the recording into words."),
}


_NO_CHOICE = re.compile(r"\b(\w+) or (?:(?:an?|in) )?\1\b", re.IGNORECASE)  # "fast or fast"


@cache
def expand(pattern: str) -> tuple[str, ...]:
    """All texts that a pattern stands for."""
    parts = re.split(r"\(([^()]*)\)", pattern)
    options = [part.split("|") if k % 2 else [part] for k, part in enumerate(parts)]
    texts = (re.sub(r" +", " ", "".join(chosen)) for chosen in product(*options))
    found = (re.sub(r" ([?.,:])", r"\1", text).strip() for text in texts)
    return tuple(dict.fromkeys(text for text in found if not _NO_CHOICE.search(text)))


def essence(text: str) -> str:
    """What two phrasings have in common that differ in nothing but small words."""
    words = re.sub(r"[^a-z{} ]", "", text.lower()).split()
    return " ".join(w for w in words if w not in _SMALL).replace("which", "what")


_SMALL = ("the", "a", "an", "is", "are", "was", "this", "that", "of", "in")


def others(patterns: Iterable[str], held_out: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """What each pattern expands to, without what says the same as a held-out phrasing."""
    taboo = {essence(text) for text in held_out}
    kept = (tuple(t for t in expand(p) if essence(t) not in taboo) for p in patterns)
    return tuple(texts for texts in kept if texts)
