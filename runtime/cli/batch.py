"""Many questions in one go: ``tg-run --batch SOURCE -o OUT.jsonl``.

Every item becomes one line of the output, in the order of the source: the item as it was asked and
its answer, or an error; see ``$defs/batch`` in ``schema/answer.schema.json``. Several items are in
work at a time. A line is written at once when its item and those before it are done, and only then:
whatever ends the process loses at most the items in work.
Started again with the same output, a half-written last line is cut off and what has a line,
answer or error, is not asked again.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from ..errors import (
    AudioError,
    IncompleteBatchError,
    QuestionError,
    StorageError,
    UsageError,
)
from ..events import SCHEMA
from ..prompt import check_choices, check_question
from ..text import counted, one_line, printable
from .records import error_record, json_line
from .terminal import Progress, debugging

if TYPE_CHECKING:
    from ..asking import AskOptions, Clips, Query
    from ..pipeline import TinyGiant

__all__ = ["SUFFIXES", "Item", "Output", "left_out", "read_items", "run"]

# By these names files in a folder are clips: of libsndfile, then of FFmpeg.
SUFFIXES = frozenset({
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".mp3", ".mp2", ".ogg", ".oga", ".opus",
    ".spx", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf",
    ".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".aac", ".amr", ".awb", ".wma", ".wmv",
    ".asf", ".webm", ".weba", ".mkv", ".mka", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv",
    ".wv", ".ape", ".ac3",
})  # fmt: skip
_AUDIO_FIELDS = ("audio", "audio_path")


@dataclass(frozen=True)
class Item:
    """One question of a batch; ``problem`` says why it cannot be asked.

    ``audio`` is as it was given, ``path`` where it lies; likewise ``second``, the other clip of a
    question about two, and ``second_path``.
    """

    id: str
    audio: str | None
    question: str | None
    choices: tuple[str, ...] | None
    path: Path
    problem: str = ""
    second: str | None = None
    second_path: Path | None = None

    def asked(self) -> dict[str, Any]:
        """What the output says of the item itself."""
        return {
            "id": self.id,
            "audio": self.audio,
            "question": self.question,
            "choices": None if self.choices is None else list(self.choices),
            **({} if self.second is None else {"second": self.second}),
        }


def read_items(
    source: str, question: str | None, choices: Sequence[str] | None
) -> tuple[Item, ...]:
    """The items of a ``.jsonl`` file or of a folder of clips, which are all asked the same.

    Raises:
        UsageError: no such file or folder, nothing in it, options that it does not take, or two
            items with one id.
        QuestionError: a question or choices for all clips that cannot be asked.
    """
    path = Path(source)
    if path.is_dir():
        if question is None:
            raise UsageError(
                f"{printable(path)} is a folder, and no question for its clips is given; add "
                "--question QUESTION"
            )
        check_question(question)
        if choices is not None:
            check_choices(choices)
        items = _clips(path, question, choices)
    else:
        if question is not None or choices is not None:
            raise UsageError(
                f"--question and --choices are for a folder, and {printable(path)} is not one; "
                "in a .jsonl file each line has its own"
            )
        items = _lines(path)
    if not items:
        if path.is_dir():
            raise UsageError(
                f"{printable(path)}: no file in it has the name of a clip (.wav, .mp3, .m4a, ...); "
                "name another folder, or list the files in a .jsonl file"
            )
        raise UsageError(
            f"{printable(path)}: no line in it; expected one for each question, such as "
            '{"audio": "clip.wav", "question": "What is heard?"}'
        )
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UsageError(
                f"{printable(path)}: two items have the id {printable(item.id)}; give each its own"
            )
        seen.add(item.id)
    return items


class Output:
    """The output file: which items it holds already, and a place to write the others.

    Attributes:
        left: items without a line so far, in order.
        n_failed: lines that hold an error.
    """

    def __init__(self, path: Path, file: IO[bytes], items: Sequence[Item]) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.n_failed = 0
        self._file = file
        done = self._read(items)
        self.left = [item for item in items if item.id not in done]

    @classmethod
    def open(cls, path: str, items: Sequence[Item]) -> Output:
        """Open or create the output of ``items``, and repair its end.

        Raises:
            StorageError: it cannot be read or written.
            UsageError: it holds something else than the answers to ``items``.
        """
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise StorageError(f"{printable(path)}: is not a regular file; name another output")
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"{printable(path)}: cannot be written ({error.strerror}); name another output"
            ) from error
        try:
            return cls(Path(path), file, items)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and remove it if nothing came of it, as without a model."""
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        self._file.close()
        if is_empty:
            self.path.unlink(missing_ok=True)

    def write(self, item: Item, **outcome: dict[str, Any]) -> None:
        """Add the line of an item, ``answer`` or ``error``, and wait until it is on the disk.

        Raises:
            StorageError: it cannot be written.
        """
        record = {"schema": SCHEMA, **item.asked(), **outcome}
        line = json_line(record).encode("utf-8", "backslashreplace")
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(
                f"{printable(self.path)}: cannot be written ({error.strerror}); make room and "
                "start again, what is done is kept"
            ) from error
        self.n_failed += "error" in outcome

    def require_complete(self) -> None:
        """Raise IncompleteBatchError if the output holds errors."""
        if self.n_failed:
            raise IncompleteBatchError(
                f"{counted(self.n_failed, 'item')} could not be answered; the lines with error in "
                f"{printable(self.path)} say why, remove them to ask again"
            )

    def _read(self, items: Sequence[Item]) -> set[str]:
        """Ids that have a line; what was left half-written at the end is cut off."""
        wanted = {item.id: item.asked() for item in items}
        done: set[str] = set()
        n_bytes = 0
        with open(self.path, "rb") as written:
            for number, line in enumerate(written, start=1):
                if not line.endswith(b"\n"):
                    self._refuse_foreign(line, number)
                    self._file.truncate(n_bytes)
                    break
                n_bytes += len(line)
                self._take(line, number, wanted, done)
        return done

    def _take(
        self, line: bytes, number: int, wanted: dict[str, dict[str, Any]], done: set[str]
    ) -> None:
        """Count a whole line as done."""
        try:
            record = json.loads(line)
            asked = {key: record[key] for key in ("id", "audio", "question", "choices")}
            asked |= {"second": record["second"]} if "second" in record else {}
            item_id, failed = str(record["id"]), "error" in record
        except (ValueError, TypeError, KeyError) as error:
            raise self._foreign(f"line {number} is not an answer to an item") from error
        if item_id in done or wanted.get(item_id) != asked:
            raise self._foreign(f"line {number} answers something that is not asked here")
        done.add(item_id)
        self.n_failed += failed

    def _refuse_foreign(self, torn: bytes, number: int) -> None:
        """A file whose only line was never ended may be anybody's: it must look like ours."""
        start = b'{"schema": "'
        if number == 1 and not torn.startswith(start[: len(torn)]):
            raise self._foreign("it is not the output of a batch")

    def _foreign(self, found: str) -> UsageError:
        return UsageError(f"{printable(self.path)}: {found}; name another output with -o")


