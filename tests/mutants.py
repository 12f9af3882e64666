"""``make mutants``: damage the code in known ways, and see that a test fails of each.

Each mutant is a fault that a reader could overlook, with the tests that are to notice it. A copy of
the repository is damaged, never the repository. A mutant counts as killed only if a test *failed*:
not if the tests could not be collected, and not if they ran out of time. Before anything is damaged
the same tests must pass. The texts that are replaced must occur exactly once: a mutant that no
longer fits the code is an error, not a success.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

__all__ = ["MUTANTS", "Mutant", "main"]

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0  # for each test or file of tests
FAILED = 1  # pytest's exit code where tests ran and some failed


@dataclass(frozen=True)
class Mutant:
    """A fault: in ``file`` the text ``old`` becomes ``new``; ``tests`` are to notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def problem(self, root: Path) -> str | None:
        """Why the mutant does not fit the code below ``root``; None if it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        count = path.read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"{self.old!r:.60} occurs {count} times in {self.file}"


def copy_repository(target: Path) -> Path:
    """The files that git knows or would take, below ``target``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """pytest's exit code below ``root``, None if it ran out of time, and its last line."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S * len(tests),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no result after {TIMEOUT_S * len(tests):.0f} s"
    lines = (run.stdout.strip() or run.stderr.strip()).splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return run.returncode, (failed or lines or ["no output"])[-1]


def verdict(mutant: Mutant, root: Path) -> tuple[str, str]:
    """``killed``, ``survived`` or ``broken``, and why."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, line = run_tests(root, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if code == FAILED:
        return "killed", line
    return ("survived" if code == 0 else "broken"), line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every mutant whose name matches; 0 if all were killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only names that match this pattern")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested at a time")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if re.search(options.pattern, mutant.name)]
    stale = [f"{m.name}: {problem}" for m in MUTANTS if (problem := m.problem(ROOT))]
    if stale or not chosen:
        print("\n".join(stale or [f"no mutant matches {options.pattern!r}"]), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy_repository(Path(scratch) / str(number)))
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        code, line = run_tests(copy_repository(Path(scratch) / "sound"), tests)
        if code != 0:
            print(f"the tests do not pass on the sound code: {line}", file=sys.stderr)
            return 2

        def judge(mutant: Mutant) -> str:
            root, start = copies.get(), time.monotonic()
            try:
                found, line = verdict(mutant, root)
            finally:
                copies.put(root)
            spent_s = time.monotonic() - start
            print(f"{found:8} {mutant.name} ({spent_s:.0f} s): {line}", flush=True)
            return found

        with ThreadPoolExecutor(options.jobs) as executor:
            verdicts = list(executor.map(judge, chosen))
    n_killed = verdicts.count("killed")
    print(f"{n_killed} of {len(chosen)} mutants killed")
    return 0 if n_killed == len(chosen) else 1


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "projector: no norm after the intent query",
        "models/projector.py",
        "return self.norm(x + attended), attention",
        "return x + attended, attention",
        ("tests/test_projector_witness.py",),
    ),
    Mutant(
        "projector: merge convolution without its residual",
        "models/projector.py",
        "merged = branches + _convolve(self.merge_conv",
        "merged = _convolve(self.merge_conv",
        ("tests/test_projector_witness.py",),
    ),
    Mutant(
        "projector: cosines before sines",
        "models/projector.py",
        "torch.cat((angles.sin(), angles.cos()), dim=1)",
        "torch.cat((angles.cos(), angles.sin()), dim=1)",
        ("tests/test_projector_witness.py",),
    ),
    Mutant(
        "projector: the gate scales from 0 to 1",
        "models/projector.py",
        "x * (0.5 * gate + 0.5).unsqueeze(1)",
        "x * gate.unsqueeze(1)",
        ("tests/test_projector_witness.py",),
    ),
    Mutant(
        "projector: masked instruction tokens count",
        "models/projector.py",
        "query = (instruction_embeds * weights).sum(1)",
        "query = instruction_embeds.sum(1)",
        ("tests/test_projector_witness.py",),
    ),
    Mutant(
        "clocks: project and prefill swapped",
        "runtime/transcript.py",
        'project_s=clock.seconds("project")',
        'project_s=clock.seconds("prefill")',
        ("tests/test_clocks.py",),
    ),
    Mutant(
        "clocks: the first token is the last",
        "runtime/pipeline.py",
        "first_token_s = first_token_s or clock.total()",
        "first_token_s = clock.total()",
        ("tests/test_clocks.py",),
    ),
    Mutant(
        "clocks: handling time counts",
        "runtime/stages.py",
        "return\n            yield item\n",
        "return\n            with self.stage(name):\n                yield item\n",
        ("tests/test_clocks.py",),
    ),
    Mutant(
        "verify: the text left alone is not judged",
        "export/verify.py",
        "if all_decided and tokens.agreement == 1.0 and tokens.free_running < 1.0:",
        "if False:",
        ("tests/test_verify.py::test_tokens_are_judged",),
    ),
    Mutant(
        "verify: decided tokens are not judged",
        "export/verify.py",
        "if not tokens.decided_agreement >= recipe.token_agreement:",
        "if False:",
        ("tests/test_verify.py::test_tokens_are_judged",),
    ),
    Mutant(
        "verify: errors of graphs are not judged",
        "export/verify.py",
        "if not error.relative_error <= limit:",
        "if False:",
        ("tests/test_verify.py::test_a_damaged_weight_leaves_no_bundle",),
    ),
    Mutant(
        "serve: a cancelled job runs to its end",
        "runtime/serve/engine.py",
        "if event is None or self.cancelled:",
        "if event is None:",
        ("tests/test_serve.py::test_a_client_that_leaves_stops_its_work",),
    ),
    Mutant(
        "serve: a failed job keeps its place",
        "runtime/serve/engine.py",
        "        self._release()\n        if not self.cancelled:",
        "        if not self.cancelled:",
        ("tests/test_serve.py::test_a_failing_model_is_500_and_the_server_goes_on",),
    ),
    Mutant(
        "quantize: no search for scales",
        "quantize/blocks.py",
        "_SHRINK = np.arange(0.65, 1.06, 0.05, dtype=np.float32)",
        "_SHRINK = np.ones(1, dtype=np.float32)",
        ("tests/test_quantize.py::test_searching_scales_pays",),
    ),
    Mutant(
        "quantize: halves of a byte swapped",
        "quantize/blocks.py",
        "unsigned[..., 0::2] | unsigned[..., 1::2] << 4",
        "unsigned[..., 1::2] | unsigned[..., 0::2] << 4",
        ("tests/test_quantize.py::test_blocks_mean_what_the_kernel_computes",),
    ),
    Mutant(
        "sessions: spin is ignored",
        "runtime/ort/sessions.py",
        '"1" if settings.spin else "0"',
        '"1"',
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "sessions: the arena is never emptied",
        "runtime/ort/sessions.py",
        "self._shrink = _shrink_options() if settings.arena and provider == CPU else None",
        "self._shrink = None",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "sessions: the arena is emptied at every step",
        "runtime/ort/sessions.py",
        "if binding.input_bytes >= _LARGE_INPUT_BYTES else None",
        "",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "sessions: threads are ignored",
        "runtime/ort/sessions.py",
        "options.intra_op_num_threads = settings.n_threads",
        "options.intra_op_num_threads = 1",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "pool: release does nothing",
        "runtime/ort/pool.py",
        "            release_free_memory()\n",
        "            pass\n",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "pool: low memory closes no graph",
        "runtime/ort/pool.py",
        "            graph.close()",
        "            pass",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "machine: a container's quota is ignored",
        "runtime/ort/machine.py",
        "min(len(cores), self._cpu_quota() or len(cores))",
        "len(cores)",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "machine: threads of a core count twice",
        "runtime/ort/machine.py",
        "min(len(cores), self._cpu_quota() or len(cores))",
        "min(len(allowed), self._cpu_quota() or len(allowed))",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "config: unknown fields are taken",
        "runtime/config.py",
        "    if unknown or missing:\n",
        "    if missing:\n",
        ("tests/test_contract.py",),
    ),
    Mutant(
        "config: a missing field is an error",
        "runtime/config.py",
        "if f.name not in data and not _has_default(f)]",
        "if f.name not in data]",
        ("tests/test_contract.py",),
    ),
    Mutant(
        "encode: windows without sound repeat the first",
        "runtime/encode.py",
        "        whole[index] = window\n",
        "        whole[index:] = window\n",
        (
            "tests/test_encode.py",
            "tests/test_pipeline.py::test_greedy_tokens_equal_pytorch",
        ),
    ),
    Mutant(
        "encode: rates do not tell clips apart",
        "runtime/encode.py",
        'f"{audio.sampling_rate_hz}:{audio.samples.size}:"',
        'f"{audio.samples.size}:"',
        ("tests/test_encode.py::test_keys_differ_with_samples_and_rate",),
    ),
    Mutant(
        "preprocess: a chunk too many",
        "runtime/preprocess.py",
        "math.ceil(round(duration_s / config.chunk_s, 9))",
        "math.ceil(duration_s / config.chunk_s + 1e-9)",
        ("tests/test_preprocess.py",),
    ),
    Mutant(
        "pipeline: the prefix of another prompt is used",
        "runtime/prefix.py",
        "if self.kept is not None and self.kept[0] == key:",
        "if self.kept is not None:",
        ("tests/test_public_bundle.py::test_another_clip_is_not_taken_for_the_one_before",),
    ),
    Mutant(
        "choices: the likeliest token overall decides",
        "runtime/choices.py",
        "allowed[greedy(logits[list(allowed)])]",
        "allowed[min(int(logits.argmax()), len(allowed) - 1)]",
        ("tests/test_choices.py",),
    ),
    Mutant(
        "tracing: transposes that differ cancel",
        "export/tracing.py",
        "if [first[axis] for axis in second] == list(range(len(first))):",
        "if True:",
        ("tests/test_export.py::test_transposes_cancel_only_where_they_undo_one_another",),
    ),
    Mutant(
        "merging: a name of its own changes how a product is treated",
        "quantize/merging.py",
        "if len(products) == 1 or [*_treatment(name, scheme)] != treatment:",
        "if len(products) == 1:",
        ("tests/test_merging.py::test_what_a_scheme_tells_apart_stays_apart",),
    ),
    Mutant(
        "merging: columns in another order",
        "quantize/merging.py",
        "for weight in weights], axis=1",
        "for weight in weights[::-1]], axis=1",
        ("tests/test_merging.py::test_nothing_changes_but_the_number_of_products",),
    ),
    Mutant(
        "training: a caption that is given is learnt",
        "models/training/reasoning.py",
        "labels[b, response_start + given_start : response_start + given_stop] = _IGNORED",
        "pass",
        (
            "tests/test_training.py::test_the_loss_is_that_of_the_response_alone_but_for_what_is_given",
        ),
    ),
    Mutant(
        "training: a short caption is given as often as a long one",
        "models/training/world_set.py",
        "self._taken = np.cumsum(1 + self._events**2)",
        "self._taken = np.cumsum(1 + 0 * self._events)",
        ("tests/test_nano_training.py::test_a_clip_of_more_events_gives_its_caption_more_often",),
    ),
    Mutant(
        "training: melodies are moved as voices are",
        "models/training/augmentation.py",
        "if rng.random() < 0.5 or b in melodies:",
        "if rng.random() < 0.5:",
        (
            "tests/test_training.py::test_a_moved_voice_has_its_formants_elsewhere_and_a_melody_stays",
        ),
    ),
    Mutant(
        "training: silence falls below its floor",
        "models/training/augmentation.py",
        ".clamp_(min=floor)",
        "",
        ("tests/test_training.py::test_bands_get_louder_or_quieter_smoothly_and_silence_stays",),
    ),
    Mutant(
        "tensors: a head of its own is taken for the embedding table",
        "models/tensors.py",
        "        and part.config.tie_word_embeddings\n",
        "",
        ("tests/test_models.py::test_a_head_of_its_own_is_kept",),
    ),
    Mutant(
        "tensors: unknown tensors are dropped",
        "models/tensors.py",
        "for name in tensors if name not in own and not name.endswith(_DERIVED)",
        "for name in tensors if False",
        (
            "tests/test_models.py::test_every_tensor_that_does_not_fit_is_named_at_once",
            "tests/test_parts.py::test_all_parts_that_do_not_fit_are_named",
        ),
    ),
    Mutant(
        "rotation: an MLP's last product is not rotated back",
        "export/rotation.py",
        "(rotation.values, rotation.gated)",
        "(rotation.values, np.eye(1))",
        ("tests/test_gptq.py::test_a_rotated_decoder_is_the_same_function",),
    ),
    Mutant(
        "gate: first choices are not judged",
        "export/quality.py",
        "            and self.same_choice >= limits.same_choice\n",
        "",
        (
            "tests/test_quality_gate.py::test_limits_refuse_what_is_not_a_number_and_spare_random_weights",
        ),
    ),
    Mutant(
        "public models: features in the file are not compared",
        "models/public.py",
        "if error <= _CONSTANT_TOLERANCE:",
        "if True:",
        ("tests/test_public_models.py::test_a_checkpoint_with_other_features_is_refused",),
    ),
    Mutant(
        "signal: channels in reverse are averaged",
        "runtime/signal.py",
        "return mean_square > SILENT_PEAK**2 and",
        "return False and",
        ("tests/test_signal.py::test_channels_in_reverse_are_not_averaged_to_nothing",),
    ),
    Mutant(
        "signal: dither is heard",
        "runtime/signal.py",
        "SILENT_PEAK = 10 / 32_768",
        "SILENT_PEAK = 0.0",
        ("tests/test_signal.py::test_dither_and_an_offset_are_silent",),
    ),
    Mutant(
        "threads: those of other graphs wait in loops",
        "runtime/ort/pool.py",
        "rest=name != self._bundle.config.decoder.graph,",
        "rest=False,",
        ("tests/test_sessions.py",),
    ),
    Mutant(
        "prompts: the last position has no logits of its own",
        "runtime/decoder.py",
        "embeds.shape[1] - 1 if with_logits else embeds.shape[1]",
        "embeds.shape[1] - 2 if with_logits else embeds.shape[1]",
        ("tests/test_prompt_graph.py",),
    ),
    Mutant(
        "prompts: a block sees one key too many",
        "export/decoder.py",
        'self._node("Sub", "blocks.before", [seqlens, n_rows])',
        'self._node("Sub", "blocks.before", [total, n_rows])',
        ("tests/test_prompt_graph.py",),
    ),
    Mutant(
        "prompts: values are rotated though another graph reads them",
        "export/rotation.py",
        "return cls(random_rotation(hidden_size, seed), gated=gated)",
        "return cls(random_rotation(hidden_size, seed), gated=gated, values=block_rotation(16))",
        ("tests/test_prompt_graph.py",),
    ),
    Mutant(
        "prompts: a slot that moves leaves the second graph behind",
        "runtime/batch.py",
        "self.cache.move(buffers)\n        self._bind()",
        "self.cache.move(buffers)\n        self._prompts = None",
        ("tests/test_prompt_graph.py",),
    ),
    Mutant(
        "batch: what a form knows is read one token a step",
        "runtime/batch.py",
        "len(token_ids) >= _TOGETHER",
        "len(token_ids) >= _TOGETHER + 500",
        ("tests/test_together.py",),
    ),
    Mutant(
        "batch: a step after tokens that were read at once is not read again at a near tie",
        "runtime/batch.py",
        "self._write_down(self.unread)",
        "pass",
        ("tests/test_together.py",),
    ),
    Mutant(
        "benchmarks: a round of processors that lay apart counts",
        "benchmarks/turns.py",
        "enumerate(farthest) if ns <= limit",
        "enumerate(farthest) if ns",
        ("tests/test_peers_benchmark.py",),
    ),
    Mutant(
        "grammar: what may never be written is allowed",
        "runtime/grammar.py",
        "Mask(np.flatnonzero(never), only=False)",
        "Mask(np.flatnonzero(never & False), only=False)",
        ("tests/test_grammar.py",),
    ),
    Mutant(
        "grammar: a loop is not ended",
        "runtime/grammar.py",
        'self._reasons.add("loop")',
        'self._reasons.discard("loop")',
        ("tests/test_grammar.py",),
    ),
)


if __name__ == "__main__":
    sys.exit(main())
