"""The screening of the defaults: what decides whether the method works on a small model, measured part by part.

    python benchmarks/screening.py PART --data=FOLDER --workdir=DIR

    content    one pool of ISARA's, steps matched: as it is, answers shuffled, greedy answers, halves by likelihood, seeds, human pairs;
               weights between the starting model and a tuned one; with --repeats=N again with other seeds
    rate       three learning rates, six epochs, on human pairs and on ISARA's pool; shorter ones, with --repeats=N of other seeds too
    answers    held-out questions answered in context: exemplars x temperature
    sheet      twenty answers of each of four settings, shuffled, to be judged without seeing the setting; `tally` reads the judgements
    questions  new questions: temperature x choice of exemplars x size of the pool
    generation whole iterations of ISARA with another temperature of answers or questions (after content, with its --repeats or fewer)
    damage     the loss on Self-Instruct's seed tasks (after content and rate)

FOLDER holds TruthfulQA and Self-Instruct's seed tasks as `config.data.path` takes them. What is finished lies in DIR and is not made again.
The reading is in docs/screening.md.
"""
from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from isara_jax.common import atomic_write

PARTS = ("content", "rate", "answers", "sheet", "tally", "questions", "generation", "damage")


def main(part: str, data: str, root: Path, repeats: int) -> None:
    """Run one part; its table goes to stdout and to DIR/PART.md."""
    import screening_generate
    import screening_train
    from screening_ground import open_ground

    started = datetime.datetime.now()
    ground = open_ground(data, root)
    made = {
        "content": lambda: screening_train.content(ground, repeats),
        "rate": lambda: screening_train.rate(ground, repeats),
        "damage": lambda: screening_train.damage(ground),
        "answers": lambda: screening_generate.answers(ground),
        "sheet": lambda: screening_generate.sheet(ground),
        "tally": lambda: screening_generate.tally(ground),
        "generation": lambda: screening_train.generation(ground, repeats),
        "questions": lambda: screening_generate.questions(ground),
    }[part]()
    atomic_write(root / f"{part}.md", made + "\n")
    print(f"\n{made}\n\n{part}: {(datetime.datetime.now() - started).total_seconds() / 60:.1f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", required=True, help="folder with the benchmarks' files")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--repeats", type=int, default=0, help="content, rate, generation: further seeds")
    args = parser.parse_args()
    main(args.part, args.data, args.workdir, args.repeats)
