"""Many clips on a cluster: the questions of ``tg-run --batch``, spread by Ray Data.

    pip install tinygiant 'ray[data]'
    python examples/ray_batch.py questions.jsonl answers/ --workers 4

Each worker loads the model once and keeps it; Ray hands it batches of rows. A bad item gets an
error in its row and does not end the run. Paths must be readable on every machine.
"""

from __future__ import annotations

import argparse
from typing import Any

from tinygiant.runtime import TinyGiantError, load

__all__ = ["Answerer", "main"]


class Answerer:
    """A loaded model that answers batches of rows; one in each worker."""

    def __init__(self, bundle: str | None, threads: int, **options: Any) -> None:
        """Load ``bundle``; ``options`` are those of ``TinyGiant.ask``."""
        self._model = load(bundle, threads=threads)
        self._options = options

    def __call__(self, batch: Any) -> Any:
        """Add the columns ``answer`` and ``error`` to a pyarrow table; one is null in each row."""
        answers: list[str | None] = []
        errors: list[str | None] = []
        for row in batch.to_pylist():
            answer = error = None
            try:
                choices = row.get("choices")
                asked = self._model.ask(row["audio"], row["question"], choices, **self._options)
                answer = asked.text
            except TinyGiantError as failure:
                error = f"{type(failure).__name__}: {failure}"
            answers.append(answer)
            errors.append(error)
        return batch.append_column("answer", [answers]).append_column("error", [errors])


def main() -> None:
    """Read a ``.jsonl`` file of questions, write a folder of ``.jsonl`` files with the answers."""
    import ray

    parser = argparse.ArgumentParser(description="Answer many questions with Ray Data.")
    parser.add_argument("questions", help="a .jsonl file: audio, question and, if any, choices")
    parser.add_argument("output", help="a folder for the answers")
    parser.add_argument("--workers", type=int, default=1, help="models to load (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each of them (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--bundle", help="the model; default: the one installed")
    options = parser.parse_args()
    answers = ray.data.read_json(options.questions, lines=True).map_batches(
        Answerer,
        fn_constructor_args=(options.bundle, options.threads),
        fn_constructor_kwargs={"max_new_tokens": options.max_new_tokens},
        batch_format="pyarrow",
        batch_size=8,
        concurrency=options.workers,
        num_cpus=options.threads,
    )
    answers.write_json(options.output)


if __name__ == "__main__":
    main()
