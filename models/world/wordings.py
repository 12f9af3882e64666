"""How questions are put: phrasings of every type, and what people put around a question.

Training draws from the first lists, from :data:`~.patterns.PATTERNS` and from the ``trained``
phrasings of ``phrasings.json``. Tests and shifted clips are asked only in the second lists, which
training never has, or in the ``fresh`` phrasings of that file, whose writer saw none of the others.
Validation has :data:`~.patterns.VALIDATION`. ``word_question`` is the only way to a question's
text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

import numpy as np

from .patterns import PATTERNS, VALIDATION, others
from .vocabulary import Split

__all__ = [
    "HELD_OUT_FRAMES",
    "TRAINING_FRAMES",
    "WORDINGS",
    "Wordings",
    "phrasings",
    "word_question",
]

Wordings = Split | Literal["fresh"]

# type -> phrasings of training, held-out phrasings, phrasings that only stand before choices.
# {...} are filled from the question's facts; "recording" is varied.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "sound heard": (
        (
            "What sound do you hear?",
            "Which sound is in the recording?",
            "What sounds are there?",
            "Which sounds can you hear?",
            "Name the sounds.",
            "List all sounds in the recording.",
            "What kind of sounds does the recording have?",
            "Which sound events are heard?",
            "What noises are there?",
        ),
        (
            "What sounds can be heard?",
            "Which sounds occur in the recording?",
            "Tell me the sounds that you hear.",
        ),
        ("Which of these sounds can be heard?", "Which of the following sounds occurs?"),
    ),
    "sound missing": (
        (),
        ("Which of the sounds listed is absent?", "Which one of these cannot be heard?"),
        (
            "Which of these sounds is not heard?",
            "Which sound is missing from the recording?",
            "Which of these sounds does not occur?",
            "Which of the following sounds is not there?",
        ),
    ),
    "background": (
        (
            "What is in the background?",
            "Which background noise is there?",
            "What is heard behind everything else?",
            "Is there a background noise, and which?",
            "What noise is under the whole recording?",
            "Name the background noise.",
            "What kind of background does the recording have?",
            "What can be heard in the background?",
        ),
        (
            "What background sound is present?",
            "Which noise lies behind the rest?",
            "What do you hear in the background?",
        ),
        (),
    ),
    "distance": (
        (
            "How far is the {item}?",
            "Is the {item} far or near?",
            "Say how far away the {item} is.",
            "Is the {item} near or far?",
            "How far away is the {item}?",
            "Does the {item} come from near or far?",
            "Is the {item} close or far away?",
            "At what distance is the {item}?",
            "Where is the {item}, near or far?",
            "How close is the {item}?",
        ),
        (
            "Was the {item} near or far away?",
            "What is the distance of the {item}?",
            "Does the {item} sound near or far?",
        ),
        (),
    ),
    "instrument": (
        (
            "What does the musician play?",
            "Which instrument was played?",
            "With which instrument is the music made?",
            "Which instrument plays?",
            "Which instrument plays the melody?",
            "What is the music played on?",
            "What instrument do you hear?",
            "Name the instrument.",
            "On which instrument is the melody played?",
            "What kind of instrument is it?",
            "Which musical instrument is there?",
            "What instrument is playing?",
        ),
        (
            "Which instrument can be heard?",
            "What instrument is the music played with?",
            "Which instrument is used?",
        ),
        (),
    ),
    "tempo": (
        (
            "Is the music fast or slow?",
            "What is the tempo of the music?",
            "How fast is the music?",
            "Is the melody quick or slow?",
            "At what speed is the melody played?",
            "Does the music go fast or slowly?",
            "What tempo does the music have?",
        ),
        ("Is it played fast or slow?", "How fast is the melody?", "Which tempo is it?"),
        (),
    ),
    "mode": (
        (
            "Is the music in major or minor?",
            "Which mode is the music in?",
            "Are the chords major or minor?",
            "Is the melody major or minor?",
            "Does the music stand in major or in minor?",
            "What is the mode of the music?",
        ),
        ("Is this piece in major or minor?", "Is the key major or minor?"),
        (),
    ),
    "pair": (
        (),
        ("Which of these pairs is right?", "Which two things are both heard?"),
        (
            "Which pair fits the recording?",
            "Which two are both true of the recording?",
            "Which two belong to what is heard?",
            "Which pair is true?",
        ),
    ),
    "sound count": (
        (
            "How many {item} sounds do you hear?",
            "Say how often the {item} is heard.",
            "How many times is there a {item}?",
            "How many times is the {item} heard?",
            "How often does the {item} occur?",
            "Count the {item} sounds. How many are there?",
            "How many {item} sounds are there?",
            "How many times does the {item} sound?",
            "Count the {item}.",
            "What is the number of {item} sounds?",
            "How often is there a {item}?",
        ),
        (
            "How many times do you hear the {item}?",
            "How often can the {item} be heard?",
            "Give the number of {item} sounds.",
        ),
        (),
    ),
    "meter": (
        (
            "How many beats are in each bar of the music?",
            "Is the music in three or in four?",
            "How many beats lie from one strong beat to the next?",
            "Are there three or four beats in a bar?",
            "What is the meter of the music?",
            "Is the meter three or four?",
        ),
        ("How many beats does a bar have?", "Which meter is it, three or four?"),
        (),
    ),
    "word count": (
        (
            "How many words has the speech?",
            "Say how many words there are.",
            "How many words are spoken?",
            "How many words does the speaker say?",
            "Count the spoken words.",
            "What is the number of spoken words?",
            "How many words are said?",
            "How many words do you hear?",
            "Count the words that are said.",
        ),
        (
            "How many words can be heard?",
            "Give the number of words.",
            "Of how many words is the speech?",
        ),
        (),
    ),
    "first": (
        (
            "What comes first?",
            "Which one begins first in the recording?",
            "What starts first?",
            "What is the first thing heard?",
            "With what does the recording begin?",
            "What do you hear first?",
            "What is heard at the beginning?",
            "What is first?",
        ),
        (
            "What can be heard first?",
            "Which one is the first?",
            "What is at the start of the recording?",
        ),
        ("Which of these starts first?",),
    ),
    "last": (
        (
            "What comes last?",
            "Which one begins last in the recording?",
            "What starts last?",
            "What is the last thing that begins?",
            "What is the last thing heard?",
            "What do you hear last?",
            "What is last?",
        ),
        ("What can be heard last?", "Which one is the last?", "What is the last to start?"),
        ("Which of these starts last?",),
    ),
    "after": (
        (
            "What is directly after the {item}?",
            "What begins after the {item}?",
            "What sounds after the {item}?",
            "What starts right after the {item}?",
            "Which one comes directly after the {item}?",
            "What is heard next to the {item}, after it?",
            "What comes after the {item}?",
            "What follows the {item}?",
            "What is next after the {item}?",
            "After the {item}, what comes?",
            "What do you hear right after the {item}?",
        ),
        (
            "What is heard directly after the {item}?",
            "What begins just after the {item}?",
            "What comes next after the {item}?",
        ),
        (),
    ),
    "before": (
        (
            "What is directly before the {item}?",
            "What begins before the {item}?",
            "What sounds before the {item}?",
            "What starts right before the {item}?",
            "Which one comes directly before the {item}?",
            "What is heard next to the {item}, before it?",
            "What comes before the {item}?",
            "Before the {item}, what comes?",
            "What do you hear right before the {item}?",
            "What is just before the {item}?",
        ),
        (
            "What is heard directly before the {item}?",
            "What begins just before the {item}?",
            "What stands right before the {item}?",
        ),
        (),
    ),
    "relation": (
        (
            "Does the {item} start before or after the {other}?",
            "When does the {item} start, compared with the {other}?",
            "Is the {item} before or after the {other}?",
            "Does the {item} come before or after the {other}?",
            "Is the {item} heard before or after the {other}?",
            "Before or after the {other}: when is the {item}?",
        ),
        (
            "Does the {item} begin before the {other} or after it?",
            "Can the {item} be heard before or after the {other}?",
        ),
        (),
    ),
    "word order": (
        (
            "Say the {where} word of the speech.",
            "Of the words, which is {where}?",
            "Which word is said {where}?",
            "What is the {where} word?",
            "Which word does the speaker say {where}?",
            "Which word comes {where}?",
            "What is the {where} word that is said?",
            "Which is the {where} spoken word?",
            "Name the {where} word.",
        ),
        (
            "What is the {where} word you hear?",
            "Which word do you hear {where}?",
            "Give the {where} word.",
        ),
        (),
    ),
    "nearer": (
        (
            "Which is {word}, the {item} or the {other}?",
            "Which sound is {word}: {item} or {other}?",
            "Of the {item} and the {other}, which is {word}?",
            "Is the {item} or the {other} {word}?",
            "What is {word}, the {item} or the {other}?",
        ),
        (
            "Which of the two is {word}, {item} or {other}?",
            "The {item} or the {other}: which one is {word}?",
        ),
        (),
    ),
    "more often": (
        (
            "Which is heard more often, the {item} or the {other}?",
            "Which sound occurs more times: {item} or {other}?",
            "Of the {item} and the {other}, which is heard more often?",
            "Is the {item} or the {other} heard more often?",
            "What occurs more often, the {item} or the {other}?",
        ),
        (
            "Which comes more often, {item} or {other}?",
            "The {item} or the {other}: which one is there more times?",
        ),
        (),
    ),
    "direction": (
        (
            "Is the pitch going up or down?",
            "Are the tones rising or falling?",
            "Do the notes rise or fall?",
            "Is the melody rising or falling?",
            "Where does the pitch of the melody go?",
            "How does the melody move?",
            "Does the melody go up or down?",
            "Is the scale rising or falling?",
            "In which direction does the melody go?",
            "Which way does the melody move?",
        ),
        (
            "Does the pitch rise or fall?",
            "What is the direction of the melody?",
            "Are the notes rising or falling?",
        ),
        (),
    ),
    "speaker": (
        (
            "Is the person a man or a woman?",
            "Which person speaks, woman or man?",
            "Does a man speak, or does a woman?",
            "Who is speaking?",
            "Is the speaker a woman or a man?",
            "Whose voice is it?",
            "Is it a man or a woman who speaks?",
            "Is the voice that of a man or of a woman?",
            "Who speaks?",
            "What kind of voice do you hear?",
            "Who says something?",
        ),
        (
            "Who is talking?",
            "Do you hear a woman or a man?",
            "Is a man or a woman speaking?",
        ),
        (),
    ),
    "word heard": (
        (
            "What words are in the speech?",
            "Say the words again.",
            "Which words were spoken?",
            "What is said?",
            "What does the speaker say?",
            "Which words are said?",
            "What words do you hear?",
            "Write down what is said.",
            "What are the spoken words?",
            "What does the voice say?",
            "Transcribe the speech.",
            "Which word does the speaker say?",
        ),
        (
            "Which words can be heard?",
            "What is spoken?",
            "Repeat what the speaker says.",
        ),
        (
            "Which of these words is said?",
            "Which word can be heard?",
            "Which of the following words does the speaker say?",
        ),
    ),
    "word named": (
        (
            "Which {category} did they mention?",
            "Say which {category} is named.",
            "What {category} is in the speech?",
            "Which {category} is named?",
            "Which {category} does the speaker say?",
            "What {category} is heard in the speech?",
            "What {category} is said?",
            "Name the {category} that is said.",
            "What is the {category}?",
            "Which {category} do you hear?",
            "Which {category} is spoken?",
        ),
        (
            "What {category} does the speaker name?",
            "Which {category} can be heard?",
            "What {category} is mentioned?",
        ),
        (),
    ),
    "presence": (
        (
            "Is there {thing}?",
            "Can you hear {thing}?",
            "Do you hear {thing}?",
            "Is {thing} heard?",
            "Does the recording have {thing}?",
            "Is {thing} in the recording?",
            "Yes or no: is there {thing}?",
        ),
        (
            "Can {thing} be heard?",
            "Is there {thing} in the recording?",
            "Does one hear {thing}?",
        ),
        (),
    ),
    "anybody": (
        (
            "Is someone talking?",
            "Does anybody speak?",
            "Is there a voice?",
            "Is there any speech?",
            "Does someone say something?",
            "Do you hear a voice?",
            "Is anyone speaking in the recording?",
            "Are there people talking?",
        ),
        ("Is anybody speaking?", "Can a voice be heard?", "Does anyone talk?"),
        (),
    ),
    "any music": (
        (
            "Is there music?",
            "Does anybody play an instrument?",
            "Is music playing?",
            "Do you hear any music?",
            "Is there a melody?",
            "Does the recording have music?",
        ),
        ("Can music be heard?", "Is an instrument playing?"),
        (),
    ),
    "silent": (
        (
            "Is it silent?",
            "Is the recording silent?",
            "Is there nothing to hear?",
            "Is the recording empty?",
            "Is nothing heard?",
        ),
        ("Is there only silence?", "Is this recording silent?"),
        (),
    ),
    "description": (
        (
            "Which things are heard?",
            "Tell what is in this recording.",
            "Sum up the recording.",
            "What is in the recording?",
            "Describe what you hear.",
            "What do you hear?",
            "What happens in the recording?",
            "Say what is heard.",
            "Give a description of the recording.",
            "What can you hear?",
            "Tell me what you hear.",
            "Describe this recording in a sentence.",
            "What is this?",
            "What is going on?",
            "Describe the sound.",
            "What does the recording contain?",
        ),
        (
            "What is heard?",
            "Describe the recording.",
            "What can be heard in this recording?",
        ),
        (),
    ),
}

# What stands around a question; {q} is as it is, {l} begins in lower case.
TRAINING_FRAMES: tuple[str, ...] = (
    *("{q}",) * 11,
    "Tell me: {l}",
    "Please answer: {q}",
    "Listen. {q}",
    "Listen to the clip. {q}",
    "I want to know: {l}",
    "{q} Answer briefly.",
    "{q} Please.",
    "Hello, {l}",
    "So, {l}",
    "Please say: {l}",
    "My question is: {l}",
    "Would you tell me: {l}",
    "Hi! {q}",
    "About this clip: {l}",
    "Answer this: {l}",
    "{q} Thank you.",
)
HELD_OUT_FRAMES: tuple[str, ...] = (*("{q}",) * 5, "Can you tell me: {l}", "Question: {q}")
_NOUNS = ("recording", "recording", "clip", "audio", "audio clip", "sound file")


@cache
def _of_others(use: Literal["trained", "fresh"]) -> dict[str, list[str]]:
    """Phrasings of ``phrasings.json`` by type: those for training, or the fresh ones."""
    text = files(__package__).joinpath("phrasings.json").read_text(encoding="utf-8")
    found: dict[str, list[str]] = json.loads(text)[use]
    return found


def phrasings(kind: str, wordings: Wordings, with_choices: bool) -> tuple[str, ...]:
    """The phrasings of a question type that a split, or a test in fresh ones, may use."""
    return tuple(text for group in _groups(kind, wordings, with_choices) for text in group)


@cache
def _groups(kind: str, wordings: Wordings, with_choices: bool) -> tuple[tuple[str, ...], ...]:
    """The phrasings by kind of sentence: questions are drawn evenly over these."""
    trained, held_out, before_choices = WORDINGS[kind]
    fresh = tuple(_of_others("fresh")[kind])
    if wordings == "fresh":
        return (fresh,)
    if wordings in ("test", "shifted"):
        return (held_out,)
    if wordings == "validation":
        return (VALIDATION[kind],)
    single = (*trained, *_of_others("trained")[kind], *(before_choices if with_choices else ()))
    return (*((text,) for text in single), *others(PATTERNS[kind], (*held_out, *fresh)))


def word_question(
    kind: str,
    slots: Mapping[str, str],
    wordings: Wordings,
    with_choices: bool,
    rng: np.random.Generator,
) -> str:
    """One question's text, drawn from ``rng``."""
    held_out = wordings in ("test", "shifted", "fresh")
    groups = _groups(kind, wordings, with_choices)
    options = groups[int(rng.integers(len(groups)))] if len(groups) > 1 else groups[0]
    text = options[int(rng.integers(len(options)))].format(**slots)
    text = text.replace("recording", _NOUNS[int(rng.integers(len(_NOUNS)))])
    frames = HELD_OUT_FRAMES if held_out else TRAINING_FRAMES
    frame = frames[int(rng.integers(len(frames)))]
    text = frame.format(q=text, l=text[0].lower() + text[1:])
    careless = rng.random()
    if not held_out and careless < 0.1:
        text = text.lower()
    if not held_out and careless < 0.06:
        text = text.rstrip("?.")
    return text
