"""Where the tables of each benchmark lie: the hub, the names of its files, and what to download when they are not there."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Sequence

from isara_jax.common import UserError
from isara_jax.data import hub
from isara_jax.data.tables import Table, read_table


@dataclass(frozen=True)
class Source:
    """One table of a benchmark.

    Attributes:
        key: the name by which its reader knows it.
        folders: names of folders that it may lie in, below the folder given.
        files: patterns of its file names, the preferred one first; those with a folder are the hub repository's layout.
        needed: what it holds, where a benchmark cannot do without; one of the sources with the same words is enough.
            Else "": it is then also looked for beside the folder given, and left out where it is in neither.
        repo: hub id, or "" where the hub does not have it; `split`, `config` and `file` as `hub.hub_table` takes them.
        by_hand: what to download where the hub cannot be used.
    """

    key: str
    folders: tuple[str, ...]
    files: tuple[str, ...]
    needed: str = ""
    repo: str = ""
    split: str = "train"
    config: str = ""
    file: str = ""
    by_hand: str = ""

    def fits(self, path: Path) -> bool:
        return any(path.match(pattern) for pattern in self.files)


_TRUTHFULQA = ("truthfulqa", "truthful_qa", "TruthfulQA")
_BEAVERTAILS = ("beavertails", "BeaverTails")
_TEST = (
    Source("alpaca_eval", ("alpaca_eval",), ("alpaca_eval.json",), repo="tatsu-lab/alpaca_eval", file="alpaca_eval.json",
           by_hand="alpaca_eval.json of the hub's tatsu-lab/alpaca_eval"),
    Source("ifeval", ("ifeval", "IFEval"), ("input_data.jsonl", "ifeval_input_data.jsonl"), repo="google/IFEval",
           by_hand="ifeval_input_data.jsonl of the hub's google/IFEval"),
)
SOURCES: dict[str, tuple[Source, ...]] = {
    "truthfulqa": (
        Source("generation", _TRUTHFULQA, ("TruthfulQA*.csv", "generation/validation*.parquet"), "the questions",
               "truthfulqa/truthful_qa", "validation", "generation", by_hand="TruthfulQA.csv of github.com/sylinrl/TruthfulQA"),
        Source("mc", _TRUTHFULQA, ("mc_task*.json", "multiple_choice/validation*.parquet"), "the questions",
               "truthfulqa/truthful_qa", "validation", "multiple_choice", by_hand="data/mc_task.json of github.com/sylinrl/TruthfulQA"),
    ),
    "beavertails": (
        Source("train", _BEAVERTAILS, ("beavertails_30k_train_safe*.jsonl*", "round0/30k/train.jsonl*", "30k_train*", "train*.jsonl*",
                                       "data/30k_train*.parquet", "data/train*.parquet", "train*.parquet"), "the training rows",
               "PKU-Alignment/BeaverTails", "30k_train", by_hand="round0/30k/train.jsonl.gz of the hub's PKU-Alignment/BeaverTails"),
        Source("unsafe", _BEAVERTAILS, ("beavertails_30k_train_unsafe*.jsonl*",)),
        Source("test", _BEAVERTAILS, ("beavertails_30k_test*.jsonl*", "round0/30k/test.jsonl*", "30k_test*", "test*.jsonl*",
                                      "data/30k_test*.parquet", "data/test*.parquet", "test*.parquet"), "the test rows",
               "PKU-Alignment/BeaverTails", "30k_test", by_hand="round0/30k/test.jsonl.gz of the hub's PKU-Alignment/BeaverTails"),
        Source("xstest", ("xstest", "XSTest"), ("xstest_prompts*.csv", "xstest_v2_prompts.csv"), repo="Paul/XSTest",
               by_hand="xstest_prompts.csv of github.com/paul-rottger/xstest"),
    ),
    "self_instruct": (
        Source("train", ("self_instruct", "self-instruct", "self-instruct-seed"),
               ("seed_tasks.jsonl", "data/seed_tasks.jsonl", "tasks.jsonl"), "the seed tasks",
               "HuggingFaceH4/self-instruct-seed", by_hand="data/seed_tasks.jsonl of github.com/yizhongw/self-instruct"),
        *_TEST,
    ),
    "alpaca": (
        Source("train", ("alpaca", "stanford_alpaca"), ("alpaca_data*.json*", "alpaca_sample*.jsonl*", "data/train*.parquet",
                                                        "train*.parquet"), "the instructions",
               "tatsu-lab/alpaca", by_hand="alpaca_data.json of github.com/tatsu-lab/stanford_alpaca"),
        *_TEST,
    ),
}


def open_tables(name: str, path: str) -> dict[str, Table]:
    """The tables of a benchmark by key: from the hub where `path` is "", else from this folder or file.

    Raises `UserError` with what to download where one that is needed is missing, and for files that cannot be read.
    """
    sources = SOURCES[name]
    if not path:
        return {s.key: _from_hub(name, s) for s in sources if s.repo}
    found = _locate(sources, path)
    for words in dict.fromkeys(s.needed for s in sources if s.needed):
        lacking = [s for s in sources if s.needed == words]
        if not any(s.key in found for s in lacking):
            usual = " or ".join(s.files[0].replace("*", "") for s in lacking)
            raise UserError(f"{name}: the file with {words} ({usual}) is not in {path}, nor in a folder {lacking[0].folders[0]} there. "
                            f"{_ways_out(lacking)}")
    return {key: hub.parquet_table(file) if file.suffix == ".parquet" else read_table(file) for key, file in found.items()}


def _from_hub(name: str, source: Source) -> Table:
    try:
        return hub.hub_table(source.repo, source.split, source.config, source.file)
    except UserError as e:
        raise UserError(f"{name}: {e} {_ways_out([s for s in SOURCES[name] if s.by_hand])}") from None


def _ways_out(sources: Sequence[Source]) -> str:
    files = (" or " if len({s.needed for s in sources}) == 1 else ", ").join(s.by_hand for s in sources)
    return f"Download {files} into a folder and start again with --config.data.path=FOLDER."


def _locate(sources: Sequence[Source], path: str) -> dict[str, Path]:
    """The file of each source that has one. A file given by name serves the source it fits, and the others are looked for beside it."""
    base = Path(path).expanduser().absolute()
    found = {}
    if base.is_file():
        like = [s for s in sources if s.fits(base)] or [s for s in sources if any(PurePath(f).suffix == base.suffix for f in s.files)]
        found[(like or sources)[0].key] = base
        base = base.parent
    elif not base.is_dir():
        raise UserError(f"config.data.path={path!r} is neither a folder nor a file here. {_ways_out([s for s in sources if s.needed])}")
    for s in sources:
        places = [base, *(base / f for f in s.folders), *(base.parent / f for f in s.folders if not s.needed)]
        files = [file for place in places for pattern in s.files for file in sorted(place.glob(pattern)) if file.is_file()]
        if files:
            found.setdefault(s.key, files[0])
    return found