def run(
    output: Output,
    model: TinyGiant,
    progress: Progress,
    options: AskOptions,
    parallel: int | None = None,
) -> None:
    """Answer what is left of a batch, ``parallel`` items at a time, as many as pay if None.

    A bad item gets an error and does not end it.

    Raises:
        BundleError: the model itself fails.
        StorageError: the output cannot be written.
    """
    start, n_items = time.monotonic(), len(output.left)
    problems = {item.id: problem for item in output.left if (problem := _problem(item))}
    queries = (_query(item, options) for item in output.left if item.id not in problems)
    answers = model.ask_many(queries, parallel=parallel)
    for n_done, item in enumerate(output.left):
        elapsed_s = time.monotonic() - start
        progress.status(_status(n_done, n_items, output.n_failed, elapsed_s, item))
        found = problems.get(item.id) or next(answers)
        if isinstance(found, Exception):
            if debugging():
                raise found
            progress.line(f"{printable(item.id)}: {one_line(found)}")
            output.write(item, error=error_record(found))
        else:
            output.write(item, answer=found.to_dict())
    elapsed_s = time.monotonic() - start
    progress.line(
        f"{counted(n_items, 'item')} in {elapsed_s:.0f} s, {printable(output.path)} is complete"
    )


def _problem(item: Item) -> Exception | None:
    if item.problem or item.question is None:
        return QuestionError(item.problem)
    return AudioError("no audio") if item.audio is None else None


def _query(item: Item, options: AskOptions) -> Query:
    from ..asking import Query  # here, so that a wrong item is told at once

    clips: Clips = item.path if item.second_path is None else [item.path, item.second_path]
    assert item.question is not None
    return Query(clips, item.question, item.choices, options)


def _status(n_done: int, n_items: int, n_failed: int, elapsed_s: float, item: Item) -> str:
    width = 20
    bar = "#" * (width * n_done // n_items)
    failed = f", {n_failed} failed" if n_failed else ""
    left_s = elapsed_s / n_done * (n_items - n_done) if n_done else 0.0
    left = f", {left_s / 60:.0f} min left" if left_s >= 60 else f", {left_s:.0f} s left"
    left = left if n_done else ""
    return f"[{bar:<{width}}] {n_done}/{n_items}{failed}{left}: {printable(item.id)}"


def left_out(source: str) -> str:
    """A line about the files in a folder that are not asked about; empty without any."""
    folder = Path(source)
    names = [printable(_name(path, folder)) for path in _files(folder) if not _is_clip(path)]
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if names[3:] else "")
    return f"{counted(len(names), 'file')} left out, not audio by their names: {shown}"


def _files(folder: Path) -> list[Path]:
    """The files in ``folder`` and the folders in it, by path.

    Without those that macOS adds to each file of a foreign disk: ``._clip.wav`` is no sound.
    """
    found = sorted(folder.rglob("*"))
    return [path for path in found if not path.name.startswith("._") and path.is_file()]


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _clips(folder: Path, question: str, choices: Sequence[str] | None) -> tuple[Item, ...]:
    paths = [path for path in _files(folder) if _is_clip(path)]
    names = [_name(path, folder) for path in paths]
    given = None if choices is None else tuple(choices)
    return tuple(
        Item(name, name, question, given, path) for name, path in zip(names, paths, strict=True)
    )


def _lines(path: Path) -> tuple[Item, ...]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: cannot be read ({error.strerror}); expected a .jsonl file or a "
            "folder of clips"
        ) from error
    return tuple(
        _item(line, number, path.parent)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    )


def _item(line: bytes, number: int, folder: Path) -> Item:
    """One line of a ``.jsonl`` file; a clip's path is relative to that file."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        return _bad(number, f"line {number} is not a JSON object with audio and question")
    item_id = data.get("id", number)
    if not isinstance(item_id, str | int) or isinstance(item_id, bool):
        return _bad(number, f"line {number}: id is neither text nor a whole number; give it one")
    audio = next((data[name] for name in _AUDIO_FIELDS if name in data), None)
    question, choices, second = data.get("question"), data.get("choices"), data.get("second")
    if second is not None and not isinstance(second, str):
        return _bad(item_id, f"line {number}: second is not a path")
    if not isinstance(audio, str):
        return _bad(item_id, f"line {number}: audio (or audio_path) is missing or not a path")
    if not isinstance(question, str):
        return _bad(item_id, f"line {number}: question is missing or not text")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        return _bad(item_id, f"line {number}: choices are not a list of texts")
    return Item(
        id=str(item_id),
        audio=audio,
        question=question,
        choices=None if choices is None else tuple(choices),
        path=folder / audio,
        second=second,
        second_path=None if second is None else folder / second,
    )


def _bad(item_id: str | int, problem: str) -> Item:
    return Item(str(item_id), None, None, None, Path(), problem)
